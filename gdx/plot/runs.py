"""Pictures of runs: loss curves, sweeps of hyperparameters, range tests of the learning rate."""

import contextlib
import reprlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gdx.arguments import of_kind
from gdx.fields import is_number, is_real
from gdx.plot.arguments import ascending, curves
from gdx.plot.style import (
    COLOURS,
    add_legend,
    axes_or_new,
    distinct,
    finite_length,
    is_positive,
    line_styles,
    mark_lone,
    plain_decades,
    run_label,
    spans_decades,
    words,
)
from gdx.population import mean_and_error, to_scores
from gdx.range_tests import RangeTest
from gdx.sweeping import Sweep

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Limits = tuple[float, float] | None


def loss_curves(history: Any, ax: "Axes | None" = None, *, steps: Mapping[str, Any] | None = None) -> "Axes":
    """Draws the loss of each run by step, on a logarithmic scale where none is negative.

    There a loss of 0 leaves the picture through its bottom. A curve ends before the first loss that is not finite, and
    its run is marked as diverged.

    Args:
      history: the losses of each run, or what `gdx.train` returned for it, by its name; or of one run without a name.
      ax: the axes to draw on; None for new ones.
      steps: the step of each loss, by the run's name; None where there is one at each step from 0.

    Returns:
      The axes.

    Raises:
      TypeError: an argument is of another kind.
      ValueError: the losses of a run have more or fewer axes than one, or steps lacks a run or has another shape.

    >>> import gdx, jax.numpy as jnp
    >>> trained = gdx.train(lambda theta, batch: theta**2, gdx.sgd(0.1), jnp.ones(()), jnp.zeros(9))
    >>> gdx.plot.loss_curves(trained).get_ylabel()
    'loss'
    >>> ax = gdx.plot.loss_curves({"sgd": [2.0, 1.0, 0.5], "too fast": [2.0, 9.0, float("inf")]})
    >>> ax.get_yscale(), [text.get_text() for text in ax.get_legend().get_texts()]
    ('log', ['sgd', 'too fast (diverged)'])
    """
    label = "plot.loss_curves"
    history = history if isinstance(history, Mapping) else {"training loss": history}
    history = {name: getattr(losses, "losses", losses) for name, losses in history.items()}
    runs = curves(label, "history", history, steps, "loss", (None,))
    ax, drawn = axes_or_new(label, ax), []
    for (name, (at, losses)), style in zip(runs.items(), line_styles()):
        end = finite_length(losses)
        drawn.append(losses[:end])
        (line,) = ax.plot(at[:end], losses[:end], label=run_label(name, end < len(losses)), **style)
        if 0 < end < len(losses):
            ax.plot(at[end - 1], losses[end - 1], marker="x", color=line.get_color())
        else:
            mark_lone(line)
    shown = np.concatenate([[], *drawn])
    if np.any(shown > 0) and not np.any(shown < 0):
        ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("loss")
    ax.grid(alpha=0.3)
    add_legend(ax)
    return ax


def sweep(
    labels: Sequence[Mapping[str, float]] | Sweep,
    score: Any,
    ax: "Axes | None" = None,
    *,
    name: str = "loss",
    limits: Limits = None,
) -> "Axes":
    """Draws the score of each point of a sweep: a curve over one hyperparameter, a heat map over two.

    Of more hyperparameters the first two are shown, with the least score over the others. The least score of all is
    marked, also as one at the edge of what was tried, if none further in is as good and the edge is not 0, and so is
    every point without a finite score ("diverged"). Of a `gdx.Sweep`, the points that halving dropped, or that an
    interruption left behind, are marked as unfinished. A figure without a layout engine gets the constrained one, which
    leaves room for the legend.

    Args:
      labels: the hyperparameters of each point, as `gdx.labels` gives them; or what `gdx.sweep` returned.
      score: of shape (points,): the smaller the better; NaN or infinite for a point that diverged. Of shape
        (points, seeds), as of a sweep with keys, their mean is drawn, along a curve with its standard error.
      ax: the axes to draw on; None for new ones.
      name: what the score is, such as "validation loss".
      limits: (low, high), the ends of its colours or axis, logarithmic where they span more than a decade; colours
        draw scores beyond them like the ends. None for the least and the largest score, without a tenth of them where
        these would take more than half of the colours.

    Returns:
      The axes.

    Raises:
      TypeError: labels is no list of dictionaries with the same hyperparameters, score no real numbers, or ax no axes.
      ValueError: the points differ in no hyperparameter, there is not one score for each, or limits are not two numbers
        of which the first is below the second.

    >>> import gdx
    >>> batch = gdx.grid(gdx.sgd, learning_rate=[0.1, 0.2, 0.4])
    >>> ax = gdx.plot.sweep(gdx.labels(batch), [0.5, 0.3, float("nan")])
    >>> ax.get_xlabel(), [text.get_text() for text in ax.get_legend().get_texts()]
    ('learning rate', ['best: 0.2', 'diverged'])
    """
    of_sweep = labels if isinstance(labels, Sweep) else None
    points: Any = labels if of_sweep is None else of_sweep.labels
    if not isinstance(points, Sequence) or any(
        not isinstance(point, Mapping) or point.keys() != points[0].keys() or not all(map(is_number, point.values()))
        for point in points
    ):
        raise TypeError(
            f"plot.sweep: labels is {reprlib.repr(points)}; expected a list, the same hyperparameters of each point, "
            f"as in plot.sweep(gdx.labels(batch), score, ax)"
        )
    if not points or not points[0]:
        raise ValueError("plot.sweep: the points differ in no hyperparameter; expected labels such as gdx.labels gives")
    seeds = np.shape(score)[1:2] if is_real(score) else ()
    score = to_scores("plot.sweep", score, (len(points), *seeds), "label and seed" if seeds else "label")
    score, errors = mean_and_error(np.where(np.isfinite(score), score, np.nan).reshape(len(points), -1))
    unfinished = np.zeros(len(points), bool)
    if of_sweep is not None:
        diverged = np.asarray(of_sweep.diverged).reshape(len(points), -1).any(axis=1)
        unfinished = (np.asarray(of_sweep.steps) < of_sweep.losses.shape[-1]) & ~diverged
        # fewer steps are no fair comparison
        score = np.where(diverged | unfinished, np.nan, score)
    if limits is not None:
        limits = tuple(ascending("plot.sweep: limits", limits, "(low, high) with low < high", 2).tolist())
    of_kind("plot.sweep: name", name, str, "text")
    ax = axes_or_new("plot.sweep", ax)
    figure = ax.get_figure(root=True)
    if figure is not None and figure.get_layout_engine() is None:
        with contextlib.suppress(RuntimeError):  # a colour bar that was made without one
            figure.set_layout_engine("constrained")
    names = list(points[0])[:2]
    values = [sorted({point[key] for point in points}) for key in names]
    best = np.full([len(v) for v in values], np.nan)
    tried, left = np.zeros(best.shape, bool), np.zeros(best.shape, bool)
    for point, value, is_left in zip(points, score, unfinished):
        cell = tuple(v.index(point[key]) for key, v in zip(names, values))
        best[cell] = np.fmin(best[cell], value if np.isfinite(value) else np.nan)
        tried[cell] = True
        left[cell] |= is_left
    if len(names) == 1:
        error = np.array([errors[[point[names[0]] for point in points].index(x)] for x in values[0]])
        _curve(ax, names, values, best, error, left, name, limits)
    elif tried.all():
        _heat_map(ax, names, values, best, left, name, limits)
    else:
        _scatter(ax, names, [[point[key] for point in points] for key in names], score, unfinished, name, limits)
    return ax


def range_test(result: Any, ax: "Axes | None" = None) -> "Axes":
    """Draws loss against learning rate, with the suggested rate and the edge beyond which training fails.

    Args:
      result: what `gdx.range_test` returned.
      ax: the axes to draw on; None for new ones.

    Returns:
      The axes.

    Raises:
      TypeError: an argument is of another kind.

    >>> import gdx, jax.numpy as jnp
    >>> bowl = lambda theta, batch: jnp.sum(theta**2)
    >>> found = gdx.range_test(bowl, gdx.sgd(0.1), jnp.ones(2), jnp.zeros((20, 1)), points=9)
    >>> gdx.plot.range_test(found).get_xlabel()
    'learning rate'
    """
    of_kind("plot.range_test: result", result, RangeTest, "what gdx.range_test returned")
    ax = axes_or_new("plot.range_test", ax)
    rates, losses = np.asarray(result.learning_rates), np.asarray(result.losses)
    # what failed would hide all else
    shown = np.where(losses - losses.min() <= 10 * abs(result.start - losses.min()), losses, np.nan)
    ax.plot(rates, shown, marker="o", markersize=3, color=COLOURS[0], label="loss at the end")
    ax.axhline(result.start, color="0.5", linewidth=1, linestyle=":", label="loss at the start")
    ax.axvline(result.suggested, color=COLOURS[2], linestyle="-", label=f"suggested: {result.suggested:.2g}")
    if np.isfinite(result.edge):
        ax.axvline(result.edge, color=COLOURS[1], linestyle="--", label=f"edge: {result.edge:.2g}")
        ax.axvspan(result.edge, max(rates[-1], result.edge), color=COLOURS[1], alpha=0.1, linewidth=0)
    ax.set_xscale("log")
    if is_positive(shown):
        ax.set_yscale("log")
    ax.set_xlim(rates[0], rates[-1])
    ax.set_xlabel("learning rate")
    ax.set_ylabel("training loss")
    ax.grid(alpha=0.3)
    add_legend(ax)
    return ax


def _curve(
    ax: "Axes",
    names: list[str],
    values: list[list[float]],
    best: np.ndarray,
    error: np.ndarray,
    left: np.ndarray,
    name: str,
    limits: Limits,
) -> None:
    x = np.asarray(values[0])
    ax.plot(x, best, marker="o", markersize=4, color=COLOURS[0])
    if np.any(error > 0):
        ax.fill_between(x, best - error, best + error, color=COLOURS[0], alpha=0.2, label="standard error of the mean")
    if np.isfinite(best).any():
        at = int(np.nanargmin(best))
        ax.plot(
            x[at],
            best[at],
            marker="*",
            markersize=15,
            color=COLOURS[1],
            linestyle="none",
            label=f"best: {distinct(values[0])[at]}{_at_edge(best, x)}",
        )
    # along the upper edge: there is no loss to draw them at
    _mark_missing(ax, best, left, x, np.full(len(x), 0.97), transform=ax.get_xaxis_transform())
    if _is_logarithmic(x):
        ax.set_xscale("log")
    if spans_decades(best if limits is None else np.asarray(limits)):
        ax.set_yscale("log")
    if limits is not None:
        ax.set_ylim(*limits)
    ax.set_xlabel(words(names[0]))
    ax.set_ylabel(name)
    ax.grid(alpha=0.3)
    add_legend(ax)


def _mark_missing(ax: "Axes", score: np.ndarray, left: np.ndarray, x: Any, y: Any, **place: Any) -> None:
    """Marks the points without a score, by why."""
    missing = ~np.isfinite(score)
    for marker, label, these in (("x", "diverged", missing & ~left), (".", "unfinished", missing & left)):
        if these.any():
            ax.plot(x[these], y[these], marker, color="0.4", label=label, **place)


def _scatter(
    ax: "Axes",
    names: list[str],
    values: list[list[float]],
    score: np.ndarray,
    left: np.ndarray,
    name: str,
    limits: Limits,
) -> None:
    y, x = map(np.asarray, values)
    finite = np.isfinite(score)
    if finite.any():
        drawn = ax.scatter(x[finite], y[finite], c=score[finite], s=40, cmap="viridis_r")
        _add_bar(ax, drawn, score[finite], name, limits)
        best = int(np.nanargmin(np.where(finite, score, np.nan)))
        _mark_best(ax, x[best], y[best], _at_edge(score, x, y))
    _mark_missing(ax, score, left, x, y)
    for set_scale, points in ((ax.set_xscale, x), (ax.set_yscale, y)):
        if _is_logarithmic(points):
            set_scale("log")
    ax.set_ylabel(words(names[0]))
    ax.set_xlabel(words(names[1]))
    _add_legend_below(ax)


def _is_logarithmic(points: np.ndarray) -> bool:
    return bool(np.all(points > 0) and points.max() >= 10 * points.min())


def _at_edge(score: np.ndarray, *along: np.ndarray) -> str:
    """What to say where the best point is the first or last along an axis, and better than all further in."""
    score = np.where(np.isfinite(score), score, np.inf)
    best = np.unravel_index(np.argmin(score), score.shape)
    for points in along:
        value, least, most = points[best], points.min(), points.max()
        # few hyperparameters have a sense below 0
        is_end = value == most or value == least != 0
        if is_end and np.any((least < points) & (points < most)) and np.all(score[points != value] > score[best]):
            return ", at the edge: try wider"
    return ""


def _add_bar(ax: "Axes", drawn: Any, score: np.ndarray, name: str, limits: Limits) -> None:
    """The colour bar of what was drawn, and its scale, logarithmic where scores or limits span decades."""
    finite = score[np.isfinite(score)]
    logarithmic = spans_decades(finite if limits is None else np.asarray(limits))
    if logarithmic:
        drawn.set_norm("log")
    if limits is None and len(finite):
        scaled = np.log(finite) if logarithmic else finite
        # a few bad points would leave all others one colour
        least, most, largest = np.quantile(scaled, [0, 0.9, 1])
        if least < most and largest - least > 2 * (most - least):
            limits = tuple(np.exp([least, most]) if logarithmic else (least, most))
    extend = "neither"
    if limits is not None:
        drawn.set_clim(*limits)
        below, above = np.any(score < limits[0]), np.any(score > limits[1])
        extend = ("neither", "min", "max", "both")[below + 2 * above]
    bar = ax.figure.colorbar(drawn, ax=ax, label=name, extend=extend)
    if logarithmic:
        plain_decades(bar.ax.yaxis)


def _add_legend_below(ax: "Axes") -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(loc="upper left", bbox_to_anchor=(0, -0.1), ncols=2, frameon=False)


def _mark_best(ax: "Axes", x: Any, y: Any, at_edge: str) -> None:
    label = f"best{at_edge}"
    ax.plot(x, y, marker="*", markersize=15, color="white", markeredgecolor="black", linestyle="none", label=label)


def _heat_map(
    ax: "Axes",
    names: list[str],
    values: list[list[float]],
    best: np.ndarray,
    left: np.ndarray,
    name: str,
    limits: Limits,
) -> None:
    image = ax.imshow(np.ma.masked_invalid(best), origin="lower", aspect="auto", cmap="viridis_r")
    _add_bar(ax, image, best, name, limits)
    rows, columns = np.indices(best.shape)
    _mark_missing(ax, best, left, columns, rows)
    if np.isfinite(best).any():
        row, column = np.unravel_index(np.nanargmin(best), best.shape)
        _mark_best(ax, column, row, _at_edge(best, *np.meshgrid(*values, indexing="ij")))
    for axis, key, points, most in ((ax.yaxis, names[0], values[0], 9), (ax.xaxis, names[1], values[1], 6)):
        # with room for the numbers, and at both ends
        shown = np.unique(np.round(np.linspace(0, len(points) - 1, min(len(points), most))).astype(int))
        axis.set_ticks(shown, distinct([points[i] for i in shown]))
        axis.set_label_text(words(key))
    _add_legend_below(ax)
