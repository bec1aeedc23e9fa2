"""What a transform is: an optax transform, a pytree of its hyperparameters, and a plain value.

Write one by giving its fields, `init` and `update`::

    class scale_by_sign(gdx.Transform):
        strength: gdx.Scalar = gdx.hyperparameter(default=1.0)

        def init(self, params):
            return optax.EmptyState()

        def update(self, updates, state, params=None, **extra_args):
            return jax.tree.map(lambda g: self.strength.astype(g.dtype) * jnp.sign(g), updates), state

The class is its own factory: `scale_by_sign(0.5)` is the transform. `init` and `update` see every
hyperparameter as a scalar array of the default float dtype, however it was given (number, array,
tracer or schedule), and only trees whose leaves are real or complex floating-point arrays.
"""

import copy
import dataclasses
import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Self, cast, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx.checks import check_gradients, check_params, check_state
from gdx.fields import Static, Value, hyperparameter, is_opaque, same, static, text, to_scalar
from gdx.schedules import schedule


class ScheduledState(NamedTuple):
    """State of a transform that has a schedule among its hyperparameters.

    Attributes:
      count: int32 scalar, the number of updates so far: what the schedules are called with.
      inner_state: the state that the transform has without schedules.
    """

    count: jax.Array  # type: ignore[assignment]
    inner_state: Any


@dataclass_transform(
    frozen_default=True, eq_default=False, field_specifiers=(hyperparameter, static, dataclasses.field)
)
class Transform(Value, optax.GradientTransformationExtraArgs):
    """Base class: an optax transform that is also a pytree of its hyperparameters and a value.

    Each subclass becomes a frozen dataclass and a registered pytree. Its leaves are its
    hyperparameters; static fields and schedules belong to the tree structure (a schedule that is
    itself a pytree, such as `jax.tree_util.Partial`, contributes its own leaves).

    Numbers are held as float64 on the host: building an optimizer touches no device, its text is
    exact, and JAX rounds to its default float dtype when they enter a program. Arrays of any real
    dtype are cast to that default dtype, so every spelling of a value meets one compiled program.

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
        super().__init_subclass__()
        for name, guard in (("init", _guard_init), ("update", _guard_update)):
            if name in vars(cls):
                setattr(cls, name, guard(vars(cls)[name]))
        dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        # inspect would otherwise show __new__, and optax.inject_hyperparams reads the signature
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        cls.__signature__ = inspect.Signature(parameters)
        jax.tree_util.register_pytree_with_keys(cls, _flatten_with_keys, functools.partial(_unflatten, cls), _flatten)

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        return tuple.__new__(cls, (None, None))

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, self._convert(field, getattr(self, field.name)))
        self.validate()

    def _convert(self, field: dataclasses.Field, value: Any, source: str = "") -> Any:
        convert = field.metadata.get("convert", _to_transform_or_scalar)
        return convert(f"{type(self).__name__}: {field.name}{source}", value)

    def validate(self) -> None:
        """Raises an error where fields that are valid one by one do not fit together."""

    def init(self, params: optax.Params) -> optax.OptState:
        """The state before the first step."""
        raise NotImplementedError(f"{type(self).__name__} defines no init")

    def update(
        self, updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        """The transformed updates and the next state."""
        raise NotImplementedError(f"{type(self).__name__} defines no update")

    # The optax view: the pair (init, update).

    def __iter__(self) -> Iterator[Callable]:
        return iter((self.init, self.update))

    def __getitem__(self, index: Any) -> Any:
        return (self.init, self.update)[index]

    @classmethod
    def _make(cls, pair: Any) -> optax.GradientTransformationExtraArgs:
        return optax.GradientTransformationExtraArgs(*pair)

    # The value view.

    def _refuse(self, other: Any) -> Any:
        return NotImplemented

    # tuple's own would compare or join the two placeholders that a transform is made of
    __lt__ = __le__ = __gt__ = __ge__ = __add__ = __mul__ = __rmul__ = _refuse
    __contains__ = None

    def __deepcopy__(self, memo: dict) -> Self:
        # structure cannot change, and may hold what cannot be copied: the devices of a mesh
        return jax.tree.map(lambda leaf: copy.deepcopy(leaf, memo), self)

    def __reduce__(self) -> Any:
        return _unflatten_fields, (type(self), dict(vars(self)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._arguments())})"

    def _arguments(self) -> Iterator[str]:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING or not same(value, field.default):
                yield f"{field.name}={text(value)}"

    @property
    def hyperparams(self) -> Mapping[str, Any]:
        """Every hyperparameter by name, through nested transforms, read-only.

        A name that several links share is qualified with as much of its path as tells them apart:
        `scale_by_adam.b1`, or `scale_by_adam[0].b1` where two links are of one kind. In the place of a
        `gdx.schedule` stand its numbers.
        """
        named = {}
        for name, field, value in self._settings():
            if not (field.metadata.get("static") or value is None or isinstance(value, schedule)):
                named[name] = float(value) if isinstance(value, np.floating) else value
        return MappingProxyType(named)

    def _settings(self) -> Iterator[tuple[str, dataclasses.Field, Any]]:
        """Name, field and value of every field that is not itself a transform, through nested transforms."""
        for name, (path, field) in self._names().items():
            yield name, field, functools.reduce(_child, path, self)

    def replace(self, **changes: Any) -> Self:
        """The same transform with some fields changed, named as in `hyperparams`.

        Static fields can be replaced too. Qualified names are passed as
        `tx.replace(**{"scale_by_adam.b1": 0.8})`.

        Raises:
          ValueError: a name is unknown, or several links have a field of that name.
        """
        names = self._names()
        for name in changes:
            if name not in names:
                choices = [known for known in names if known.endswith(f".{name}")]
                problem = "is ambiguous" if choices else "is unknown"
                raise ValueError(
                    f"{type(self).__name__}.replace: {name!r} {problem}; choose from {', '.join(choices or names)}"
                )
        return self._put([(names[name][0], value) for name, value in changes.items()])

    def _put(self, changes: Sequence[tuple[Sequence, Any]]) -> Self:
        """The same transform with other values at these paths: all put in their places before any is checked."""
        values = dict(vars(self))
        inside: dict[tuple[str, int | None], list] = {}
        for ((field, index), *rest), value in changes:
            if rest:
                inside.setdefault((field, index), []).append((rest, value))
            else:
                values[field] = self._convert(type(self).__dataclass_fields__[field], value)
        for (field, index), inner in inside.items():
            child = values[field] if index is None else values[field][index]
            if isinstance(child, Transform):
                child = child._put(inner)
            elif isinstance(child, schedule):
                child = child.replace(**{rest[0][0]: value for rest, value in inner})
            else:
                numbers = ", ".join(rest[0][0] for rest, _ in inner)
                raise ValueError(
                    f"{type(self).__name__}.replace: {field} becomes {text(child)}, which has no {numbers}"
                )
            siblings = values[field]
            values[field] = child if index is None else (*siblings[:index], child, *siblings[index + 1 :])
        changed = _unflatten_fields(type(self), values)
        changed.validate()
        return changed

    def _names(self) -> dict[str, tuple[tuple, dataclasses.Field]]:
        """The shortest unambiguous dotted name of each field, with its path from here."""
        found = list(self._walk())
        suffixes = Counter(".".join(labels[i:]) for labels, _, _ in found for i in range(len(labels)))

        def name(labels: tuple[str, ...]) -> str:
            dotted = [".".join(labels[i:]) for i in reversed(range(len(labels)))]
            return next((suffix for suffix in dotted if suffixes[suffix] == 1), dotted[-1])

        return {name(labels): (path, field) for labels, path, field in found}

    def _walk(self) -> Iterator[tuple[tuple[str, ...], tuple, dataclasses.Field]]:
        """Labels, path and field of every field that is not itself a transform."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Transform):
                children: list[tuple[str, int | None, Transform]] = [(field.name, None, value)]
            elif isinstance(value, tuple) and all(isinstance(v, Transform) for v in value):
                kinds = [type(v).__name__ for v in value]
                labels = [k if kinds.count(k) == 1 else f"{k}[{kinds[:i].count(k)}]" for i, k in enumerate(kinds)]
                children = [(label, i, v) for i, (label, v) in enumerate(zip(labels, value))]
            else:
                yield (field.name,), ((field.name, None),), field
                if isinstance(value, schedule):
                    for name in value.named:
                        yield (field.name, name), ((field.name, None), (name, None)), field
                continue
            for label, index, child in children:
                for inner_labels, inner_path, inner_field in child._walk():
                    yield (label, *inner_labels), ((field.name, index), *inner_path), inner_field

    def _hyperparameters(self) -> Iterator[tuple[dataclasses.Field, Any]]:
        """The fields that hold a hyperparameter, with its value."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not (field.metadata.get("static") or value is None or isinstance(value, tuple)):
                yield field, value

    @property
    def has_schedule(self) -> bool:
        """Whether a hyperparameter of its own, not of a transform inside it, is a schedule."""
        return any(callable(value) for _, value in self._hyperparameters())

    def at(self, count: Any) -> Self:
        """This transform with its hyperparameters as scalar arrays, schedules called with `count`."""
        dtype = jnp.result_type(float)
        values = dict(vars(self))
        for field, value in self._hyperparameters():
            if callable(value):
                # schedules compute with an integer count, which strict promotion would refuse
                with jax.numpy_dtype_promotion("standard"):
                    scheduled = value(count)
                value = self._convert(field, scheduled, source=f", as returned by the schedule {text(value)},")
            if np.shape(value) != ():
                raise ValueError(
                    f"{type(self).__name__}: {field.name} has shape {np.shape(value)}: this is a batch of "
                    f"optimizers; call its init and update under jax.vmap, or train it with gdx.sweep"
                )
            if not isinstance(value, jax.Array):
                value = jax.lax.full((), float(value), dtype)
            values[field.name] = value.astype(dtype)
        return _unflatten_fields(type(self), values)


def _to_transform_or_scalar(label: str, value: Any) -> Any:
    """Converts a field that was declared without `hyperparameter` or `static`."""
    return value if isinstance(value, Transform) else to_scalar(label, value)


def _guard_init(init: Callable) -> Callable:
    """`init` that checks the parameters first and keeps the step count of schedules."""

    @functools.wraps(init)
    def guarded(self: Transform, params: optax.Params) -> optax.OptState:
        check_params(self, params)
        if not self.has_schedule:
            return init(self.at(None), params)
        count = jnp.zeros([], jnp.int32)
        return ScheduledState(count, init(self.at(count), params))

    return guarded


def _guard_update(update: Callable) -> Callable:
    """`update` that checks what it is given first and calls the schedules."""

    @functools.wraps(update)
    def guarded(
        self: Transform, updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        check_gradients(self, updates, params)
        if not self.has_schedule:
            return update(self.at(None), updates, state, params, **extra_args)
        check_state(self, state, ScheduledState)
        updates, inner_state = update(self.at(state.count), updates, state.inner_state, params, **extra_args)
        return updates, ScheduledState(optax.safe_increment(state.count), inner_state)

    return guarded


# The pytree view. Children are kept as they come: a transformation may put anything in their place.


def _split(tx: Transform) -> tuple[dict[str, Any], tuple]:
    """Children by field name, and everything else (hashable)."""
    children, rest = {}, []
    values, kind = vars(tx), cast(Any, type(tx))
    for name, is_static in _field_kinds(kind):
        value = values[name]
        if is_static or is_opaque(value):
            rest.append((name, value if isinstance(value, _PLAIN) else Static(value)))
        else:
            children[name] = value
    return children, (tuple(children), tuple(rest))


# these are hashable as they are; a call of a jitted function flattens the optimizer and compares its structure
_PLAIN = (bool, type(None), np.dtype)


@functools.cache
def _field_kinds(cls: Any) -> tuple[tuple[str, bool], ...]:
    return tuple((field.name, bool(field.metadata.get("static"))) for field in dataclasses.fields(cls))


def _flatten(tx: Transform) -> tuple[tuple, tuple]:
    children, aux = _split(tx)
    return tuple(children.values()), aux


def _flatten_with_keys(tx: Transform) -> tuple[list, tuple]:
    children, aux = _split(tx)
    return [(jax.tree_util.GetAttrKey(name), value) for name, value in children.items()], aux


def _unflatten(cls: type[Transform], aux: tuple, children: Any) -> Transform:
    names, rest = aux
    values = dict(zip(names, children))
    values.update((name, kept.value if isinstance(kept, Static) else kept) for name, kept in rest)
    return _unflatten_fields(cls, values)


def _unflatten_fields(cls: type[Transform], values: Mapping[str, Any]) -> Any:
    """The transform with these field values, unchecked."""
    tx: Any = cls.__new__(cls)
    vars(tx).update(values)
    return tx


def _child(tx: Any, step: tuple[str, int | None]) -> Any:
    field, index = step
    value = getattr(tx, field)
    return value if index is None else value[index]
