"""What all pictures share: colours, lines, new axes, legends."""

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from gdx.extra import needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe & Ito's palette without its yellow and black, legible also to the colour-blind; the lengths
# of the two cycles share no factor, so that 42 lines differ
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLES = ("-", "--", "-.", (0, (1, 1.2)), (0, (5, 1, 1, 1, 1, 1)), (0, (9, 2)), (0, (4, 1, 4, 1, 1, 1)))


def axes_or_new(ax: "Axes | None") -> "Axes":
    if ax is not None:
        return ax
    with needs("demo"):
        from matplotlib import pyplot
    return pyplot.subplots(layout="constrained")[1]


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


def spans_decades(values: np.ndarray) -> bool:
    finite = values[np.isfinite(values)]
    return bool(len(finite) and finite.min() > 0 and finite.max() > 10 * finite.min())


def plain_decades(axis: Any) -> None:
    """Numbers at 1, 2 and 5 of each decade of a logarithmic axis, written out."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())
