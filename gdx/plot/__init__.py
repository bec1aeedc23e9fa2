"""Pictures of optimization: runs and sweeps, what was watched, paths and slices of the loss, curvature, noise, width.

Each function draws on the axes it is given, or on new ones, and returns them; nothing is shown or
saved. matplotlib comes with `gdx-jax[plot]`.
"""

from gdx.plot.curvature import sharpness, spectral_density
from gdx.plot.landscape import loss_line, loss_plane
from gdx.plot.noise import noise_scale
from gdx.plot.plane import paths
from gdx.plot.runs import loss_curves, range_test, sweep
from gdx.plot.watching import watched
from gdx.plot.width import coordinate_check

__all__ = [
    "coordinate_check",
    "loss_curves",
    "loss_line",
    "loss_plane",
    "noise_scale",
    "paths",
    "range_test",
    "sharpness",
    "spectral_density",
    "sweep",
    "watched",
]
