r"""Schedules that are values: the usual ones, with optax's names, arguments and values, and any of your own.

A schedule $s_t$ is a function of the step count. Wherever an optimizer takes a number it takes one too, also a plain
function, which then is part of the program. Those made here are values: their numbers, steps included, are named,
changed without compiling, batched and differentiated like any hyperparameter of the optimizer around them.

>>> import gdx
>>> rate = gdx.schedules.warmup_cosine_decay_schedule(0.0, peak_value=0.1, warmup_steps=10, decay_steps=100)
>>> tx = gdx.adamw(rate)
>>> tx.replace(peak_value=0.2).hyperparams["warmup_steps"]
10.0

`gdx.schedule` makes a class of schedules of a function. The result has the same bits whether the numbers are constants,
arguments or lanes of `vmap`, eagerly and compiled, for one count or an array of them. At every count the slopes in all
numbers are finite. A number of steps between 0 and 1 is refused where it can be read: it is meant for something else;
and what optax only logs, such as a transition of 0 steps, is warned of.
Steps are computed in the default float dtype: in float32 they are exact up to $2^{24}$.
"""

import functools
import math
import reprlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ParamSpec, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx.annotations import check_type
from gdx.checks import no_values
from gdx.fields import in_default_dtype, is_concrete, is_opaque, is_real, static, text
from gdx.numerics import by_itself
from gdx.values import KEEPERS, Value, kept_calls

__all__ = [
    "Schedule",
    "constant_schedule",
    "cosine_decay_schedule",
    "exponential_decay",
    "join_schedules",
    "linear_schedule",
    "piecewise_constant_schedule",
    "polynomial_schedule",
    "warmup_constant_schedule",
    "warmup_cosine_decay_schedule",
    "warmup_exponential_decay_schedule",
    "warmup_stable_decay_schedule",
]

P = ParamSpec("P")
Number = float | np.ndarray | jax.Array


class Schedule(Value):
    """A schedule that is a value: a call of a function that makes schedules, kept. See `gdx.schedule`.

    >>> import gdx
    >>> isinstance(gdx.schedules.constant_schedule(0.5), gdx.schedules.Schedule)
    True
    """

    _keeper = "schedule"
    _has_name = True

    def _convert(self, name: str, value: Any, source: str = "") -> tuple[Any, bool]:
        takes = self._metadata[name]["takes"]
        if value is not takes.default:
            check_type(f"{type(self).__name__}: {name}", value, takes.annotation)
        kept, is_child = super()._convert(name, value, source)
        if is_child or not isinstance(value, tuple | list | dict):
            return kept, is_child
        items = jax.tree.map(lambda x: Plain(x) if is_opaque(x) else x, value, is_leaf=lambda x: isinstance(x, Value))
        return super()._convert(name, items, source)

    def validate(self) -> None:
        leaves = jax.tree.leaves(self)
        if all(map(is_concrete, leaves)) and not any(map(np.ndim, leaves)):
            self._made(lambda number: number)
        if type(self).__module__ == __name__:  # of a function of one's own a name says nothing
            for name, value in self._given().items():
                self._check_steps(name, value)

    def _check_steps(self, name: str, value: Any) -> None:
        """Raises where an argument that counts steps, as optax's names tell, has something else."""
        numbers = [value] if name.endswith(("_steps", "_begin")) else []
        if name.startswith("boundaries") and value is not None:
            numbers = [at[0] if isinstance(at, tuple | list) else at for at in value]
        least: Any = 0 if name.endswith("_steps") and name != "transition_steps" else -math.inf
        expected = f"a number of steps, none of them between 0 and 1{'' if least else ' or below 0'}"
        for number in filter(is_concrete, numbers):
            counted = in_default_dtype(np.asarray(number, float))
            # a fraction of a step is meant for something else, such as a rate in the wrong place
            if np.any(((counted > 0) & (counted < 1)) | (counted < least)):
                one = "" if number is value else ": one"
                raise ValueError(f"{type(self).__name__}: {name}{one} is {text(counted)}; expected {expected}")
            if name == "boundaries":
                least, expected = counted, f"a number of steps >= {text(counted)}, the one before it"
        # what is hardly meant, and optax logs
        logged = {"transition_steps": np.less_equal, "transition_begin": np.less, "decay_rate": np.equal}
        if name in logged and is_concrete(value) and np.any(logged[name](np.asarray(value), 0)):
            warnings.warn(
                f"{type(self).__name__}: {name} is {text(value)}, which counts as none, as in optax", stacklevel=2
            )

    def __call__(self, count: Any) -> jax.Array:
        """The value at a step count, or at each of an array of them."""
        if not is_real(count):
            shown = reprlib.repr(count)
            raise TypeError(f"{type(self).__name__}: count is {shown}; expected a step count, or an array of them")
        count = jnp.asarray(count)
        dtype = jnp.result_type(float)
        # adding 0 * t keeps a constant from being worked on at compile time, which rounds differently
        zero = jnp.sum(0 * count.astype(dtype))
        made = self._made(lambda x: x if isinstance(x, Value) else jnp.asarray(x, dtype) + zero)
        # it computes with an integer count, which strict promotion would refuse
        with jax.numpy_dtype_promotion("standard"):
            value = jnp.asarray(made(count))
        return value if value.shape else jnp.broadcast_to(value, count.shape)

    def _made(self, convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """What the function returns for its fields, this done to numbers and schedules in them."""
        said = (
            f"{type(self).__name__}: it needs the value of a number that is traced while it makes the schedule; take "
            f"the schedule of that name in gdx.schedules, or decide with jnp.where in the function of the step count"
        )
        with no_values(said), jax.numpy_dtype_promotion("standard"), np.errstate(all="ignore"):
            made = cast(Any, self)._function[0](**self._arguments_with(convert))
        if not callable(made):
            raise TypeError(f"{type(self).__name__} returned {made!r}; expected a function of the step count")
        return made


class Plain(Value):
    """A plain function in a container, which leaves what is beside it a child of the pytree."""

    function: Callable = static()

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __repr__(self) -> str:
        return text(self.function)


@functools.cache
def _schedule_class(function: Callable) -> Any:
    return kept_calls(function, Schedule)


KEEPERS["schedule"] = _schedule_class


def schedule(function: Callable[P, Callable[[Any], Any]]) -> Callable[P, Schedule]:
    """A class of schedules that are calls of a function, kept; the function returns a function of the step count.

    As `gdx.value` does for transforms. Numbers are floats, and integers where the parameter's default or annotation is
    a float; an integer elsewhere decides the program. The function is called again whenever the schedule is, with
    arrays for the numbers, so it decides with `jnp.where`, not with `if`.

    Args:
      function: makes a schedule of its arguments: your own, or one of optax's (whose steps are integers, which then
        cannot change without compiling).

    Raises:
      TypeError: it is a schedule already, takes `*args` or `**kwargs`, or returns no function; or, in a call, it
        compares traced numbers.

    >>> import gdx, optax
    >>> @gdx.schedule
    ... def inverse_root(peak_value: float, warmup_steps: float):
    ...     return lambda count: peak_value * (warmup_steps / (warmup_steps + count)) ** 0.5
    >>> rate = inverse_root(0.1, warmup_steps=100)
    >>> rate, f"{float(rate(300)):.3f}"
    (inverse_root(peak_value=0.1, warmup_steps=100.0), '0.050')
    >>> gdx.sgd(rate).replace(peak_value=0.2).hyperparams["peak_value"]
    0.2
    """
    if not callable(function) or _is_made(function):
        mend = "; what returns a number is one already: give it to the optimizer" if callable(function) else ""
        raise TypeError(f"schedule: got {reprlib.repr(function)}; expected a function that makes a schedule{mend}")
    if isinstance(function, type) and issubclass(function, Schedule):
        return cast(Any, function)
    return _schedule_class(cast(Any, function))


def _is_made(function: Callable) -> bool:
    """Whether a function is a schedule, whose value at a step count is a number."""
    try:
        with jax.numpy_dtype_promotion("standard"):
            return isinstance(jax.eval_shape(function, jax.ShapeDtypeStruct((), jnp.int32)), jax.ShapeDtypeStruct)
    except Exception:  # what makes one asks for more, or returns a function
        return isinstance(function, Schedule)


def _check(label: str, number: Any, is_right: Any, expected: str) -> None:
    if is_concrete(is_right) and not is_right:
        raise ValueError(f"{label} is {float(number):g}; expected {expected}")


# At the ends of an interval `where` takes the slope of one side, where `maximum` and `clip` take half of it.


def _passed(count: Any, begin: Any) -> jax.Array:
    """The steps since begin, or since 0 if that is later."""
    # at its default, 0, begin has the slope of what is right of it, but for the count 0, which has passed nothing
    since = count - jnp.where((begin > 0) | (begin == 0) & (count > 0), begin, 0)
    return jnp.where(since < 0, 0, since)


def _progress(count: Any, begin: Any, steps: Any) -> jax.Array:
    """How far the count is between begin and begin + steps, from 0 to 1; 0 for no steps."""
    passed = _passed(count, begin)
    return jnp.where(passed < steps, by_itself(passed * (1 / jnp.where(steps > 0, steps, 1))), steps > 0)


def _between(start: Any, end: Any, share: Any) -> jax.Array:
    """This share of the way from start to end. No product is contracted with what comes next: in no program."""
    return start + by_itself((end - start) * share)


def _power(base: Any, exponent: Any) -> jax.Array:
    """`base ** exponent` for base >= 0, with finite slopes at 0."""
    positive = base > 0
    return jnp.where(positive, jnp.where(positive, base, 1) ** exponent, jnp.where(exponent == 0, 1.0, 0.0))


def _grown(value: Any, rate: Any, power: Any) -> jax.Array:
    """`value * rate ** power`, which stops short of where it or its slopes would be infinite."""
    most = np.log(jnp.finfo(jnp.result_type(float)).max) - 2
    size = power * jnp.log(jnp.maximum(rate, 1)) + jnp.log((1 + power) * jnp.maximum(jnp.abs(value), 1))
    return jnp.where(size > most, jnp.sign(value) * np.exp(most), value * jnp.where(size > most, 1, rate) ** power)


def _half_cosine(count: Any, steps: Any, exponent: Any) -> jax.Array:
    return _power(0.5 * (1 + jnp.cos(jnp.pi * _progress(count, 0, steps))), exponent)


def _warmed_up(init_value: Any, peak_value: Any, warmup_steps: Any, then: optax.Schedule) -> optax.Schedule:
    up = _function_of(linear_schedule)(init_value, peak_value, warmup_steps)
    return _function_of(join_schedules)([up, then], [warmup_steps])


def _function_of(made: Any) -> Callable[..., optax.Schedule]:
    """What a class of schedules is made of: inside of another the numbers of steps may be no user's, nor whole."""
    return made._function[0]


@schedule
def constant_schedule(value: Number) -> optax.Schedule:
    r"""$s_t = s$.

    >>> import gdx
    >>> float(gdx.schedules.constant_schedule(0.5)(10))
    0.5
    """
    return lambda count: value


@schedule
def linear_schedule(
    init_value: Number, end_value: Number, transition_steps: Number, transition_begin: Number = 0.0
) -> optax.Schedule:
    r"""From $a$ to $b$ in $n$ steps, along a line: $s_t = a + (b - a) \, p_t$, with $p_t = (t - t_0) / n$ in [0, 1].

    >>> import gdx
    >>> float(gdx.schedules.linear_schedule(1.0, 0.0, transition_steps=4)(1))
    0.75
    """

    return lambda count: _between(end_value, init_value, 1 - _progress(count, transition_begin, transition_steps))


@schedule
def polynomial_schedule(
    init_value: Number, end_value: Number, power: Number, transition_steps: Number, transition_begin: Number = 0.0
) -> optax.Schedule:
    r"""From $a$ to $b$ in $n$ steps: $s_t = b + (a - b) (1 - p_t)^k$, with $p_t = (t - t_0) / n$ in [0, 1].

    >>> import gdx
    >>> float(gdx.schedules.polynomial_schedule(1.0, 0.0, power=2, transition_steps=4)(2))
    0.25
    """

    rest = lambda count: 1 - _progress(count, transition_begin, transition_steps)  # noqa: E731
    return lambda count: _between(end_value, init_value, _power(rest(count), power))


@schedule
def exponential_decay(
    init_value: Number,
    transition_steps: Number,
    decay_rate: Number,
    transition_begin: Number = 0.0,
    staircase: bool = False,
    end_value: Number | None = None,
) -> optax.Schedule:
    r"""By a factor $r$ every $n$ steps: $s_t = a \, r^{(t - t_0) / n}$, rounded down to whole powers as a staircase.

    `end_value` bounds it, from below for $r < 1$, else from above. With no steps, or $r = 0$, it is constant.
    Growth without end stops near the largest number that there is.

    >>> import gdx
    >>> float(gdx.schedules.exponential_decay(1.0, transition_steps=10, decay_rate=0.25)(5))
    0.5
    """

    _check("exponential_decay: decay_rate", decay_rate, staircase or decay_rate >= 0, "a number >= 0")

    def at(count: Any) -> Any:
        passed, acts = _passed(count, transition_begin), (transition_steps > 0) & (decay_rate != 0)
        rate, steps = jnp.where(acts, decay_rate, 1), jnp.where(acts, transition_steps, 1)
        # a quotient by way of 1 / steps may be just below a whole number
        value = _grown(init_value, rate, jnp.floor_divide(passed, steps) if staircase else passed * (1 / steps))
        if end_value is not None:
            value = jnp.where(acts & ((value < end_value) == (rate < 1)), end_value, value)
        return value

    return at


@schedule
def cosine_decay_schedule(
    init_value: Number, decay_steps: Number, alpha: Number = 0.0, exponent: Number = 1.0
) -> optax.Schedule:
    r"""Half a cosine from $a$ to $\alpha a$ in $n$ steps, then constant:

    $$ s_t = a \left( (1 - \alpha) \left( \tfrac{1}{2} (1 + \cos \pi p_t) \right)^k + \alpha \right),
       \qquad p_t = \min(t / n, 1) $$

    Source: Loshchilov & Hutter, SGDR (2017), eq. 5.

    >>> import gdx
    >>> f"{gdx.schedules.cosine_decay_schedule(1.0, decay_steps=10)(5):.3f}"
    '0.500'
    """
    _check("cosine_decay_schedule: decay_steps", decay_steps, decay_steps > 0, "a positive number of steps")
    return lambda count: init_value * _between(alpha, 1, _half_cosine(count, decay_steps, exponent))


@schedule
def warmup_constant_schedule(init_value: Number, peak_value: Number, warmup_steps: Number) -> optax.Schedule:
    r"""Along a line to the peak, where it stays.

    >>> import gdx
    >>> float(gdx.schedules.warmup_constant_schedule(0.0, 1.0, warmup_steps=4)(1))
    0.25
    """
    return _function_of(linear_schedule)(init_value, peak_value, warmup_steps)


@schedule
def warmup_cosine_decay_schedule(
    init_value: Number,
    peak_value: Number,
    warmup_steps: Number,
    decay_steps: Number,
    end_value: Number = 0.0,
    exponent: Number = 1.0,
) -> optax.Schedule:
    r"""Along a line to the peak, then half a cosine to the end; `decay_steps` counts both.

    >>> import gdx
    >>> rate = gdx.schedules.warmup_cosine_decay_schedule(0.0, 1.0, warmup_steps=10, decay_steps=20)
    >>> [f"{rate(count):.2f}" for count in (5, 10, 15, 20)]
    ['0.50', '1.00', '0.50', '0.00']
    """
    steps = decay_steps - warmup_steps
    _check("warmup_cosine_decay_schedule: decay_steps - warmup_steps", steps, steps > 0, "a positive number of steps")

    def down(count: Any) -> Any:
        end = jnp.where(peak_value == 0, 0, end_value)  # as in optax, where it is a share of the peak
        return _between(end, peak_value, _half_cosine(count, steps, exponent))

    return _warmed_up(init_value, peak_value, warmup_steps, down)


@schedule
def warmup_exponential_decay_schedule(
    init_value: Number,
    peak_value: Number,
    warmup_steps: Number,
    transition_steps: Number,
    decay_rate: Number,
    transition_begin: Number = 0.0,
    staircase: bool = False,
    end_value: Number | None = None,
) -> optax.Schedule:
    r"""Along a line to the peak, then as `exponential_decay`.

    >>> import gdx
    >>> rate = gdx.schedules.warmup_exponential_decay_schedule(0.0, 1.0, 10, transition_steps=10, decay_rate=0.5)
    >>> float(rate(5)), float(rate(20))
    (0.5, 0.5)
    """
    decay = _function_of(exponential_decay)
    down = decay(peak_value, transition_steps, decay_rate, transition_begin, staircase, end_value)
    return _warmed_up(init_value, peak_value, warmup_steps, down)


@schedule
def warmup_stable_decay_schedule(
    init_value: Number,
    peak_value: Number,
    warmup_steps: Number,
    stable_steps: Number,
    decay_steps: Number,
    end_value: Number = 0.0,
    exponent: Number = 1.0,
) -> optax.Schedule:
    r"""Along a line to the peak, there for a while, then down in the last steps: $b + (a - b) (1 - p_t^k)$.

    With $k = 1$ it ends along a line; $k = 1/2$ falls faster at first. A run can be prolonged from the stable part.

    Source: Hägele et al., Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations (2024), section 3.

    >>> import gdx
    >>> rate = gdx.schedules.warmup_stable_decay_schedule(0.0, 1.0, warmup_steps=10, stable_steps=80, decay_steps=10)
    >>> float(rate(5)), float(rate(50)), float(rate(95))
    (0.5, 1.0, 0.5)
    """

    def down(count: Any) -> Any:
        return _between(peak_value, end_value, _power(_progress(count, stable_steps, decay_steps), exponent))

    return _warmed_up(init_value, peak_value, warmup_steps, down)


@schedule
def piecewise_constant_schedule(
    init_value: Number, boundaries_and_scales: Mapping[int, float] | Sequence[tuple[float, float]] | None = None
) -> optax.Schedule:
    r"""Scaled at each boundary: $s_t = a \prod_{b_i \le t} f_i$.

    The boundaries of a mapping, `{100: 0.1}`, are part of the structure; those of pairs, `[(100.0, 0.1)]`, are numbers.

    >>> import gdx
    >>> rate = gdx.schedules.piecewise_constant_schedule(1.0, {100: 0.5, 200: 0.5})
    >>> float(rate(99)), float(rate(100)), float(rate(200))
    (1.0, 0.5, 0.25)
    """
    pairs = boundaries_and_scales or ()
    pairs = list(pairs.items()) if isinstance(pairs, Mapping) else pairs
    for _, scale in pairs:
        _check("piecewise_constant_schedule: a scale", scale, scale >= 0, "a number >= 0")

    return lambda count: math.prod((jnp.where(count < at, 1, scale) for at, scale in pairs), start=init_value)


@schedule
def join_schedules(schedules: Sequence[optax.Schedule], boundaries: Sequence[float]) -> optax.Schedule:
    r"""One schedule after the other, each with the count from its own boundary.

    Args:
      schedules: those of this module, or plain functions of the count.
      boundaries: where each but the first begins, none before the one before it.

    >>> import gdx
    >>> up, down = gdx.schedules.linear_schedule(0.0, 1.0, 10), gdx.schedules.linear_schedule(1.0, 0.0, 10)
    >>> rate = gdx.schedules.join_schedules([up, down], [10])
    >>> float(rate(5)), float(rate(12.5))
    (0.5, 0.75)
    """
    if len(boundaries) != len(schedules) - 1:
        raise ValueError(
            f"join_schedules: got {len(schedules)} schedules and {len(boundaries)} boundaries; "
            f"expected one boundary less"
        )

    def at(count: Any) -> Any:
        now, value = jnp.int32(0), jnp.zeros(())
        for i, boundary in enumerate(boundaries, 1):
            now = jnp.where(count < boundary, now, i)
        for i, (begin, part) in enumerate(zip([0, *boundaries], schedules)):
            # not called with counts that are not its own, for which it may have no value
            value = jnp.where(now == i, part(jnp.where(now == i, count - begin, 0)), value)
        return value

    return at
