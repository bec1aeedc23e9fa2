"""Pictures of optimization: loss curves, paths down a function of the plane, sweeps of hyperparameters, curvature.

Each function draws on the axes it is given, or on new ones, and returns them; nothing is shown or
saved. matplotlib comes with `gdx-jax[demo]`.
"""

from gdx.plot.curvature import sharpness, spectral_density
from gdx.plot.plane import paths
from gdx.plot.runs import loss_curves, range_test, sweep

__all__ = ["loss_curves", "paths", "range_test", "sharpness", "spectral_density", "sweep"]
