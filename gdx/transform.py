"""What a transform is: an optax transform that is a value, with one door.

`init` and `update`, which callers call, are written once, in `Transform`: they check the trees, and the update leaves
in the gradient's dtype. A transform of your own gives the step between: `init_tree` and `update_tree`::

    class scale_by_sign(gdx.Transform):
        strength: gdx.Scalar = gdx.hyperparameter(default=1.0)

        def init_tree(self, params):
            return optax.EmptyState()

        def update_tree(self, updates, state, params=None, **extra_args):
            return jax.tree.map(lambda g: self.strength.astype(g.dtype) * jnp.sign(g), updates), state

The class is its own factory: `scale_by_sign(0.5)` is the transform. The step sees every hyperparameter as a scalar
array of the default float dtype, however it was given (number, array, tracer or schedule), and gradients in at least
float32.

`gdx.value` makes transforms of functions: of optax's optimizers, links and wrappers, and of your own.
"""

import contextlib
import dataclasses
import functools
import operator
import re
import reprlib
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, ParamSpec, Self, cast, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx import values
from gdx.checks import (
    check_gradients,
    check_params,
    check_state,
    check_state_like,
    check_stepped,
    no_values,
    state_kinds,
)
from gdx.compat import enable_x64
from gdx.fields import hyperparameter, static, text, uncalled
from gdx.numerics import by_itself, compute_dtype
from gdx.values import KEEPERS, Value, is_float, is_whole, kept_calls

P = ParamSpec("P")


class CountedState(NamedTuple):
    """State of a transform that needs the step count, for a schedule or random rounding, and has none of its own.

    Attributes:
      count: int32 scalar, the number of updates so far: what schedules are called with.
      inner_state: the state that it has without.
    """

    count: jax.Array  # type: ignore[assignment]
    inner_state: Any


class _Shown:
    """What a transform holds as a tuple, for `"%s" % tx` and `"%r" % tx`, which look no further."""

    tx: Any = None

    def __repr__(self) -> str:
        return repr(self.tx)


class _NoAttribute:
    """In the place of tuple's methods that mean nothing here; a field of that name goes before it."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, tx: Any, owner: Any = None) -> Any:
        raise AttributeError(f"{getattr(owner, '__name__', 'Transform')} has no field {self.name!r}")


@dataclass_transform(
    frozen_default=True, eq_default=False, field_specifiers=(hyperparameter, static, dataclasses.field)
)
class Transform(Value, optax.GradientTransformationExtraArgs):
    """Base class: an optax transform that is also a pytree of its hyperparameters and a value.

    Each subclass becomes a frozen dataclass and a registered pytree. Its leaves are its
    hyperparameters; static fields and schedules that are plain functions belong to the tree structure.

    Hyperparameters are checked in the call that makes the transform, where they are concrete;
    gradients, parameters and state are checked whenever `update` is called or traced.

    >>> import gdx
    >>> tx = gdx.adamw(1e-3)
    >>> tx.replace(learning_rate=0.1)
    adamw(learning_rate=0.1)
    >>> tx.hyperparams["b2"]
    0.999
    >>> tx == gdx.adamw(1e-3)
    True
    """

    def __init_subclass__(cls) -> None:
        doors = {"init", "update"} & set(vars(cls))
        if doors and cls.__module__ != __name__:
            raise TypeError(
                f"{cls.__name__}: {' and '.join(sorted(doors))} check what callers give and are Transform's own; "
                f"give init_tree(self, params) and update_tree(self, updates, state, params=None, **extra_args)"
            )
        super().__init_subclass__()

    @classmethod
    def _empty(cls) -> Self:
        shown = _Shown()
        shown.tx = tx = tuple.__new__(cls, (shown,))
        return tx

    # The door.

    def init(self, params: optax.Params) -> optax.OptState:
        """The state before the first step."""
        check_params(self, params)
        return self._init(jax.tree.map(as_array, params))

    def update(
        self, updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        """The transformed updates and the next state."""
        # the gradients of optax.lookahead's pair of parameters are those of `fast`; its updates are a pair too
        check_gradients(self, updates, params.fast if isinstance(params, optax.LookaheadParams) else params)
        updates = jax.tree.map(as_array, updates)
        new, state = self._update(updates, state, params, extra_args)
        if isinstance(params, optax.LookaheadParams):
            return new, state
        return self._as_returned(new, updates, params), state

    def _as_returned(self, new: Any, updates: Any, params: Any) -> Any:
        """Updates in the dtypes in which `update` returns them."""
        if params is not None and any(map(is_bfloat16, jax.tree.leaves(params))) and self.rounds:
            # what rounds parameters to bfloat16 says how far in float32
            return jax.tree.map(lambda u, g, p: u if is_bfloat16(p) else cast_like(u, g), new, updates, params)
        return jax.tree.map(cast_like, new, updates)

    @property
    def rounds(self) -> bool:
        """Whether it, or a transform inside it, rounds parameters."""
        return any(tx.rounds for tx in transforms_in(self))

    # Inside. What is below is what transforms call on each other: nothing is checked again. Links of one leaf widen
    # what comes in themselves, in the leaf's own program, where that takes no memory.

    def _init(self, params: optax.Params) -> optax.OptState:
        if not self.has_schedule:
            return self.at(None).init_tree(params)
        count = jnp.zeros([], jnp.int32)
        return CountedState(count, self.at(count).init_tree(params))

    def _update(self, updates: Any, state: Any, params: Any, extra_args: dict[str, Any]) -> tuple[Any, Any]:
        updates, count, inner = jax.tree.map(widened, updates), None, state
        if self.has_schedule:
            check_state(self, state, CountedState)
            count, inner = state
        at = self.at(count)
        returned = at.update_tree(updates, inner, params, **extra_args)
        check_stepped(self, returned, None if isinstance(params, optax.LookaheadParams) else updates)
        updates, new = returned
        _check_own(
            self, inner, new, functools.partial(jax.eval_shape, at.init_tree), updates if params is None else params
        )
        return updates, CountedState(optax.safe_increment(count), new) if self.has_schedule else new

    def _counts(self, state: Any) -> Iterator[tuple[Any, Any]]:
        """Where the schedules in it are, each with the count in a state at which the next step calls it."""
        if self.has_schedule:
            check_state(self, state, CountedState)
            for name, value in self._hyperparameters():
                if callable(value):
                    yield (name,), state.count
            state = state.inner_state
        for path, tx in _transforms_at(self):
            for inner, count in tx._counts(state):
                yield (*path, *inner), count

    def init_tree(self, params: optax.Params) -> optax.OptState:
        """For subclasses: the state before the first step."""
        raise NotImplementedError(f"{type(self).__name__} defines no init_tree")

    def update_tree(
        self, updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        """For subclasses: the transformed updates and the next state. Gradients come in at least float32."""
        raise NotImplementedError(f"{type(self).__name__} defines no update_tree")

    # Hyperparameters as arrays.

    def _hyperparameters(self) -> list[tuple[str, Any]]:
        """The numbers and schedules among its own fields, by name."""
        fields: Any = vars(self)
        structure = fields["_structure"]
        held = [(name, fields[name]) for name in (*structure.children, *structure.schedules)]
        return [pair for pair in held if not isinstance(pair[1], types.NoneType | tuple | list | dict | Transform)]

    @functools.cached_property
    def has_schedule(self) -> bool:
        """Whether a hyperparameter of its own, not of a transform inside it, is a schedule."""
        return any(callable(value) for _, value in self._hyperparameters())

    def at(self, count: Any) -> Self:
        """This transform with its hyperparameters in the default float dtype, schedules called with `count`."""
        fields: dict[str, Any] = vars(self)  # type: ignore[assignment]
        dtype = jnp.result_type(float)
        if fields.get("_at", (None,))[0] is dtype:
            return fields["_at"][1]
        own, arrays = self._hyperparameters(), {}
        for name, value in own:
            value = self._scheduled(name, value, count) if callable(value) else value
            if np.ndim(value):
                self._refuse_batch(name, value)
            arrays[name] = value.astype(dtype)
        at, structure = self._empty(), fields["_structure"]
        if structure.schedules:
            structure = structure.with_children(arrays)
        cast(Any, vars(at)).update({name: fields[name] for name in self._metadata} | arrays, _structure=structure)
        if all(isinstance(value, np.generic) for _, value in own):
            fields["_at"] = dtype, at
        return at

    def _scheduled(self, name: str, schedule: Callable[[Any], Any], count: Any) -> Any:
        """The value of a schedule at a count."""
        # it computes with an integer count, which strict promotion would refuse
        shown = text(schedule)
        said = (
            f"{type(self).__name__}: {name}, {shown}, needs the value of the step count, which is traced; let the "
            f"schedule compute with jax.numpy, and decide with jnp.where"
        )
        with no_values(said), jax.numpy_dtype_promotion("standard"):
            scheduled = schedule(count)
        value, _ = self._convert(name, scheduled, source=f", as returned by the schedule {shown},")
        return value

    def check_narrow(self, dtype: np.dtype) -> None:
        """Raises where a number that is valid in the default float dtype is not in this one, in which it is used."""
        if jnp.finfo(dtype).bits < jnp.finfo(jnp.result_type(float)).bits:
            with enable_x64(False):
                for name, value in self._hyperparameters():
                    if isinstance(value, np.generic):
                        self._convert(name, value, source=", in a step of float32,")

    def _refuse_batch(self, name: str, value: Any) -> None:
        """Raises since this is a batch, of which each member has a step of its own."""
        raise ValueError(
            f"{type(self).__name__}: {name} has shape {np.shape(value)}: this is a batch of "
            f"optimizers; call its init and update under jax.vmap, or train it with gdx.sweep"
        )

    # The optax view: the pair (init, update), and nothing of a tuple otherwise.

    def __iter__(self) -> Iterator[Callable]:
        return iter((self.init, self.update))

    def __getitem__(self, index: Any) -> Any:
        return (self.init, self.update)[index]

    def __len__(self) -> int:
        return 2

    @classmethod
    def _make(cls, pair: Any) -> optax.GradientTransformationExtraArgs:
        return optax.GradientTransformationExtraArgs(*pair)

    def _refuse(self, other: Any) -> Any:
        return NotImplemented

    __lt__ = __le__ = __gt__ = __ge__ = __add__ = __mul__ = __rmul__ = _refuse
    __contains__ = None
    count = _NoAttribute()
    index = _NoAttribute()


def transforms_in(tx: Transform) -> Iterator[Transform]:
    """The transforms among its arguments."""
    # at each update, so without their paths
    for leaf in jax.tree.leaves(values.flatten(tx)[0], is_leaf=is_whole):
        if isinstance(leaf, Transform):
            yield leaf


def all_within(tx: Transform) -> Iterator[Transform]:
    """It and all transforms inside, also those that calls have made."""
    yield tx
    made = tx.made if isinstance(tx, Call) else None
    for inner in [made] if isinstance(made, Transform) else transforms_in(tx):
        yield from all_within(inner)


def _transforms_at(tx: Transform) -> Iterator[tuple[tuple, Transform]]:
    """Path and transform of those among its arguments."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tx, is_leaf=lambda x: x is not tx and is_whole(x)):
        if isinstance(leaf, Transform):
            yield tuple(getattr(key, "name", getattr(key, "idx", getattr(key, "key", None))) for key in path), leaf


def _kinds_in(tx: Transform) -> Iterator[str]:
    """What the transforms among its arguments, and among theirs, are called."""
    for inner in transforms_in(tx):
        yield type(inner).__name__
        yield from _kinds_in(inner)


def as_array(g: Any) -> Any:
    """A leaf as it is; a Python float as an array, and numpy's float64 in what JAX has for it."""
    if not hasattr(g, "dtype"):
        return jnp.asarray(g, compute_dtype(g))
    return jnp.asarray(g) if isinstance(g, np.ndarray | np.generic) and g.dtype in (np.float64, np.complex128) else g


def widened(g: Any) -> Any:
    """A gradient in at least float32: a small decay beside an update in bfloat16 would vanish."""
    return g if g.dtype.itemsize >= 4 else jnp.asarray(g, compute_dtype(g))


def cast_like(u: Any, g: Any) -> Any:
    """The update in the gradient's dtype."""
    dtype = g.dtype if hasattr(g, "dtype") else compute_dtype(g)
    if u.dtype == dtype:
        return u
    # times a constant that is a power of two, a compiler would multiply in float16, and contract what adds the update
    return (by_itself(u) if dtype == jnp.float16 else u).astype(dtype)


def is_bfloat16(p: Any) -> bool:
    return getattr(p, "dtype", None) == jnp.bfloat16


class Foreign(Transform):
    """A transform of optax or of the user's own, which is functions: compared by identity, without leaves."""

    transform: optax.GradientTransformation = static()

    def _init(self, params: optax.Params) -> optax.OptState:
        return self.transform.init(params)

    def _update(self, updates: Any, state: Any, params: Any, extra_args: dict[str, Any]) -> tuple[Any, Any]:
        return foreign_update(self, self.transform, updates, state, params, extra_args)

    def __repr__(self) -> str:
        return f"<optax {getattr(self.transform.update, '__qualname__', 'transform').split('.')[0]}>"


def foreign_update(
    tx: Transform, made: Any, updates: Any, state: Any, params: Any, extra_args: dict[str, Any]
) -> tuple[Any, Any]:
    """The update of what does not keep gdx's rules, for tx: its state is held to the dtypes that it has."""
    like = updates if params is None else params
    # both in as many bits, which jax.lax.cond compares; beside wide parameters, few bits are what it was asked for
    is_narrow = params is None or any(jnp.result_type(p).itemsize < 4 for p in jax.tree.leaves(params))
    wide = jax.tree.map(_wide, state) if is_narrow else state
    # it promotes as JAX does by default
    with jax.numpy_dtype_promotion("standard"):
        # an object that is no transform, such as MultiSteps, takes them as it is
        is_transform = isinstance(made, optax.GradientTransformation)
        update = optax.with_extra_args_support(made).update if is_transform else made.update
        try:
            updates, new = update(jax.tree.map(widened, updates), wide, params, **extra_args)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            # what it trips over may be the state of another transform, unless one of gdx's has said what it is
            if not _CHECKED.match(str(error)):
                check_state_like(tx, state, jax.eval_shape(made.init, like))
            raise
        _check_own(tx, wide, new, made.init, like)
    structure: Any = jax.tree.structure(new)
    return updates, jax.tree.map(_like, new, state) if structure == jax.tree.structure(state) else new


def _check_own(tx: Transform, state: Any, new: Any, init: Callable[[Any], Any], params: Any) -> None:
    """Raises where a step has handed back some of a state untouched, or another structure, and the state is no own."""
    leaves, news = jax.tree.leaves(state), jax.tree.leaves(new)
    structure: Any = jax.tree.structure(state)
    is_looked_at = leaves and not any(map(operator.is_, leaves, news)) and structure == jax.tree.structure(new)
    if is_looked_at or (isinstance(state, optax.EmptyState) and isinstance(new, optax.EmptyState)):
        return
    # to make a state without arrays takes less time than to trace it
    expected = jax.eval_shape(init, params) if leaves else init(params)
    if state_kinds(state) != state_kinds(expected):
        check_state_like(tx, state, expected)


_CHECKED = re.compile(r"\w+: (the (gradient|parameter|state)|update needs)")


def _wide(x: Any) -> Any:
    return widened(x) if jnp.issubdtype(getattr(x, "dtype", int), jnp.inexact) else x


def _like(new: Any, old: Any) -> Any:
    dtype = getattr(old, "dtype", None)
    is_wider = dtype is not None and jnp.issubdtype(dtype, np.inexact) and getattr(new, "dtype", dtype) != dtype
    return new.astype(dtype) if is_wider else new


def to_transform(label: str, value: Any) -> Transform:
    """Converts a field that is a transform, gdx's or optax's."""
    if not isinstance(value, optax.GradientTransformation):
        if hasattr(value, "gradient_transformation"):
            raise TypeError(f"{label} is a {type(value).__name__}, no transform; pass its .gradient_transformation()")
        raise TypeError(
            f"{label} is {reprlib.repr(value)}; expected a transform such as gdx.scale_by_adam(){uncalled(value)}"
        )
    return value if isinstance(value, Transform) else Foreign(value)


values.as_child = lambda label, x: x if isinstance(x, Value) else to_transform(label, x)


class Call(Transform):
    """A transform that a function makes of its fields, anew whenever they are other numbers."""

    _keeper = "value"

    def __post_init__(self, *kept: Any) -> None:
        given = self._given()
        try:
            # as they were given: it may know more of them than its signature says
            self._call(given)
        except Exception as error:
            if not any(f": {name} " in str(error) for name in given):
                super().__post_init__(*kept)  # what it tripped over may be an argument, which this names
            raise
        super().__post_init__(*kept)

    @property
    def made(self) -> Any:
        """What the function returns for these fields: the transform that does the work."""
        fields: dict[str, Any] = vars(self)  # type: ignore[assignment]
        dtype = jnp.result_type(float)
        if fields.get("_made", (None,))[0] is dtype:
            return fields["_made"][1]
        if not all(isinstance(x, np.generic) for x in jax.tree.leaves(self)):
            return self._call(self._arguments_in(dtype))
        # kept, so that what the function computes must be no part of a program that is traced around this
        with jax.ensure_compile_time_eval():
            fields["_made"] = dtype, self._call(self._arguments_in(dtype))
        return fields["_made"][1]

    def _made_for(self, tree: Any) -> Any:
        """It, with numbers no wider than the tree: optax's functions may not promote what they are given."""
        dtypes = {jnp.finfo(compute_dtype(x)).dtype for x in jax.tree.leaves(tree)}
        if not dtypes - {jnp.result_type(float)}:
            return self.made
        return self._call(self._arguments_in(min(dtypes, key=lambda dtype: dtype.itemsize)))

    def _arguments_in(self, dtype: np.dtype) -> dict[str, Any]:
        """What the function is called with, numbers in this dtype."""

        def converted(x: Any) -> Any:
            # of numpy's where nothing traces it
            is_array = isinstance(x, np.generic | np.ndarray | jax.Array)
            return x.astype(dtype) if is_array and is_float(x) and x.dtype != dtype else x

        for name, value in self._hyperparameters():
            # integers and keys may have a shape
            if np.ndim(value) and is_float(value) and not self._metadata[name]["takes"].arrays:
                self._refuse_batch(name, value)
        return self._arguments_with(converted)

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of what the function makes carry the name that users know; those of what it was given, their own."""
        said = (
            f"{type(self).__name__}: it needs the value of a number that is traced, so that number cannot change "
            f"within a compiled program: close over the optimizer instead of passing it; or, where the number is of a "
            f"gradient, a state or the step count, decide with jnp.where"
        )
        try:
            with no_values(said):
                yield
        except (TypeError, ValueError) as error:
            link = _LINK.match(str(error))
            known = {type(self).__name__, *(_kinds_in(self) if "_structure" in vars(self) else ())}
            if type(error) not in (TypeError, ValueError) or (link and link[1] in known):
                raise
            raise type(error)(f"{type(self).__name__}: {_LINK.sub('', str(error))}") from error

    def _call(self, arguments: Mapping[str, Any]) -> Any:
        with self._named():
            made = cast(Any, self)._function[0](**arguments)
        if not (hasattr(made, "init") and hasattr(made, "update")):
            raise TypeError(f"{type(self).__name__}: the function returned {reprlib.repr(made)}; expected a transform")
        return made

    @property
    def rounds(self) -> bool:
        made = self.made
        return made.rounds if isinstance(made, Transform) else super().rounds

    def _init(self, params: optax.Params) -> optax.OptState:
        made = self.made
        with self._named():
            return made._init(params) if isinstance(made, Transform) else self._made_for(params).init(params)

    def _update(self, updates: Any, state: Any, params: Any, extra_args: dict[str, Any]) -> tuple[Any, Any]:
        made = self.made
        with self._named():
            if isinstance(made, Transform):
                return made._update(updates, state, params, extra_args)
            return foreign_update(self, self._made_for(updates), updates, state, params, extra_args)

    def _counts(self, state: Any) -> Iterator[tuple[Any, Any]]:
        made, settings = self.made, values.names_of(self).values()
        if isinstance(made, Transform):
            # what it was given is in what it made, at another place
            at = dict(made._counts(state))
            counts = {id(found.value): at[found.path] for found in values.names_of(made).values() if found.path in at}
            yield from ((found.path, counts[id(found.value)]) for found in settings if id(found.value) in counts)
            return
        # where the transforms inside it keep their states is for the function to know; those of a dict, under its keys
        counted = [
            (path, leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(state)
            if path and getattr(path[-1], "name", "") in ("count", "step_count")
        ]
        inside = [path for path, _ in _transforms_at(self)]
        for found in settings:
            if callable(found.value) and not found.is_static:
                around = next((path for path in inside if found.path[: len(path)] == path), ())
                keys = [jax.tree_util.DictKey(key) for key in around[1:] if isinstance(key, str)]
                there = [(path[-1].name, leaf) for path, leaf in counted if all(key in path for key in keys)]
                theirs = [leaf for name, leaf in there if name == "count" and around]
                for count in (theirs or [leaf for _, leaf in there])[:1]:
                    yield found.path, count


_LINK = re.compile(r"^([a-zA-Z_]\w*): ")


@functools.cache
def _call_class(function: Callable) -> Any:
    return kept_calls(function, Call)


KEEPERS["value"] = _call_class


def value(function: Callable[P, Any]) -> Callable[P, Transform]:
    r"""A class of transforms that are calls of a function, kept: `gdx.value(optax.lion)(1e-4)` is a value.

    The function returns a transform: it is an optimizer, link or wrapper of optax (or `optax.contrib`), or one of your
    own, and `value` then serves as a decorator. The fields of the class are the function's parameters. Numbers,
    schedules that are values, transforms and containers of these are children of the pytree: they can be changed
    without compiling, batched and differentiated. Everything else is part of the structure. Whether an argument is a
    number follows from the parameter: its default or annotation is a float, or the argument is one. A number is finite
    and has no shape. Arrays that have one are children where the parameter's annotation is `jax.Array`, or its default
    is such an array; so are random keys and arrays of integers anywhere.

    `init` and `update` call the function again with what the numbers are by then. So it has to take them as JAX
    arrays: one that compares them in Python (`if momentum > 0`) can be closed over, but not be an argument of a
    compiled function.

    Args:
      function: returns an `optax.GradientTransformation`, or an object with `init` and `update`. Two calls are equal if
        their function is the same object, so define it once.

    Raises:
      TypeError: it takes `*args` or `**kwargs`, or calls a parameter as values call something of theirs (`replace`),
        or returns something else; or, in a call, an argument is no number where the parameter takes one.
      ValueError: in a call, a number is not finite, or has a shape.

    >>> import gdx, jax, jax.numpy as jnp, optax
    >>> lion = gdx.value(optax.lion)
    >>> tx = lion(1e-4, weight_decay=0.1)
    >>> tx, tx == lion(1e-4, weight_decay=0.1), tx.replace(b1=0.8).hyperparams["b1"]
    (lion(learning_rate=0.0001, weight_decay=0.1), True, 0.8)
    >>> every = gdx.value(optax.MultiSteps)(tx, every_k_schedule=4)
    >>> every.hyperparams["learning_rate"]
    0.0001
    """
    if not callable(function):
        raise TypeError(f"value: got {reprlib.repr(function)}; expected a function that returns a transform")
    if isinstance(function, type) and issubclass(function, Value):
        return cast(Any, function)
    return _call_class(cast(Any, function))


def hyperparams_in_use(tx: Transform, state: Any) -> dict[str, Any]:
    """Every hyperparameter by name, as the next step uses it: schedules at the counts of this state.

    Works through any nesting, and inside `jax.jit`. A schedule inside a schedule has no value in use of its own: that
    is the outer one's. Schedules that one of optax's functions was given, or transforms inside it, are taken at the
    first count in its state (`count` or `step_count`), those of a dict at the first one under its key.

    Args:
      tx: a transform of gdx's.
      state: its state, as `init` or the last `update` returned it.

    Returns:
      The names of `tx.hyperparams`, and those of schedules, with numbers; and those that `gdx.times` makes in a group.

    Raises:
      TypeError: tx is none of gdx's; `gdx.value` makes one of optax's factories.
      ValueError: the state has no count for a schedule.

    >>> import gdx, jax.numpy as jnp
    >>> tx = gdx.sgd(gdx.schedules.linear_schedule(1.0, 0.0, transition_steps=4), momentum=0.9)
    >>> _, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    >>> {name: float(value) for name, value in gdx.hyperparams_in_use(tx, state).items()}["learning_rate"]
    0.75
    """
    if not isinstance(tx, Transform):
        raise TypeError(
            f"hyperparams_in_use: tx is {reprlib.repr(tx)}; expected a transform of gdx's, such as gdx.sgd(0.1) or "
            f"gdx.value(optax.lion)(1e-4){uncalled(tx)}"
        )
    counts = dict(tx._counts(state))
    settings = values.names_of(tx)
    schedules = [found.path for found in settings.values() if isinstance(found.value, Value)]
    in_use = {}
    for name, found in settings.items():
        path, value = found.path, found.value
        if found.is_static or value is None:
            continue
        if callable(value):
            if any(path[:length] in schedules for length in range(len(path))):
                continue
            if path not in counts:
                raise ValueError(
                    f"hyperparams_in_use: the state has no count at which {name}, {text(value)}, is called; expected "
                    f"the state that init or the last update of this transform returned"
                )
            with jax.numpy_dtype_promotion("standard"):
                value = value(counts[path])
        in_use[name] = float(value) if isinstance(value, np.floating) else value
    at = {found.path: name for name, found in settings.items()}
    for name, found in settings.items():
        if found.multiplies in at:
            with jax.numpy_dtype_promotion("standard"):
                in_use[name.rpartition(".")[0]] = in_use[at[found.multiplies]] * in_use[name]
    return in_use


__all__ = ["Call", "CountedState", "Foreign", "Transform", "hyperparams_in_use", "to_transform", "value"]
