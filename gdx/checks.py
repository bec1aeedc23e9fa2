"""What is checked before a step: gradients, parameters and state. Every error names the leaf and the mend."""

import collections
import contextlib
import functools
import reprlib
import types
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx.compat import varying_axes
from gdx.mesh import unreduced_axes
from gdx.storage.blocks import is_packed, reassembled
from gdx.storage.formats import Format, why_whole
from gdx.trees import path_text, paths, unboxed


def check_floating(label: str, tree: Any, mend: str = "") -> None:
    """Raises unless every leaf of a tree is a floating-point array."""
    leaves = jax.tree.leaves(tree)
    kinds = [getattr(leaf, "dtype", type(leaf)) for leaf in leaves]
    wrong = [kind for kind in dict.fromkeys(kinds) if not jnp.issubdtype(kind, np.inexact)]
    if wrong:
        i = kinds.index(wrong[0])
        raise TypeError(
            f"{label} at {_path(tree, i)} is {_array(leaves[i])}, expected a floating-point array{mend}{_order(tree)}"
        )


def _order(tree: Any) -> str:
    """What to do where a state may be in the place of the parameters."""
    return " A state goes before the parameters: update(gradients, state, params)." if state_kinds(tree) else ""


def check_params(tx: Any, params: optax.Params) -> None:
    """Raises unless every leaf is a floating-point array."""
    mend = ". Train only such leaves: take the others out of the parameters (equinox.partition), or cast them."
    check_floating(f"{type(tx).__name__}: the parameter", params, mend)


def check_gradients(tx: Any, updates: optax.Updates, params: optax.Params | None) -> None:
    """Raises unless the gradients are floating-point arrays shaped like the parameters, if those are given."""
    mend = ". Differentiate with respect to floating-point parameters only."
    check_floating(f"{type(tx).__name__}: the gradient", updates, mend)
    if params is not None:
        check_params(tx, params)
        check_like(tx, updates, "params", params)
        for i, (g, p) in enumerate(zip(jax.tree.leaves(updates), jax.tree.leaves(params))):
            if jnp.iscomplexobj(g) and not jnp.iscomplexobj(p):
                _refuse_complex(tx, updates, i)


def check_state(tx: Any, state: Any, kind: Any) -> None:
    """Raises unless the state is of this kind and its count, if it has one, an integer scalar."""
    if not isinstance(state, kind):
        fields = ", ".join(getattr(kind, "_fields", ()))
        raise TypeError(
            f"{type(tx).__name__}: the state is {kind_of(state)}, expected {kind.__name__}({fields}). {_STATE_MEND}"
        )
    # a NamedTuple without the field has the tuple's method of that name
    count = state.count if "count" in getattr(kind, "_fields", ()) else 0
    if not (jnp.issubdtype(jnp.result_type(count), np.integer) and jnp.shape(count) == ()):
        raise TypeError(
            f"{type(tx).__name__}: state.count is {_array(count)}, expected an integer scalar. "
            f"If it was restored from a file, cast it back: state._replace(count=state.count.astype('int32'))"
        )


def check_chain_state(tx: Any, state: Any, length: int) -> None:
    """Raises unless the state is a tuple with one state for each link."""
    if type(state) is not tuple or len(state) != length:
        raise TypeError(
            f"{type(tx).__name__}: the state is {kind_of(state)}, expected a tuple of {length}, one state for each "
            f"link. {_STATE_MEND}"
        )


def kind_of(state: Any) -> str:
    """A state in words, for errors."""
    if isinstance(state, dict):
        return f"a dict with keys {sorted(map(str, state))}"
    if type(state) is tuple:
        return f"a tuple of {len(state)}: ({', '.join(type(s).__name__ for s in state)})"
    return f"a {type(state).__name__}"


def nodes_of(state: Any) -> list[Any]:
    """All that there is in a state, itself first, and each before what is in it."""
    found = list[Any]()
    jax.tree.leaves(state, is_leaf=lambda x: bool(found.append(x)))  # type: ignore[func-returns-value]
    return found


def one_of(label: str, state: Any, kind: Any, what: str, maker: str) -> Any:
    """The one state of this kind in a state, without boxes of flax's; raises where there is none, or several."""
    found = [x for x in nodes_of(state) if isinstance(x, kind)]
    if len(found) != 1:
        raise ValueError(
            f"{label}: the state has {len(found) or 'no'} {what}{'s' * (len(found) > 1)}; expected that of one "
            f"{maker}, around all groups, as its init or update returned it, or part of it with one {what}"
        )
    return unboxed(found[0])


def state_kinds(state: Any) -> list[type]:
    """The kinds of the NamedTuples in a state, outermost first."""
    return [type(x) for x in nodes_of(state) if hasattr(x, "_fields")]


def check_state_like(tx: Any, state: Any, expected: Any, *, dtypes: bool = False) -> None:
    """Raises unless the state has the structure, shapes and, if asked for, dtypes of this one."""
    structure: Any = jax.tree.structure(state)
    if structure != jax.tree.structure(expected):
        theirs, ours = (dict.fromkeys(paths(t)) for t in (state, expected))
        unlike = [path for path in (*ours, *theirs) if (path in ours) != (path in theirs)]
        what = f", with other leaves: {', '.join(unlike[:3])}" if unlike else ""
        raise TypeError(
            f"{type(tx).__name__}: the state is {kind_of(state)}, expected {kind_of(expected)}{what}. {_STATE_MEND}"
        )
    for i, (leaf, other) in enumerate(zip(jax.tree.leaves(state), jax.tree.leaves(expected))):
        has_shape = np.shape(leaf) == np.shape(other)
        if not has_shape or (dtypes and jnp.result_type(leaf) != other.dtype):
            expected = f"the dtype {other.dtype}" if has_shape else f"the shape {np.shape(other)}"
            said = f"{type(tx).__name__}: the state is {_array(leaf)} at {_path(state, i)}, expected {expected}"
            raise (TypeError if has_shape else ValueError)(f"{said}. {_STATE_MEND}")


def check_like(tx: Any, updates: optax.Updates, name: str, tree: Any) -> None:
    """Raises unless `tree` (the parameters, a moment in the state) has the gradients' structure and shapes."""
    structure: Any = jax.tree.structure(updates)
    if structure != jax.tree.structure(tree):
        # a moment in a storage format may be a node of its own
        tree = jax.tree.map(_described, tree, is_leaf=is_packed)
    if structure != jax.tree.structure(tree):
        raise ValueError(
            f"{type(tx).__name__}: the gradients' tree differs from that of {name}: {_difference(updates, tree, name)}"
        )
    for i, (leaf, other) in enumerate(zip(jax.tree.leaves(updates), jax.tree.leaves(tree))):
        if np.shape(leaf) != np.shape(other):
            raise ValueError(
                f"{type(tx).__name__}: the gradient at {_path(updates, i)} has shape {np.shape(leaf)}, but {name} "
                f"there has {np.shape(other)}; pass gradients with respect to the parameters that init was called with"
            )


def checked_moments(tx: Any, updates: optax.Updates, moments: dict[str, Any]) -> list[list[Any]]:
    """The leaves of moments by name, in the gradients' order: of one in a storage format the whole of it.

    Raises unless they are shaped like the gradients and held as the transform has it.
    """
    structure: Any = jax.tree.structure(updates)
    trees = list(map(reassembled, moments.values(), tx.formats or [None] * len(moments)))
    for name, tree in zip(moments, trees):
        check_like(tx, updates, f"state.{name}", tree)
    columns = list(map(structure.flatten_up_to, trees))
    check_formats(tx, updates, list(moments), columns)
    return columns


class Notes(NamedTuple):
    """What is noted on the way.

    Attributes:
      whole: why each moment that has a format stays whole, by its place in the link's state.
      groups: each `gdx.groups` with the sizes of its parameters.
    """

    whole: dict[tuple, list[str]]
    groups: dict[Any, tuple[Any, Any]]


_notes: ContextVar[Any] = ContextVar("notes", default=None)


@contextlib.contextmanager
def noted() -> Iterator[Notes]:
    """In here `init` leaves its notes."""
    token = _notes.set(Notes(collections.defaultdict(list), {}))
    try:
        yield _notes.get()
    finally:
        _notes.reset(token)


@contextlib.contextmanager
def held_together(tx: Any, params: optax.Params) -> Iterator[None]:
    """In here `init` is called for parts of these parameters; warns where formats hold nothing in any of them."""
    if (notes := _notes.get()) is not None:  # whoever asked for the notes judges
        # by its structure: where it was traced first, the same without tracers replaces it
        notes.groups[jax.tree.structure((tx, params))] = tx, jax.tree.map(np.size, params)
        yield
        return
    with noted() as notes:
        yield
    whys = [why for found in notes.whole.values() for why in found]
    if whys and all(whys):
        warnings.warn(
            f"{type(tx).__name__}: no leaf fits its storage format, so all stay whole. One of them: {whys[0]}. "
            f"{_WHOLE_MEND}",
            stacklevel=2,
        )


_WHOLE_MEND = (
    "Choose a smaller minimum_size or block, or leave the format out; gdx.describe(tx, params) lists what stays whole"
)


def check_held(tx: Any, params: optax.Params, names: list[str], rows: list[tuple[Any, ...]]) -> None:
    """Warns where formats hold nothing of the moments with these names, given for each parameter; or has it `noted`."""
    notes, leaves, whole = _notes.get(), jax.tree_util.tree_leaves_with_path(params), dict[str, list[str]]()
    for i, (name, format) in enumerate(zip(names, tx.formats)):
        if isinstance(format, Format):
            whys = [why_whole(format, row[i]) for row in rows]
            if notes is not None:
                for (path, _), why in zip(leaves, whys):
                    notes.whole[jax.tree_util.GetAttrKey(name), *path].append(why)
            elif whys and all(whys):
                whole[f"state.{name} in {format}"] = whys
    if whole:
        (path, largest), why = max(zip(leaves, next(iter(whole.values()))), key=lambda pair: np.size(pair[0][1]))
        warnings.warn(
            f"{type(tx).__name__}: no leaf fits {' or '.join(whole)}, so all stay whole. The largest, at "
            f"{path_text(path)}, has the shape {np.shape(largest)}: {why}. {_WHOLE_MEND}",
            stacklevel=2,
        )


def check_formats(tx: Any, updates: optax.Updates, names: list[str], columns: list[list[Any]]) -> None:
    """Raises where moments (lists of leaves) are not in the dtype or storage format that the transform has."""
    for i, (g, *moments) in enumerate(zip(jax.tree.leaves(updates), *columns)):
        if jnp.iscomplexobj(g) and moments and not any(map(_is_complex, moments)):
            _refuse_complex(tx, updates, i)
        for name, format, moment in zip(names, tx.formats, moments):
            if not _is_held_by(format, moment):
                raise TypeError(
                    f"{type(tx).__name__}: state.{name} at {_path(updates, i)} is {_array(moment)}, which is not how "
                    f"{_format(format)} holds it. Take it there: gdx.storage.convert(state, tx.init(params))"
                )
            axes = unreduced_axes(g) if is_packed(moment) else ()
            if axes:
                raise ValueError(
                    f"{type(tx).__name__}: the gradient at {_path(updates, i)} is a sum that is still to be made over "
                    f"the axes {', '.join(map(repr, axes))} of the mesh. Make it: "
                    f"jax.sharding.reshard(gradients, jax.P())"
                )


def _is_held_by(format: Any, moment: Any) -> bool:
    """Whether a moment is in this format; without one, or where one does not fit, in at least float32."""
    if isinstance(format, Format) and format.holds(moment):
        return _kinds(moment) == _stored_kind(format, moment.shape)
    if is_packed(moment) or not jnp.issubdtype(moment.dtype, np.floating):
        return not is_packed(moment) and jnp.iscomplexobj(moment)
    # without x64, float64 means float32
    return (
        moment.dtype == jax.dtypes.canonicalize_dtype(format)
        if isinstance(format, np.dtype)
        else moment.dtype.itemsize >= 4
    )


def check_returned(tx: Any, method: str, found: Any, expected: Sequence[Any], what: str) -> None:
    """Raises unless a method of a link returned a tuple of such arrays: in these shapes, complex only as these are."""
    is_right = isinstance(found, tuple | list) and len(found) == len(expected)
    if not is_right or any(_shape(x) != np.shape(like) for x, like in zip(found, expected)):
        if isinstance(found, tuple | list):
            got = f"a tuple of {len(found)}, in the shapes {', '.join(str(_shape(x)) for x in found) or 'of nothing'}"
        else:
            got = f"no tuple but {_array(found)}"
        shapes = ", in the shapes " + ", ".join(str(np.shape(like)) for like in expected) if expected else ""
        raise TypeError(
            f"{type(tx).__name__}: {method} returned {got}; expected a tuple of {len(expected)}{shapes}: {what}"
        )
    for x, like in zip(found, expected):
        if _is_complex(x) and not _is_complex(like):
            raise TypeError(
                f"{type(tx).__name__}: {method} returned {_array(x)}, expected a real array, as what it was given is; "
                f"take the real part"
            )


def check_stepped(tx: Any, returned: Any, updates: optax.Updates | None) -> None:
    """Raises unless `update_tree` returned updates, like these if there are any, and a state."""
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise TypeError(
            f"{type(tx).__name__}: update_tree returned {kind_of(returned)}; expected a pair, the updates and "
            f"the new state"
        )
    if updates is None:
        return
    found, structure = jax.tree.flatten(returned[0])
    gradients, expected = jax.tree.flatten(updates)
    unlike = [i for i, (u, g) in enumerate(zip(found, gradients)) if _shape(u) != np.shape(g)]
    if structure != expected or unlike:  # type: ignore[operator]
        at = f" as {structure}"
        if structure == expected:  # type: ignore[operator]
            at = f", of the shape {_shape(found[unlike[0]])} at {_path(updates, unlike[0])}"
        raise TypeError(
            f"{type(tx).__name__}: update_tree returned updates{at}; expected one for each gradient, shaped like it"
        )


def check_own_formats(tx: Any, names: list[str]) -> None:
    """Raises unless a link's formats are dtypes, storage formats or None, one for each moment, or none at all."""
    expected = (
        f"a tuple of {len(names)}, for {', '.join(names) or 'no moment'}: each a np.dtype, a format or None, as "
        f"gdx.storage.to_storage makes of what a user gives; or ()"
    )
    if not isinstance(tx.formats, tuple | list) or len(tx.formats) not in (0, len(names)):
        raise TypeError(f"{type(tx).__name__}: formats is {reprlib.repr(tx.formats)}; expected {expected}")
    for format in tx.formats:
        if not isinstance(format, np.dtype | Format | types.NoneType):
            raise TypeError(f"{type(tx).__name__}: formats has {reprlib.repr(format)}; expected {expected}")


def check_starts(tx: Any, names: list[str], rows: list[tuple[Any, ...]]) -> None:
    """Raises unless the moments at the start, given for each parameter, are held as the link's formats say."""
    for row in rows:
        for name, format, moment in zip(names, tx.formats or [None] * len(names), row):
            # without formats they are held as they are made, but in blocks
            if (tx.formats or is_packed(moment)) and not _is_held_by(format, moment):
                raise TypeError(
                    f"{type(tx).__name__}: start returned {_array(moment)} for {name}, which is not how "
                    f"{_format(format)} holds it; expected gdx.storage.moment_like(p, format), with the same in formats"
                )


def _refuse_complex(tx: Any, updates: optax.Updates, index: int) -> None:
    raise TypeError(
        f"{type(tx).__name__}: the gradient at {_path(updates, index)} is complex, but the parameter is real; "
        f"take the gradient's real part, or make the parameter complex"
    )


_VALUE_ERRORS = (
    jax.errors.ConcretizationTypeError,
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


@contextlib.contextmanager
def no_values(said: str) -> Iterator[None]:
    """Where a traced array's value is asked for in here, an error that says what did so, and what JAX said."""
    try:
        yield
    except _VALUE_ERRORS as error:
        raise TypeError(f"{said} ({str(error).splitlines()[0]})") from error


def check_alike(tx: Any, what: str, tree: Any, does: str) -> None:
    """Raises inside `jax.shard_map` where arrays differ between devices, each of which would decide on its own."""
    axes = {axis for x in jax.tree.leaves(tree) for axis in varying_axes(x)}
    if axes:
        raise ValueError(
            f"{type(tx).__name__}: in jax.shard_map {what} differ along {', '.join(map(repr, sorted(axes)))}: each "
            f"device would {does} its own. Expected their mean, as from jax.lax.pmean"
        )


def require_params(tx: Any, params: optax.Params | None) -> None:
    """Raises if the parameters were not passed."""
    if params is None:
        raise ValueError(f"{type(tx).__name__}: update needs the parameters; call update(gradients, state, params)")


_STATE_MEND = (
    "Pass the state that this transform's init or its last update returned, as update(gradients, state, params); "
    "restore a saved one with init(params) as the target."
)


def _is_complex(x: Any) -> bool:
    return not is_packed(x) and jnp.iscomplexobj(x)


def _shape(x: Any) -> Any:
    """The shape of an array or number; None of what is neither."""
    return x.shape if hasattr(x, "shape") else () if isinstance(x, int | float | complex) else None


def _described(x: Any) -> Any:
    return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_packed(x) else x


def _kinds(moment: Any) -> tuple:
    leaves, structure = jax.tree.flatten(moment)
    return structure, tuple(leaf.dtype for leaf in leaves)


@functools.cache
def _stored_kind(format: Format, shape: tuple[int, ...]) -> tuple:
    """The structure and dtypes of what a format makes of an array of this shape."""
    return _kinds(jax.eval_shape(format.zeros, jax.ShapeDtypeStruct(shape, np.float32)))


def _format(format: Any) -> str:
    if isinstance(format, np.dtype):
        return f"an optimizer with {format.name}"
    return repr(format) if isinstance(format, Format) else "an optimizer without a storage format, in float32 or wider,"


def _difference(updates: Any, tree: Any, name: str) -> str:
    """The paths that only one of two trees has."""
    ours, theirs = (dict.fromkeys(paths(t)) for t in (updates, tree))
    missing = [path for path in theirs if path not in ours]
    extra = [path for path in ours if path not in theirs]
    said = [
        f"{word} {', '.join(places[:3])}{' and others' if len(places) > 3 else ''}"
        for word, places in (("no gradient for", missing), (f"nothing in {name} for the gradient at", extra))
        if places
    ]
    types = f"{jax.tree.structure(updates)} and {jax.tree.structure(tree)} (same paths, other containers)"
    mend = "Take the gradients of the parameters that init was called with."
    return f"{'; '.join(said) or types}. {mend}{_order(tree)}"


def _path(tree: Any, index: int) -> str:
    return list(paths(tree))[index]


def _array(leaf: Any) -> str:
    if is_packed(leaf):
        return repr(leaf)
    if hasattr(leaf, "dtype"):
        return f"{leaf.dtype if leaf.dtype != jax.dtypes.float0 else 'float0'}[{','.join(map(str, leaf.shape))}]"
    return f"{type(leaf).__name__} {leaf!r}"
