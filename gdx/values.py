"""A call kept as a value: a frozen dataclass that is a pytree of its numbers, compares, hashes, prints and pickles.

An optimizer is a call, `adamw(1e-3, b1=0.8)`, kept instead of being thrown away. Its fields are the call's arguments.
Numbers, arrays, other values and containers of these are children of the pytree; everything else (a switch, a dtype, a
mask, a plain function) decides the program, and is part of the tree's structure.
"""

import dataclasses
import difflib
import functools
import importlib
import inspect
import pickle
import reprlib
import sys
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Self, cast, dataclass_transform

import jax
import numpy as np
import optax

from gdx.annotations import ANYTHING, Takes, check_type, read_parameter
from gdx.fields import (
    Setting,
    hyperparameter,
    is_concrete,
    is_key,
    is_number,
    is_opaque,
    key_of,
    same,
    static,
    text,
    to_number,
    to_scalar,
)


@dataclass_transform(
    frozen_default=True, eq_default=False, field_specifiers=(hyperparameter, static, dataclasses.field)
)
class Value:
    """Base of what is kept of a call. A subclass gives fields, and becomes a frozen dataclass and a pytree.

    Numbers are held as float64 on the host: making a value touches no device, and JAX rounds to its default float
    dtype when they enter a program. Arrays of any real dtype are cast to that default dtype, so every spelling of a
    number meets one compiled program. Values are equal if their numbers are in that dtype.
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if not kwargs.keys() <= cls._metadata.keys():
            _check_names(cls, kwargs)
        return cls._empty()

    @classmethod
    def _empty(cls) -> Self:
        """One without fields yet."""
        return object.__new__(cls)

    # what is known of each field, by name
    _metadata: ClassVar[dict[str, Mapping[str, Any]]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        cls._metadata = {field.name: field.metadata for field in dataclasses.fields(cast(Any, cls))}
        for base in cls.__bases__:
            taken = _field_names(cls) - _field_names(base)
            for name in sorted(name for name in taken if getattr(base, name, None) is not None):
                raise TypeError(f"{cls.__name__}: {name!r} is a name that values have for something else; use another")
        # inspect would otherwise show __new__, and optax.inject_hyperparams reads the signature
        parameters = list(inspect.signature(cls.__init__).parameters.values())[1:]
        cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        jax.tree_util.register_pytree_with_keys(cls, _flatten_with_keys, functools.partial(unflatten, cls), flatten)

    def __post_init__(self, kept: Mapping[str, tuple[Any, bool]] = MappingProxyType({})) -> None:
        # what the fields hold by now is what they were given, but for those that are kept
        given = self._given()
        self._set({name: kept[name] if name in kept else self._convert(name, given[name]) for name in given})
        self.validate()

    def _given(self) -> dict[str, Any]:
        """The fields by name."""
        return {name: vars(self)[name] for name in self._metadata}

    def _arguments_with(self, convert: Callable[[Any], Any]) -> dict[str, Any]:
        """The fields by name, with this done to each of their numbers, and to each value inside as a whole."""
        children = vars(self)["_structure"].children
        return {
            name: jax.tree.map(convert, held, is_leaf=is_whole) if name in children else held
            for name, held in self._given().items()
        }

    def _set(self, converted: Mapping[str, tuple[Any, bool]]) -> None:
        """Fills in the fields: the value of each, and whether it is a child."""
        fields = vars(self)
        fields.update({name: value for name, (value, _) in converted.items()})
        rest = {name: value for name, (value, is_child) in converted.items() if not is_child}
        fields["_structure"] = Structure(
            tuple([name for name in converted if name not in rest]),
            tuple([(name, Setting(value)) for name, value in rest.items()]),
            tuple([name for name, value in rest.items() if callable(value) and self._takes_schedules(name)]),
        )

    def _takes_schedules(self, name: str) -> bool:
        """Whether a function in this field is in the place of a number."""
        metadata = self._metadata[name]
        return metadata["takes"].floats if "takes" in metadata else not metadata.get("static")

    def _convert(self, name: str, value: Any, source: str = "") -> tuple[Any, bool]:
        """A field's value in its canonical form, and whether it is a child of the pytree."""
        label = f"{type(self).__name__}: {name}{source}"
        metadata = self._metadata[name]
        if not isinstance(value, int | float | str | types.NoneType):  # most are
            value = _copied(label, value)
        convert = metadata.get("convert")
        if convert is None:
            takes = metadata.get("takes", ANYTHING)
            if takes.floats and (callable(value) or is_whole(value) or isinstance(value, tuple | list | dict)):
                check_type(label, value, takes.annotation)  # what is no number, where only numbers may be
            return guessed(label, value, takes)
        value = convert(label, value)
        return value, not (metadata.get("static") or is_opaque(value))

    def validate(self) -> None:
        """Raises an error where fields that are valid one by one do not fit together."""

    # Comparing and showing.

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if type(self) is not type(other):
            return False
        structure: Any = jax.tree.structure(self)
        return structure == jax.tree.structure(other) and all(map(same, jax.tree.leaves(self), jax.tree.leaves(other)))

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        leaves, structure = jax.tree.flatten(self)
        # of numbers in float32, so that it is the same with float64 on and off
        return hash((structure, *(key_of(leaf, np.float32) for leaf in leaves)))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(self._arguments())})"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def _arguments(self) -> Iterator[str]:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if not self._is_default(field):
                yield f"{field.name}={text(value)}"

    def _is_default(self, field: dataclasses.Field) -> bool:
        value, default = getattr(self, field.name), _default(field)
        if default is dataclasses.MISSING or value is default:
            return value is default
        default, _ = self._convert(field.name, default)
        (leaves, structure), (others, other_structure) = jax.tree.flatten(value), jax.tree.flatten(default)
        is_alike: bool = structure == other_structure  # type: ignore[operator]
        return is_alike and all(map(same, leaves, others))

    # Copying. A value cannot change, so that a copy needs no copies of what it holds, such as devices.

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: Any) -> Self:
        return self

    def __reduce__(self) -> Any:
        fields: Any = dataclasses.fields(self)  # type: ignore[arg-type]
        given = {field.name: getattr(self, field.name) for field in fields if not self._is_default(field)}
        children = vars(self)["_structure"].children
        for name in {*given} & {*children}:
            given[name] = jax.tree.map(lambda x: _Key(x) if is_key(x) else x, given[name], is_leaf=is_whole)
        return _restored, (*_origin(type(self)), given, children)

    # Names.

    @property
    def hyperparams(self) -> Mapping[str, Any]:
        """Every number by name, through nested values, read-only.

        A name that several of them share is qualified with as much of its path as tells them apart:
        `scale_by_adam.b1`, or `scale_by_adam[0].b1` where two are of one kind. In the place of a schedule that is a
        value stand its numbers.
        """
        named = {}
        for name, found in names_of(self).items():
            if not (found.is_static or found.value is None or isinstance(found.value, Value)):
                named[name] = float(found.value) if isinstance(found.value, np.floating) else found.value
        return MappingProxyType(named)

    def replace(self, **changes: Any) -> Self:
        """The same value with some fields changed, named as in `hyperparams`.

        Fields that are no numbers can be replaced too, and containers as a whole. Qualified names are passed as
        `tx.replace(**{"scale_by_adam.b1": 0.8})`. In a batch a number is that of all members, and a list or array has
        one for each.

        Raises:
          ValueError: a name is unknown, or several values have a field of that name.
        """
        names = names_of(self)
        names = {**names, **_by_name(self._walk(containers=True)), **names}
        for name in changes:
            if name not in names:
                choices = [known for known in names if known.endswith(f".{name}")]
                alone = "cannot be replaced as a whole" if name in self._given() else "is unknown"
                problem = "is ambiguous" if choices else alone
                meant = "" if choices else _meant(name, names)
                hint = f"did you mean {meant}?" if meant else f"choose from {', '.join(choices or names)}"
                raise ValueError(f"{type(self).__name__}.replace: {name!r} {problem}; {hint}")
        found = [names[name] for name in changes]
        size = size_of(self)
        if size:
            return self._put_each(found, list(changes.values()), size)
        return self._put([(each.path, value) for each, value in zip(found, changes.values())])

    def _put(self, changes: Sequence[tuple[tuple, Any]]) -> Self:
        """The same value with others at these paths: all put in their places before any is checked."""
        given, children = self._given(), vars(self)["_structure"].children
        changed = {name: [(path[1:], value) for path, value in changes if path[0] == name] for name in given}
        kept = {name: (value, name in children) for name, value in given.items() if not changed[name]}
        for name, there in changed.items():
            given[name] = _with(given[name], there, self) if there else given[name]
        new = self._empty()
        vars(new).update(given)
        new.__post_init__(kept)
        return new

    def _put_each(self, found: Sequence["Named"], new: list[Any], size: int) -> Self:
        """The same in each of so many members of a batch, where what is new may have an item for each."""
        for i, (each, value) in enumerate(zip(found, new)):
            if isinstance(value, list | tuple) and not isinstance(each.value, list | tuple):
                new[i] = np.stack(value) if value and all(map(is_number, value)) else value
            for shape in map(np.shape, jax.tree.leaves(new[i])):
                if shape and shape[0] != size:
                    raise ValueError(
                        f"{type(self).__name__}.replace: {'.'.join(each.labels)} has shape {shape}; expected a number, "
                        f"or an array of {size}, with one for each member of the batch"
                    )
        leaves, structure = jax.tree.flatten((self, new))
        has_each = [bool(np.ndim(leaf)) for leaf in leaves]

        def changed(items: Iterable[Any]) -> Any:
            items = iter(items)
            member, values = jax.tree.unflatten(
                structure, [next(items) if each else leaf for each, leaf in zip(has_each, leaves)]
            )
            return member._put([(each.path, value) for each, value in zip(found, values)])

        columns = [leaf for each, leaf in zip(has_each, leaves) if each]
        if not all(map(is_concrete, columns)):
            return jax.vmap(changed)(columns)
        return stacked([changed(items) for items in zip(*map(on_every_device, columns))])

    # which function makes classes like it of functions, if it is made of one
    _keeper = ""
    # whether, in the values that hold it, it has a name of its own beside those of its fields
    _has_name = False

    def _walk(self, containers: bool = False) -> "Iterator[Named]":
        """What has a name, and containers if asked for."""
        structure = vars(self)["_structure"]
        for name, value in self._given().items():
            is_child = name in structure.children
            is_static = not is_child and name not in structure.schedules
            if containers and is_child and isinstance(value, tuple | list | dict):
                yield Named((name,), (name,), False, value)
            for labels, path, item in _items(name, value) if is_child else [((name,), (), value)]:
                if not isinstance(item, Value) or item._has_name:
                    yield Named(labels, (name, *path), is_static, item)
                if isinstance(item, Value) and is_child:
                    for inner in item._walk(containers):
                        yield inner.within((name, *path))._replace(labels=(*labels, *inner.labels))


def size_of(value: Value) -> int:
    """How many members it has, if it is a batch: a number that takes no shape has one. 0 if it is none."""
    for name in vars(value)["_structure"].children:
        takes = value._metadata[name].get("takes")
        for leaf in jax.tree.leaves(vars(value)[name], is_leaf=is_whole):
            if isinstance(leaf, Value):
                size = size_of(leaf)
            else:
                size = np.shape(leaf)[0] if np.ndim(leaf) and is_float(leaf) and not (takes and takes.arrays) else 0
            if size:
                return size
    return 0


# what others call it
_ELSEWHERE = {"lr": "learning_rate", "wd": "weight_decay", "epsilon": "eps", "beta": "momentum", "beta1": "b1"}
_ELSEWHERE |= {"beta2": "b2", "betas": "b1, b2", "alpha": "learning_rate", "decay": "weight_decay"}


def _meant(name: str, known: Iterable[str]) -> str:
    """Which of the known names is meant by another one; "" if none is."""
    known = [*known]
    elsewhere = [other for other in _ELSEWHERE.get(name, "").split(", ") if other in known]
    return ", ".join(elsewhere or difflib.get_close_matches(name, known, 1))


def _check_names(cls: type, given: Mapping[str, Any]) -> None:
    """Raises where an argument has a name that the call does not know, with the one that is meant."""
    parameters = inspect.signature(cls).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    for name in given:
        if name not in parameters:
            meant = _meant(name, parameters)
            raise TypeError(
                f"{cls.__name__}: there is no argument {name!r}; "
                + (f"did you mean {meant}?" if meant else f"expected {', '.join(parameters) or 'none'}")
            )


class Named(typing.NamedTuple):
    """A field somewhere in a value: what it may be called, where it is, whether it is structure, what it is.

    And the path of what it multiplies, where it is a factor.
    """

    labels: tuple[str, ...]
    path: tuple
    is_static: bool
    value: Any
    multiplies: tuple | None = None

    def within(self, path: tuple) -> "Named":
        """The same, in a value that has this one's at a path."""
        of = None if self.multiplies is None else (*path, *self.multiplies)
        return self._replace(path=(*path, *self.path), multiplies=of)


def names_of(value: Value) -> dict[str, Named]:
    """What has a name in a value, itself no transform, by the shortest dotted one that tells it apart."""
    return _by_name(value._walk())


def held_as(value: Value, last: str) -> dict[str, Any]:
    """What has this name in a value, or one that ends in it: wherever it is, by name."""
    return {name: found.value for name, found in names_of(value).items() if name.split(".")[-1] == last}


def _by_name(walk: Iterable[Named]) -> dict[str, Named]:
    """Each by the shortest dotted name that tells it apart."""
    found = list(walk)
    suffixes = Counter(".".join(each.labels[i:]) for each in found for i in range(len(each.labels)))

    def name(labels: tuple[str, ...]) -> str:
        dotted = [".".join(labels[i:]) for i in reversed(range(len(labels)))]
        return next((suffix for suffix in dotted if suffixes[suffix] == 1), dotted[-1])

    return {name(each.labels): each for each in found}


def stacked(members: Sequence[Any]) -> Any:
    """One value of several, each of their numbers with a leading axis of members."""

    def column(*items: Any) -> Any:
        on_device = any(isinstance(item, jax.Array) for item in items)
        return jax.numpy.stack(list(map(jax.numpy.asarray, items))) if on_device else np.stack(items)

    return jax.tree.map(column, *members)


def on_every_device(leaf: Any) -> Any:
    """The same array whole on each device of its mesh: an axis that is split by its type cannot be indexed."""
    if isinstance(leaf, jax.core.Tracer) or not isinstance(getattr(leaf, "sharding", None), jax.NamedSharding):
        return leaf
    return jax.device_put(leaf, jax.NamedSharding(leaf.sharding.mesh, jax.P()))


class Structure:
    """What decides the program: which fields are children, and the values of all others.

    Of these, `schedules` are the names of plain functions in the place of numbers.
    """

    __slots__ = ("_hash", "children", "rest", "schedules")

    def __init__(
        self, children: tuple[str, ...], rest: tuple[tuple[str, Setting], ...], schedules: tuple[str, ...] = ()
    ):
        self.children, self.rest, self.schedules = children, rest, schedules
        self._hash: int | None = None

    def __eq__(self, other: object) -> bool:
        return self is other or (
            isinstance(other, Structure) and self.children == other.children and self.rest == other.rest
        )

    def __hash__(self) -> int:
        if self._hash is None:  # not before it is needed: what is held may have no hash
            self._hash = hash((self.children, self.rest))
        return self._hash

    def with_children(self, names: Iterable[str]) -> "Structure":
        """The same, where what has these names is a child."""
        new = [name for name in names if name not in self.children]
        if not new:
            return self
        return Structure((*self.children, *new), tuple(item for item in self.rest if item[0] not in new))

    def __repr__(self) -> str:
        return ", ".join([*self.children, *(f"{name}={text(kept.value)}" for name, kept in self.rest)])


# The pytree. Children are kept as they come: a transformation may put anything in their place.


def flatten(value: Value) -> tuple[tuple, Structure]:
    fields = vars(value)
    structure = fields["_structure"]
    return tuple([fields[name] for name in structure.children]), structure


def _flatten_with_keys(value: Value) -> tuple[list, Structure]:
    children, structure = flatten(value)
    return [(jax.tree_util.GetAttrKey(name), child) for name, child in zip(structure.children, children)], structure


def unflatten(cls: Any, structure: Structure, children: Any) -> Any:
    value = cls._empty()
    fields = vars(value)
    fields.update(zip(structure.children, children))
    for name, kept in structure.rest:
        fields[name] = kept.value
    fields["_structure"] = structure
    return value


def guessed(label: str, value: Any, takes: Takes) -> tuple[Any, bool]:
    """What an argument is kept as, and whether it is a child, where nothing was declared.

    Numbers are floats, and integers where the parameter takes floats; an integer anywhere else decides the program, as
    a switch does. Where a parameter takes floats, a truth value, a text or what is not finite is refused, unless its
    annotation names such things. Arrays are children, those of floats with a shape only where it takes arrays.
    """
    if is_whole(value) or (takes.transforms and callable(value)):
        return as_child(label, value), True
    if takes.dtypes and isinstance(value, str | type):
        return _to_dtype(value), False
    if value is None or is_opaque(value):
        return value, False
    if isinstance(value, tuple | list | dict):
        leaves, structure = jax.tree_util.tree_flatten_with_path(value, is_leaf=is_whole)
        names = [f"{label}.{jax.tree_util.keystr(path, simple=True, separator='.')}" for path, _ in leaves]
        items = [guessed(name, item, takes) for name, (_, item) in zip(names, leaves)]
        if items and all(is_child for _, is_child in items):
            return jax.tree.unflatten(structure, [item for item, _ in items]), True
        return value, False
    is_array = isinstance(value, jax.Array | np.ndarray)
    if is_array and value.ndim and is_float(value) and not takes.arrays:
        raise ValueError(
            f"{label} has shape {np.shape(value)}; expected a finite number. Build a batch of optimizers with "
            f"gdx.stack or gdx.grid, and annotate what may have a shape, in a function of your own, as jax.Array"
        )
    if is_number(value) and (is_float(value) or takes.floats):
        is_default = isinstance(value, float) and isinstance(takes.default, float) and value == takes.default
        return to_number(value) if is_default else to_scalar(label, value), True
    is_simple = isinstance(value, str | bool | complex | np.generic)
    is_unlike = is_simple and takes.kinds is not None and type(value) not in takes.kinds
    # an integer that is no number is too large for one
    if takes.floats and (is_unlike or type(value) is int):
        to_scalar(label, value)  # which says what is expected
    # what can be called here is a schedule that JAX takes apart, such as a Partial
    return value, is_array or (callable(value) and takes.floats)


def _copied(label: str, value: Any) -> Any:
    """The same, its containers and numpy's arrays copied: others may change theirs."""
    try:
        return jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, value, is_leaf=is_whole)
    except ValueError as error:
        keys = f" with the keys {reprlib.repr([*value])}" if isinstance(value, dict) else ""
        raise ValueError(
            f"{label} is a {type(value).__name__}{keys} that JAX cannot take apart; expected keys that can be sorted, "
            f"such as names ({error})"
        ) from error


def _to_dtype(value: Any) -> Any:
    """A dtype by any of its names, so that each is one program; what is none is for the function to refuse."""
    try:
        return np.dtype(jax.numpy.dtype(value))
    except TypeError:
        return value


def is_whole(x: Any) -> bool:
    """Whether it is one item of a container, not to be taken apart."""
    return isinstance(x, Value | optax.GradientTransformation)


# how transforms that are not values are kept, which gdx.transform says
as_child: Callable[[str, Any], Any] = lambda label, x: x  # noqa: E731


def is_float(value: Any) -> bool:
    """Whether it is a real number that is no integer, or an array of them."""
    return jax.dtypes.issubdtype(getattr(value, "dtype", type(value)), np.floating)


def _items(name: str, value: Any) -> Iterator[tuple[tuple[str, ...], tuple, Any]]:
    """Labels, path and item of what a child holds: itself, or what is in a container."""
    if isinstance(value, Value) or not isinstance(value, tuple | list | dict):
        yield (name,), (), value
    elif isinstance(value, tuple | list) and all(isinstance(item, Value) for item in value):
        kinds = [type(item).__name__ for item in value]
        for i, (kind, item) in enumerate(zip(kinds, value)):
            yield (kind if kinds.count(kind) == 1 else f"{kind}[{kinds[:i].count(kind)}]",), (i,), item
    else:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            for labels, path, inner in _items(str(key), item):
                is_value = isinstance(inner, Value)
                yield (name, *labels) if is_value else (".".join([name, *labels]),), (key, *path), inner


def _with(held: Any, changes: list[tuple[tuple, Any]], owner: Value) -> Any:
    """What a field holds, with others at these paths."""
    changes = sorted(changes, key=lambda change: len(change[0]))
    if changes[0][0] == ():
        held, changes = changes[0][1], changes[1:]
    if not changes:
        return held
    if isinstance(held, Value):
        return held._put(changes)
    if isinstance(held, dict | tuple | list):
        keys = dict.fromkeys(path[0] for path, _ in changes)
        items = held.items() if isinstance(held, dict) else enumerate(held)
        new = {
            key: _with(item, [(path[1:], v) for path, v in changes if path[0] == key], owner) if key in keys else item
            for key, item in items
        }
        return type(held)(new) if isinstance(held, dict) else type(held)(new.values())
    numbers = ", ".join(str(path[0]) for path, _ in changes)
    raise ValueError(f"{type(owner).__name__}.replace: {text(held)} has no {numbers}")


def _field_names(cls: Any) -> set[str]:
    return {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()


def _default(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


# Functions whose calls are kept.


def kept_calls(function: Callable, base: Any) -> Any:
    """A subclass of `base` whose fields are the parameters of a function: `_function[0]` takes them by keyword."""
    name, module = _name_of(function), _module_of(function)
    fields: dict[str, Any] = {}
    label = f"{base._keeper}: {name}"
    parameters = _parameters(function, label)
    for parameter in parameters:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise TypeError(
                f"{label} takes {parameter}, of which no fields can be made; wrap it in a function that "
                f"names its parameters, or chain transforms with gdx.chain"
            )
        if parameter.name.startswith("_") or parameter.name in ("self", "cls") or hasattr(base, parameter.name):
            raise TypeError(
                f"{label} has a parameter {parameter.name!r}, a name that values have for something "
                f"else; wrap it in a function that calls it otherwise"
            )
        default = parameter.default
        given: dict[str, Any] = {}
        if type(default).__hash__ is None:
            given = {"default_factory": lambda default=default: default}
        elif default is not parameter.empty:
            given = {"default": default}
        fields[parameter.name] = dataclasses.field(
            **given, kw_only=parameter.kind is parameter.KEYWORD_ONLY, metadata={"takes": read_parameter(parameter)}
        )
    body = {
        "__annotations__": dict.fromkeys(fields, Any),
        "__doc__": inspect.getdoc(function),
        "__module__": module,
        "__qualname__": getattr(function, "__qualname__", name),
        # bound to nothing, and no method in doctest's eyes
        "_function": (_by_keyword(function, parameters), function),
        **fields,
    }
    cls: Any = types.new_class(name, (base,), exec_body=lambda namespace: namespace.update(body))
    cls.__annotations__ = {}  # read by now; the reference would look for them in a source that there is not
    return cls


def _parameters(function: Callable, label: str) -> list[inspect.Parameter]:
    """Those of a function, with annotations as types where they can be found."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise TypeError(f"{label} has no signature; wrap it in a function that names its parameters") from error
    try:
        hints = typing.get_type_hints(function)
    except Exception:  # a partial, or names that only a type checker knows
        hints = {}
    return [p.replace(annotation=hints.get(p.name, p.annotation)) for p in parameters]


def _by_keyword(function: Callable, parameters: Sequence[inspect.Parameter]) -> Callable:
    """The function, taking by keyword also what it takes by position only."""
    names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_ONLY]
    return (lambda **given: function(*[given.pop(name) for name in names], **given)) if names else function


def _name_of(function: Any) -> str:
    """What a function is called; of a `functools.partial`, the name under which its module holds it."""
    if hasattr(function, "__name__"):
        return "lambda_" if function.__name__ == "<lambda>" else function.__name__
    around = getattr(sys.modules.get(_module_of(function)), "__dict__", {})
    inner = getattr(function, "func", function)
    return next((name for name, held in around.items() if held is function), getattr(inner, "__name__", "call"))


def _module_of(function: Any) -> str:
    return getattr(getattr(function, "func", function), "__module__", None) or "__main__"


def _origin(cls: Any) -> tuple[Any, str]:
    """What finds a class again in another process: itself if it has an importable name, else the function."""
    found: Any = sys.modules.get(cls.__module__)
    for part in cls.__qualname__.split("."):
        found = getattr(found, part, None)
    if found is cls or not cls._keeper:
        return cls, ""
    function = cls._function[-1]
    if isinstance(function, types.FunctionType | types.BuiltinFunctionType | type):
        return function, cls._keeper
    # a copy of any other callable is another object
    if found != function:
        raise pickle.PicklingError(
            f"{cls.__name__}: its function, {reprlib.repr(function)}, is not found as {cls.__qualname__} in the module "
            f"{cls.__module__}, so that a pickle would be of another optimizer; pickle the value of a function that is "
            f"defined (def) at the top level of a module"
        )
    return (cls.__module__, cls.__qualname__), cls._keeper


class _Key:
    """A random key, in a pickle."""

    def __init__(self, key: jax.Array):
        self.key = key

    def __reduce__(self) -> Any:
        wrap = functools.partial(jax.random.wrap_key_data, impl=str(jax.random.key_impl(self.key)))
        return wrap, (jax.random.key_data(self.key),)


def _restored(origin: Any, keeper: str, given: Mapping[str, Any], children: tuple[str, ...]) -> Any:
    if isinstance(origin, tuple):
        origin = functools.reduce(getattr, origin[1].split("."), importlib.import_module(origin[0]))
    cls = origin if not keeper else KEEPERS[keeper](origin)
    value = cls._empty()
    value._set(
        {
            field.name: (given[field.name], field.name in children)
            if field.name in given
            else value._convert(field.name, _default(field))
            for field in dataclasses.fields(cls)
        }
    )
    return value


KEEPERS: dict[str, Callable[[Any], Any]] = {}
"""What makes classes of functions, by its name: `gdx.value` and `gdx.schedule`."""
