"""Pictures of the noise of gradients."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gdx.arguments import number
from gdx.plot.arguments import curves
from gdx.plot.style import add_legend, axes_or_new, line_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def noise_scale(
    scales: Mapping[str, Any],
    ax: "Axes | None" = None,
    *,
    steps: Mapping[str, Any] | None = None,
    batch_size: float | None = None,
    examples: float | None = None,
) -> "Axes":
    """Draws the gradient noise scale over training, which predicts the critical batch size.

    Where the gradient is lost in noise, the scale infinite and nothing to be drawn, the curve has a gap.

    Args:
      scales: `gdx.noise.Noise.scale` of each step, in examples, by the name of the run or of the way it was measured.
      ax: the axes to draw on; None for new ones.
      steps: the step of each, by name; None where there is one at each step from 0. One value alone is a point.
      batch_size: the batch that is trained with, drawn as a line: below the scale it is noise that steps follow
        most, above it examples are spent on a gradient that is exact enough.
      examples: the number of training examples, drawn as a line.

    Returns:
      The axes.

    Raises:
      TypeError: an argument is of another kind.
      ValueError: scales have another shape, steps lacks a run or has another shape, or a number is not positive.

    >>> import gdx
    >>> gdx.plot.noise_scale({"sgd": [20.0, 150.0, 800.0]}, batch_size=64).get_ylabel()
    'noise scale (examples)'
    """
    label = "plot.noise_scale"
    runs = curves(label, "scales", scales, steps, "scale", (None,), ())
    batch_size, examples = (
        number(f"{label}: {name}", size, "a number > 0", above=0, optional=True)
        for name, size in (("batch_size", batch_size), ("examples", examples))
    )
    ax = axes_or_new(label, ax)
    for (name, (at, values)), style in zip(runs.items(), line_styles()):
        shown = np.where(np.isfinite(values) & (values > 0), values, np.nan)
        if len(values) <= 30:
            style |= {"marker": "o", "markersize": 5, "zorder": 3}
        ax.plot(at, shown, label=name, **style)
    # the scale rises as the loss falls: the lower right and the upper left corner are free
    for name, size, x, side in (("batch size", batch_size, 0.98, "right"), ("examples", examples, 0.02, "left")):
        if size is not None:
            ax.axhline(size, color="0.4", linewidth=1)
            ax.annotate(
                f"{name}: {size:g}",
                (x, size),
                xycoords=ax.get_yaxis_transform(),
                textcoords="offset points",
                xytext=(0, 3),
                ha=side,
                fontsize="small",
                color="0.3",
            )
    ax.set_yscale("log")
    ax.set_xlabel("step")
    ax.set_ylabel("noise scale (examples)")
    ax.grid(alpha=0.3)
    add_legend(ax)
    return ax
