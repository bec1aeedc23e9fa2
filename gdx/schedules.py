"""Schedules that are values: optax's own, with their numbers as leaves."""

import contextlib
import functools
import inspect
import operator
import types
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from gdx.fields import Static, Value, is_concrete, text, to_scalar

WAYS = 64


class schedule(Value):
    r"""A schedule $s_t = f(a_1, a_2, \dots)(t)$ whose numbers $a_i$ are leaves; $f$ is a function that makes schedules.

    The numbers given here may be changed, batched and differentiated like any hyperparameter of an
    optimizer, and are named like one: `tx.replace(peak_value=0.2)` compiles nothing. Those in a tree are named with
    their path, `boundaries_and_scales.100`. Everything else (defaults that are not given, `staircase=True`, the steps
    that are keys of a dictionary, what `functools.partial` holds) is a constant.

    The result has the same bits whether the numbers are constants, arguments or lanes of `vmap`. Where
    $f$ compares its numbers, to leave out a phase of no steps say, and they are no constants, both ways are compiled
    and the comparison chooses between them when it runs; it is NaN for numbers that $f$ refuses. Steps are computed in
    the default float dtype: in float32 they are exact up to $2^{24}$.

    Args:
      factory: a function that returns a function of the step count, such as `optax.cosine_decay_schedule`.
      **arguments: its arguments: numbers, other `gdx.schedule`s and trees of both become leaves, anything else stays as
        it is.

    Raises:
      TypeError: factory is no function, does not take these arguments, needs the value of a number
        while it makes the schedule (as optax's one-cycle schedules do with `transition_steps`), or
        compares traced numbers in more than 64 ways; give that one as a constant, in `functools.partial`.
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
        factory, constants = _without_partial(factory)
        name, signature = _name(factory), inspect.signature(factory)
        try:
            signature.bind(**{**constants, **arguments})
        except TypeError as error:
            raise TypeError(f"schedule: {name}: {error}; it takes {', '.join(signature.parameters)}") from None
        numbers: dict[str, Any] = {}
        for key, value in arguments.items():
            constants.pop(key, None)
            if _is_constant(value):
                constants[key] = value
            else:
                numbers[key] = _map_numbers(functools.partial(_to_number, f"schedule: {name}: {key}"), value)
        # in one order, however they were given
        order = [*signature.parameters, *sorted({*numbers, *constants} - {*signature.parameters})]
        in_order = ({key: given[key] for key in order if key in given} for given in (numbers, constants))
        vars(self).update(factory=factory, **dict(zip(("numbers", "constants"), in_order)))
        for way in self._ways(lambda number: number):
            if not callable(made := way.made):
                raise TypeError(f"schedule: {name} returned {made!r}; expected a function of the step count")

    def __call__(self, count: Any) -> jax.Array:
        count = jnp.asarray(count)
        dtype = jnp.result_type(float)

        def scalar(number: Any) -> Any:
            return np.asarray(number).astype(dtype) if is_concrete(number) else jnp.asarray(number, dtype)

        def value(way: _Way) -> jax.Array:
            def array(number: Any) -> jax.Array:
                # 1 where another way is taken: there this one may divide by 0, and NaN would go into all slopes
                chosen = jnp.where(way.taken, scalar(number), 1) if way.conditions else scalar(number)
                # adding 0 * t keeps a constant from being worked on at compile time, which rounds differently
                return chosen + 0 * count.astype(dtype)

            found = self._made(_Way(way.choices), scalar, array).made(count)
            return jnp.asarray(found.array if isinstance(found, _Number) else found)

        # schedules compute with an integer count, which strict promotion would refuse
        with jax.numpy_dtype_promotion("standard"):
            total: Any = jnp.nan
            for way in self._ways(scalar):
                total = jnp.where(way.taken, value(way), total) if way.conditions else value(way)
        return total

    def _made(self, way: "_Way", scalar: Callable[[Any], Any], array: Callable[[Any], Any]) -> "_Way":
        """A way, with what the factory makes on it of numbers that compute as arrays and compare as scalars."""

        def number(leaf: Any) -> Any:
            return leaf if isinstance(leaf, schedule) else _Number(array(leaf), scalar(leaf), way)

        try:
            with np.errstate(all="ignore"):
                made = self.factory(**_map_numbers(number, self.numbers), **self.constants)
        except TypeError as error:
            if _Number.__name__ not in str(error):
                raise
            raise TypeError(
                f"schedule: {_name(self.factory)} computes with its numbers by more than operators while it makes the "
                f"schedule; do it in the function of the step count that it returns ({error})"
            ) from error
        way.made = _with_arrays(made, {})
        return way

    def _ways(self, scalar: Callable[[Any], Any]) -> "list[_Way]":
        """The ways that comparisons of traced numbers can turn out, without those that the factory refuses."""
        ways: list[_Way] = []
        refusal: ValueError | None = None
        untried: list[tuple[bool, ...]] = [()]
        while untried:
            way = _Way(untried.pop())
            try:
                ways.append(self._made(way, scalar, scalar))
            except ValueError as error:
                refusal = error
            untried += way.others()
            if len(ways) + len(untried) > WAYS:
                raise TypeError(
                    f"schedule: {_name(self.factory)} compares traced numbers in more than {WAYS} ways; give some of "
                    f"{', '.join(self.numbers)} as constants, in functools.partial, or close over the optimizer"
                )
        if not ways and refusal is not None:
            raise refusal
        return ways

    @property
    def named(self) -> dict[str, Any]:
        """Every number by its name, where in a tree with its path: `cosine_kwargs.0.peak_value`."""
        return {_dotted(path): number for path, number in jax.tree_util.tree_leaves_with_path(self)}

    def replace(self, **changes: Any) -> Self:
        """The same schedule with some arguments changed, or single numbers, by their names in `named`.

        Raises:
          ValueError, TypeError: as when a schedule is made.
        """
        inner = {name: changes.pop(name) for name in self.named if "." in name and name in changes}
        changed = jax.tree_util.tree_map_with_path(lambda path, kept: inner.get(_dotted(path), kept), self)
        fixed, plain = self._constants_by_kind()
        # a number that is a constant stays one
        fixed = {name: changes.pop(name, kept) for name, kept in fixed.items()}
        return type(self)(functools.partial(self.factory, **fixed), **{**changed.numbers, **plain, **changes})

    def _constants_by_kind(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The constants that `functools.partial` made of what would be numbers, and those of other types."""
        plain = {name: value for name, value in self.constants.items() if _is_constant(value)}
        return {name: value for name, value in self.constants.items() if name not in plain}, plain

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and "numbers" in vars(self):
            if name in self.numbers:
                return self.numbers[name]
            if name in self.named:
                return self.named[name]
        raise AttributeError(f"schedule has no number {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a schedule is a value; use replace({name}=...)")

    def __repr__(self) -> str:
        fixed, plain = self._constants_by_kind()
        factory = f"partial({', '.join([_name(self.factory), *_shown(fixed)])})" if fixed else _name(self.factory)
        return f"schedule({', '.join([factory, *_shown(self.numbers), *_shown(plain)])})"


def _flatten_with_keys(made: schedule) -> tuple[list, tuple]:
    children = [(jax.tree_util.GetAttrKey(name), value) for name, value in made.numbers.items()]
    constants = tuple((name, Static(value)) for name, value in made.constants.items())
    return children, (made.factory, tuple(made.numbers), constants)


def _unflatten(aux: tuple, children: Any) -> schedule:
    factory, names, constants = aux
    made = object.__new__(schedule)
    fixed = {name: kept.value for name, kept in constants}
    vars(made).update(factory=factory, numbers=dict(zip(names, children)), constants=fixed)
    return made


jax.tree_util.register_pytree_with_keys(schedule, _flatten_with_keys, _unflatten)


def _without_partial(factory: Callable) -> tuple[Callable, dict[str, Any]]:
    """The function in a `functools.partial` and its arguments by name, where they all have one."""
    if not isinstance(factory, functools.partial):
        return factory, {}
    parameters = list(inspect.signature(factory.func).parameters.values())
    named = all(p.kind == p.POSITIONAL_OR_KEYWORD for p in parameters[: len(factory.args)])
    if len(parameters) < len(factory.args) or not named:
        return factory, {}
    return factory.func, {**dict(zip((p.name for p in parameters), factory.args)), **factory.keywords}


def _is_constant(value: Any) -> bool:
    """Whether an argument is never a number or a tree of them."""
    opaque = callable(value) and not isinstance(value, schedule)
    return opaque or value is None or isinstance(value, bool | np.bool_ | str)


def _map_numbers(function: Callable[[Any], Any], tree: Any) -> Any:
    """The function of each number of a tree, and of each schedule as a whole."""
    return jax.tree.map(function, tree, is_leaf=lambda x: isinstance(x, schedule))


def _to_number(label: str, value: Any) -> Any:
    if isinstance(value, schedule):
        return value
    if callable(value):
        raise TypeError(
            f"{label} has {text(value)} in it; expected numbers, or schedules that are values, such as "
            f"gdx.schedule(optax.constant_schedule, value=0.1)"
        )
    return to_scalar(label, value)


def _with_arrays(made: Any, known: dict[int, Any]) -> Any:
    """A function, or what it closes over, with every `_Number` in it replaced by its array.

    Args:
      made: what the factory has made, or a part of it.
      known: what has been replaced so far, by its `id`: a function may close over itself.
    """
    if isinstance(made, _Number):
        return made.array
    if isinstance(made, list | tuple):
        return type(made)(_with_arrays(value, known) for value in made)
    if isinstance(made, dict):
        return {key: _with_arrays(value, known) for key, value in made.items()}
    if isinstance(made, functools.partial):
        parts = _with_arrays((made.func, list(made.args), made.keywords), known)
        return functools.partial(parts[0], *parts[1], **parts[2])
    if isinstance(made, types.FunctionType):
        if id(made) not in known:
            cells = tuple(types.CellType() for _ in made.__closure__ or ())
            known[id(made)] = copied = types.FunctionType(made.__code__, made.__globals__, made.__name__, None, cells)
            copied.__defaults__ = _with_arrays(made.__defaults__, known)
            copied.__kwdefaults__ = _with_arrays(made.__kwdefaults__, known)
            for cell, kept in zip(cells, made.__closure__ or ()):
                with contextlib.suppress(ValueError):  # it is empty: the factory left this variable unset
                    cell.cell_contents = _with_arrays(kept.cell_contents, known)
        return known[id(made)]
    return made


def _dotted(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _shown(arguments: dict[str, Any]) -> list[str]:
    return [f"{key}={text(value)}" for key, value in arguments.items()]


def _name(factory: Callable) -> str:
    return getattr(factory, "__name__", None) or repr(factory)


class _Way:
    """How the comparisons of one run of a factory turn out: the first as chosen, any further ones True.

    Attributes:
      choices: how the first ones are to turn out.
      conditions: what has to hold for it to be this way, as far as it is traced.
      made: what the factory has made on it, once it has.
    """

    def __init__(self, choices: tuple[bool, ...]):
        self.choices = choices
        self.conditions: list[Any] = []
        self.made: Any = None

    def decide(self, condition: Any) -> bool:
        if is_concrete(condition):
            return bool(condition)
        if self.made is not None:
            raise TypeError("schedule: it compares a traced number when it is called; use jnp.where there")
        number = len(self.conditions)
        choice = self.choices[number] if number < len(self.choices) else True
        self.conditions.append(condition if choice else ~condition)
        return choice

    @property
    def taken(self) -> Any:
        """Whether it is this way that the numbers take."""
        return functools.reduce(operator.and_, self.conditions, True)

    def others(self) -> list[tuple[bool, ...]]:
        """The ways that leave this one where it was free to choose."""
        free = range(len(self.choices), len(self.conditions))
        return [(*self.choices, *[True] * (number - len(self.choices)), False) for number in free]


class _Number:
    """A number while a factory runs: it computes with an array, and compares as a scalar, or as the way says."""

    __array_ufunc__ = None  # leaves the arithmetic with numpy's scalars to this class

    def __init__(self, array: Any, scalar: Any, way: _Way):
        self.array, self.scalar, self.way = array, scalar, way

    def _refuse(self, *_: Any) -> Any:
        raise TypeError(
            "schedule: the factory needs this number while it makes the schedule; give it as a constant, "
            "as in gdx.schedule(functools.partial(optax.cosine_onecycle_schedule, 1000), peak_value=0.1)"
        )

    __int__ = __float__ = __index__ = __hash__ = _refuse

    def __repr__(self) -> str:
        return text(self.array)

    def __bool__(self) -> bool:
        return self.way.decide(self.scalar != 0)

    def _of(self, operation: Callable, *others: Any) -> "_Number":
        arrays, scalars = (
            operation(*(getattr(x, kept) if isinstance(x, _Number) else x for x in (self, *others)))
            for kept in ("array", "scalar")
        )
        return _Number(arrays, scalars, self.way)


def _comparison(operation: Callable) -> Callable:
    def method(self: _Number, other: Any) -> bool:
        return self.way.decide(operation(self.scalar, other.scalar if isinstance(other, _Number) else other))

    return method


for _operator in ("neg", "pos", "abs"):
    _operation = getattr(operator, _operator)
    setattr(_Number, f"__{_operator}__", lambda x, f=_operation: x._of(f))
for _operator in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _operation = getattr(operator, _operator)
    setattr(_Number, f"__{_operator}__", lambda x, y, f=_operation: x._of(f, y))
    setattr(_Number, f"__r{_operator}__", lambda x, y, f=_operation: x._of(lambda a, b: f(b, a), y))
for _operator in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(_Number, f"__{_operator}__", _comparison(getattr(operator, _operator)))
