"""Takes an optimizer's state from one storage format to another."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdx.storage.blocks import Packed, is_packed
from gdx.storage.dither import Dither
from gdx.trees import check_arrays


def convert(state: Any, like: Any) -> Any:
    """The same state in the storage formats and dtypes of another one.

    Values that were rounded stay rounded; a count that only `like` has is taken from there, and one
    that only `state` has is left out. Pure: works under `jax.jit` too.

    Args:
      state: an optimizer's state, say as restored from a checkpoint.
      like: the state in the formats to go to: `tx.init(params)` of the optimizer that goes on with it.

    Returns:
      A state with the structure, shapes and dtypes of `like`, and the values of `state`.

    Raises:
      TypeError: a leaf is no array, or cannot be converted without losing what it is: a complex number in a real one,
        a fraction in an integer, a random key in another.
      ValueError: the states differ in more than formats and counts.

    >>> import gdx, jax.numpy as jnp
    >>> params = {"w": jnp.ones((8, 512))}
    >>> exact, small = gdx.adam(0.1), gdx.adam(0.1, nu_dtype=gdx.storage.FourthRoot8())
    >>> _, state = exact.update(params, exact.init(params))
    >>> state = gdx.storage.convert(state, small.init(params))
    >>> state[0].count.item(), state[0].nu["w"].codes.max().item()
    (1, 255)
    """
    check_arrays("convert: state", state)
    check_arrays("convert: like", like)
    values, targets = dict(_leaves(state)), dict(_leaves(like))
    missing = [path for path in targets if path not in values and not _is_count(targets[path])]
    extra = [path for path in values if path not in targets and not _is_count(values[path])]
    shaped = [path for path in targets if path in values and np.shape(values[path]) != np.shape(targets[path])]
    for what, paths in (("has nothing at", missing), ("has also", extra), ("has another shape at", shaped)):
        if paths:
            raise ValueError(
                f"convert: the state {what} {', '.join(map(jax.tree_util.keystr, paths[:3]))}, unlike the one to go "
                f"to; pass tx.init(params) of an optimizer with the same links, and the same parameters"
            )
    for path, target in targets.items():
        if path in values and not _holds(_dtype(target), _dtype(values[path])):
            raise TypeError(
                f"convert: the state is {_dtype(values[path])} at {jax.tree_util.keystr(path)}, of which the one to go "
                f"to, {_dtype(target)}, holds only a part; convert that leaf yourself, or take it from tx.init(params)"
            )
    leaves = [_recast(values.get(path, target), target, index) for index, (path, target) in enumerate(targets.items())]
    return jax.tree.unflatten(jax.tree.structure(like, is_leaf=is_packed), leaves)


def _leaves(state: Any, path: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Leaves by their paths, which do not change when a count comes beside what it counts."""
    for path_there, x in jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda x: is_packed(x) or _is_counted(x)):
        if _is_counted(x):
            yield (*path, *path_there, "count"), x.count
            yield from _leaves(x.inner_state, (*path, *path_there))
        else:
            yield (*path, *path_there), x


def _is_counted(x: Any) -> bool:
    return getattr(x, "_fields", None) == ("count", "inner_state")


def _recast(value: Any, target: Any, index: int) -> Any:
    if isinstance(value, Packed):
        if isinstance(target, Packed) and value.format == target.format:
            return value
        value = value.decode()
    value = jnp.asarray(value)
    if isinstance(target, Packed):
        return target.format.encode(value, Dither(np.uint32(0), np.uint32(index)))
    return value if value.dtype == target.dtype else value.astype(target.dtype)  # keys refuse to be cast, even to keys


def _dtype(x: Any) -> Any:
    return np.dtype(np.float32) if is_packed(x) else jnp.result_type(x)


# a key is none of the others
_KINDS = (np.bool_, np.integer, np.floating, np.complexfloating, jax.dtypes.prng_key)


def _holds(target: Any, dtype: Any) -> bool:
    """Whether an array of this dtype keeps its kind in the target's."""
    rank, most = ([jnp.issubdtype(x, kind) for kind in _KINDS].index(True) for x in (dtype, target))
    return dtype == target or (rank <= most < len(_KINDS) - 1)


def _is_count(x: Any) -> bool:
    dtype = jnp.result_type(x)  # of a byte is the correction of a parameter that is a scalar
    return np.shape(x) == () and jnp.issubdtype(dtype, jnp.integer) and dtype.itemsize > 1
