"""How the parts of an optimizer's state are laid out on a mesh: a PartitionSpec for each, from shapes alone."""

import math
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from gdx.storage.blocks import Packed, is_packed
from gdx.trees import place


class Plan(NamedTuple):
    """How everything is split.

    Attributes:
      params: the parameters' own specs.
      moments: of what is computed with each parameter: its gradient, its moments.
      state: of each array of the state.
      follows: whether each array of the state belongs to a parameter.
    """

    params: list[PartitionSpec]
    moments: list[PartitionSpec]
    state: list[PartitionSpec]
    follows: list[bool]


def plan_of(state: Any, params: Any, mesh: Mesh | AbstractMesh, axis: str, specs: Any) -> Plan:
    """The layout of a state of these parameters, both of which may be abstract.

    Raises:
      ValueError: a parameter is on another mesh, or specs has nothing for it or names an axis that the mesh lacks.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    index_of = {path: index for index, (path, _) in enumerate(leaves)}
    shapes = [np.shape(p) for _, p in leaves]
    own = [_own_spec(path, p, mesh) if specs is None else _given_spec(specs, path, mesh) for path, p in leaves]
    kept = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_packed)
    follows = [_parameter_of(path, np.shape(leaf), index_of, shapes) for path, leaf in kept]

    # one split serves a parameter's gradient and all its moments, so blocks must be whole in every one
    units: list[dict[int, int]] = [{} for _ in leaves]
    for index, (_, leaf) in zip(follows, kept):
        if index is not None and is_packed(leaf):
            dimension = len(shapes[index]) + leaf.format.axis
            units[index][dimension] = math.lcm(units[index].get(dimension, 1), leaf.format.block)
    moments = list(own)
    for index in {index for index in follows if index is not None}:
        moments[index] = _split(shapes[index], own[index], mesh, axis, units[index])

    placed: list[PartitionSpec] = []
    belongs: list[bool] = []
    for index, (_, leaf) in zip(follows, kept):
        if index is not None:
            # what has further axes in front, such as a history of gradients, is split as one of them
            spec = _trimmed([*[None] * (np.ndim(leaf) - len(shapes[index])), *moments[index]])
        else:
            # an accumulator of another shape, such as a preconditioner; vectors, counters and keys are left whole
            is_large = jnp.issubdtype(leaf.dtype, np.inexact) and np.ndim(leaf) > 1
            spec = _split(np.shape(leaf), PartitionSpec(), mesh, axis) if is_large else PartitionSpec()
        arrays = [spec, _scales_spec(leaf, spec, mesh)] if is_packed(leaf) else [spec]
        placed += arrays
        belongs += [index is not None] * len(arrays)
    return Plan(own, moments, placed, belongs)


def _parameter_of(
    path: tuple, shape: tuple[int, ...], index_of: dict[tuple, int], shapes: Sequence[tuple[int, ...]]
) -> int | None:
    """Which parameter a leaf of the state belongs to: that of the longest path that ends its own, if shapes agree."""
    for start in range(len(path) + 1):
        index = index_of.get(path[start:])
        if index is not None and shapes[index] and shape[-len(shapes[index]) :] == shapes[index]:
            return index
    return None


_LANES = 128


def _split(
    shape: tuple[int, ...],
    own: PartitionSpec,
    mesh: Mesh | AbstractMesh,
    axis: str,
    units: Mapping[int, int] = MappingProxyType({}),
) -> PartitionSpec:
    """The spec with one dimension split along the axis too, in equal parts, multiples of its unit if it has one."""
    entries = [*own, *[None] * (len(shape) - len(own))]
    if axis in (name for entry in entries for name in names_of(entry)):
        return own
    last = len(shape) - 1
    candidates = []
    for dimension, (size, entry) in enumerate(zip(shape, entries)):
        own_parts = _parts(entry, mesh)
        part, rest = divmod(size, mesh.shape[axis] * own_parts)
        if part and not rest and part % units.get(dimension, 1) == 0:
            # rows narrower than a TPU's tile are laid out anew before they are gathered, at half the cost of a step
            is_narrow = dimension == last > 0 and part % _LANES != 0
            candidates.append((is_narrow, own_parts > 1, dimension == last, dimension))
    if not candidates:
        return own
    dimension = min(candidates)[-1]
    entries[dimension] = axis if entries[dimension] is None else (*names_of(entries[dimension]), axis)
    return _trimmed(entries)


def _scales_spec(packed: Packed, spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """That of the codes, but the axis of blocks is whole where a part of it would end inside a block."""
    dimension = packed.ndim + packed.format.axis
    if len(spec) <= dimension:
        return spec
    is_whole = packed.shape[dimension] % (_parts(spec[dimension], mesh) * packed.format.block) == 0
    return spec if is_whole else _trimmed(None if i == dimension else entry for i, entry in enumerate(spec))


def _trimmed(entries: Iterable) -> PartitionSpec:
    """Without None at the end: specs that mean the same are then equal, and nothing compiles twice."""
    entries = list(entries)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def names_of(entry: Any) -> tuple[str, ...]:
    """The axes that one dimension is split along."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _parts(entry: Any, mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[name] for name in names_of(entry))


def sharding_of(p: Any) -> NamedSharding | None:
    """How an array, abstract or not, is spread over a mesh, as far as it shows."""
    sharding = jax.typeof(p).sharding if isinstance(p, jax.core.Tracer) else getattr(p, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and not sharding.mesh.empty else None


def _own_spec(path: tuple, p: Any, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    sharding = sharding_of(p)
    if sharding is None:
        return PartitionSpec()
    if sharding.mesh.shape_tuple != mesh.shape_tuple:
        raise ValueError(
            f"shard_state: the parameter at {place(path)} is on {sharding.mesh}, expected {mesh}. "
            f"Move it: jax.device_put(params, jax.NamedSharding(mesh, jax.P()))"
        )
    return _trimmed(sharding.spec)


def _given_spec(specs: Any, path: tuple, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    for branch, spec in jax.tree_util.tree_leaves_with_path(specs):
        if path[: len(branch)] == branch:
            for name in (name for entry in spec for name in names_of(entry)):
                if name not in mesh.axis_names:
                    raise ValueError(f"shard_state: specs has {spec} at {place(path)}, but the mesh no axis {name!r}")
            return _trimmed(spec)
    raise ValueError(f"shard_state: specs has no PartitionSpec for the parameter at {place(path)}")
