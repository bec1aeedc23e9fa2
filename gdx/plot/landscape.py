"""Pictures of the loss around parameters: along a line, over a plane."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gdx.arguments import number, of_kind
from gdx.plot.arguments import ascending, by_name, numbers
from gdx.plot.style import add_legend, axes_or_new, distinct, line_styles, mark_lone, plain_decades, spans_decades

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def loss_line(
    positions: Any,
    losses: Mapping[str, Any],
    ax: "Axes | None" = None,
    *,
    marks: Mapping[str, float] | None = None,
    name: str = "loss",
) -> "Axes":
    """Draws the loss along a line through the parameters, as `gdx.landscape.line` gives it.

    Values that are not finite leave a gap.

    Args:
      positions: of shape (points,).
      losses: each curve by its name, such as that of the training and that of the test loss: of shape (points,), or
        (lines, points) for several lines, of which the mean is drawn with a band from the least to the largest.
      ax: the axes to draw on; None for new ones.
      marks: positions to mark, such as the two ends, by the names to write above them.
      name: what the curves are.

    Returns:
      The axes.

    Raises:
      TypeError: an argument is of another kind.
      ValueError: losses have not one number for each position.

    >>> import gdx, jax.numpy as jnp, numpy as np
    >>> positions = np.linspace(-0.5, 1.5, 21)
    >>> losses = gdx.landscape.line(lambda x: jnp.sum(x**2), jnp.zeros(2), jnp.ones(2), positions)
    >>> gdx.plot.loss_line(positions, {"training": losses}, marks={"start": 0, "end": 1}).get_xlabel()
    'position on the line'
    """
    label = "plot.loss_line"
    positions = numbers(f"{label}: positions", positions, "(points,)", (None,))
    count, lines = len(positions), by_name(f"{label}: losses", losses, "the losses of a curve")
    expected = f"({count},), one for each position, or (lines, {count})"
    lines = {key: numbers(f"{label}: {key}", x, expected, (count,), (None, count)) for key, x in lines.items()}
    marks = by_name(f"{label}: marks", {} if marks is None else marks, "a position")
    marks = {key: number(f"{label}: marks: {key}", x) for key, x in marks.items()}
    of_kind(f"{label}: name", name, str, "text")
    ax, drawn = axes_or_new(label, ax), []
    for (key, values), style in zip(lines.items(), line_styles()):
        rows = np.atleast_2d(np.where(np.isfinite(values), values, np.nan))
        mean = rows.mean(axis=0)  # NaN where a line is
        drawn.append(mean)
        (curve,) = ax.plot(positions, mean, label=key, **style)
        mark_lone(curve)
        if len(rows) > 1:
            ax.fill_between(positions, *_range(rows), color=curve.get_color(), alpha=0.2, linewidth=0)
    if drawn and spans_decades(np.stack(drawn)):
        ax.set_yscale("log")
        plain_decades(ax.yaxis)
    for key, position in marks.items():
        ax.axvline(position, color="0.5", linewidth=1, linestyle=":")
        ax.annotate(
            key,
            (position, 1),
            xycoords=ax.get_xaxis_transform(),
            textcoords="offset points",
            xytext=(0, 3),
            ha="center",
            fontsize="small",
            color="0.3",
        )
    ax.set_xlabel("position on the line")
    ax.set_ylabel(name)
    ax.grid(alpha=0.3)
    add_legend(ax)
    return ax


def loss_plane(
    x: Any,
    y: Any,
    losses: Any,
    ax: "Axes | None" = None,
    *,
    points: Mapping[str, tuple[float, float]] | None = None,
    levels: Any = None,
    name: str = "loss",
) -> "Axes":
    """Draws the loss over a plane through the parameters, as `gdx.landscape.plane` gives it, as a contour map.

    Values that are not finite stay white.

    Args:
      x, y: the coordinates, of shapes (columns,) and (rows,).
      losses: of shape (rows, columns).
      ax: the axes to draw on; None for new ones.
      points: points to mark, by name.
      levels: the heights of the contours, at least 2, ascending: give the same to pictures that are to be compared.
        None for 10 between the least and the largest loss, at equal ratios where they span a decade, or for 2
        around a constant.
      name: what is drawn.

    Returns:
      The axes.

    Raises:
      TypeError: an argument is of another kind.
      ValueError: there are not 2 coordinates or more of each, or not one loss for each pair; a point is none of the
        plane; levels do not ascend.

    >>> import gdx, jax.numpy as jnp, numpy as np
    >>> x, directions = np.linspace(-1, 1, 9), (jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))
    >>> losses = gdx.landscape.plane(lambda x: jnp.sum(x**2), jnp.zeros(2), directions, x, x)
    >>> gdx.plot.loss_plane(x, x, losses, points={"minimum": (0, 0)}).get_ylabel()
    'second direction'
    """
    label = "plot.loss_plane"
    x, y = (
        numbers(f"{label}: {key}", value, "one coordinate for each", (None,)) for key, value in (("x", x), ("y", y))
    )
    shape = len(y), len(x)
    expected = f"(rows, columns), one for each y and each x, here {shape}, and at least 2 of both"
    expected = f"{expected}; draw one row with plot.loss_line"
    heights = np.ma.masked_invalid(numbers(f"{label}: losses", losses, expected, *[shape] * (min(shape) > 1)))
    if levels is not None:
        levels = ascending(f"{label}: levels", levels, "at least 2 ascending heights", None)
    marked = by_name(f"{label}: points", {} if points is None else points, "a point (x, y)")
    marked = {key: numbers(f"{label}: points: {key}", point, "(x, y)", (2,)) for key, point in marked.items()}
    of_kind(f"{label}: name", name, str, "text")
    ax = axes_or_new(label, ax)
    from matplotlib.colors import BoundaryNorm
    from matplotlib.patheffects import withStroke

    levels = _levels(heights) if levels is None else levels
    if levels is not None:
        norm = BoundaryNorm(levels, 256, extend="both")
        filled = ax.contourf(x, y, heights, levels=levels, cmap="viridis", norm=norm, extend="both")
        ax.contour(x, y, heights, levels=levels, colors="white", linewidths=0.5, alpha=0.7)
        bar = ax.figure.colorbar(filled, ax=ax, label=name, spacing="uniform")
        bar.set_ticks(levels, labels=distinct(levels))
    for key, (a, b) in marked.items():
        ax.plot(a, b, "o", color="white", markeredgecolor="black", markersize=7, zorder=3)
        text = ax.annotate(key, (a, b), textcoords="offset points", xytext=(7, 5), color="white", fontweight="bold")
        text.set_path_effects([withStroke(linewidth=2, foreground="black")])
    ax.set_xlabel("first direction")
    ax.set_ylabel("second direction")
    return ax


def _range(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows.min(axis=0), rows.max(axis=0)


def _levels(heights: np.ma.MaskedArray) -> np.ndarray | None:
    """Heights of ten contours, or of two around what is flat; None where nothing is finite."""
    finite = heights.compressed()
    if not len(finite):
        return None
    low, high = finite.min(), finite.max()
    if high - low <= 1e-9 * abs(low):  # what differs is rounding
        return low + 0.1 * (abs(low) or 1.0) * np.array([-1, 1])
    space = np.geomspace if spans_decades(finite) else np.linspace
    return space(low, high, 10)
