"""gdx: the gradient descent family for JAX, where an optimizer is a value.

- Optimizers: `gradient_descent`, `sgd`, `momentum`, `nesterov`, `adam`, `adamw`
- Links: `scale_by_learning_rate`, `scale_by_momentum`, `scale_by_adam`, `add_decoupled_weight_decay`
- Composing: `chain`, `value` (any optimizer, link or wrapper of optax as a value), `groups`, `times` (changes by path)
- Schedules: `gdx.schedules` (the usual ones, as values), `schedule`, `hyperparams_in_use`
- Looking: `describe`, `Description` (who is where, in which format, in how many bytes)
- Training: `train`, `Trained`, `Evaluated`
- Sweeps: `grid`, `stack`, `unstack`, `labels`, `sweep`, `Sweep`, `range_test`, `RangeTest`
- Width: `gdx.width` (what is tuned on a narrow model, for a wide one)
- Averages: `average_parameters`, `read_average`
- Guards: `skip_spikes`, `check_spikes`
- Watching: `watch`, `read_watch`, `Watched`
- Few bits: `gdx.storage` (formats), `round_stochastically`, `round_with_correction`, `round_with_compensation`,
  `round_with_master`
- Theory: `gdx.curvature` (spectra, best rates), `gdx.noise` (mini-batches), `gdx.landscape` (slices of the loss)
- Machines: `gdx.sharding` (state over a device mesh), `gdx.checkpoint` (saved, and restored onto another mesh)
- Pictures: `gdx.plot`
- Your own: `Transform`, `Leafwise`, `hyperparameter`, `static`, `Scalar`, `CountedState`, `alike`, `uncontracted`

## A value

Any hyperparameter may be a number, an array of shape `()`, a tracer, or a schedule (a function of the step count,
optax's included).

>>> import gdx, jax, jax.numpy as jnp, numpy as np
>>> bowl = lambda theta, batch: jnp.sum((theta - batch) ** 2)
>>> start, batches = jnp.ones(3), jnp.zeros((64, 3))  # 64 steps
>>> train = jax.jit(lambda tx: gdx.train(bowl, tx, start, batches))  # many steps in one call
>>> rate = gdx.schedules.warmup_cosine_decay_schedule(0.0, peak_value=0.1, warmup_steps=8, decay_steps=64)
>>> tx = gdx.adamw(rate)
>>> bool(train(tx).losses[-1] < train(tx.replace(peak_value=0.01)).losses[-1])  # compiled once
True
>>> state = train(tx).state
>>> bool(gdx.hyperparams_in_use(tx, state)["learning_rate"] < 1e-3)  # at the end of the schedule
True

The slope of the final loss in every hyperparameter, through all steps, in memory for 30 of them, and whether those
nearby agree with it:

>>> slopes = jax.grad(lambda tx: gdx.train(bowl, tx, start, batches, remat=True).losses[-1])(tx)
>>> agreement = gdx.metasmoothness(lambda tx: gdx.train(bowl, tx, start, batches).params, tx)
>>> bool(slopes.learning_rate.peak_value < 0), bool(agreement.learning_rate.peak_value > 0.9)
(True, True)

A batch of optimizers is one whose hyperparameters have a leading axis. It goes wherever a pytree does: `jax.vmap`,
`jax.lax.map`, and over the devices of a mesh with `jax.device_put(grid, NamedSharding(mesh, P("members")))`, where
`sweep` trains each member on its own device.

>>> grid = gdx.grid(gdx.adamw, learning_rate=np.geomspace(1e-3, 1, 8), weight_decay=[0.0, 0.1])
>>> swept = gdx.sweep(bowl, grid, start, batches)  # 16 optimizers in one program
>>> best = gdx.unstack(grid)[swept.ranking(swept.losses[:, -1])[0]]
>>> swept.losses.shape, sorted(swept.labels[0])
((16, 64), ['learning_rate', 'weight_decay'])
>>> found = gdx.range_test(bowl, gdx.sgd(0.1), start, batches)  # the learning rates at which it trains
>>> bool(0.1 < found.suggested < found.edge < 2)  # the edge of this bowl is at 1
True

One program compiles once for all members; on one CPU that saves the compiling, not the arithmetic
(`python -m benchmarks sweep`). `python -m gdx sweep` and `python -m gdx learn` do both on handwritten digits.

## Moving over from optax

Options have optax's names and meaning, and the states are optax's. Three things differ on purpose: moments of
bfloat16 and float16 parameters are kept in float32 unless you say otherwise (`mu_dtype`, `accumulator_dtype`), the
second moment of a complex parameter is real, and a gradient whose square overflows (beyond 1.8e19 in float32) makes a
NaN to be seen, where optax never moves that parameter again.

`sgd` and `momentum` agree for a constant rate and differ under a schedule: in `sgd` a new rate rescales the whole
velocity, in `momentum` and `nesterov` only what enters it from then on.

## Promises

Each is checked for every transform over one table, `tests/contract/table.py`:

1. It is an optax transform, and composes as one.
2. It is a value: text, comparison, hash, pickle, copies.
3. The same bits whichever way a hyperparameter arrives: a constant, an argument, a schedule, injected by optax, in a
   chain, under `lax.map`, `lax.scan`, and in each lane of `vmap`. (NaN is NaN, whatever its sign. The promise is for
   the update rule: a whole model under `vmap` also has other matrix products. An eager step may differ from a jitted
   one by one rounding of the parameter or the update, whichever is larger: only jitted does XLA add the two in one
   fused multiply-add. Before jax 0.12 a first step that is compiled together with `init` may differ, too, for its
   count is then a constant. And between the links of `optax.chain` updates are cast to the gradient's dtype: with
   gradients in half precision use `gdx.chain`.)
4. One compile for any change of any hyperparameter's value, also from one process to the next.
5. No dtype, shape or sharding of the state ever changes; everything can be donated.
6. A step is exact to 2e-6 of its largest entry at any count up to a million and any `b2` up to 0.99999.
7. Finite gradients make finite steps, within the range that each docstring gives.
8. Pure, under JAX's strictest settings.
9. Differentiable with respect to every hyperparameter and parameter.
10. Bad input is refused by a message that names the leaf and says what to do.
11. Counts saturate at 2^31 - 1.
12. Any pytree: `None`, empty, 0-size, scalar and complex leaves, equinox modules, nnx states.

## Limits

- A learning rate or decay that is a tracer is not checked: there is no value to look at.
- Adam's bias correction under a scheduled `b1` or `b2` uses the current one, as optax and torch do.
- Swapped arguments that look alike, `update(params, state, gradients)`, cannot be told apart.
- Slopes of hyperparameters through relu networks are those between the corners: on digits 14 % less than finite
  differences, which cross them; through tanh they agree to five digits.
- NaN gradients pass into the state, as in optax; put `skip_spikes` around the optimizer.
- A state made without a schedule does not fit an optimizer with one, as in optax: schedules keep a count.
  `storage.convert(state, tx.init(params))` takes it there, with the count at 0.
"""

import os
import signal
import sys

# `python -m gdx` imports all this before its main can take Ctrl-C, which would end in a traceback of the imports
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv)] == "gdx" and signal.getsignal(2) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

from gdx import checkpoint, curvature, landscape, noise, plot, schedules, sharding, storage, width
from gdx.averages import average_parameters, read_average
from gdx.compose import chain
from gdx.describing import Description, describe
from gdx.fields import Scalar, hyperparameter, static
from gdx.grouping import groups, times
from gdx.guards import check_spikes, skip_spikes
from gdx.leafwise import Leafwise
from gdx.links.adam import adam, adamw, scale_by_adam
from gdx.links.decay import add_decoupled_weight_decay
from gdx.links.descent import gradient_descent, scale_by_learning_rate
from gdx.links.momentum import momentum, nesterov, scale_by_momentum, sgd
from gdx.links.rounding import round_stochastically, round_with_compensation, round_with_correction, round_with_master
from gdx.numerics import alike, uncontracted
from gdx.population import grid, labels, stack, unstack
from gdx.range_tests import RangeTest, range_test
from gdx.schedules import schedule
from gdx.smoothness import metasmoothness
from gdx.sweeping import Sweep, sweep
from gdx.training import Evaluated, Trained, train
from gdx.transform import CountedState, Transform, hyperparams_in_use, value
from gdx.watching import Watched, read_watch, watch

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
    "groups",
    "times",
    "schedules",
    "schedule",
    "hyperparams_in_use",
    "describe",
    "Description",
    "train",
    "Trained",
    "Evaluated",
    "metasmoothness",
    "grid",
    "stack",
    "unstack",
    "labels",
    "sweep",
    "Sweep",
    "range_test",
    "RangeTest",
    "width",
    "average_parameters",
    "read_average",
    "skip_spikes",
    "check_spikes",
    "watch",
    "read_watch",
    "Watched",
    "storage",
    "round_stochastically",
    "round_with_compensation",
    "round_with_correction",
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
