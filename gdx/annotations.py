"""What a parameter of a function takes, read from its annotation and default: once, when a class is made of it."""

import dataclasses
import functools
import inspect
import itertools
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdx.fields import is_concrete, is_number, makes_schedules, text


@dataclasses.dataclass(frozen=True, eq=False)
class Takes:
    """What a parameter takes.

    Attributes:
      default: its default, if it has one.
      annotation: its annotation, if it has one.
      floats: whether its default is a float, or its annotation has one, or an array and no integer. Not where integers
        and None are in the annotation and the default is None: an integer is then a seed, or a choice.
      arrays: whether its annotation is an array, and no number, or its default has a shape.
      dtypes: whether its annotation names dtypes, or its own name ends in "dtype".
      transforms: whether its annotation names transforms, and nothing that makes them.
      kinds: the types in the annotation, and the default's.
    """

    default: Any = inspect.Parameter.empty
    annotation: Any = inspect.Parameter.empty
    floats: bool = True
    arrays: bool = True
    dtypes: bool = False
    transforms: bool = False
    kinds: tuple[Any, ...] | None = None


ANYTHING = Takes()


def read_parameter(parameter: inspect.Parameter) -> Takes:
    """What it takes."""
    default, annotation = parameter.default, parameter.annotation
    kinds = [*_types_in(annotation), type(default)]
    # the booleans among jax.typing.ArrayLike are not meant
    if complex in kinds and all(kind in _ARRAY_LIKE for kind in kinds):
        kinds = [kind for kind in kinds if kind not in (bool, np.bool_)]
    is_choice = isinstance(default, int) or (default is None and int in kinds)
    names_floats = float in kinds or (jax.Array in kinds and int not in kinds)
    names_arrays = float not in kinds and (jax.Array in kinds or np.ndarray in kinds)
    has_shape = isinstance(default, tuple | list) or getattr(default, "ndim", 0) > 0
    return Takes(
        default,
        annotation,
        floats=isinstance(default, float) or (names_floats and not is_choice),
        arrays=has_shape or names_arrays,
        dtypes=np.dtype in typing.get_args(annotation) or parameter.name.endswith("dtype"),
        transforms=any(hasattr(kind, "init") and hasattr(kind, "update") for kind in kinds)
        and not re.search(r"Callable|[Tt]ype\[", str(annotation)),
        kinds=tuple(kinds),
    )


_ARRAY_LIKE = [*typing.get_args(jax.typing.ArrayLike), type(None), type]
_BY_WORD: dict[str, Any] = {kind.__name__: kind for kind in (float, int, bool, str, jax.Array)}
_BY_WORD |= {"ArrayLike": jax.typing.ArrayLike, "ScalarOrSchedule": float}


def _types_in(annotation: Any) -> list[Any]:
    """A type, or those of what is in a union or container; not those in a function of them."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, str):
        inside = tuple(_BY_WORD[word] for word in re.findall(r"\w+", annotation) if word in _BY_WORD)
    elif origin is typing.Literal or not inside:
        return [*map(type, inside)] or [annotation]
    elif isinstance(origin, type) and issubclass(origin, Mapping):
        inside = inside[1:]
    return [] if origin is Callable else [kind for part in inside for kind in _types_in(part)]


def _is_finite(x: Any) -> bool:
    with np.errstate(over="ignore"):
        return is_number(x) and not (is_concrete(x) and not np.isfinite(np.asarray(x).astype(jnp.result_type(float))))


# what an annotation accepts, and what that is called
_CHECKS: dict[Any, tuple[Callable[[Any], bool], str]] = {
    float: (_is_finite, "a finite number"),
    int: (_is_finite, "a finite number"),
    bool: (lambda x: isinstance(x, bool | np.bool_), "True or False"),
    types.NoneType: (lambda x: x is None, "None"),
    Callable: (lambda x: callable(x) and not makes_schedules(x), "a function of the step count"),
    Mapping: (lambda x: isinstance(x, Mapping), "a dict"),
    Sequence: (lambda x: isinstance(x, Sequence) or getattr(x, "ndim", 0) > 0, "a list"),
    tuple: (lambda x: isinstance(x, tuple | list) and len(x) == 2, "a pair"),
}


@functools.cache
def _options(annotation: Any) -> dict[Any, tuple]:
    """The kinds that an annotation names, each with the types of what is in it; none where one is not known here."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    options = typing.get_args(annotation) if is_union else (annotation,)
    kinds = {typing.get_origin(option) or option: typing.get_args(option) or (Any, Any) for option in options}
    # two of a kind, or a tuple that is no pair
    if len(kinds) < len(options) or (tuple in kinds and (len(kinds[tuple]) != 2 or ... in kinds[tuple])):
        return {}
    if float in kinds:  # an array beside it is of shape (), and what else makes an ArrayLike is not meant
        arrays = {*_ARRAY_LIKE} - {float, int, types.NoneType} if complex in kinds else {np.ndarray, jax.Array}
        kinds = {kind: of for kind, of in kinds.items() if kind not in arrays}
    return kinds if kinds.keys() <= _CHECKS.keys() else {}


def check_type(label: str, value: Any, annotation: Any) -> None:
    """Raises an error if a value is not what an annotation says; one that says nothing of this takes all."""
    kinds = _options(annotation)
    if not kinds:
        return
    kind = next((kind for kind in kinds if _CHECKS[kind][0](value)), None)
    if kind is None:
        expected = " or ".join(dict.fromkeys(_CHECKS[kind][1] for kind in kinds))
        error = ValueError if float in kinds and is_number(value) else TypeError
        raise error(f"{label} is {text(value)}; expected {expected}")
    if kind in (Mapping, Sequence, tuple):
        of = kinds[kind]
        for key in value if kind is Mapping else ():
            check_type(f"{label}: a key", key, of[0])
        items = value.items() if kind is Mapping else enumerate(value)
        for (key, item), inner in zip(items, of if kind is tuple else itertools.repeat(of[kind is Mapping])):
            check_type(f"{label}.{key}", item, inner)
