"""Pictures of curvature: the density of a spectrum, and sharpness against the edge of stability while training."""

from collections.abc import Mapping
from types import NoneType
from typing import TYPE_CHECKING, Any

import numpy as np

from gdx.arguments import number, of_kind
from gdx.curvature import Density, Edges
from gdx.plot.arguments import curves
from gdx.plot.style import COLOURS, add_legend, axes_or_new, finite_length, line_styles, mark_lone, run_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNIT = "loss per parameter squared"


def spectral_density(
    density: Any, ax: "Axes | None" = None, *, edges: Any = None, width: float | None = None
) -> "Axes":
    """Draws the density of eigenvalues, on a logarithmic scale, with its standard error and the edges.

    Args:
      density: what `gdx.curvature.spectral_density` returned.
      ax: the axes to draw on; None for new ones.
      edges: what `gdx.curvature.spectrum_edges` returned; None for no marks.
      width: the standard deviation of the Gaussian that smooths it; None for 1 % of the spectrum's width.

    Returns:
      The axes.

    Raises:
      TypeError: an argument is of another kind.
      ValueError: an eigenvalue is infinite or NaN, or width not positive.

    >>> import gdx, jax, jax.numpy as jnp
    >>> bowl = lambda theta, batch: 0.5 * jnp.sum(jnp.arange(1.0, 11.0) * theta**2)
    >>> hessian = gdx.curvature.Hessian(bowl, jnp.ones(10), batches=jnp.zeros(1))
    >>> density = gdx.curvature.spectral_density(hessian, jax.random.key(0))
    >>> gdx.plot.spectral_density(density).get_xlabel()
    'eigenvalue (loss per parameter squared)'
    """
    label = "plot.spectral_density"
    of_kind(f"{label}: density", density, Density, "what gdx.curvature.spectral_density returned")
    of_kind(f"{label}: edges", edges, (Edges, NoneType), "what gdx.curvature.spectrum_edges returned, or None")
    values = np.ravel(density.nodes)
    if edges is not None:
        values = np.append(values, [edges.smallest.value, edges.largest.value])
    low, high = float(np.min(values)), float(np.max(values))
    if not np.isfinite([low, high]).all():
        raise ValueError(f"{label}: the eigenvalues go from {low:g} to {high:g}; expected finite ones")
    span = high - low if high > low else max(abs(high), 1.0)
    width = number(f"{label}: width", width, "a number > 0", above=0, optional=True) or 0.01 * span
    points = np.linspace(low - 0.05 * span - 2 * width, high + 0.05 * span + 2 * width, 600)
    heights, errors = (np.asarray(x, float) for x in density.at(points, width))
    highest = heights.max()
    ax = axes_or_new(label, ax)
    # below one in a million of the peak a Gaussian only falls on, and says nothing of the spectrum
    floor = max(1e-6 * highest, np.finfo(float).tiny)
    ax.plot(points, np.maximum(heights, 0.1 * floor), color=COLOURS[0], linewidth=1.8, label="density")
    if np.isfinite(errors).all():
        bounds = (np.maximum(heights + sign * errors, 0.1 * floor) for sign in (-1, 1))
        ax.fill_between(points, *bounds, color=COLOURS[0], alpha=0.25, linewidth=0, label="± standard error")
    if edges is not None:
        for edge, colour, style in ((edges.smallest, COLOURS[2], "-."), (edges.largest, COLOURS[1], "--")):
            name = "smallest" if edge is edges.smallest else "largest"
            ax.axvline(float(edge.value), color=colour, linestyle=style, label=f"{name}: {float(edge.value):.4g}")
    ax.set_yscale("log")
    ax.set_xlim(points[0], points[-1])
    ax.set_ylim(floor, 3 * highest)
    ax.set_xlabel(f"eigenvalue ({UNIT})")
    ax.set_ylabel("density (1 / eigenvalue)")
    ax.grid(alpha=0.3)
    add_legend(ax)
    return ax


def sharpness(
    history: Mapping[str, Any], edge: Any, ax: "Axes | None" = None, *, steps: Mapping[str, Any] | None = None
) -> "Axes":
    r"""Draws the sharpness of each run by step, against the edge of stability that its optimizer has.

    A curve ends before the first value that is not finite, and its run is marked as diverged.

    Args:
      history: the largest eigenvalues of each run, by its name.
      edge: from which curvature on training is unstable, as `gdx.curvature.stability_edge` says, $2 / \eta$ for
        gradient descent: one number for all runs, or by the run's name.
      ax: the axes to draw on; None for new ones.
      steps: the step of each value, by the run's name; None where there is one at each step from 0.

    Returns:
      The axes.

    Raises:
      TypeError: an argument is of another kind.
      ValueError: edge or steps lacks a run, or has another shape.

    >>> import gdx
    >>> ax = gdx.plot.sharpness({"gradient descent": [5.0, 15.0, 21.0, 19.0]}, edge=2 / 0.1)
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['gradient descent', 'edge of stability: 20']
    """
    label = "plot.sharpness"
    runs = curves(label, "history", history, steps, "largest eigenvalue", (None,))
    edges = edge if isinstance(edge, Mapping) else dict.fromkeys(runs, edge)
    missing = [name for name in runs if name not in edges]
    if missing:
        raise ValueError(f"{label}: edge has no {missing[0]!r}; expected a number, or one for each run")
    edges = {name: number(f"{label}: edge", x) for name, x in edges.items()}
    ax = axes_or_new(label, ax)
    values, lowest = list(edges.values()), 0.0
    for (name, (at, curve)), style in zip(runs.items(), line_styles()):
        end = finite_length(curve)
        (line,) = ax.plot(at[:end], curve[:end], label=run_label(name, end < len(curve)), **style)
        mark_lone(line)
        lowest = min([lowest, *curve[:end]])
        if len(set(values)) > 1:  # each run has its own
            limit = edges[name]
            ax.axhline(limit, color=style["color"], linestyle=":", linewidth=1.4, label=f"edge of {name}: {limit:.3g}")
    if len(set(values)) == 1:
        ax.axhline(values[0], color="black", linestyle=":", linewidth=1.4, label=f"edge of stability: {values[0]:.3g}")
    if lowest == 0:  # the largest eigenvalue is negative where the loss curves down on all sides
        ax.set_ylim(bottom=0)
    ax.set_xlabel("step")
    ax.set_ylabel(f"sharpness ({UNIT})")
    ax.grid(alpha=0.3)
    add_legend(ax)
    return ax
