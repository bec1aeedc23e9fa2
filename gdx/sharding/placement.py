"""How the parts of an optimizer's state are laid out on a mesh: a PartitionSpec for each, from shapes alone."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from gdx.mesh import agree, explicit_first, names_of, parts, sharding_of, spec_of_boxes
from gdx.storage.blocks import is_packed
from gdx.trees import path_text


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


def plan_of(name: str, state: Any, params: Any, mesh: Mesh | AbstractMesh, axis: str, specs: Any) -> Plan:
    """The layout of a state of these parameters, both of which may be abstract, for the function of this name.

    Raises:
      ValueError: a parameter is on another mesh; its spec does not divide it; specs has nothing for it or names an
        axis that the mesh lacks.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    index_of = {path: index for index, (path, _) in enumerate(leaves)}
    shapes = [np.shape(p) for _, p in leaves]
    own = [_own_spec(name, path, p, mesh, specs) for path, p in leaves]
    kept = jax.tree_util.tree_leaves_with_path(state, is_leaf=is_packed)
    follows = [_parameter_of(path, np.shape(leaf), index_of, shapes) for path, leaf in kept]

    # one split serves a parameter's gradient and all its moments, so blocks must be whole in every one
    units = [(1,) * len(shape) for shape in shapes]
    for index, (_, leaf) in zip(follows, kept):
        # scales of rows and of columns are reduced over devices, whatever is split
        if index is not None and is_packed(leaf) and leaf.format.axis is not None:
            box = leaf.format.layout(leaf.shape).box[-len(shapes[index]) :]
            units[index] = tuple(map(math.lcm, units[index], box))
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
        placed.append(spec)
        if is_packed(leaf):
            boxes = [layout.box for layout in leaf.format.layouts(leaf.shape)]
            placed += [_trimmed(spec_of_boxes(spec, mesh, leaf.shape, box)) for box in boxes]
        belongs += [index is not None] * len(jax.tree.leaves(leaf))
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
    units: tuple[int, ...] = (),
) -> PartitionSpec:
    """The spec with one dimension split along the axis too, in equal parts, multiples of its unit."""
    entries = [*own, *[None] * (len(shape) - len(own))]
    if axis in (name for entry in entries for name in names_of(entry)):
        return own
    last = len(shape) - 1
    candidates = []
    for dimension, (size, entry, unit) in enumerate(zip(shape, entries, units or (1,) * len(shape))):
        own_parts = parts(entry, mesh)
        part, rest = divmod(size, mesh.shape[axis] * own_parts)
        if part and not rest and part % unit == 0:
            # rows narrower than a TPU's tile are laid out anew before they are gathered, at half the cost of a step
            is_narrow = dimension == last > 0 and part % _LANES != 0
            candidates.append((is_narrow, own_parts > 1, dimension == last, dimension))
    if not candidates:
        return own
    dimension = min(candidates)[-1]
    entries[dimension] = explicit_first(mesh, (*names_of(entries[dimension]), axis))
    return _trimmed(entries)


def _trimmed(entries: Iterable) -> PartitionSpec:
    """Without None at the end: specs that mean the same are then equal, and nothing compiles twice."""
    entries = list(entries)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def check_devices(name: str, what: str, tree: Any, mesh: Mesh) -> None:
    """Raises where an array has been put on other devices, or on those of the mesh in another order.

    Else JAX takes it, whatever the axes of its own mesh.
    """
    for i, x in enumerate(jax.tree.leaves(tree)):
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.committed:
            where: Any = x.sharding
            if isinstance(where, NamedSharding):
                where = where.mesh
                is_there = where == mesh or [*where.devices.flat] == [*mesh.devices.flat]
            else:
                is_there = where.device_set == {*mesh.devices.flat}
            if not is_there:
                path, _ = jax.tree_util.tree_leaves_with_path(tree)[i]
                raise _misplaced(name, path, where, mesh, what)


_MOVES = {
    "parameter": "Pass their own mesh, or move them: jax.device_put(params, jax.NamedSharding(mesh, jax.P()))",
    "gradient": "Move them: jax.device_put(gradients, jax.NamedSharding(mesh, jax.P()))",
    "state": "Move it: jax.device_put(state, gdx.sharding.state_shardings(tx, params, mesh))",
}


def _misplaced(name: str, path: tuple, where: Any, mesh: Mesh | AbstractMesh, what: str = "parameter") -> ValueError:
    """The error that it is not on the mesh."""
    return ValueError(
        f"{name}: the {what} at {path_text(path)} is on {where}, expected on {mesh}{_first_difference(where, mesh)}. "
        f"{_MOVES[what]}"
    )


def _first_difference(where: Any, mesh: Mesh | AbstractMesh) -> str:
    """Between meshes that print alike."""
    if str(where) != str(mesh):
        return ""
    at, theirs, ours = next((i, a, b) for i, (a, b) in enumerate(zip(where.devices.flat, mesh.devices.flat)) if a != b)
    return f", whose device number {at} is {ours}, not {theirs}"


def _own_spec(name: str, path: tuple, p: Any, mesh: Mesh | AbstractMesh, specs: Any) -> PartitionSpec:
    """How a parameter itself is split: as specs has it, or as it shows."""
    sharding = sharding_of(p)
    if sharding is not None and not agree(sharding.mesh, mesh):
        raise _misplaced(name, path, sharding.mesh, mesh)
    if specs is not None:
        spec = _given_spec(name, specs, path, mesh)
    else:
        spec = PartitionSpec() if sharding is None else _trimmed(sharding.spec)
    shape, counts = np.shape(p), [parts(entry, mesh) for entry in spec]
    if len(spec) > len(shape) or any(size % count for size, count in zip(shape, counts)):
        raise ValueError(
            f"{name}: the parameter at {path_text(path)} has the shape {shape}, which {spec} does not divide: into "
            f"{tuple(counts)} parts on {mesh}. Split another dimension, or none: jax.P()"
        )
    return spec


def _given_spec(name: str, specs: Any, path: tuple, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    for branch, spec in jax.tree_util.tree_leaves_with_path(specs):
        if path[: len(branch)] == branch:
            for axis in (axis for entry in spec for axis in names_of(entry)):
                if axis not in mesh.axis_names:
                    raise ValueError(f"{name}: specs has {spec} at {path_text(path)}, but the mesh no axis {axis!r}")
            return _trimmed(spec)
    raise ValueError(f"{name}: specs has no PartitionSpec for the parameter at {path_text(path)}")
