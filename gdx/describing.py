"""What an optimizer is for these parameters: who is where, how its state is held, and how large that is."""

import itertools
import textwrap
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from gdx.checkpoint.describe import kind
from gdx.checks import noted
from gdx.fields import text
from gdx.grouping import groups, leaf_paths, times
from gdx.mesh import names_of as axes_of
from gdx.modules import take_apart
from gdx.sharding.placement import plan_of
from gdx.sharding.state import bare, check_layout
from gdx.storage.blocks import is_packed, nbytes
from gdx.transform import Transform, to_transform
from gdx.values import Value, names_of, size_of


class Group(NamedTuple):
    """Parameters that have the same hyperparameters; see `Description`."""

    name: str
    text: str
    hyperparams: Mapping[str, Any]
    paths: tuple[str, ...]
    parameters: int


class Leaf(NamedTuple):
    """Where one array of a state lives; see `Description`."""

    path: str
    moment: str
    format: str
    spec: PartitionSpec | None
    nbytes: int
    nbytes_per_device: int
    why: str
    why_whole: str
    memory: str


class Moment(NamedTuple):
    """What is of one name and format and in one memory in a state; see `Description`."""

    name: str
    format: str
    nbytes: int
    nbytes_per_parameter: float
    nbytes_per_device: int
    memory: str


class Description(NamedTuple):
    """What `describe` has found; prints as a table.

    Attributes:
      optimizer: what the optimizer is made of.
      groups: of `gdx.groups` in it, in order; else one, "all". Each has a `name` (the pattern), the `hyperparams` that
        are other than in the optimizer (of "all" and "all others" every one) and these as `text`, the `paths` of its
        leaves, and how many numbers these `parameters` are.
      leaves: one for each array of the state: its `path` there, which `moment` it is part of, its dtype or storage
        `format`, how it is split (`spec`, None without a mesh), `nbytes` of the whole array and `nbytes_per_device` of
        each device's part, `why` it is not split along the axis (empty if it is, or without a mesh), `why_whole`, why
        it is not held in its storage format (empty if it is, or has none), and in which `memory` it is between steps:
        "device", or "host" under `gdx.sharding.offload_state`.
      parameters: how many numbers the parameters are.
    """

    optimizer: str
    groups: tuple[Group, ...]
    leaves: tuple[Leaf, ...]
    parameters: int

    @property
    def moments(self) -> tuple[Moment, ...]:
        """What the leaves are in all, for each name, format and memory; scalars last."""
        found: dict[tuple[str, str, str], list[Leaf]] = {}
        for leaf in sorted(self.leaves, key=lambda leaf: leaf.moment == _SCALARS):
            found.setdefault((leaf.moment, leaf.format, leaf.memory), []).append(leaf)
        return tuple(
            Moment(name, form, total, total / max(self.parameters, 1), _on_device(leaves), memory)
            for (name, form, memory), leaves in found.items()
            for total in [sum(leaf.nbytes for leaf in leaves)]
        )

    @property
    def nbytes(self) -> int:
        """Of the whole state."""
        return sum(leaf.nbytes for leaf in self.leaves)

    @property
    def nbytes_per_parameter(self) -> float:
        """Of the whole state."""
        return self.nbytes / max(self.parameters, 1)

    @property
    def whole(self) -> tuple[Leaf, ...]:
        """What is not held in its storage format, the largest first."""
        return tuple(sorted((p for p in self.leaves if p.why_whole), key=lambda p: -p.nbytes))

    @property
    def nbytes_per_device(self) -> int:
        """Of the state that each device holds in its own memory."""
        return _on_device(self.leaves)

    @property
    def nbytes_on_host(self) -> int:
        """Of the part of the whole state that waits in the host's memory between steps."""
        return sum(leaf.nbytes for leaf in self.leaves if leaf.memory == "host")

    @property
    def replicated(self) -> tuple[Leaf, ...]:
        """What is not split along the axis, the largest first."""
        return tuple(sorted((p for p in self.leaves if p.why), key=lambda p: -p.nbytes_per_device))

    @property
    def nbytes_replicated(self) -> int:
        """Of the part of `nbytes_per_device` that is not split along the axis."""
        return _on_device(self.replicated)

    def __repr__(self) -> str:
        columns = 5 if any(leaf.spec is not None for leaf in self.leaves) else 4
        of_groups = [
            (p.name, f"{len(p.paths):,}", f"{p.parameters:,}", f"{p.text} in {_first(p.paths)}".strip())
            for p in self.groups
        ]
        size = f"state of {self.nbytes:,} bytes, {self.nbytes_per_parameter:.3f} per parameter"
        if self.nbytes_on_host:
            size += f", {self.nbytes_on_host:,} of them in the host's memory"
        if columns == 5:
            each, of_it = self.nbytes_per_device, self.nbytes_replicated
            size += f": {each:,} on each device, {of_it:,} of them not split along the axis"
        of_moments = [
            (p.name, _where(p), f"{p.nbytes:,}", f"{p.nbytes_per_parameter:.3f}", f"{p.nbytes_per_device:,}")[:columns]
            for p in self.moments
        ]
        # counts and the like last
        by_size = sorted(self.leaves, key=lambda p: (-p.nbytes_per_device, not p.why_whole))
        listed = [p for p in by_size if p.why or p.why_whole]
        of_leaves = [
            (p.path, f"{p.nbytes_per_device:,}", "; ".join(filter(None, (p.why, p.why_whole)))) for p in listed[:_SHOWN]
        ]
        more = f"  and {len(listed) - _SHOWN} smaller ones" if len(listed) > _SHOWN else ""
        lines = [
            *textwrap.wrap(self.optimizer, _WIDTH, break_long_words=False),
            *table(["group", "leaves", "parameters"], "<>><", of_groups),
            size,
            *table(["state", "format", "bytes", "per parameter", "on each device"][:columns], "<<>>>", of_moments),
            *table(["whole", "bytes", "why"], "<><", of_leaves),
            more,
        ]
        return "\n".join(filter(None, lines))


_SCALARS, _SHOWN, _WIDTH = "scalars", 6, 120


def _on_device(leaves: Sequence[Leaf]) -> int:
    """Of the bytes that each device holds in its own memory."""
    return sum(leaf.nbytes_per_device for leaf in leaves if leaf.memory == "device")


def _where(moment: Moment) -> str:
    return moment.format + (", on the host" if moment.memory == "host" else "")


def _first(paths: tuple[str, ...]) -> str:
    """The first of some paths, and how many more there are."""
    more = f" and {len(paths) - 3:,} more" if len(paths) > 3 else ""
    return ", ".join(paths[:3] or ["nothing"]) + more


def table(header: list[str], sides: str, rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Lines of columns, each to the left or right; what is left of a row comes behind, on as many as it takes."""
    if not rows:
        return
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    for row in (tuple(header), *rows):
        line = "".join(f"  {cell:{side}{width}}" for cell, side, width in zip(row, sides, widths))
        behind = textwrap.wrap("".join(row[len(header) :]), max(_WIDTH - len(line) - 2, 40), break_long_words=False)
        yield f"{line}  {''.join(behind[:1])}".rstrip()
        yield from (" " * len(line) + f"  {words}" for words in behind[1:])


def describe(
    tx: optax.GradientTransformation,
    params: Any,
    mesh: Mesh | AbstractMesh | None = None,
    axis: str = "data",
    specs: Any = None,
) -> Description:
    """What an optimizer is for these parameters: its groups, hyperparameters and state, as a table and as numbers.

    It says which parameters each group of `gdx.groups` has and what is different there; in which format each moment is,
    and how many bytes the state takes, per parameter and on each device of a mesh; and what is larger than asked, and
    why: what does not fit its storage format, or cannot be split along the axis; and what `gdx.sharding.offload_state`
    keeps in the host's memory. Nothing is computed, so that neither the devices nor the memory need be there. A mask,
    as `adamw` may have one, is no group: on which leaves it acts is not said.

    Args:
      tx: the optimizer, gdx's or optax's; whether `gdx.sharding.shard_state` is around it does not matter.
      params: arrays, or `jax.ShapeDtypeStruct`s with or without a sharding; of a module what `gdx.train` trains.
      mesh: the devices; None for all of the state on one.
      axis, specs: as in `gdx.sharding.state_shardings`, whose errors are those of this function too.

    Raises:
      ValueError: tx is a batch of optimizers.

    >>> import gdx, jax
    >>> mesh = jax.sharding.AbstractMesh((8,), ("data",))
    >>> params = {"b": jax.ShapeDtypeStruct((7,), "float32"), "w": jax.ShapeDtypeStruct((4096, 11008), "float32")}
    >>> tx = gdx.groups(gdx.sgd(0.1, momentum=0.9), {"b": dict(learning_rate=gdx.times(0.5))})
    >>> gdx.describe(tx, params, mesh)
    groups(sgd)
      group       leaves  parameters
      b                1           7  learning_rate=0.05 in b
      all others       1  45,088,768  learning_rate=0.1, momentum=0.9 in w
    state of 180,355,100 bytes, 4.000 per parameter: 22,544,412 on each device, 28 of them not split along the axis
      state  format         bytes  per parameter  on each device
      trace  float32  180,355,100          4.000      22,544,412
      whole              bytes  why
      [0][0].trace['b']     28  no dimension of (7,) divides into 8
    """
    tx = to_transform("describe: tx", tx)
    if size := size_of(tx):
        raise ValueError(
            f"describe: tx is a batch of {size} optimizers; expected a single one, such as gdx.unstack(tx)[0]"
        )
    params = take_apart("describe: params", params)[0]
    shapes = bare("describe", params)
    # traced anew, which notes why moments are whole
    with noted() as notes, jax.disable_jit():
        traced, state = jax.make_jaxpr(lambda params: tx.init(params), return_shape=True)(shapes)
    sizes = jax.tree.map(np.size, shapes)
    own = {path for path, _ in jax.tree_util.tree_leaves_with_path(sizes)}
    nodes = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_packed)
    about = [
        [(_moment(path, node, own), _format(node), _noted(notes.whole, path))] * len(jax.tree.leaves(node))
        for path, node in nodes
    ]
    arrays = jax.tree_util.tree_leaves_with_path(state)
    places: list[tuple] = [(None, x.shape, "") for _, x in arrays]
    if mesh is not None:
        check_layout("describe", mesh, axis, specs)
        plan = plan_of("describe", state, params, mesh, axis, specs)
        given = zip(arrays, plan.state, plan.follows)
        places = [(spec, *_part(x.shape, mesh, axis, spec, follows)) for (_, x), spec, follows in given]
    # types, which say in which memory each array is
    memories = ["host" if x.memory_space is jax.memory.Space.Host else "device" for x in traced.out_avals]
    keystr = jax.tree_util.keystr
    leaves = [
        Leaf(keystr(path), moment, form, spec, nbytes(x), nbytes(x.update(shape=part)), why, why_whole, memory)
        for (path, x), (moment, form, why_whole), (spec, part, why), memory in zip(
            arrays, itertools.chain(*about), places, memories
        )
    ]
    found = tuple(group for each, of_each in notes.groups.values() for group in _groups(each, of_each))
    everything = _group("all", tx, _hyperparams(tx), sizes)
    return Description(kind(tx), found or (everything,), tuple(leaves), everything.parameters)


def _groups(tx: groups, sizes: Any) -> Iterator[Group]:
    """Those that a transform makes of parameters of these sizes."""
    names = names_of(tx.tx)
    for name, member, change, settings, part in itertools.zip_longest(
        (*tx.patterns, "all others"), tx.members, tx.changes, tx.settings, tx.split(sizes)[1]
    ):
        held = {found.path: found.value for found in names_of(member).values()}
        if isinstance(change, dict):
            changed = {**change, **settings}
            there = {k: held[names[k].path] if isinstance(new, times) else new for k, new in changed.items()}
            yield _group(name, None, there, part)
        else:
            yield _group(name, member, _hyperparams(member), part)


def _group(name: str, tx: Transform | None, hyperparams: dict[str, Any], sizes: Any) -> Group:
    """One row; tx is None where it is the optimizer but for these hyperparameters."""
    said = ", ".join(f"{name}={_said(value)}" for name, value in hyperparams.items())
    if tx is not None and name not in ("all", "all others"):
        said = "frozen" if kind(tx) == "set_to_zero" else f"{kind(tx)}: {said}".removesuffix(": ")
    return Group(name, said, hyperparams, tuple(leaf_paths(sizes)), sum(jax.tree.leaves(sizes)))


def _said(value: Any) -> str:
    # seven digits: a multiple is a product in float32
    return f"{value:.7g}" if isinstance(value, float | np.floating) else text(value)


def _hyperparams(tx: Transform) -> dict[str, Any]:
    """Every one by name, a schedule as a whole."""
    names = names_of(tx)
    schedules = {found.path for found in names.values() if isinstance(found.value, Value)}
    return {
        name: found.value
        for name, found in names.items()
        if not (
            found.is_static or found.value is None or any(found.path[:i] in schedules for i in range(len(found.path)))
        )
    }


def _moment(path: tuple, node: Any, own: Container[tuple]) -> str:
    """What the part of a state there is called: by the last attribute that leads to what is like the parameters."""
    start = next((i for i in range(len(path)) if path[i:] in own), len(path))
    if start == len(path) and not node.shape:
        return _SCALARS
    names = [key.name for key in path[:start] if isinstance(key, jax.tree_util.GetAttrKey)]
    return names[-1] if names else jax.tree_util.keystr(path[:start])


def _format(node: Any) -> str:
    return repr(node.format) if is_packed(node) else str(node.dtype)


def _noted(notes: dict[tuple, list[str]], path: tuple) -> str:
    """What is noted of the moment there: of links whose moments have one name, the first has noted it first."""
    return next((notes[path[i:]].pop(0) for i in range(len(path)) if notes.get(path[i:])), "")


def _part(
    shape: tuple[int, ...], mesh: Mesh | AbstractMesh, axis: str, spec: PartitionSpec, follows: bool
) -> tuple[tuple[int, ...], str]:
    """The shape of what a device holds of an array, and why that is not split along the axis."""
    part, count = NamedSharding(mesh, spec).shard_shape(shape), mesh.shape[axis]
    if axis in (name for entry in spec for name in axes_of(entry)):
        return part, ""
    if not part:
        return part, "a scalar"
    if not any(size and size % count == 0 for size in part):
        return part, f"no dimension of {part} divides into {count}"
    if follows:
        return part, f"no dimension of {part} divides into {count} parts of whole blocks"
    return part, "shaped like no parameter, and small"
