"""What an optimizer is, as texts that another process can compare: its kind and each of its fields."""

import functools
import hashlib
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from gdx.compose import chain
from gdx.fields import in_default_dtype, is_concrete, is_key, text
from gdx.schedules import Schedule
from gdx.sharding import offload_state, shard_state
from gdx.transform import Foreign, Transform, transforms_in
from gdx.values import names_of

# what Python shows of an object without a text of its own: another one in every process
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
# where schedules are looked at
COUNTS = (0, *(digit * 10**power for power in range(7) for digit in (1, 2, 5)))


def describe(tx: optax.GradientTransformation) -> dict[str, str]:
    """Each field of an optimizer as text, by its name in `hyperparams`, and which optimizer it is.

    Numbers are as they enter a program, in the default float dtype. Schedules that are functions are told
    apart by their values at 22 counts up to 5,000,000, to four digits; other functions by their names. A transform
    of optax has the fields of those of gdx that it is made of, and none of its own. Where `shard_state` and
    `offload_state` keep the state is left out.

    >>> import gdx
    >>> describe(gdx.adam(0.1))["learning_rate"], describe(gdx.chain(gdx.sgd(0.1)))["optimizer"]
    ('0.1', 'chain(sgd)')
    """
    tx = unplaced(tx)
    return {"optimizer": kind(tx), **_fields(tx)}


def _fields(tx: optax.GradientTransformation) -> dict[str, str]:
    if not isinstance(tx, Transform):
        held = list(_held(tx))
        return _fields(chain(*held)) if held else {}
    described = {}
    for name, found in names_of(tx).items():
        described[name] = _setting(found.value) if found.is_static else _hyperparameter(found.value)
        if isinstance(found.value, optax.GradientTransformation):
            described |= {f"{name}.{inner}": shown for inner, shown in _fields(found.value).items()}
    return described


def unplaced(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer without the `shard_state` or `offload_state` around it or one of its links."""
    if not isinstance(tx, Transform):
        return tx
    tx = jax.tree.map(lambda x: unplaced(x.tx) if _is_placed(x) else x, tx, is_leaf=_is_placed)
    return tx.transform if isinstance(tx, Foreign) else tx


def _is_placed(x: Any) -> bool:
    return isinstance(x, shard_state | offload_state)


def kind(tx: optax.GradientTransformation) -> str:
    """The names of a transform and of those that it holds."""
    if isinstance(tx, Foreign):
        return kind(tx.transform)
    name = type(tx).__name__
    if not isinstance(tx, Transform):
        name = f"<optax {getattr(tx.update, '__qualname__', type(tx.update).__name__).split('.')[0]}>"
    held = ", ".join(map(kind, _held(tx)))
    return f"{name}({held})" if held else name


def _held(tx: optax.GradientTransformation) -> Iterator[optax.GradientTransformation]:
    """The transforms in a transform's fields, or those of gdx in the functions of one of optax."""
    if not isinstance(tx, Transform):
        yield from map(unplaced, _closed_over(tx.update))
        return
    if isinstance(tx, Foreign):
        yield tx.transform
    yield from transforms_in(tx)


def _closed_over(function: Any) -> Iterator[Transform]:
    """The transforms of gdx that a function holds, each once, in the order of its variables."""
    seen: dict[int, Any] = {}
    waiting = [function]
    while waiting:
        x = waiting.pop()
        if id(x) in seen:
            continue
        seen[id(x)] = x
        if isinstance(x, Transform):
            yield x
        else:
            waiting += reversed(_parts(x))


def _parts(x: Any) -> list[Any]:
    """What a function, an optimizer that is an object, or a container holds; nothing of anything else."""
    if isinstance(x, types.MethodType):
        return [x.__self__]
    if isinstance(x, types.FunctionType):
        return [cell.cell_contents for cell in x.__closure__ or () if cell != types.CellType()]  # an empty one raises
    if isinstance(x, functools.partial):
        return [x.func, *x.args, *x.keywords.values()]
    if isinstance(x, dict):
        return list(x.values())
    if isinstance(x, tuple | list):
        return list(x)
    is_optimizer = not isinstance(x, type) and hasattr(x, "init") and hasattr(x, "update")
    return list(getattr(x, "__dict__", {}).values()) if is_optimizer else []


def _setting(value: Any) -> str:
    return kind(value) if isinstance(value, optax.GradientTransformation) else _without_addresses(text(value))


def _hyperparameter(value: Any) -> str:
    if isinstance(value, Schedule):  # its fields have names of their own
        return type(value).__name__
    if callable(value):
        return f"{text(value)} with values {_values(value)}"
    if value is None or is_key(value) or not is_concrete(value):
        return text(value)
    numbers = in_default_dtype(value)
    return " ".join(str(float(str(number))) for number in numbers.ravel())


def _values(function: Callable[[Any], Any]) -> str:
    """A digest of a schedule's values."""
    with jax.numpy_dtype_promotion("standard"):
        values = [f"{float(function(jnp.asarray(count, jnp.int32))):.4g}" for count in COUNTS]
    return hashlib.sha256(" ".join(values).encode()).hexdigest()[:8]


def _without_addresses(shown: str) -> str:
    return ADDRESS.sub("", shown)
