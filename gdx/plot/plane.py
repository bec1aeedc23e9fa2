"""Pictures of the plane: paths of runs down a function of two numbers."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gdx.fields import refuse, to_bool
from gdx.plot.arguments import ascending, by_name, numbers
from gdx.plot.style import axes_or_new, finite_length, line_styles, run_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
      legend: whether to name the runs; start and minimum are named anyway.

    Returns:
      The axes.

    Raises:
      TypeError: an argument is of another kind.
      ValueError: a path has another shape, limits do not ascend, or function returns no scalar.

    >>> import gdx, jax.numpy as jnp
    >>> bowl = lambda x: x[0] ** 2 + 10 * x[1] ** 2
    >>> ax = gdx.plot.paths(bowl, {"sgd": [[4.0, 2.0], [3.0, -1.0], [2.0, 0.5]]}, minimum=(0.0, 0.0))
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['sgd', 'start', 'minimum']
    """
    label = "plot.paths"
    if not callable(function):
        refuse(f"{label}: function", function, "a function of a point, an array of shape (2,)")
    walks = {
        name: numbers(f"{label}: {name}", points, "(steps, 2), one point for each step", (None, 2), (0,)).reshape(-1, 2)
        for name, points in by_name(f"{label}: paths", paths, "the points of a run").items()
    }
    finite = {name: finite_length(points.sum(axis=1)) for name, points in walks.items()}
    diverged = {name for name, points in walks.items() if finite[name] < len(points)}
    if limits is None:
        limits = _limits([points[: 1 if name in diverged else None] for name, points in walks.items()])
    (left, right), (bottom, top) = ascending(
        f"{label}: limits", limits, "((left, right), (bottom, top))", 2, 2
    ).tolist()
    if minimum is not None:
        minimum = numbers(f"{label}: minimum", minimum, "a point (x, y)", (2,)).tolist()
    legend = to_bool(f"{label}: legend", legend)
    x, y = np.linspace(left, right, 200), np.linspace(bottom, top, 200)
    points = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)
    heights = jax.jit(jax.vmap(function))(jnp.asarray(points, float))
    heights = numbers(f"{label}: function of {len(points)} points", heights, "a scalar of each", (len(points),))
    ax = axes_or_new(label, ax)
    _contours(ax, x, y, heights.reshape(len(y), len(x)))
    for index, ((name, points), style) in enumerate(zip(walks.items(), line_styles())):
        points = points[: finite[name]]
        if name in diverged:  # it would cross the picture to and fro on its way to infinity
            inside = (left <= points[:, 0]) & (points[:, 0] <= right) & (bottom <= points[:, 1]) & (points[:, 1] <= top)
            points = points[: int(np.argmin(np.append(inside, False))) + 1]
        # narrower one after another, so that none hides where they share a valley
        style["linewidth"] = 2.8 - 1.3 * index / max(len(walks) - 1, 1)
        (line,) = ax.plot(*points.T, label=run_label(name, name in diverged), **style)
        ax.plot(*points[-1:].T, marker="o", markersize=5, color=line.get_color())
        (start,) = ax.plot(*points[:1].T, marker="s", markersize=5, color="black", linestyle="none", zorder=3)
    if walks:
        start.set_label("start")
    if minimum is not None:
        ax.plot(*minimum, marker="*", markersize=13, color="black", linestyle="none", label="minimum", zorder=3)
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    ax.set_xlabel("x")
    ax.set_ylabel("y")
    handles, names = ax.get_legend_handles_labels()
    shown = [(h, name) for h, name in zip(handles, names) if legend or name in ("start", "minimum")]
    if shown:
        ax.legend(*zip(*shown), handlelength=3.5)
    return ax


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


def _contours(ax: "Axes", x: np.ndarray, y: np.ndarray, heights: np.ndarray) -> None:
    """Contours of a function, equally far apart in the logarithm of its height above the lowest point."""
    finite = heights[np.isfinite(heights)]
    if not len(finite) or finite.max() == finite.min():
        return
    heights = np.ma.masked_invalid(heights - finite.min())
    highest = float(heights.max())
    levels = np.geomspace(highest * 1e-4, highest, 13)
    shades = [str(shade) for shade in np.linspace(1.0, 0.82, len(levels))]
    ax.contourf(x, y, heights, levels=[0.0, *levels], colors=shades)
    ax.contour(x, y, heights, levels=levels, colors="0.6", linewidths=0.6)
