"""The contract's table: one row per transform. A new transform adds its row and gets every promise checked.

A row says how to make the transform from keyword hyperparameters, its valid settings (together
they use every option), its invalid ones with the words of their errors, and its oracle.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from tests import oracle


@dataclass(frozen=True, repr=False)
class Row:
    """One transform and what is special about it.

    Attributes:
      make: makes the transform from keywords.
      settings: valid keywords; the first is the usual case.
      invalid: keywords, the error they raise, and a pattern that its message matches.
      step: its step in `tests.oracle`.
      largest_gradient: the largest float32 gradient that gives finite steps.
      takes_schedules: whether each number may also be a schedule; it may not inside one, nor everywhere in optax.
      dtype: of the parameters that it is for.
    """

    make: Callable[..., gdx.Transform]
    settings: tuple[dict[str, Any], ...]
    invalid: tuple[tuple[dict[str, Any], type[Exception], str], ...]
    step: Callable
    largest_gradient: float = 3e38
    takes_schedules: bool = True
    dtype: str = "float32"

    @property
    def name(self) -> str:
        return self.make.__name__

    @property
    def tx(self) -> gdx.Transform:
        return self.make(**self.settings[0])

    def __repr__(self) -> str:
        return self.name

    def tree(self, seed: int = 0) -> dict[str, Any]:
        """Parameters of the kind that it is for."""
        return tree(seed, self.dtype)

    def injected(self, settings: dict[str, Any]) -> optax.GradientTransformation:
        """It inside optax's wrapper, which takes numbers for hyperparameters and by default rounds them to bfloat16."""
        whole = {"seed", "start", "every", "warmup_steps", "most"}
        static = whole & set(inspect.signature(self.make).parameters)
        return optax.inject_hyperparams(self.make, static_args=static, hyperparam_dtype=jnp.float32)(**settings)

    def rounds(self, param_dtype: Any) -> bool:
        """Whether it rounds parameters of this dtype: its updates are then to be added in float32."""
        return self.dtype != "float32" and jnp.dtype(param_dtype) == jnp.dtype(self.dtype)

    def numbers(self, settings: dict[str, Any]) -> dict[str, float]:
        """The settings that are hyperparameters."""
        names = self.make(**settings).hyperparams
        return {name: value for name, value in settings.items() if name in names}


def another(name: str, value: float) -> float:
    """Another valid value of a hyperparameter; a part of a step would be refused."""
    return value / 2 + (1.125 if name == "transition_begin" else 0.125)


def few_bits(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that keep a moment in few bits.

    Such a moment is rounded on purpose, so it is not exact to float32's rounding; and it moves in
    steps, so that finite differences do not see the slope, which is that of the unrounded moment.
    """
    return {name: value for name, value in settings.items() if isinstance(value, str | gdx.storage.Format)}


_IDENTITY = optax.identity()


def nested(learning_rate: Any, b1: Any = 0.9, momentum: Any = 0.5) -> gdx.Transform:
    """A chain in a chain, with a link of optax's."""
    inner = gdx.chain(gdx.scale_by_adam(b1), gdx.scale_by_learning_rate(learning_rate))
    return gdx.chain(_IDENTITY, inner, gdx.scale_by_momentum(momentum))


def scheduled(init_value: Any, end_value: Any, transition_steps: Any, momentum: Any) -> gdx.Transform:
    """A schedule whose numbers are hyperparameters."""
    return gdx.momentum(gdx.schedules.linear_schedule(init_value, end_value, transition_steps), momentum)


@gdx.value
def in_chain(tx: gdx.Transform) -> optax.GradientTransformation:
    """A chain of optax's around a value."""
    return optax.chain(optax.identity(), tx)


def wrapped(learning_rate: Any, momentum: Any = 0.9) -> gdx.Transform:
    """A wrapper of optax's around a value."""
    return in_chain(gdx.sgd(learning_rate, momentum))


def scaled(learning_rate: Any, step_size: Any = 1.0, b1: Any = 0.9) -> gdx.Transform:
    """A chain whose first link is a value of optax's, with a number of its own."""
    return gdx.chain(gdx.value(optax.scale)(step_size), gdx.adam(learning_rate, b1))


@gdx.value
def fed(tx: gdx.Transform) -> optax.GradientTransformationExtraArgs:
    """A link that measures noise, told in each step what it needs."""

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> tuple[Any, Any]:
        micro_batches = gdx.noise.MicroBatches(jnp.full([], 1e6, jnp.float32), 8, 4)
        return tx.update(updates, state, params, micro_batches=micro_batches, **extra_args)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def measured(learning_rate: Any, decay: Any) -> gdx.Transform:
    """With the link that measures noise, told in each step what it needs."""
    return gdx.chain(fed(gdx.noise.measure_noise(decay)), gdx.sgd(learning_rate))


def averaged(
    learning_rate: Any,
    momentum: Any = 0.9,
    decay: Any = 0.999,
    start: int = 0,
    every: int = 1,
    dtype: Any = None,
    accumulator_dtype: Any = None,
) -> gdx.Transform:
    """With the average of its parameters."""
    tx = gdx.sgd(learning_rate, momentum, accumulator_dtype=accumulator_dtype)
    return gdx.average_parameters(tx, decay, start=start, every=every, dtype=dtype)


def with_skip_spikes(
    learning_rate: Any,
    b1: Any = 0.9,
    threshold: Any = 6.0,
    decay: Any = 0.99,
    warmup_steps: int = 64,
    most: int = 10,
    clip: bool = False,
    of: str = "gradient",
) -> gdx.Transform:
    """A guard, around what never spikes here."""
    return gdx.skip_spikes(gdx.adamw(learning_rate, b1), threshold, decay, warmup_steps, most, clip, of)


def watched(learning_rate: Any, b1: Any = 0.9, every: int = 1, per: str = "all") -> gdx.Transform:
    """With a measurement in every step."""
    return gdx.watch(gdx.adamw(learning_rate, b1), every, per)


def sharded(learning_rate: Any, b1: Any = 0.9, weight_decay: Any = 1e-4) -> gdx.Transform:
    """State over a mesh, of one device: on several a step of so few numbers would be mostly communication."""
    return gdx.sharding.shard_state(gdx.adamw(learning_rate, b1=b1, weight_decay=weight_decay), _one_device())


def grouped(learning_rate: Any, factor: Any = 1.0, weight_decay: Any = 1e-4) -> gdx.Transform:
    """With all parameters in one group, whose rate is a multiple."""
    base = gdx.adamw(learning_rate, weight_decay=weight_decay)
    return gdx.groups(base, {"": {"learning_rate": gdx.times(factor)}})


@functools.cache
def _one_device() -> jax.sharding.Mesh:
    return jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:1])


def rounded_stochastically(learning_rate: Any, seed: int = 0) -> gdx.Transform:
    return gdx.chain(gdx.scale_by_learning_rate(learning_rate), gdx.round_stochastically(seed))


def rounded_with_correction(learning_rate: Any, seed: int = 0) -> gdx.Transform:
    return gdx.chain(gdx.scale_by_learning_rate(learning_rate), gdx.round_with_correction(seed))


def rounded_with_compensation(learning_rate: Any) -> gdx.Transform:
    return gdx.chain(gdx.scale_by_learning_rate(learning_rate), gdx.round_with_compensation())


def rounded_with_master(learning_rate: Any) -> gdx.Transform:
    return gdx.chain(gdx.scale_by_learning_rate(learning_rate), gdx.round_with_master())


def _link(step: Callable) -> Callable:
    """The oracle's step of a link alone: what it would subtract at learning rate 1, added."""
    return lambda *args, **kwargs: -step(*args, **{"learning_rate": 1.0, **kwargs})


def _descent(t: int, g: Any, theta: Any, memory: dict, *, learning_rate: Any, flip_sign: bool = True) -> Any:
    return -(learning_rate * g) if flip_sign else learning_rate * g


def _measured(t: int, g: Any, theta: Any, memory: dict, *, learning_rate: Any, decay: Any) -> Any:
    return oracle.sgd(t, g, theta, memory, learning_rate=learning_rate)


def _grouped(t: int, g: Any, theta: Any, memory: dict, *, learning_rate: Any, factor: Any, weight_decay: Any) -> Any:
    rest = {"b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": weight_decay}
    return oracle.adamw(t, g, theta, memory, learning_rate=learning_rate * factor, **rest)


def _averaged(t: int, g: Any, theta: Any, memory: dict, *, learning_rate: Any, momentum: Any, **average: Any) -> Any:
    return oracle.sgd(t, g, theta, memory, learning_rate=learning_rate, momentum=momentum)


def _guarded(t: int, g: Any, theta: Any, memory: dict, *, learning_rate: Any, b1: Any, **guard: Any) -> Any:
    return oracle.adamw(t, g, theta, memory, learning_rate=learning_rate, b1=b1, b2=0.999, eps=1e-8, weight_decay=1e-4)


def _decay(t: int, g: Any, theta: Any, memory: dict, *, weight_decay: Any) -> Any:
    return g + weight_decay * theta


def _nested(t: int, g: Any, theta: Any, memory: dict, *, learning_rate: Any, b1: Any, momentum: Any) -> Any:
    u = oracle.adam(t, g, theta, memory, learning_rate=learning_rate, b1=b1, b2=0.999, eps=1e-8)
    v = memory["velocity"] = u if t == 1 else momentum * memory["velocity"] + u
    return v


def _scaled(t: int, g: Any, theta: Any, memory: dict, *, learning_rate: Any, step_size: Any, b1: Any) -> Any:
    return oracle.adam(t, step_size * g, theta, memory, learning_rate=learning_rate, b1=b1, b2=0.999, eps=1e-8)


def _scheduled(
    t: int, g: Any, theta: Any, memory: dict, *, init_value: Any, end_value: Any, transition_steps: Any, momentum: Any
) -> Any:
    rate = (init_value - end_value) * (1 - (t - 1) / transition_steps) + end_value
    return oracle.momentum(t, g, theta, memory, learning_rate=rate, momentum=momentum)


_BAD_RATE = (
    ({"learning_rate": -0.1}, ValueError, r"learning_rate is -0\.1; expected a finite number >= 0"),
    ({"learning_rate": float("nan")}, ValueError, r"learning_rate is nan; expected a finite number >= 0"),
    ({"learning_rate": float("inf")}, ValueError, r"learning_rate is inf; expected a finite number >= 0"),
    ({"learning_rate": 1e39}, ValueError, r"learning_rate is 1e\+39 \(inf in float32\)"),
    ({"learning_rate": 1e-50}, ValueError, r"learning_rate is 1e-50 \(0\.0 in float32\)"),
    ({"learning_rate": {"w": 0.1}}, TypeError, r"learning_rate is \{'w': 0\.1\}; expected"),
    ({"learning_rate": None}, TypeError, r"learning_rate is None; expected a finite number >= 0"),
    ({"learning_rate": "0.1"}, TypeError, r"learning_rate is '0\.1'; expected a finite number >= 0"),
    ({"learning_rate": True}, TypeError, r"learning_rate is True; expected a finite number"),
    ({"learning_rate": 1j}, TypeError, r"learning_rate is 1j; expected a finite number"),
    ({"learning_rate": np.ones(3)}, ValueError, r"learning_rate has shape \(3,\); expected .* gdx\.stack or gdx\.grid"),
    ({"learning_rate": jnp.float32(-1)}, ValueError, r"learning_rate is -1\.0; expected a finite number >= 0"),
)
# with these, leaves of the tree below are large enough to be held in 8 bits, with blocks that are not full
_BLOCKS = {"block": 8, "minimum_size": 1}
_SMALL_MU, _SMALL_NU = gdx.storage.SignedFourthRoot8(**_BLOCKS), gdx.storage.FourthRoot8(**_BLOCKS)
_FOUR_BITS = gdx.storage.SignedPowersOfTwo4(**_BLOCKS)
_SIMULATED = gdx.storage.Simulated(gdx.storage.PowersOfTwo4(**_BLOCKS))
_STOCHASTIC = gdx.storage.StochasticBfloat16()
_BAD_MOMENTUM = (
    ({"momentum": 1.0}, ValueError, r"momentum is 1\.0; expected a finite number in \[0, 1\)"),
    ({"momentum": -0.1}, ValueError, r"momentum is -0\.1; expected a finite number in \[0, 1\)"),
    (
        {"accumulator_dtype": "int8"},
        ValueError,
        r"accumulator_dtype is 'int8', in which a moment would be rounded away",
    ),
    (
        {"accumulator_dtype": gdx.storage.FourthRoot8()},
        ValueError,
        r"accumulator_dtype is storage\.FourthRoot8\(\), which holds no negative numbers; expected .*SignedFourthRoot8",
    ),
    ({"accumulator_dtype": "float8_e5m2"}, ValueError, r"accumulator_dtype is 'float8_e5m2', in which .* rounded away"),
    ({"accumulator_dtype": "f3"}, TypeError, r"accumulator_dtype is 'f3'; expected a floating-point dtype"),
)
_BAD_MOMENTS = (
    ({"b1": 1.0}, ValueError, r"b1 is 1\.0; expected a finite number in \[0, 1\)"),
    ({"b1": -0.5}, ValueError, r"b1 is -0\.5; expected a finite number in \[0, 1\)"),
    ({"b2": 1.5}, ValueError, r"b2 is 1\.5; expected a finite number in \[0, 1\)"),
    ({"b2": 1 - 1e-9}, ValueError, r"b2 is 0\.999999999 \(1\.0 in float32\); expected a finite number in \[0, 1\)"),
    ({"b2": jnp.bfloat16(0.999)}, ValueError, r"b2 is 1\.0; expected a finite number in \[0, 1\)"),
    ({"eps": -1e-8}, ValueError, r"eps is -1e-08; expected a finite number >= 0"),
    ({"eps_root": -1.0}, ValueError, r"eps_root is -1\.0; expected a finite number >= 0"),
    ({"mu_dtype": "int8"}, ValueError, r"mu_dtype is 'int8', in which a moment would be rounded away"),
    ({"mu_dtype": gdx.storage.FourthRoot8()}, ValueError, r"mu_dtype is .*, which holds no negative numbers"),
    (
        {"nu_dtype": gdx.storage.SignedFourthRoot8()},
        ValueError,
        r"nu_dtype is .*rounds small second moments to 0.*FourthRoot8",
    ),
    ({"nu_dtype": "int8"}, ValueError, r"nu_dtype is 'int8', in which a moment would be rounded away; .*FourthRoot8"),
    (
        {"nu_dtype": "bfloat16"},
        ValueError,
        r"nu_dtype is 'bfloat16' with b2 = 0\.999: rounded to nearest, .* nu_dtype=gdx\.storage\.StochasticBfloat16",
    ),
    ({"nu_dtype": "bfloat16", "b2": 0.99}, ValueError, r"nu_dtype is 'bfloat16' with b2 = 0\.99"),
    ({"nu_dtype": "float16", "b2": 0.9}, ValueError, r"nu_dtype is 'float16', which rounds small second moments to 0"),
    ({"mu_dtype": gdx.storage.StochasticBfloat16}, TypeError, r"mu_dtype is the class StochasticBfloat16; expected"),
    (
        {"nu_dtype": "bfloat16", "b2": gdx.schedules.constant_schedule(0.5)},
        ValueError,
        r"nu_dtype is 'bfloat16' with b2 = constant_schedule\(",
    ),
    ({"nesterov": "no"}, TypeError, r"nesterov is 'no'; expected True or False"),
    ({"mu_dtype": bool}, ValueError, r"mu_dtype is 'bool', in which a moment would be rounded away"),
)
_BAD_DECAY = (
    ({"weight_decay": -0.1}, ValueError, r"weight_decay is -0\.1; expected a finite number >= 0"),
    ({"weight_decay": None}, TypeError, r"weight_decay is None; expected a finite number >= 0"),
)
_MOMENTS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}


def _with_rate(cases: tuple) -> tuple:
    return tuple(({"learning_rate": 0.1, **settings}, error, words) for settings, error, words in cases)


ROWS = (
    Row(
        gdx.scale_by_learning_rate,
        ({"learning_rate": 0.1}, {"learning_rate": 0.0}, {"learning_rate": 0.1, "flip_sign": False}),
        (
            *_BAD_RATE,
            ({"learning_rate": 0.1, "flip_sign": "x"}, TypeError, r"flip_sign is 'x'; expected True or False"),
        ),
        _descent,
    ),
    Row(
        gdx.scale_by_momentum,
        (
            {"momentum": 0.9},
            {"momentum": 0.5, "nesterov": True},
            {"momentum": 0.0},
            {"momentum": 0.9, "accumulator_dtype": "bfloat16"},
            {"momentum": 0.9, "accumulator_dtype": _STOCHASTIC, "nesterov": True},
            {"momentum": 0.9, "accumulator_dtype": _SMALL_MU},
        ),
        _BAD_MOMENTUM,
        _link(oracle.sgd),
        largest_gradient=3e37,
    ),
    Row(
        gdx.scale_by_adam,
        (
            _MOMENTS,
            {"b1": 0.5, "b2": 0.99, "eps": 1e-3, "eps_root": 1e-5},
            {**_MOMENTS, "nesterov": True},
            {"b1": 0.0, "b2": 0.99999, "eps": 0.0},
            {**_MOMENTS, "mu_dtype": "bfloat16"},
            {**_MOMENTS, "mu_dtype": _STOCHASTIC, "nu_dtype": _STOCHASTIC},
            {**_MOMENTS, "mu_dtype": _SMALL_MU, "nu_dtype": _SMALL_NU, "nesterov": True},
            {**_MOMENTS, "mu_dtype": _FOUR_BITS, "nu_dtype": _SIMULATED},
        ),
        _BAD_MOMENTS,
        _link(oracle.adam),
        largest_gradient=1e19,
    ),
    Row(
        gdx.add_decoupled_weight_decay,
        ({"weight_decay": 0.01}, {"weight_decay": 0.0}),
        _BAD_DECAY,
        _decay,
    ),
    Row(gdx.gradient_descent, ({"learning_rate": 0.1},), _BAD_RATE, oracle.gradient_descent),
    Row(
        gdx.sgd,
        (
            {"learning_rate": 0.1, "momentum": 0.9},
            {"learning_rate": 0.1},
            {"learning_rate": 0.01, "momentum": 0.9, "nesterov": True},
        ),
        (
            *_BAD_RATE,
            *_with_rate(_BAD_MOMENTUM),
            ({"learning_rate": 0.1, "nesterov": True}, ValueError, r"nesterov=True needs momentum"),
            ({"learning_rate": 0.1, "nesterov": 0.5}, TypeError, r"nesterov is 0\.5; expected True or False"),
        ),
        oracle.sgd,
        largest_gradient=3e37,
    ),
    Row(
        gdx.momentum,
        ({"learning_rate": 0.1, "momentum": 0.9},),
        (*_BAD_RATE, *_with_rate(_BAD_MOMENTUM)),
        oracle.momentum,
    ),
    Row(
        gdx.nesterov,
        ({"learning_rate": 0.1, "momentum": 0.9},),
        (*_BAD_RATE, *_with_rate(_BAD_MOMENTUM)),
        oracle.nesterov,
    ),
    Row(
        gdx.adam,
        (
            {"learning_rate": 1e-2, **_MOMENTS},
            {"learning_rate": 1e-2, "b1": 0.8, "b2": 0.99, "eps": 1e-6, "nesterov": True},
        ),
        (*_BAD_RATE, *_with_rate(_BAD_MOMENTS)),
        oracle.adam,
        largest_gradient=1e19,
    ),
    Row(
        gdx.adamw,
        (
            {"learning_rate": 1e-2, **_MOMENTS, "weight_decay": 0.1},
            {"learning_rate": 1e-2, **_MOMENTS, "weight_decay": 0.01, "schedule_multiplier": 0.5},
            {"learning_rate": 1e-2, **_MOMENTS, "weight_decay": 0.1, "nesterov": True},
            {"learning_rate": 1e-2, **_MOMENTS, "weight_decay": 0.1, "mu_dtype": _SMALL_MU, "nu_dtype": _SMALL_NU},
        ),
        (
            *_BAD_RATE,
            *_with_rate(_BAD_MOMENTS),
            *_with_rate(_BAD_DECAY),
            ({"learning_rate": 0.1, "schedule_multiplier": -1}, ValueError, r"schedule_multiplier is -1\.0; expected"),
        ),
        oracle.adamw,
        largest_gradient=1e19,
    ),
    Row(
        nested,
        ({"learning_rate": 1e-2, "b1": 0.9, "momentum": 0.5},),
        _with_rate((({"b1": 1.0}, ValueError, r"scale_by_adam: b1 is 1\.0"),)),
        _nested,
        largest_gradient=1e19,
    ),
    Row(
        wrapped,
        ({"learning_rate": 0.1, "momentum": 0.9},),
        _with_rate((({"momentum": 1.0}, ValueError, r"sgd: momentum is 1\.0"),)),
        oracle.sgd,
        largest_gradient=3e37,
    ),
    Row(
        scaled,
        ({"learning_rate": 1e-2, "step_size": 0.5, "b1": 0.9},),
        _with_rate((({"b1": 1.0}, ValueError, r"adam: b1 is 1\.0"),)),
        _scaled,
        largest_gradient=1e19,
        takes_schedules=False,
    ),
    Row(
        measured,
        ({"learning_rate": 0.1, "decay": 0.99}, {"learning_rate": 0.1, "decay": 0.0}),
        _with_rate(
            (
                ({"decay": 1.0}, ValueError, r"measure_noise: decay is 1\.0; expected a finite number in \[0, 1\)"),
                ({"decay": -0.5}, ValueError, r"measure_noise: decay is -0\.5; expected a finite number in \[0, 1\)"),
                ({"decay": None}, TypeError, r"measure_noise: decay is None; expected"),
            )
        ),
        _measured,
    ),
    Row(
        averaged,
        (
            {"learning_rate": 0.1, "momentum": 0.9, "decay": 0.999},
            {"learning_rate": 0.1, "momentum": 0.9, "decay": None, "start": 2, "every": 3},
            {
                "learning_rate": 0.1,
                "momentum": 0.9,
                "decay": 0.99,
                "dtype": _STOCHASTIC,
                "accumulator_dtype": _SMALL_MU,
            },
        ),
        _with_rate(
            (
                (
                    {"decay": 1.0},
                    ValueError,
                    r"average_parameters: decay is 1\.0; expected a finite number in \[0, 1\)",
                ),
                (
                    {"decay": -0.5},
                    ValueError,
                    r"average_parameters: decay is -0\.5; expected a finite number in \[0, 1\)",
                ),
                ({"decay": "0.9"}, TypeError, r"average_parameters: decay is '0\.9'; expected a finite number"),
                ({"momentum": 1.0}, ValueError, r"sgd: momentum is 1\.0"),
                ({"start": -1}, ValueError, r"average_parameters: start is -1; expected an integer >= 0"),
                ({"every": 0}, ValueError, r"average_parameters: every is 0; expected an integer >= 1"),
                ({"every": 0.5}, TypeError, r"average_parameters: every is 0\.5; expected an integer"),
                (
                    {"dtype": "bfloat16"},
                    ValueError,
                    r"average_parameters: dtype is bfloat16: rounded to nearest, an average stands still .*"
                    r"expected gdx\.storage\.StochasticBfloat16\(\)",
                ),
                ({"dtype": gdx.storage.FourthRoot8()}, ValueError, r"dtype is .*, which holds no negative numbers"),
            )
        ),
        _averaged,
        largest_gradient=3e37,
    ),
    Row(
        with_skip_spikes,
        (
            {"learning_rate": 1e-2, "b1": 0.9},
            {"learning_rate": 1e-2, "b1": 0.9, "threshold": 8.0, "decay": 0.9, "clip": True},
        ),
        _with_rate(
            (
                ({"threshold": 0.0}, ValueError, r"skip_spikes: threshold is 0\.0; expected a finite number >= 0\.001"),
                ({"threshold": -1.0}, ValueError, r"skip_spikes: threshold is -1\.0; expected"),
                ({"threshold": float("nan")}, ValueError, r"skip_spikes: threshold is nan; expected a finite number"),
                ({"decay": 1.0}, ValueError, r"skip_spikes: decay is 1\.0; expected a finite number in \[0, 1\)"),
                ({"most": 0}, ValueError, r"skip_spikes: most is 0; expected an integer >= 1"),
                ({"warmup_steps": 1}, ValueError, r"skip_spikes: warmup_steps is 1; expected an integer >= 2"),
                ({"warmup_steps": 2.5}, TypeError, r"skip_spikes: warmup_steps is 2\.5; expected an integer"),
                ({"clip": "yes"}, TypeError, r"skip_spikes: clip is 'yes'; expected True or False"),
                ({"of": "loss"}, ValueError, r"skip_spikes: of is 'loss'; expected 'gradient' or 'value'"),
                ({"of": "value", "clip": True}, ValueError, r"skip_spikes: clip=True needs of='gradient'"),
                ({"b1": 1.0}, ValueError, r"adamw: b1 is 1\.0"),
            )
        ),
        _guarded,
        largest_gradient=1e19,
    ),
    Row(
        watched,
        ({"learning_rate": 1e-2, "b1": 0.9},),
        _with_rate(
            (
                ({"every": 0}, ValueError, r"watch: every is 0; expected an integer >= 1"),
                ({"every": 2.5}, TypeError, r"watch: every is 2\.5; expected an integer"),
                ({"per": "layer"}, ValueError, r"watch: per is 'layer'; expected 'all', 'group' or 'leaf'"),
                ({"b1": 1.0}, ValueError, r"adamw: b1 is 1\.0"),
            )
        ),
        _guarded,
        largest_gradient=1e19,
    ),
    Row(
        sharded,
        ({"learning_rate": 1e-2, "b1": 0.9, "weight_decay": 0.1},),
        _with_rate((({"b1": 1.0}, ValueError, r"adamw: b1 is 1\.0"),)),
        functools.partial(oracle.adamw, b2=0.999, eps=1e-8),
        largest_gradient=1e19,
    ),
    Row(
        grouped,
        ({"learning_rate": 0.1, "factor": 0.3, "weight_decay": 0.1},),
        _with_rate(
            (
                ({"factor": -1.0}, ValueError, r"times: factor is -1\.0; expected a finite number >= 0"),
                ({"weight_decay": -1.0}, ValueError, r"adamw: weight_decay is -1\.0"),
            )
        ),
        _grouped,
        largest_gradient=1e19,
    ),
    Row(
        scheduled,
        ({"init_value": 0.1, "end_value": 0.01, "transition_steps": 400.0, "momentum": 0.9},),
        (
            (
                {"init_value": -0.1, "end_value": 0.0, "transition_steps": 4, "momentum": 1.0},
                ValueError,
                r"momentum is 1\.0",
            ),
        ),
        _scheduled,
        takes_schedules=False,
    ),
)

ROWS += tuple(
    Row(
        make,
        settings,
        (*_BAD_RATE, *invalid),
        oracle.gradient_descent,
        dtype="bfloat16",
    )
    for make, settings, invalid in (
        (
            rounded_stochastically,
            ({"learning_rate": 0.1},),
            _with_rate((({"seed": 0.5}, TypeError, r"round_stochastically: seed is 0\.5; expected an integer"),)),
        ),
        (
            rounded_with_correction,
            ({"learning_rate": 0.1},),
            _with_rate((({"seed": 0.5}, TypeError, r"round_with_correction: seed is 0\.5; expected an integer"),)),
        ),
        (rounded_with_compensation, ({"learning_rate": 0.1},), ()),
        (rounded_with_master, ({"learning_rate": 0.1},), ()),
    )
)

# large enough for a difference of rounding that few elements show
SHAPES = {"w": (16, 33), "b": (7,), "s": ()}

CASES = [(row, settings) for row in ROWS for settings in row.settings]

every_row = pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
every_case = pytest.mark.parametrize(
    ("row", "settings"), CASES, ids=[f"{row.name}-{row.settings.index(settings)}" for row, settings in CASES]
)


def tree(seed: int = 0, dtype: Any = np.float32) -> dict[str, Any]:
    """Parameters of a few shapes."""
    random = np.random.default_rng(seed)
    return {
        name: jnp.asarray(random.standard_normal(shape).astype(np.float32), dtype) for name, shape in SHAPES.items()
    }


def gradients(steps: int, seed: int = 1) -> dict[str, Any]:
    """Random gradients over six orders of magnitude, a leading axis of steps."""
    random = np.random.default_rng(seed)
    scales = 10.0 ** (np.arange(steps) % 7 - 3)
    return {
        name: jnp.asarray((random.standard_normal((steps, *shape)).T * scales).T.astype(np.float32))
        for name, shape in SHAPES.items()
    }


def one_step(tx: optax.GradientTransformation, params: Any, state: Any, g: Any) -> tuple[Any, Any]:
    updates, state = optax.with_extra_args_support(tx).update(g, state, params)
    with jax.numpy_dtype_promotion("standard"):  # it adds updates in the gradient's dtype
        return optax.apply_updates(params, updates), state


def scan(tx: optax.GradientTransformation, params: Any, gradients: Any) -> Any:
    """The parameters after one step per gradient, in one program."""
    step = lambda carry, g: (one_step(tx, *carry, g), None)  # noqa: E731
    return jax.lax.scan(step, (params, tx.init(params)), gradients)[0][0]


def history(tx: optax.GradientTransformation, params: Any, gradients: Any) -> Any:
    """The parameters after each step, in one compiled program."""

    def step(carry: tuple, g: Any) -> tuple:
        carry = one_step(tx, *carry, g)
        return carry, carry[0]

    return jax.jit(lambda params, gradients: jax.lax.scan(step, (params, tx.init(params)), gradients)[1])(
        params, gradients
    )


def assert_same_bits(a: Any, b: Any) -> None:
    """Structures, dtypes and bit patterns are equal."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(map(np.asarray, jax.tree.leaves(a)), map(np.asarray, jax.tree.leaves(b))):
        assert x.dtype == y.dtype
        assert x.tobytes() == y.tobytes(), f"{np.sum(x != y)} of {x.size} differ"
