"""gdx: the gradient descent family for JAX, where an optimizer is a value.

- Optimizers: `gradient_descent`, `sgd`, `momentum`, `nesterov`, `adam`, `adamw`
- Links: `scale_by_learning_rate`, `scale_by_momentum`, `scale_by_adam`, `add_decoupled_weight_decay`
- Composing: `chain`, `value` (any optimizer, link or wrapper of optax as a value)
- Schedules: `schedules` (the usual ones, as values), `schedule`, `hyperparams_in_use`
- Training: `train`, `Trained`
- Sweeps: `grid`, `stack`, `unstack`, `labels`, `sweep`, `Sweep`, `range_test`, `RangeTest`
- Few bits: `storage` (formats), `round_stochastically`, `round_with_compensation`, `round_with_master`
- Theory: `curvature` (spectra, best rates), `noise` (mini-batches, noise scale), `landscape` (slices of the loss)
- Machines: `sharding` (state over a device mesh), `checkpoint` (saved, and restored onto another mesh)
- Pictures: `plot`
- Your own: `Transform`, `Leafwise`, `hyperparameter`, `static`, `Scalar`, `CountedState`, `alike`, `uncontracted`
"""

import os
import signal
import sys

# `python -m gdx` imports all this before its main can take Ctrl-C, which would end in a traceback of the imports
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] == "gdx" and signal.getsignal(2) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from gdx import checkpoint, curvature, landscape, noise, plot, schedules, sharding, storage
from gdx.compose import chain
from gdx.fields import Scalar, hyperparameter, static
from gdx.leafwise import Leafwise
from gdx.links.adam import adam, adamw, scale_by_adam
from gdx.links.decay import add_decoupled_weight_decay
from gdx.links.descent import gradient_descent, scale_by_learning_rate
from gdx.links.momentum import momentum, nesterov, scale_by_momentum, sgd
from gdx.links.rounding import round_stochastically, round_with_compensation, round_with_master
from gdx.numerics import alike, uncontracted
from gdx.population import grid, labels, stack, unstack
from gdx.schedules import schedule
from gdx.training import RangeTest, Sweep, Trained, range_test, sweep, train
from gdx.transform import CountedState, Transform, hyperparams_in_use, value

__version__ = "0.1.0"

# in the order of the contents above, which is that of the reference
__all__ = [  # noqa: RUF022
    "gradient_descent",
    "sgd",
    "momentum",
    "nesterov",
    "adam",
    "adamw",
    "scale_by_learning_rate",
    "scale_by_momentum",
    "scale_by_adam",
    "add_decoupled_weight_decay",
    "chain",
    "value",
    "schedules",
    "schedule",
    "hyperparams_in_use",
    "train",
    "Trained",
    "grid",
    "stack",
    "unstack",
    "labels",
    "sweep",
    "Sweep",
    "range_test",
    "RangeTest",
    "storage",
    "round_stochastically",
    "round_with_compensation",
    "round_with_master",
    "curvature",
    "noise",
    "landscape",
    "sharding",
    "checkpoint",
    "plot",
    "Transform",
    "Leafwise",
    "hyperparameter",
    "static",
    "Scalar",
    "CountedState",
    "alike",
    "uncontracted",
]
