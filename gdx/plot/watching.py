"""Pictures of what was watched."""

from typing import TYPE_CHECKING, Any

import numpy as np

from gdx.arguments import of_kind
from gdx.plot.arguments import numbers
from gdx.plot.style import axes_or_new, is_positive, line_styles, mark_lone, words
from gdx.training import Trained
from gdx.watching import Watched

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NAMES = 12


def watched(watched: Any, ax: "Axes | None" = None) -> "Axes":
    """Draws what `gdx.watch` measured by step: norms, update over parameter, cosine, unmoved parameters and rates.

    Each has a panel of its own within the axes, with a line for each group or leaf: norms, ratios and rates on a
    logarithmic scale. Their names are shown where they are no more than twelve.

    Args:
      watched: what `gdx.train` returned, or the `watched` of it.
      ax: the axes to draw within; None for new ones, of a size that leaves room.

    Returns:
      The axes; the panels are its `child_axes`.

    Raises:
      TypeError: an argument is of another kind, or nothing was watched.
      ValueError: it is of one step alone, without an axis of measurements.

    >>> import gdx, jax.numpy as jnp
    >>> tx = gdx.watch(gdx.sgd(0.1), every=2)
    >>> trained = gdx.train(lambda theta, batch: jnp.sum(theta**2), tx, jnp.ones(3), jnp.zeros(9))
    >>> [panel.get_title() for panel in gdx.plot.watched(trained).child_axes]
    ['gradient norm', 'update norm', 'parameter norm', 'update over parameter', 'cosine', 'learning rate']
    """
    label = "plot.watched"
    expected = "what gdx.train returned for an optimizer with gdx.watch around it"
    found = getattr(watched, "watched", watched) if isinstance(watched, Trained) else watched
    found = of_kind(f"{label}: watched", found, Watched, expected)
    at = numbers(f"{label}: step", found.step, "one for each measurement, as gdx.train collects them", (None,))
    shape = (at.size, len(found.names)) if np.ndim(found.gradient_norm) > 1 else (at.size,)
    panels = {
        words(name): numbers(f"{label}: {name}", getattr(found, name), f"{shape}", shape)
        for name in Watched._fields[1:7]
        if getattr(found, name) is not None
    }
    rates = {name: x for name, x in found.hyperparameters.items() if name.split(".")[-1] == "learning_rate"}
    for name, rate in rates.items():
        panels[words(name)] = numbers(f"{label}: {name}", rate, "one for each measurement", at.shape)
    is_new = ax is None
    ax = axes_or_new(label, ax)
    rows = -(-len(panels) // 2)
    if is_new:
        ax.figure.set_size_inches(9, 1.5 + 1.9 * rows)  # type: ignore[union-attr]
    ax.set_axis_off()
    made = at >= 0
    for i, (title, values) in enumerate(panels.items()):
        place = (0.57 * (i % 2), 1 - (i // 2 + 0.84) / rows, 0.43, 0.76 / rows)
        panel = ax.inset_axes(place, sharex=ax.child_axes[0] if i else None)
        lines = np.atleast_2d(values[made].T)
        names = found.names if values.ndim > 1 else ("",)
        is_logarithmic = title not in ("cosine", "unmoved")
        for line, name, style in zip(lines, names, line_styles()):
            # a logarithmic scale would draw 0 as a fall out of the picture
            shown = np.where(np.isfinite(line) & ((line > 0) | (not is_logarithmic)), line, np.nan)
            mark_lone(panel.plot(at[made], shown, label=name, **style)[0])
        if is_logarithmic and is_positive(lines[lines > 0]):
            panel.set_yscale("log")
        panel.set_title(title, fontsize="medium", pad=2)
        panel.grid(alpha=0.3)
        is_last = i >= len(panels) - 2
        panel.tick_params(labelbottom=is_last)
        panel.set_xlabel("step" if is_last else "")
    if 1 <= len(found.names) <= MOST_NAMES:
        handles = ax.child_axes[0].get_lines()
        ax.legend(handles, found.names, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False)
    return ax
