"""Pictures of how a model behaves as it gets wider."""

from typing import TYPE_CHECKING, Any

from gdx.arguments import of_kind
from gdx.plot.style import add_legend, axes_or_new, line_styles
from gdx.width import CoordinateCheck

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def coordinate_check(check: Any, ax: "Axes | None" = None) -> "Axes":
    """Draws how far activations have moved after the last step, by width; in the legend stands the slope of each.

    Args:
      check: what `gdx.width.coordinate_check` returned.
      ax: the axes to draw on; None for new ones.

    Returns:
      The axes.

    Raises:
      TypeError: an argument is of another kind.

    >>> import gdx, numpy as np
    >>> moved = {"hidden": np.array([[0.0, 0.1], [0.0, 0.1]]), "logits": np.array([[0.0, 0.2], [0.0, 0.8]])}
    >>> check = gdx.width.CoordinateCheck(np.array([64, 256]), moved, moved, np.ones((2, 2)))
    >>> ax = gdx.plot.coordinate_check(check)
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['hidden: slope +0.00', 'logits: slope +1.00']
    """
    label = "plot.coordinate_check"
    check = of_kind(f"{label}: check", check, CoordinateCheck, "what gdx.width.coordinate_check returned")
    ax = axes_or_new(label, ax)
    for (name, changes), style in zip(check.changes.items(), line_styles()):
        slope = check.slopes[name][-1]
        ax.plot(check.widths, changes[:, -1], marker="o", markersize=4, label=f"{name}: slope {slope:+z.2f}", **style)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(check.widths, map(str, check.widths))
    ax.set_xlabel("width")
    steps = check.losses.shape[1] - 1
    ax.set_ylabel(f"mean change in {steps} step{'s' * (steps > 1)}")
    ax.grid(alpha=0.3)
    add_legend(ax)
    return ax
