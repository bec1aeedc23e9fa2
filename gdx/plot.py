"""Pictures of optimization: loss curves, and paths down a function of the plane.

Each function draws on the axes it is given, or on new ones, and returns them; nothing is shown or
saved. matplotlib comes with `gdx-jax[demo]`.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gdx.extra import needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito's palette without its yellow and black, legible also to the colour-blind; the lengths
# of the two cycles share no factor, so that 42 lines differ
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", (0, (1, 1.2)), (0, (5, 1, 1, 1, 1, 1)), (0, (9, 2)), (0, (4, 1, 4, 1, 1, 1)))


def loss_curves(
    history: Mapping[str, Any], ax: "Axes | None" = None, *, steps: Mapping[str, Any] | None = None
) -> "Axes":
    """Draws the loss of each run by step, on a logarithmic scale.

    A curve ends before the first loss that is not finite, and its run is marked as diverged.

    Args:
      history: the losses of each run, by its name.
      ax: the axes to draw on; None for new ones.
      steps: the step of each loss, by the run's name; None where there is one at each step from 0.

    Returns:
      The axes.
    """
    ax = _axes(ax)
    some_positive = False
    for (name, losses), style in zip(history.items(), _line_styles()):
        losses = np.asarray(losses, float)
        at = np.arange(len(losses)) if steps is None else np.asarray(steps[name])
        end = _finite_length(losses)
        some_positive |= bool(np.any(losses[:end] > 0))
        (line,) = ax.plot(at[:end], losses[:end], label=_label(name, end < len(losses)), **style)
        if 0 < end < len(losses):
            ax.plot(at[end - 1], losses[end - 1], marker="x", color=line.get_color())
    if some_positive:
        ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("loss")
    ax.grid(alpha=0.3)
    _legend(ax)
    return ax


def paths(
    function: Callable[[jax.Array], jax.Array],
    paths: Mapping[str, Any],
    ax: "Axes | None" = None,
    *,
    limits: tuple[tuple[float, float], tuple[float, float]] | None = None,
    minimum: tuple[float, float] | None = None,
    legend: bool = True,
) -> "Axes":
    """Draws the paths of runs over the contours of the function that they minimise.

    A run with a point that is not finite is marked as diverged; its path ends where it leaves the picture.

    Args:
      function: a JAX function from an array of shape (2,) to a scalar.
      paths: the points of each run, of shape (steps, 2), by its name.
      ax: the axes to draw on; None for new ones.
      limits: ((left, right), (bottom, top)) of the picture; None for what holds every path that has not diverged.
      minimum: the point to mark as the minimum; None for no mark.
      legend: whether to add the legend.

    Returns:
      The axes.
    """
    ax = _axes(ax)
    walks = {name: np.asarray(points, float).reshape(-1, 2) for name, points in paths.items()}
    finite = {name: _finite_length(points.sum(axis=1)) for name, points in walks.items()}
    diverged = {name for name, points in walks.items() if finite[name] < len(points)}
    if limits is None:
        limits = _limits([points[: 1 if name in diverged else None] for name, points in walks.items()])
    (left, right), (bottom, top) = limits
    _contours(ax, function, np.linspace(left, right, 200), np.linspace(bottom, top, 200))
    for index, ((name, points), style) in enumerate(zip(walks.items(), _line_styles())):
        points = points[: finite[name]]
        if name in diverged:  # it would cross the picture to and fro on its way to infinity
            inside = (left <= points[:, 0]) & (points[:, 0] <= right) & (bottom <= points[:, 1]) & (points[:, 1] <= top)
            points = points[: int(np.argmin(np.append(inside, False))) + 1]
        # narrower one after another, so that none hides where they share a valley
        style["linewidth"] = 2.8 - 1.3 * index / max(len(walks) - 1, 1)
        (line,) = ax.plot(*points.T, label=_label(name, name in diverged), **style)
        ax.plot(*points[-1:].T, marker="o", markersize=5, color=line.get_color())
        ax.plot(*points[:1].T, marker="s", markersize=5, color="black", zorder=3)
    if minimum is not None:
        ax.plot(*minimum, marker="*", markersize=13, color="black", linestyle="none", label="minimum", zorder=3)
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    ax.set_xlabel("x")
    ax.set_ylabel("y")
    if legend:
        _legend(ax)
    return ax


def _axes(ax: "Axes | None") -> "Axes":
    if ax is not None:
        return ax
    with needs("demo"):
        from matplotlib import pyplot
    return pyplot.subplots(layout="constrained")[1]


def _label(name: str, diverged: bool) -> str:
    return f"{name} (diverged)" if diverged else name


def _legend(ax: "Axes") -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(handlelength=3.5)


def _line_styles() -> Iterator[dict[str, Any]]:
    for colour, style in zip(itertools.cycle(COLOURS), itertools.cycle(STYLES)):
        yield {"color": colour, "linestyle": style, "linewidth": 1.8}


def _finite_length(values: np.ndarray) -> int:
    """How many values there are before the first that is not finite."""
    return int(np.argmin(np.append(np.isfinite(values), False)))


def _limits(walks: list[np.ndarray]) -> tuple[tuple[float, float], tuple[float, float]]:
    """The rectangle around all points, with a margin."""
    points = np.concatenate([*walks, np.zeros((0, 2))])
    points = points[np.isfinite(points).all(axis=1)]
    if not len(points):
        return (-1.0, 1.0), (-1.0, 1.0)
    low, high = points.min(axis=0), points.max(axis=0)
    margin = np.where(high > low, 0.1 * (high - low), 1.0)
    (left, bottom), (right, top) = (low - margin).tolist(), (high + margin).tolist()
    return (left, right), (bottom, top)


def _contours(ax: "Axes", function: Callable[[jax.Array], jax.Array], x: np.ndarray, y: np.ndarray) -> None:
    """Contours of the function, equally far apart in the logarithm of its height above the lowest point."""
    grid = np.stack(np.meshgrid(x, y), axis=-1)
    heights = np.asarray(jax.jit(jax.vmap(function))(jnp.asarray(grid.reshape(-1, 2), float)), float)
    heights = heights.reshape(grid.shape[:2])
    finite = heights[np.isfinite(heights)]
    if not len(finite) or finite.max() == finite.min():
        return
    heights = np.ma.masked_invalid(heights - finite.min())
    highest = float(heights.max())
    levels = np.geomspace(highest * 1e-4, highest, 13)
    shades = [str(shade) for shade in np.linspace(1.0, 0.82, len(levels))]
    ax.contourf(x, y, heights, levels=[0.0, *levels], colors=shades)
    ax.contour(x, y, heights, levels=levels, colors="0.6", linewidths=0.6)
