"""What functions take: checks of one argument each, whose errors say what was got and what was expected."""

import inspect
import reprlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx.fields import is_concrete, is_key, is_number, text
from gdx.trees import path_text


def refuse(label: str, value: Any, expected: str, error: type[Exception] = TypeError) -> Any:
    """Raises an error that says what was got and what was expected."""
    raise error(f"{label} is {text(value) if is_number(value) else reprlib.repr(value)}; expected {expected}")


def of_kind(label: str, value: Any, kind: type | tuple[type, ...], expected: str) -> Any:
    """An argument that has a type."""
    return value if isinstance(value, kind) else refuse(label, value, expected)


def number(
    label: str, value: Any, expected: str = "a number", *, above: float = -np.inf, optional: bool = False
) -> Any:
    """A real number; infinite or NaN too where none is too small, traced, or None if it is optional."""
    if optional and value is None:
        return None
    if not is_number(value):
        refuse(label, value, expected)
    if is_concrete(value) and above > -np.inf and not above < float(value) < np.inf:
        refuse(label, value, expected, ValueError)
    return float(value) if is_concrete(value) else value


def is_real(x: Any) -> bool:
    """Whether it is a real number, or an array or list of such."""
    try:
        dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
        return bool(jnp.issubdtype(dtype, np.floating) or jnp.issubdtype(dtype, np.integer))
    except (TypeError, ValueError):  # random keys; lists of several lengths
        return False


def check_function(label: str, function: Any, *arguments: str, mend: str = "") -> None:
    """Raises unless it is a function that can take these arguments by position."""
    shown = reprlib.repr(function)
    is_right = callable(function) and not (
        isinstance(function, type) and issubclass(function, optax.GradientTransformation)
    )
    if is_right:
        try:
            # what is written around a function may give it more
            signature = inspect.signature(function, follow_wrapped=False)
            shown = f"{getattr(function, '__name__', shown)}{signature}"
            signature.bind(*arguments)
        except ValueError:  # it has no signature
            pass
        except TypeError:
            is_right = False
    if not is_right:
        raise TypeError(f"{label} is {shown}; expected a function of {' and '.join(arguments)}{mend}")


def check_key(label: str, value: Any) -> None:
    """Raises unless it is one random key, of the new kind or of bits."""
    is_bits = getattr(value, "dtype", None) == np.uint32 and value.ndim == 1
    if not (is_bits or (is_key(value) and value.ndim == 0)):
        refuse(label, value, "a random key, such as jax.random.key(0)")


def check_floating(label: str, tree: Any) -> None:
    """Raises unless every leaf of a tree is a floating-point array."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), np.inexact):
            kind = getattr(leaf, "dtype", reprlib.repr(leaf))
            raise TypeError(f"{label} at {path_text(path)} is {kind}; expected a floating-point array")
