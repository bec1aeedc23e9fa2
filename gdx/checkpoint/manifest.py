"""The manifest of a checkpoint: what it holds, in JSON, and how that differs from what is expected."""

import collections
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx.checkpoint.describe import ADDRESS, describe, kind, unplaced
from gdx.grouping import leaf_paths
from gdx.storage.blocks import is_packed
from gdx.transform import Transform

FORMAT = 2


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


def leaves(params: Any, state: Any, label: str = "checkpoint") -> dict[str, Any]:
    """Every leaf of both by its path, with slashes between names; errors start with the label.

    Raises:
      ValueError: two paths are the same text, or one holds an address: neither could be found again.
    """
    trees = {"params": params, "state": state}
    texts = list(leaf_paths(trees))
    # Orbax makes folders at slashes, and dots of them
    counts = collections.Counter(text.replace("/", ".") for text in texts)
    folders = {folder for text in texts for folder in _folders(text)}
    for text in texts:
        is_twice = counts[text.replace("/", ".")] > 1 or f"{text}/" in folders
        if is_twice or ADDRESS.search(text):
            raise ValueError(
                f"{label}: {'two leaves are' if is_twice else 'a leaf is'} called {text}, by which a leaf cannot be "
                f"found again; give the keys in its path texts that tell them apart, slashes and dots alike, and are "
                f"the same in every process"
            )
    return dict(zip(texts, jax.tree.leaves(trees)))


def storage(state: Any) -> dict[str, str]:
    """The storage format of each moment that is packed."""
    paths = leaf_paths({"state": jax.tree.map(is_packed, state, is_leaf=is_packed)})
    return {path: repr(x.format) for path, x in zip(paths, jax.tree.leaves(state, is_leaf=is_packed)) if is_packed(x)}


def of_params(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the parameters, by the paths in which patterns are searched."""
    return {path[len("params/") :]: x for path, x in leaves.items() if path.split("/")[0] == "params"}


def skipped(patterns: Sequence[str], targets: Mapping[str, Any]) -> list[str]:
    """The targets whose path a pattern matches.

    Raises:
      TypeError, ValueError: a pattern is no regular expression, or matches nothing; a target that is matched has no
        value, or none is left.
    """
    found = dict[str, Any]()
    for pattern in patterns:
        try:
            matching = {path: x for path, x in targets.items() if re.search(pattern, path)}
        except (re.error, TypeError) as error:
            raise (ValueError if isinstance(pattern, str) else TypeError)(
                f"restore_params: the pattern {pattern!r} is no regular expression ({error}); expected one such as "
                f"'^head'"
            ) from error
        if not matching:
            raise ValueError(
                f"restore_params: the pattern {pattern!r} matches no path of params; expected one that does (what only "
                f"the checkpoint has is not read anyway). The paths are {_listed(targets, 20)}"
            )
        found |= matching
    for path, x in found.items():
        if not _has_value(x):
            raise ValueError(
                f"restore_params: {path} has no value that could stay; expected an array where a pattern of skip "
                f"matches, no jax.ShapeDtypeStruct, and none that was donated"
            )
    if len(found) == len(targets):
        raise ValueError("restore_params: nothing is left to be read; expected parameters that skip does not match")
    return [path for path in targets if path in found]


def check_params(saved: Mapping[str, Any], targets: Mapping[str, Any], skip: Sequence[str]) -> str | None:
    """How the parameters to be read differ from the saved ones, and what to do; None if all can be read."""
    arrays = of_params(saved["arrays"])
    said = _differences({path: x for path, x in arrays.items() if path in targets}, targets)
    return f"is of another model: {'; '.join(said[:4])}. {_mend_params(arrays, targets, skip)}" if said else None


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
    targets, formats, was = leaves(params, state), storage(state), saved["storage"]
    held = [path for path in {**formats, **was} if formats.get(path) != was.get(path)]
    unlike = _differences(saved["arrays"], targets)
    unlike += [f"{path} is held as {formats.get(path)}, saved {was.get(path)}" for path in held]
    theirs, ours = of_params(saved["arrays"]), of_params(targets)
    mend = (
        f"Restore with the optimizer that saved it, {saved['repr']}, onto what is like the saved state, such as its "
        f"init(params); where storage formats are all that differs, gdx.storage.convert(state, tx.init(params)) goes "
        f"on from there. Or go on with the parameters alone: restore_params(params)"
    )
    if _differences(theirs, ours):
        mend = _mend_params(theirs, ours)
    if changed:
        pairs = [(name, here.get(name, "absent"), fields.get(name, "absent")) for name in changed]
        said = "; ".join(f"{name} is {value}, saved {old}" for name, value, old in pairs)
        allowed = ", ".join(map(repr, [*allow, *changed]))
        return f"is of another optimizer: {said}. " + (
            mend if unlike else f"To go on with the values of here, pass allow=[{allowed}]"
        )
    return f"holds other arrays: {'; '.join(unlike[:4])}. {mend}" if unlike else None


def _mend_params(arrays: Mapping[str, Any], targets: Mapping[str, Any], skip: Sequence[str] = ()) -> str:
    """What can be done where parameters differ; `skip` has left out others already."""
    unlike = {path: x for path, x in targets.items() if arrays.get(path, [])[:2] != _described(x)}
    cast = any(arrays[path][1] == list(np.shape(x)) for path, x in unlike.items() if path in arrays)
    said = ["Nothing is cast: ask for the saved dtype (64 bits by arrays of numpy), and cast what comes back"] * cast
    if len(unlike) < len(targets):
        patterns = f", skip={[*skip, *_patterns(unlike, targets)]}" if unlike else ""
        values = "" if all(map(_has_value, unlike.values())) else ", with arrays, not shapes, where that matches"
        said.append(f"To take what fits: restore_params(params{patterns}){values}")
    elif not cast:
        said.append(_inside(arrays, targets) or "None of the parameters fits")
    return ". ".join(said)


def _inside(arrays: Mapping[str, Any], targets: Mapping[str, Any]) -> str:
    """Where all of the targets are like what folders of the saved parameters have: how to ask for that."""
    first, folders = next(iter(targets)), list[str]()
    for found in arrays:
        folder = found.removesuffix(first).rstrip("/") if first else found
        inner = {"/".join(filter(None, (folder, path))): x for path, x in targets.items()}
        if found in inner and all(arrays.get(path, [])[:2] == _described(x) for path, x in inner.items()):
            folders.append(folder)
    if not folders:
        return ""
    tree = "params"
    for name in reversed(folders[0].split("/")):
        tree = f"{{{name!r}: {tree}}}"
    return f"They are like what it has at {_listed(folders)}: ask for it there, as in restore_params({tree})"


def _patterns(unlike: Mapping[str, Any], targets: Mapping[str, Any]) -> list[str]:
    """Patterns that match these targets and no others: of folders, where all in them is unlike."""
    others = {folder for path in targets if path not in unlike for folder in _folders(path)}
    found = dict[str, None]()
    for path in unlike:
        whole = [folder for folder in _folders(path) if folder not in others]
        found[f"^{re.escape(whole[0])}" if whole else f"^{re.escape(path)}$"] = None
    return list(found)


def _folders(path: str) -> list[str]:
    return [path[: i + 1] for i, character in enumerate(path) if character == "/"]


def _has_value(x: Any) -> bool:
    return not isinstance(x, jax.ShapeDtypeStruct) and not (isinstance(x, jax.Array) and x.is_deleted())


def _listed(paths: Iterable[str], most: int = 3) -> str:
    listed = [path or "the root" for path in paths]
    return f"{', '.join(listed[:most])}{' and others' if len(listed) > most else ''}"


def _differences(arrays: Mapping[str, Any], targets: Mapping[str, Any]) -> list[str]:
    """The leaves that are not alike, in words."""
    missing, more = (
        [path for path in one if path not in other] for one, other in ((targets, arrays), (arrays, targets))
    )
    said = [f"it has {what} {_listed(paths)}" for what, paths in (("nothing at", missing), ("also", more)) if paths]
    for path in targets:
        if path in arrays and _described(targets[path]) != arrays[path][:2]:
            said.append(f"{_listed([path])} is {_shown(_described(targets[path]))}, saved {_shown(arrays[path])}")
    return said


def _described(x: Any) -> list[Any]:
    dtype = x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype
    if isinstance(x, jax.ShapeDtypeStruct) and not is_key(x):
        dtype = jax.dtypes.canonicalize_dtype(dtype)  # what JAX would make of it
    return [str(dtype), list(np.shape(x))]


def _shown(described: Sequence[Any]) -> str:
    return f"{described[0]}[{','.join(map(str, described[1]))}]"
