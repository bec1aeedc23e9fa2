"""What functions take: checks of one argument each, whose errors say what was got and what was expected."""

import inspect
import reprlib
from typing import Any

import jax
import numpy as np
import optax

from gdx.fields import is_concrete, is_key, is_number, refuse


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


def check_not_traced(name: str, tree: Any) -> None:
    """Raises where a function is to look at numbers that have no value yet."""
    if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree)):
        raise TypeError(
            f"{name}: what it looks at is traced, and has no value yet; call {name} outside of jax.jit, jax.vmap and "
            f"jax.grad"
        )
