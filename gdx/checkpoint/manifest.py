"""The manifest of a checkpoint: what it holds, in JSON, and how that differs from what is expected."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx.checkpoint.describe import ADDRESS, describe, kind, unplaced
from gdx.storage.blocks import is_packed
from gdx.transform import Transform

FORMAT = 1


def manifest(
    step: int, tx: optax.GradientTransformation, params: Any, state: Any, extra: Any, checksums: Mapping[str, str]
) -> dict[str, Any]:
    """What is saved beside the arrays, whose checksums are given by path.

    Raises:
      TypeError: extra is not JSON.
    """
    try:
        # a loss that is NaN is not equal to itself
        same = jax.tree.map(lambda a, b: a == b or a != a, json.loads(json.dumps(extra)), extra)
    except (TypeError, ValueError):
        same = False
    if not jax.tree.all(same):
        raise TypeError(f"save: extra is {extra!r}; expected numbers, texts, lists and dictionaries, as JSON has them")
    content = {
        "format": FORMAT,
        "step": step,
        "repr": repr(unplaced(tx)) if isinstance(tx, Transform) else kind(tx),
        "fields": describe(tx),
        "storage": storage(state),
        "arrays": {path: [*_described(x), checksums[path]] for path, x in leaves(params, state).items()},
        "extra": extra,
    }
    return {**content, "digest": digest(content)}


def digest(content: Mapping[str, Any]) -> str:
    """A checksum of all of a manifest but this one."""
    return hashlib.sha256(json.dumps({**content, "digest": None}, sort_keys=True).encode()).hexdigest()


def leaves(params: Any, state: Any) -> dict[str, Any]:
    """Every leaf of both by its path.

    Raises:
      ValueError: two paths are the same text, or one holds an address: neither could be found again.
    """
    found: dict[str, Any] = {}
    for name, tree in (("params", params), ("state", state)):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            text = f"{name}{jax.tree_util.keystr(path)}"
            problem = "two leaves are called" if text in found else "a leaf is called" if ADDRESS.search(text) else ""
            if problem:
                raise ValueError(
                    f"checkpoint: {problem} {text}, by which a leaf cannot be found again; give the keys in its path a "
                    f"repr that tells them apart and is the same in every process"
                )
            found[text] = leaf
    return found


def storage(state: Any) -> dict[str, str]:
    """The storage format of each moment that is packed."""
    nodes = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_packed)
    return {f"state{jax.tree_util.keystr(path)}": repr(x.format) for path, x in nodes if is_packed(x)}


def is_key(x: Any) -> bool:
    """Whether it is an array of random keys."""
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def check(
    saved: Mapping[str, Any], tx: optax.GradientTransformation, params: Any, state: Any, allow: Sequence[str]
) -> str | None:
    """How a saved optimizer and its arrays differ from the ones to go on with, and what to do; None if they agree."""
    fields, here = saved["fields"], describe(tx)
    unknown = [name for name in allow if name not in here and name not in fields]
    if unknown:
        return f"has no field {unknown[0]!r} to allow; choose from {', '.join(fields)}"
    changed = [name for name in {**fields, **here} if name not in allow and fields.get(name) != here.get(name)]
    arrays = _differences(saved, leaves(params, state), storage(state))
    mend = (
        f"To go on in another storage format or with other links, restore with the optimizer that saved it, "
        f"{saved['repr']}, and a target of its init(params); then gdx.storage.convert(state, tx.init(params))"
    )
    if changed:
        pairs = [(name, here.get(name, "absent"), fields.get(name, "absent")) for name in changed]
        said = "; ".join(f"{name} is {value}, saved {old}" for name, value, old in pairs)
        allowed = ", ".join(map(repr, [*allow, *changed]))
        return f"is of another optimizer: {said}. " + (
            mend if arrays else f"To go on with the values of here, pass allow=[{allowed}]"
        )
    return f"holds other arrays: {arrays}. {mend}" if arrays else None


def _differences(saved: Mapping[str, Any], targets: Mapping[str, Any], formats: Mapping[str, str]) -> str:
    """The leaves that are not alike, as text."""
    arrays = saved["arrays"]
    said = [
        f"{word} {', '.join(listed[:3])}{' and others' if len(listed) > 3 else ''}"
        for word, listed in (
            ("it has nothing at", [path for path in targets if path not in arrays]),
            ("it has also", [path for path in arrays if path not in targets]),
        )
        if listed
    ]
    for path in targets:
        if path in arrays and _described(targets[path]) != arrays[path][:2]:
            said.append(f"{path} is {_shown(_described(targets[path]))}, saved {_shown(arrays[path])}")
    for path in {**formats, **saved["storage"]}:
        if formats.get(path) != saved["storage"].get(path):
            said.append(f"{path} is held as {formats.get(path)}, saved {saved['storage'].get(path)}")
    return "; ".join(said[:4])


def _described(x: Any) -> list[Any]:
    dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
    return [str(dtype), list(np.shape(x))]


def _shown(described: Sequence[Any]) -> str:
    return f"{described[0]}[{','.join(map(str, described[1]))}]"
