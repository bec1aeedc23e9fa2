"""What all pictures share: colours, lines, new axes, legends."""

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from gdx.arguments import of_kind
from gdx.extra import needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

# Okabe & Ito's palette without its yellow and black, legible also to the colour-blind; the lengths
# of the two cycles share no factor, so that 42 lines differ
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", (0, (1, 1.2)), (0, (5, 1, 1, 1, 1, 1)), (0, (9, 2)), (0, (4, 1, 4, 1, 1, 1)))


def axes_or_new(label: str, ax: "Axes | None") -> "Axes":
    with needs("plot"):
        from matplotlib import axes
    if ax is None:
        from matplotlib import pyplot

        return pyplot.subplots(layout="constrained")[1]
    return of_kind(f"{label}: ax", ax, axes.Axes, "the axes of one picture, such as figure.subplots()")


def add_legend(ax: "Axes") -> None:
    if ax.get_legend_handles_labels()[0]:
        ax.legend(handlelength=3.5)


def line_styles() -> Iterator[dict[str, Any]]:
    for colour, style in zip(itertools.cycle(COLOURS), itertools.cycle(STYLES)):
        yield {"color": colour, "linestyle": style, "linewidth": 1.8}


def run_label(name: str, diverged: bool) -> str:
    return f"{name} (diverged)" if diverged else name


def words(name: str) -> str:
    return name.replace("_", " ")


def finite_length(values: np.ndarray) -> int:
    """How many values there are before the first that is not finite."""
    return int(np.argmin(np.append(np.isfinite(values), False)))


def mark_lone(line: "Line2D") -> None:
    """A dot on each point without a neighbour, which a line alone would not show."""
    there = np.pad(np.isfinite(line.get_ydata()), 1)
    lone = there[1:-1] & ~there[:-2] & ~there[2:]
    if lone.any():
        line.set(marker="o", markersize=5, markevery=lone.nonzero()[0].tolist())


def is_positive(values: np.ndarray) -> bool:
    """Whether there are finite values, and all of them have a logarithm."""
    finite = values[np.isfinite(values)]
    return bool(len(finite) and finite.min() > 0)


def spans_decades(values: np.ndarray) -> bool:
    finite = values[np.isfinite(values)]
    return is_positive(finite) and bool(finite.max() > 10 * finite.min())


def plain_decades(axis: Any) -> None:
    """Numbers written out at each decade of a logarithmic axis, and at 2 and 5 too where few decades leave room."""
    from matplotlib.ticker import LogLocator

    def between(x: float, position: int | None) -> str:
        low, high = axis.get_view_interval()
        return f"{x:g}" if high <= 1e3 * low else ""

    axis.set_major_locator(LogLocator())
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.set_minor_formatter(between)


def distinct(points: Sequence[float]) -> list[str]:
    """Ascending numbers with as few digits as tell them apart, at least two: off by a tenth of a gap at most."""
    gaps = np.diff(points, prepend=-np.inf, append=np.inf)
    for digits in range(2, 12):
        numbers = [float(f"{point:.{digits}g}") for point in points]
        if np.all(np.abs(np.subtract(numbers, points)) <= 0.1 * np.minimum(gaps[:-1], gaps[1:])):
            break
    return [f"{number:.12g}" for number in numbers]
