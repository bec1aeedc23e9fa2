"""Trees of arrays: where a leaf is, in words, and the leading axis that all leaves share."""

import reprlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


def path_text(path: tuple) -> str:
    """A key path as text."""
    return jax.tree_util.keystr(path) or "the root"


def paths(tree: Any) -> Iterator[str]:
    """Where each leaf of a tree is, as text."""
    for path, _ in jax.tree_util.tree_leaves_with_path(tree):
        yield path_text(path)


def is_box(x: Any) -> bool:
    """Whether it is what flax's nnx keeps an array in."""
    return any(kind.__name__ == "Variable" and kind.__module__.startswith("flax.nnx") for kind in type(x).__mro__)


def unboxed(tree: Any) -> Any:
    """The tree with what is in flax's boxes instead of them."""
    content = lambda box: jax.tree.leaves(box, is_leaf=lambda x: x is not box)[0]  # noqa: E731
    return jax.tree.map(lambda x: content(x) if is_box(x) else x, tree, is_leaf=is_box)


def check_arrays(label: str, tree: Any) -> None:
    """Raises unless all leaves of a tree are arrays or numbers."""
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if not is_array(x):
            raise TypeError(f"{label} is {reprlib.repr(x)} at {path_text(path)}; expected arrays")


def kinds(tree: Any) -> tuple[Any, list[str]]:
    """The structure of a tree of arrays, and their dtypes and shapes, in words that can be shown."""
    return jax.tree.structure(tree), [f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(tree)]


def is_array(x: Any) -> bool:
    """Whether it is a number or an array of such, or of random keys."""
    kinds = (np.number, np.bool_, jax.dtypes.prng_key)
    return isinstance(x, bool | int | float | complex) or (
        hasattr(x, "dtype") and any(jax.dtypes.issubdtype(x.dtype, kind) for kind in kinds)
    )


def leading_axis(label: str, tree: Any, axis: str, *, least: int = 0, mend: str = "") -> int:
    """The length of the leading axis that all leaves have in common.

    Args:
      label: what the error starts with, up to the shapes.
      tree: a tree of arrays.
      axis: what the axis is of, such as "steps".
      least: the smallest length that is allowed.
      mend: what the error ends with.

    Raises:
      ValueError: there are no arrays, or they have no such axis.
    """
    shapes = dict(zip(paths(tree), map(np.shape, jax.tree.leaves(tree))))
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) != 1 or lengths == {()} or min(lengths) < (least,):
        listed = ", ".join(f"{path} has shape {shape}" for path, shape in list(shapes.items())[:5])
        raise ValueError(
            f"{label} {listed or 'there are no arrays'}; expected arrays with a leading axis of {axis}, of one length"
            f"{mend}"
        )
    return lengths.pop()[0]
