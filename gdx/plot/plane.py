"""Pictures of the plane: paths of runs down a function of two numbers."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from gdx.plot.style import add_legend, axes_or_new, finite_length, line_styles, run_label

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
      legend: whether to add the legend.

    Returns:
      The axes.

    >>> import gdx, jax.numpy as jnp
    >>> bowl = lambda x: x[0] ** 2 + 10 * x[1] ** 2
    >>> ax = gdx.plot.paths(bowl, {"sgd": [[4.0, 2.0], [3.0, -1.0], [2.0, 0.5]]}, minimum=(0.0, 0.0))
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['sgd', 'minimum']
    """
    ax = axes_or_new(ax)
    walks = {name: np.asarray(points, float).reshape(-1, 2) for name, points in paths.items()}
    finite = {name: finite_length(points.sum(axis=1)) for name, points in walks.items()}
    diverged = {name for name, points in walks.items() if finite[name] < len(points)}
    if limits is None:
        limits = _limits([points[: 1 if name in diverged else None] for name, points in walks.items()])
    (left, right), (bottom, top) = limits
    _contours(ax, function, np.linspace(left, right, 200), np.linspace(bottom, top, 200))
    for index, ((name, points), style) in enumerate(zip(walks.items(), line_styles())):
        points = points[: finite[name]]
        if name in diverged:  # it would cross the picture to and fro on its way to infinity
            inside = (left <= points[:, 0]) & (points[:, 0] <= right) & (bottom <= points[:, 1]) & (points[:, 1] <= top)
            points = points[: int(np.argmin(np.append(inside, False))) + 1]
        # narrower one after another, so that none hides where they share a valley
        style["linewidth"] = 2.8 - 1.3 * index / max(len(walks) - 1, 1)
        (line,) = ax.plot(*points.T, label=run_label(name, name in diverged), **style)
        ax.plot(*points[-1:].T, marker="o", markersize=5, color=line.get_color())
        ax.plot(*points[:1].T, marker="s", markersize=5, color="black", zorder=3)
    if minimum is not None:
        ax.plot(*minimum, marker="*", markersize=13, color="black", linestyle="none", label="minimum", zorder=3)
    ax.set_xlim(left, right)
    ax.set_ylim(bottom, top)
    ax.set_xlabel("x")
    ax.set_ylabel("y")
    if legend:
        add_legend(ax)
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
