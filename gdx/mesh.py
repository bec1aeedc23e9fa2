"""Meshes: what is automatic and what is explicit, known here alone.

Along *automatic* axes the compiler places arrays, and under `jax.jit` nothing of it shows. Along *explicit* ones an
array's type says how it is split, and every operation has to agree. Inside `jax.shard_map` axes are *manual*: an array
is one device's part.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from gdx.compat import to_varying, varying_axes


def names_of(entry: Any) -> tuple[str, ...]:
    """The axes that one dimension is split along, given its entry in a PartitionSpec."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def sharding_of(x: Any) -> NamedSharding | None:
    """How an array, abstract or not, is spread over a mesh, as far as it shows."""
    sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) and not sharding.mesh.empty else None


def as_placed(x: jax.Array, like: jax.Array) -> jax.Array:
    """An array on a mesh as another one is, or what it is where either is traced."""
    sharding = None if isinstance(x, jax.core.Tracer) or isinstance(like, jax.core.Tracer) else sharding_of(like)
    return x if sharding is None else jax.device_put(x, sharding)


def parts(entry: Any, mesh: Mesh | AbstractMesh) -> int:
    """Into how many one dimension is split, given its entry in a PartitionSpec."""
    return math.prod(mesh.shape[name] for name in names_of(entry))


def spec_of_boxes(
    spec: PartitionSpec, mesh: Mesh | AbstractMesh, shape: tuple[int, ...], box: tuple[int, ...]
) -> list[Any]:
    """That of an array of this shape, for one with a number for each box in it: whole where a part would cut boxes."""
    entries = [*spec, *[None] * (len(shape) - len(spec))]
    return [e if size % (parts(e, mesh) * length) == 0 else None for e, size, length in zip(entries, shape, box)]


def sharding_of_boxes(like: Any, box: tuple[int, ...]) -> Any:
    """That of an array, for one with a number for each box in it."""
    if isinstance(like, jax.core.Tracer):
        sharding = jax.typeof(like).sharding
        if not sharding.mesh.explicit_axes:
            return None
    else:
        sharding = getattr(like, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        # an array that could be on any device leaves the other one as free as itself
        return sharding if isinstance(sharding, SingleDeviceSharding) and like.committed else None
    return NamedSharding(sharding.mesh, PartitionSpec(*spec_of_boxes(sharding.spec, sharding.mesh, like.shape, box)))


def types_of(tree: Any) -> Any:
    """How arrays are split along explicit axes, as a sharding for each."""
    return jax.tree.map(lambda x: jax.typeof(x).sharding, tree)


def untyped(function: Callable[..., Any], mesh: Mesh | AbstractMesh, out: Any) -> Callable[..., Any]:
    """The function with all axes automatic inside, for operations that explicit types allow no sharding for.

    Its results are typed as `out` says, a tree of shardings on the mesh.
    """
    return jax.sharding.auto_axes(function, out_sharding=out) if mesh.explicit_axes else function


def on_any_mesh(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of two trees of arrays that takes explicitly sharded ones; its results are then on every device."""

    @functools.wraps(function)
    def automatic(operator: Any, arrays: Any, *options: Any) -> Any:
        def run(operator: Any, arrays: Any) -> Any:
            return function(operator, arrays, *options)

        for leaf in jax.tree.leaves((operator, arrays)):
            mesh = jax.typeof(leaf).sharding.mesh
            if mesh.explicit_axes:
                # one array of differently sharded leaves has no sharding of its own
                return untyped(run, mesh, NamedSharding(mesh, PartitionSpec()))(operator, arrays)
        return run(operator, arrays)

    return automatic


def typed_sharding(mesh: Mesh, spec: PartitionSpec) -> NamedSharding:
    """The part of a spec that is in an array's type: along the explicit axes."""
    seen = (tuple(name for name in names_of(entry) if name in mesh.explicit_axes) or None for entry in spec)
    return NamedSharding(mesh.abstract_mesh, PartitionSpec(*seen))  # jax 0.7 takes types of no other mesh


def constrained(mesh: Mesh, tree: Any, specs: Sequence[PartitionSpec]) -> Any:
    """Arrays split as these specs say, for the compiler to see to inside an `untyped` function."""
    mesh = mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    leaves, structure = jax.tree.flatten(tree)
    constrain = jax.lax.with_sharding_constraint
    return jax.tree.unflatten(structure, [constrain(x, held(mesh, spec, x)) for x, spec in zip(leaves, specs)])


def held(mesh: Mesh | AbstractMesh, spec: PartitionSpec, x: Any) -> NamedSharding:
    """The sharding of an array, or of one of this type, that is split so in the memory that it is in."""
    kind = x if isinstance(x, jax.core.ShapedArray) else jax.typeof(x)
    is_on_host = kind.memory_space is jax.memory.Space.Host
    return NamedSharding(mesh, spec, memory_kind="pinned_host" if is_on_host else None)


def explicit_first(mesh: Mesh | AbstractMesh, names: Iterable[str]) -> tuple[str, ...]:
    """Axes of one dimension in their order: what is in an array's type is divided before what the compiler divides."""
    return tuple(sorted(names, key=lambda name: name not in mesh.explicit_axes))


def hidden_axes(mesh: Mesh | AbstractMesh) -> set[str]:
    """The axes along which `jax.jit` does not see that an array is split."""
    return {name for name in mesh.auto_axes if mesh.shape[name] > 1}


def is_inside_shard_map(axis: str) -> bool:
    """Whether arrays are one device's part along this axis."""
    return axis in jax.sharding.get_abstract_mesh().manual_axes


def unreduced_axes(x: Any) -> Iterable[str]:
    """The explicit axes along which an array is a sum that is still to be made."""
    return jax.typeof(x).sharding.spec.unreduced


def agree(theirs: Mesh | AbstractMesh, mesh: Mesh | AbstractMesh) -> bool:
    """Whether arrays on both meshes can be used together, as far as it shows."""
    if isinstance(theirs, Mesh) and isinstance(mesh, Mesh):
        return theirs == mesh
    # nothing runs on an abstract mesh; inside jax.shard_map over other axes those are manual
    is_typed = isinstance(mesh, AbstractMesh) or all(
        kind in (expected, AxisType.Manual) for kind, expected in zip(theirs.axis_types, mesh.axis_types)
    )
    return theirs.shape_tuple == mesh.shape_tuple and is_typed


def varying_alike(tree: Any) -> Any:
    """Arrays inside `jax.shard_map`, all with the type of those that differ between devices, as branches need."""
    axes = frozenset[str]().union(*map(varying_axes, jax.tree.leaves(tree)))

    def cast(x: jax.Array) -> jax.Array:
        missing = axes - varying_axes(x)
        return to_varying(x, missing) if missing else x

    return jax.tree.map(cast, tree)
