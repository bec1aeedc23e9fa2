"""The fields of a transform: hyperparameters (leaves) and static settings, and what a value of one is."""

import dataclasses
import functools
import inspect
import reprlib
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

Scalar = float | np.ndarray | jax.Array | optax.Schedule
"""A hyperparameter: a number, an array of shape (), or a schedule (a function of the step count)."""


def hyperparameter(
    *,
    default: Any = dataclasses.MISSING,
    minimum: float = -np.inf,
    below: float = np.inf,
    optional: bool = False,
    kw_only: bool = False,
    mend: str = "",
) -> Any:
    """A field that is a leaf: a real number in [minimum, below), checked when its value is concrete.

    Args:
      default: the field's default; without one the argument is required.
      minimum: the smallest valid value.
      below: every valid value is strictly smaller, also once it is rounded to float32.
      optional: whether None (then not a leaf) is valid too.
      kw_only: whether it can be passed by keyword only.
      mend: what to do instead of a number below the minimum.

    >>> import gdx
    >>> class scale(gdx.Leafwise):
    ...     factor: gdx.Scalar = gdx.hyperparameter(default=1.0, minimum=0)
    ...     def step(self, shared, g, p):
    ...         return (self.factor * g,)
    >>> scale(-1.0)
    Traceback (most recent call last):
    ValueError: scale: factor is -1.0; expected a finite number >= 0, an array of shape () or a schedule
    """
    convert = functools.partial(to_scalar, minimum=minimum, below=below, optional=optional, mend=mend)
    return dataclasses.field(default=default, kw_only=kw_only, metadata={"convert": convert})


def static(
    *,
    default: Any = dataclasses.MISSING,
    convert: Callable[[str, Any], Any] = lambda label, value: value,
    kw_only: bool = False,
) -> Any:
    """A field that decides the program (`nesterov`, a dtype, a mask): part of the tree structure.

    Args:
      default: the field's default; without one the argument is required.
      convert: `convert(label, value)` returns the value in its canonical form, or raises an error
        that starts with the label ("scale_by_adam: mu_dtype").
      kw_only: whether it can be passed by keyword only.

    >>> import gdx, jax
    >>> class clip_by_sign(gdx.Leafwise):
    ...     positive: bool = gdx.static(default=True)
    ...     def step(self, shared, g, p):
    ...         return (jax.nn.relu(g) if self.positive else -jax.nn.relu(-g),)
    >>> clip_by_sign(positive=False), jax.tree.leaves(clip_by_sign())
    (clip_by_sign(positive=False), [])
    """
    return dataclasses.field(default=default, kw_only=kw_only, metadata={"convert": convert, "static": True})


def to_scalar(
    label: str,
    value: Any,
    *,
    minimum: float = -np.inf,
    below: float = np.inf,
    optional: bool = False,
    mend: str = "",
) -> Any:
    """`value` as a field holds it: a number (see `to_number`), a schedule, or None."""
    if optional and value is None:
        return value
    if callable(value):
        if makes_schedules(value):
            raise TypeError(
                f"{label} is {text(value)}, which is no function of the step count; {_expected(minimum, below)}: "
                f"call it first"
            )
        return value
    if not isinstance(value, _NUMBERS) or not is_real(value):
        raise TypeError(f"{label} is {reprlib.repr(value)}; {_expected(minimum, below)}")
    if np.shape(value) != ():
        raise ValueError(
            f"{label} has shape {np.shape(value)}; {_expected(minimum, below)}. Build a batch of optimizers with "
            f"gdx.stack or gdx.grid"
        )
    coarse = ""
    if below < np.inf and hasattr(value, "dtype") and value.dtype.itemsize < 4:
        coarse = (
            f"{value.dtype}, in which values near {below:g} round to it; "
            f"pass it in float32 (with optax: inject_hyperparams(..., hyperparam_dtype='float32'))"
        )
    if is_concrete(value):
        with np.errstate(over="ignore"):
            rounded = float(np.asarray(value).astype(jnp.result_type(float)))
        least = max(minimum, np.finfo(float).min)  # -inf is no number either
        in_range = least <= float(value) < below
        if not (in_range and least <= rounded < below and bool(rounded) == bool(value)):
            in_float32 = f" ({rounded!r} in {jnp.result_type(float)})" if in_range else ""
            hint = f". It is a {coarse}" if coarse else f"; {mend}" if mend and float(value) < least else ""
            raise ValueError(f"{label} is {float(value)!r}{in_float32}; {_expected(minimum, below)}{hint}")
    elif coarse:
        raise TypeError(f"{label} is a traced {coarse}")
    return to_number(value)


def makes_schedules(function: Any) -> bool:
    """Whether it is a class, or a function that cannot be called with a count alone."""
    if isinstance(function, types.FunctionType):
        try:
            inspect.signature(function).bind(0)
        except TypeError:
            return True
    return isinstance(function, type)


def uncalled(value: Any) -> str:
    """What to do with a function or class where what it makes is expected."""
    return f"; call it, as in {value.__name__}(...)" if isinstance(value, type | types.FunctionType) else ""


def to_bool(label: str, value: Any) -> bool:
    """Converts a static switch."""
    return bool(value) if isinstance(value, bool | np.bool_) else refuse(label, value, "True or False")


def to_integer(label: str, value: Any, *, minimum: int | None = None) -> int:
    """Converts a static whole number."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
        refuse(label, value, "an integer")
    if minimum is not None and value < minimum:
        refuse(label, value, f"an integer >= {minimum}", ValueError)
    return int(value)


def to_word(label: str, value: Any, *words: str) -> str:
    """Converts a static choice among words."""
    if not isinstance(value, str) or value not in words:
        refuse(label, value, f"{', '.join(map(repr, words[:-1]))} or {words[-1]!r}", ValueError)
    return value


def refuse(label: str, value: Any, expected: str, error: type[Exception] = TypeError) -> Any:
    """Raises an error that says what was got and what was expected."""
    raise error(f"{label} is {text(value) if is_number(value) else reprlib.repr(value)}; expected {expected}")


_NUMBERS = int | float | np.generic | np.ndarray | jax.Array


def is_number(value: Any) -> bool:
    """Whether it is a real number, or an array of one."""
    return isinstance(value, _NUMBERS) and not isinstance(value, bool) and is_real(value) and np.shape(value) == ()


def to_number(value: Any) -> Any:
    """A number as a field holds it: np.float64 on the host; what cannot be read here, in the default float dtype.

    So an array is no other value than its number: on no device, and taken where flax's nnx refuses arrays.
    """
    return value.astype(jnp.result_type(float)) if not is_concrete(value) else np.float64(value)


def is_real(x: Any) -> bool:
    """Whether it is a real number, or an array or list of such."""
    try:
        dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
        return bool(jnp.issubdtype(dtype, np.floating) or jnp.issubdtype(dtype, np.integer))
    except (TypeError, ValueError):  # random keys; lists of several lengths
        return False


def _expected(minimum: float, below: float) -> str:
    interval = f" in [{minimum:g}, {below:g})" if below < np.inf else f" >= {minimum:g}" if minimum > -np.inf else ""
    return f"expected a finite number{interval}, an array of shape () or a schedule"


def is_key(value: Any) -> bool:
    """Whether it is a random key, or an array of keys."""
    return isinstance(value, jax.Array) and jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key)


def is_concrete(value: Any) -> bool:
    """Whether the value of an array can be read here: it is no tracer, and this process holds it."""
    return not isinstance(value, jax.core.Tracer) and getattr(value, "is_fully_addressable", True)


def is_opaque(value: Any) -> bool:
    """Whether a field's value is a function that no pytree has taken apart, so that JAX cannot carry it."""
    return callable(value) and jax.tree_util.all_leaves([value])


class Setting:
    """What is not a child, hashable and comparable also where it is a tree of booleans or names."""

    __slots__ = ("_key", "value")

    def __init__(self, value: Any):
        self.value = value
        self._key: Any = None

    def _compared(self) -> Any:
        if self._key is None:
            leaves, structure = jax.tree.flatten(self.value)
            # with its type: True == 1, and numpy's dtype of doubles == None
            self._key = structure, tuple((type(leaf), leaf) for leaf in leaves)
        return self._key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Setting) and (self.value is other.value or self._compared() == other._compared())

    def __hash__(self) -> int:
        return hash(self._compared())


def in_default_dtype(number: Any, dtype: Any = None) -> np.ndarray:
    """A number as it enters a program, or in this dtype; a random key as its data."""
    array = np.asarray(jax.random.key_data(number) if is_key(number) else number)
    return array.astype(dtype or jnp.result_type(float)) if jnp.issubdtype(array.dtype, np.floating) else array


def same(a: Any, b: Any) -> bool:
    """Whether two leaves are the same value; tracers are the same only if they are the same object."""
    if a is b:
        return True
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return False
    return bool(key_of(a) == key_of(b))


def key_of(leaf: Any, dtype: Any = None) -> Any:
    """A key that is equal for leaves that are the `same`, in the default float dtype or in this one."""
    if isinstance(leaf, bool) or not isinstance(leaf, _NUMBERS) or isinstance(leaf, jax.core.Tracer):
        return type(leaf), leaf  # True == 1
    array = in_default_dtype(leaf, dtype)
    if array.ndim == 0:
        return array.item()
    return is_key(leaf) and str(jax.typeof(leaf).dtype), array.shape, *array.ravel().tolist()


def text(value: Any) -> str:
    """A field's value as Python text that evaluates to it, where it has one."""
    if isinstance(value, jax.core.Tracer) or (isinstance(value, jax.Array | np.ndarray) and value.ndim > 0):
        return f"<{value.dtype}[{','.join(map(str, value.shape))}]>"
    if is_key(value):
        return f"<{value.dtype}{in_default_dtype(value).tolist()}>"
    if isinstance(value, jax.Array | np.ndarray | np.floating) and jnp.issubdtype(value.dtype, np.floating):
        # the shortest digits that tell it apart in the dtype in which it enters a program
        return repr(float(str(in_default_dtype(value))))
    if isinstance(value, np.dtype):
        return repr(value.name)
    if isinstance(value, jax.sharding.Mesh):  # one can be called, as a decorator
        return repr(value)
    if type(value) in (tuple, list, dict):
        return _container_text(value)
    if is_opaque(value):
        name = getattr(value, "__qualname__", type(value).__name__)
        return f"<{name.replace('<locals>.', '').replace('<lambda>', 'lambda')}>"
    return repr(value)


def _container_text(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {text(item)}" for key, item in value.items()) + "}"
    items = ", ".join(map(text, value))
    if isinstance(value, list):
        return f"[{items}]"
    return f"({items},)" if len(value) == 1 else f"({items})"
