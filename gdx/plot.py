"""Pictures of optimization: loss curves, paths down a function of the plane, sweeps of hyperparameters.

Each function draws on the axes it is given, or on new ones, and returns them; nothing is shown or
saved. matplotlib comes with `gdx-jax[demo]`.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
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


def sweep(labels: Sequence[Mapping[str, float]], score: Any, ax: "Axes | None" = None, *, name: str = "loss") -> "Axes":
    """Draws the score of each point of a sweep: a curve over one hyperparameter, a heat map over two.

    Of more hyperparameters the first two are shown, with the least score over the others. The
    least score of all is marked, and so is every point without a finite one ("diverged").

    Args:
      labels: the hyperparameters of each point, as `gdx.labels` gives them.
      score: of shape (points,): the smaller the better; NaN or infinite for a point that diverged.
      ax: the axes to draw on; None for new ones.
      name: what the score is.

    Returns:
      The axes.

    Raises:
      ValueError: the points differ in no hyperparameter.
    """
    if not labels or not labels[0]:
        raise ValueError("plot.sweep: the points differ in no hyperparameter; expected labels such as gdx.labels gives")
    ax = _axes(ax)
    names = list(labels[0])[:2]
    values = [sorted({point[key] for point in labels}) for key in names]
    best = np.full([len(v) for v in values], np.nan)
    for point, value in zip(labels, np.asarray(score, float)):
        cell = tuple(v.index(point[key]) for key, v in zip(names, values))
        best[cell] = np.fmin(best[cell], value if np.isfinite(value) else np.nan)
    (_curve if len(names) == 1 else _heat_map)(ax, names, values, best, name)
    return ax


def range_test(result: Any, ax: "Axes | None" = None) -> "Axes":
    """Draws loss against learning rate, with the suggested rate and the edge beyond which training fails.

    Args:
      result: what `gdx.range_test` returned.
      ax: the axes to draw on; None for new ones.

    Returns:
      The axes.
    """
    ax = _axes(ax)
    rates, losses = np.asarray(result.learning_rates), np.asarray(result.losses)
    shown = np.where(losses <= 10 * result.start, losses, np.nan)  # what failed would hide all else
    ax.plot(rates, shown, marker="o", markersize=3, color=COLOURS[0], label="loss at the end")
    ax.axhline(result.start, color="0.5", linewidth=1, linestyle=":", label="loss at the start")
    ax.axvline(result.suggested, color=COLOURS[2], linestyle="-", label=f"suggested: {result.suggested:.2g}")
    if np.isfinite(result.edge):
        ax.axvline(result.edge, color=COLOURS[1], linestyle="--", label=f"edge: {result.edge:.2g}")
        ax.axvspan(result.edge, max(rates[-1], result.edge), color=COLOURS[1], alpha=0.1, linewidth=0)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlim(rates[0], rates[-1])
    ax.set_xlabel("learning rate")
    ax.set_ylabel("loss")
    ax.grid(alpha=0.3)
    _legend(ax)
    return ax


def _curve(ax: "Axes", names: list[str], values: list[list[float]], best: np.ndarray, name: str) -> None:
    x = np.asarray(values[0])
    ax.plot(x, best, marker="o", markersize=4, color=COLOURS[0])
    diverged = ~np.isfinite(best)
    if not diverged.all():
        at = int(np.nanargmin(best))
        ax.plot(
            x[at], best[at], marker="*", markersize=15, color=COLOURS[1], linestyle="none", label=f"best: {x[at]:.3g}"
        )
    if diverged.any():
        # along the upper edge: there is no loss to draw them at
        top = ax.get_xaxis_transform()
        ax.plot(x[diverged], np.full(diverged.sum(), 0.97), "x", color="0.4", transform=top, label="diverged")
    if np.all(x > 0) and x[-1] >= 10 * x[0]:
        ax.set_xscale("log")
    if _spans_decades(best):
        ax.set_yscale("log")
    ax.set_xlabel(_words(names[0]))
    ax.set_ylabel(name)
    ax.grid(alpha=0.3)
    _legend(ax)


def _heat_map(ax: "Axes", names: list[str], values: list[list[float]], best: np.ndarray, name: str) -> None:
    from matplotlib.colors import LogNorm

    norm = LogNorm() if _spans_decades(best) else None
    image = ax.imshow(np.ma.masked_invalid(best), origin="lower", aspect="auto", cmap="viridis_r", norm=norm)
    ax.figure.colorbar(image, ax=ax, label=name)
    diverged = np.argwhere(~np.isfinite(best))
    if len(diverged):
        ax.plot(diverged[:, 1], diverged[:, 0], "x", color="0.4", linestyle="none", label="diverged")
    if len(diverged) < best.size:
        row, column = np.unravel_index(np.nanargmin(best), best.shape)
        ax.plot(
            column,
            row,
            marker="*",
            markersize=15,
            color="white",
            markeredgecolor="black",
            linestyle="none",
            label="best",
        )
    for axis, key, points in ((ax.yaxis, names[0], values[0]), (ax.xaxis, names[1], values[1])):
        shown = np.unique(np.linspace(0, len(points) - 1, min(len(points), 9)).round().astype(int))
        axis.set_ticks(shown, [f"{points[i]:.2g}" for i in shown])
        axis.set_label_text(_words(key))
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.1), ncols=2, frameon=False)


def _spans_decades(values: np.ndarray) -> bool:
    finite = values[np.isfinite(values)]
    return bool(len(finite) and finite.min() > 0 and finite.max() > 10 * finite.min())


def _words(name: str) -> str:
    return name.replace("_", " ")


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
