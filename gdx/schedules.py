"""Schedules that are values: optax's own, with their numbers as leaves."""

import functools
import inspect
import operator
import types
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from gdx.fields import Value, is_concrete, text, to_scalar

WAYS = 64


class schedule(Value):
    r"""A schedule $s_t = f(a_1, a_2, \dots)(t)$ whose numbers $a_i$ are leaves; $f$ is a function that makes schedules.

    The numbers given here may be changed, batched and differentiated like any hyperparameter of an
    optimizer, and are named like one: `tx.replace(peak_value=0.2)` compiles nothing. Everything else
    (defaults that are not given, `staircase=True`, the steps that are keys of a dictionary) is a constant.

    The result has the same bits whether the numbers are constants, arguments or lanes of `vmap`. Where
    $f$ compares its numbers, to leave out a phase of no steps say, both ways are compiled and the
    comparison chooses between them when it runs. Steps are computed in the default float dtype: in
    float32 they are exact up to $2^{24}$.

    Args:
      factory: a function that returns a function of the step count, such as `optax.cosine_decay_schedule`.
      **arguments: its arguments: numbers and trees of numbers become leaves, anything else stays as it is.

    Raises:
      TypeError: factory is no function, does not take these arguments, needs the value of a number
        while it makes the schedule (as optax's one-cycle schedules do with `transition_steps`), or
        compares its numbers in more than 64 ways; give that one as a constant, in `functools.partial`.
      ValueError: a number is not finite or no scalar, or the factory refuses it.

    >>> import gdx, optax
    >>> rate = gdx.schedule(optax.cosine_decay_schedule, init_value=0.5, decay_steps=100)
    >>> float(rate(0)), float(rate(100))
    (0.5, 0.0)
    >>> tx = gdx.sgd(rate)
    >>> tx.replace(init_value=0.25).hyperparams["init_value"]
    0.25
    """

    def __init__(self, factory: Callable[..., Callable[[Any], Any]], /, **arguments: Any):
        if not callable(factory):
            raise TypeError(f"schedule: got {factory!r}; expected a function such as optax.cosine_decay_schedule")
        name, signature = _name(factory), inspect.signature(factory)
        try:
            signature.bind(**arguments)
        except TypeError as error:
            raise TypeError(f"schedule: {name}: {error}; it takes {', '.join(signature.parameters)}") from None
        numbers: dict[str, Any] = {}
        constants: dict[str, Any] = {}
        for key, value in arguments.items():
            if value is None or isinstance(value, bool | np.bool_ | str) or callable(value):
                constants[key] = value
            else:
                numbers[key] = jax.tree.map(lambda leaf, key=key: to_scalar(f"schedule: {name}: {key}", leaf), value)
        vars(self).update(factory=factory, numbers=numbers, constants=constants)
        for _, made in self._outcomes(lambda number: number):
            if not callable(made):
                raise TypeError(f"schedule: {name} returned {made!r}; expected a function of the step count")

    def __call__(self, count: Any) -> jax.Array:
        count = jnp.asarray(count)
        dtype = jnp.result_type(float)

        def array(number: Any) -> jax.Array:
            # adding 0 * t keeps a constant from being worked on at compile time, which rounds differently
            return jnp.asarray(number, dtype) + 0 * count.astype(dtype)

        # schedules compute with an integer count, which strict promotion would refuse
        with jax.numpy_dtype_promotion("standard"):
            (_, made), *others = self._outcomes(array)
            value = jnp.asarray(made(count))
            for conditions, made in others:
                value = jnp.where(functools.reduce(operator.and_, conditions), made(count), value)
        return value

    def _outcomes(self, array: Callable[[Any], Any]) -> list[tuple[list[Any], Callable[[Any], Any]]]:
        """What the factory makes for each way that comparisons of traced numbers can turn out.

        Returns:
          The conditions under which it is the one, and the schedule. Ways that the factory refuses are
          left out, for what is traced cannot be refused.
        """
        outcomes: list[tuple[list[Any], Callable]] = []
        refusal: ValueError | None = None
        untried: list[tuple[bool, ...]] = [()]
        while untried:
            way = _Way(untried.pop())
            try:
                numbers = jax.tree.map(lambda number: _Number(array(number), way), self.numbers)  # noqa: B023
                outcomes.append((way.conditions, _with_arrays(self.factory(**numbers, **self.constants))))
            except ValueError as error:
                refusal = error
            untried += way.others()
            if len(outcomes) + len(untried) > WAYS:
                raise TypeError(
                    f"schedule: {_name(self.factory)} compares traced numbers in more than {WAYS} ways; give some of "
                    f"{', '.join(self.numbers)} as constants, in functools.partial"
                )
        if not outcomes and refusal is not None:
            raise refusal
        return outcomes

    def replace(self, **changes: Any) -> Self:
        """The same schedule with some arguments changed.

        Raises:
          ValueError, TypeError: as when a schedule is made.
        """
        return type(self)(self.factory, **{**self.numbers, **self.constants, **changes})

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and name in vars(self).get("numbers", {}):
            return self.numbers[name]
        raise AttributeError(f"schedule has no number {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a schedule is a value; use replace({name}=...)")

    def __repr__(self) -> str:
        arguments = {**self.numbers, **self.constants}
        return f"schedule({', '.join([_name(self.factory), *(f'{k}={text(v)}' for k, v in arguments.items())])})"


def _flatten_with_keys(made: schedule) -> tuple[list, tuple]:
    children = [(jax.tree_util.GetAttrKey(name), value) for name, value in made.numbers.items()]
    return children, (made.factory, tuple(made.numbers), tuple(made.constants.items()))


def _unflatten(aux: tuple, children: Any) -> schedule:
    factory, names, constants = aux
    made = object.__new__(schedule)
    vars(made).update(factory=factory, numbers=dict(zip(names, children)), constants=dict(constants))
    return made


jax.tree_util.register_pytree_with_keys(schedule, _flatten_with_keys, _unflatten)


def _with_arrays(made: Any) -> Any:
    """A function, or what it closes over, with every `_Number` in it replaced by its array."""
    if isinstance(made, _Number):
        return made.array
    if isinstance(made, list | tuple):
        return type(made)(map(_with_arrays, made))
    if isinstance(made, dict):
        return {key: _with_arrays(value) for key, value in made.items()}
    if isinstance(made, types.FunctionType) and made.__closure__:
        cells = tuple(map(_cell_with_arrays, made.__closure__))
        return types.FunctionType(made.__code__, made.__globals__, made.__name__, made.__defaults__, cells)
    return made


def _cell_with_arrays(cell: types.CellType) -> types.CellType:
    try:
        return types.CellType(_with_arrays(cell.cell_contents))
    except ValueError:  # it is empty: the factory left this variable of its schedule unset
        return cell


def _name(factory: Callable) -> str:
    return getattr(factory, "__name__", None) or repr(factory)


class _Way:
    """How the comparisons of one run of a factory turn out: the first as chosen, any further ones True."""

    def __init__(self, choices: tuple[bool, ...]):
        self.choices = choices
        self.conditions: list[Any] = []

    def decide(self, condition: Any) -> bool:
        if is_concrete(condition):
            return bool(condition)
        number = len(self.conditions)
        choice = self.choices[number] if number < len(self.choices) else True
        self.conditions.append(condition if choice else ~condition)
        return choice

    def others(self) -> list[tuple[bool, ...]]:
        """The ways that leave this one where it was free to choose."""
        free = range(len(self.choices), len(self.conditions))
        return [(*self.choices, *[True] * (number - len(self.choices)), False) for number in free]


class _Number:
    """A number while a factory runs: it computes with an array, and compares as the way says."""

    __array_ufunc__ = None  # leaves the arithmetic with numpy's scalars to this class

    def __init__(self, array: Any, way: _Way):
        self.array, self.way = array, way

    def _refuse(self, *_: Any) -> Any:
        raise TypeError(
            "schedule: the factory needs this number while it makes the schedule; give it as a constant, "
            "as in gdx.schedule(functools.partial(optax.cosine_onecycle_schedule, 1000), peak_value=0.1)"
        )

    __int__ = __float__ = __index__ = __hash__ = _refuse

    def __repr__(self) -> str:
        return text(self.array)

    def __bool__(self) -> bool:
        return self.way.decide(self.array != 0)

    def __neg__(self) -> "_Number":
        return _Number(-self.array, self.way)


def _arithmetic(operation: Callable, *, reflected: bool = False) -> Callable:
    def method(self: _Number, other: Any) -> _Number:
        arrays = (self.array, other.array if isinstance(other, _Number) else other)
        return _Number(operation(*(reversed(arrays) if reflected else arrays)), self.way)

    return method


def _comparison(operation: Callable) -> Callable:
    def method(self: _Number, other: Any) -> bool:
        return self.way.decide(operation(self.array, other.array if isinstance(other, _Number) else other))

    return method


for _operator in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    setattr(_Number, f"__{_operator}__", _arithmetic(getattr(operator, _operator)))
    setattr(_Number, f"__r{_operator}__", _arithmetic(getattr(operator, _operator), reflected=True))
for _operator in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(_Number, f"__{_operator}__", _comparison(getattr(operator, _operator)))
