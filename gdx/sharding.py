r"""Where state lives on a device mesh: optimizer state split over the data-parallel axis (ZeRO, stage 1).

With $n$ devices along the axis each holds, and updates, one $n$-th of the moments: gradients are
reduce-scattered to where the moments are, and the updates all-gathered to where the parameters
are, by the compiler.

>>> import gdx, jax, jax.numpy as jnp
>>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
>>> params = jax.device_put({"w": jnp.ones((64, 3))}, jax.NamedSharding(mesh, jax.P()))
>>> tx = gdx.sharding.shard_state(gdx.adamw(1e-3), mesh)
>>> tx.init(params)[0].mu["w"].sharding.spec
P('data',)

Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models (2020), section 5.1.
"""

import dataclasses
import functools
import math
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from gdx.checks import check_state_like
from gdx.compose import to_transform
from gdx.fields import static
from gdx.storage.blocks import Packed
from gdx.transform import Transform


def _to_mesh(label: str, value: Any) -> Mesh:
    if not isinstance(value, Mesh):
        raise TypeError(f"{label} is {reprlib.repr(value)}; expected a mesh of devices, such as jax.make_mesh returns")
    return value


def _to_specs(label: str, value: Any) -> Any:
    for path, spec in jax.tree_util.tree_leaves_with_path(value):
        if not isinstance(spec, PartitionSpec):
            raise TypeError(
                f"{label} is {reprlib.repr(spec)} at {jax.tree_util.keystr(path) or 'the root'}; "
                f"expected a PartitionSpec, as in jax.tree.map(lambda p: p.sharding.spec, params)"
            )
    return value


class shard_state(Transform):
    """Keeps the state of any transform split over an axis of a mesh, and computes each part where it is.

    Each moment has the sharding of its parameter and is split further along the axis, on the first
    dimension that divides into equal parts: on one that is not split already if it can be, and on the
    last only if no other will do. Scalars are on every device, and so is what does not divide (see
    `report`). `init` makes the state in its places, also outside `jax.jit`; `update` keeps it there,
    and its updates have the parameters' own sharding. The state's structure is that of `tx` alone.

    With automatic axes a function under `jax.jit` cannot see how its arguments are sharded: pass
    `specs` if the parameters themselves are split over the mesh. With explicit axes nothing is needed.

    Args:
      tx: the transform, gdx's or optax's.
      mesh: the devices, with automatic or explicit axes.
      axis: the axis of the mesh that the state is split along: that of data parallelism.
      specs: the parameters' own PartitionSpecs, a tree like them in which one PartitionSpec may stand for a whole
        branch; None to read them off the parameters, which with automatic axes have then to be whole on each device.

    Raises:
      TypeError: tx is no transform, mesh no mesh of devices, or specs holds something else than PartitionSpecs.
      ValueError: the mesh has no such axis; parameters are on other devices, or are split with automatic axes and
        without specs; the state is that of another transform.

    >>> import gdx, jax
    >>> mesh = jax.make_mesh((jax.device_count(),), ("data",))
    >>> tx = gdx.sharding.shard_state(gdx.adam(1e-3), mesh)
    >>> tx.replace(b1=0.8).hyperparams["b1"]
    0.8
    """

    tx: Transform = dataclasses.field(metadata={"convert": to_transform})
    mesh: Mesh = static(convert=_to_mesh)
    axis: str = static(default="data")
    specs: Any = static(default=None, convert=_to_specs)

    def validate(self) -> None:
        _check_axis("shard_state", self.mesh, self.axis)

    def init(self, params: optax.Params) -> optax.OptState:
        self._check_places(params)
        self._check_seen(params)
        shardings = state_shardings(self.tx, params, self.mesh, self.axis, self.specs)
        return jax.jit(_init, out_shardings=shardings)(self.tx, params)

    def update(
        self, updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        like = updates if params is None else params
        self._check_places(like)
        check_state_like(self, state, jax.jit(_init).eval_shape(self.tx, like))
        plan = _plan(state, like, self.mesh, self.axis, self.specs)

        def step(tx: Transform, updates: Any, state: Any, params: Any, arrays: dict[str, Any]) -> tuple[Any, Any]:
            constrain = functools.partial(_constrain, self.mesh)
            updates, params = (constrain(tree, plan.moments) for tree in (updates, params))
            updates, state = tx.update(updates, constrain(state, plan.state), params, **arrays, **others)
            return constrain(updates, plan.params), constrain(state, plan.state)

        arrays = {name: value for name, value in extra_args.items() if _is_arrays(value)}
        others = {name: value for name, value in extra_args.items() if name not in arrays}
        if AxisType.Explicit in self.mesh.axis_types:
            # types would have to agree in every operation of the transform; inside, the compiler sees to it
            out = [[NamedSharding(self.mesh, spec) for spec in specs] for specs in (plan.params, plan.state)]
            structures = [jax.tree.structure(tree) for tree in (updates, state)]
            step = jax.sharding.auto_axes(step, out_sharding=tuple(map(jax.tree.unflatten, structures, out)))
        return step(self.tx, updates, state, params, arrays)

    def _check_places(self, params: Any) -> None:
        """Raises where parameters are not on the mesh."""
        if self.axis in jax.sharding.get_abstract_mesh().manual_axes:
            raise ValueError(
                f"shard_state: inside jax.shard_map over {self.axis!r} an array is one device's part; call it outside"
            )
        for path, p in jax.tree_util.tree_leaves_with_path(params):
            if not _is_on(self.mesh, p):
                raise ValueError(
                    f"shard_state: the parameter at {jax.tree_util.keystr(path) or 'the root'} is on "
                    f"{_places(p)}, expected {self.mesh}. Move it: jax.device_put(params, NamedSharding(mesh, P()))"
                )

    def _check_seen(self, params: Any) -> None:
        """Raises where `update` would, under jit, take parameters for whole that are not."""
        if self.specs is None and AxisType.Explicit not in self.mesh.axis_types:
            for path, p in jax.tree_util.tree_leaves_with_path(params):
                spec = _own_spec(p)
                if any(self.mesh.shape[name] > 1 for entry in spec for name in _names(entry)):
                    raise ValueError(
                        f"shard_state: the parameter at {jax.tree_util.keystr(path) or 'the root'} is split as {spec}, "
                        f"which jax.jit hides where axes are automatic; say so: "
                        f"shard_state(tx, mesh, specs=jax.tree.map(lambda p: p.sharding.spec, params))"
                    )


def state_shardings(
    tx: optax.GradientTransformation, params: Any, mesh: Mesh | AbstractMesh, axis: str = "data", specs: Any = None
) -> Any:
    """Where `shard_state(tx, mesh, axis, specs)` keeps each leaf of the state: to restore a checkpoint to.

    Args:
      tx: the transform, gdx's or optax's; whether `shard_state` is around it does not matter.
      params: arrays, or `jax.ShapeDtypeStruct`s with or without a sharding; nothing is computed.
      mesh: the devices.
      axis: the axis of the mesh that the state is split along.
      specs: the parameters' own PartitionSpecs, as in `shard_state`; None to read them off the parameters.

    Returns:
      A tree like the state with a `NamedSharding` for each array.

    Raises:
      ValueError: the mesh has no such axis, or specs has nothing for a parameter.

    >>> import gdx, jax
    >>> mesh = jax.sharding.AbstractMesh((8,), ("data",))
    >>> params = {"w": jax.ShapeDtypeStruct((3, 64), "float32")}
    >>> gdx.sharding.state_shardings(gdx.sgd(0.1, 0.9), params, mesh)[0].trace["w"].spec
    P(None, 'data')
    """
    _check_axis("state_shardings", mesh, axis)
    state = jax.jit(_init).eval_shape(to_transform("state_shardings: tx", tx), _bare(params))
    plan = _plan(state, params, mesh, axis, specs)
    return jax.tree.unflatten(jax.tree.structure(state), [NamedSharding(mesh, spec) for spec in plan.state])


def _init(tx: Transform, params: optax.Params) -> optax.OptState:
    return tx.init(params)


class _Plan(NamedTuple):
    """PartitionSpecs: the parameters' own, those of what is computed with each, and of each array of the state."""

    params: list[PartitionSpec]
    moments: list[PartitionSpec]
    state: list[PartitionSpec]


def _plan(state: Any, params: Any, mesh: Mesh | AbstractMesh, axis: str, specs: Any) -> _Plan:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    index_of = {path: index for index, (path, _) in enumerate(leaves)}
    shapes = [np.shape(p) for _, p in leaves]
    own = [_own_spec(p) if specs is None else _given_spec(specs, path) for path, p in leaves]
    kept = jax.tree_util.tree_leaves_with_path(state, is_leaf=_is_packed)
    follows = [_parameter_of(path, np.shape(leaf), index_of, shapes) for path, leaf in kept]

    # one split serves a parameter's gradient and all its moments, so blocks must be whole in every one
    units = [1] * len(leaves)
    for index, (_, leaf) in zip(follows, kept):
        if index is not None and _is_packed(leaf):
            units[index] = math.lcm(units[index], leaf.format.block)
    moments = list(own)
    for index in {index for index in follows if index is not None}:
        moments[index] = _split(shapes[index], own[index], mesh, axis, units[index])

    placed: list[PartitionSpec] = []
    for index, (_, leaf) in zip(follows, kept):
        if index is not None:
            # what has further axes in front, such as a history of gradients, is split as one of them
            spec = PartitionSpec(*[None] * (np.ndim(leaf) - len(shapes[index])), *moments[index])
        else:
            # an accumulator of another shape; keys and counters are left whole
            is_float = jnp.issubdtype(leaf.dtype, np.inexact)
            spec = _split(np.shape(leaf), PartitionSpec(), mesh, axis) if is_float else PartitionSpec()
        placed += [spec, _scales_spec(leaf, spec, mesh)] if _is_packed(leaf) else [spec]
    return _Plan(own, moments, placed)


def _parameter_of(
    path: tuple, shape: tuple[int, ...], index_of: dict[tuple, int], shapes: Sequence[tuple[int, ...]]
) -> int | None:
    """Which parameter a leaf of the state belongs to: that of the longest path that ends its own, if shapes agree."""
    for start in range(len(path) + 1):
        index = index_of.get(path[start:])
        if index is not None and shapes[index] and shape[-len(shapes[index]) :] == shapes[index]:
            return index
    return None


def _split(
    shape: tuple[int, ...], own: PartitionSpec, mesh: Mesh | AbstractMesh, axis: str, unit: int = 1
) -> PartitionSpec:
    """The spec with one dimension split along the axis too, in equal parts; of the last a multiple of `unit`."""
    entries = [*own, *[None] * (len(shape) - len(own))]
    if axis in (name for entry in entries for name in _names(entry)):
        return own
    last = len(shape) - 1
    candidates = []
    for dimension, (size, entry) in enumerate(zip(shape, entries)):
        parts = mesh.shape[axis] * _parts(entry, mesh) * (unit if dimension == last else 1)
        if size and size % parts == 0:
            # along the last one, parts are no longer contiguous
            candidates.append((entry is not None, dimension == last, dimension))
    if not candidates:
        return own
    dimension = min(candidates)[-1]
    entries[dimension] = axis if entries[dimension] is None else (*_names(entries[dimension]), axis)
    return _trimmed(entries)


def _scales_spec(packed: Packed, spec: PartitionSpec, mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """That of the codes, but the last axis is whole where a part of it would end inside a block."""
    if len(spec) < packed.ndim:
        return spec
    whole = packed.shape[-1] % (_parts(spec[-1], mesh) * packed.format.block) == 0
    return spec if whole else _trimmed(spec[:-1])


def _trimmed(entries: Iterable) -> PartitionSpec:
    """Without None at the end: specs that mean the same are then equal, and nothing compiles twice."""
    entries = list(entries)
    while entries and entries[-1] is None:
        entries.pop()
    return PartitionSpec(*entries)


def _names(entry: Any) -> tuple[str, ...]:
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def _parts(entry: Any, mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[name] for name in _names(entry))


def _own_spec(p: Any) -> PartitionSpec:
    """How a parameter is sharded, as far as it shows."""
    sharding = jax.typeof(p).sharding if isinstance(p, jax.core.Tracer) else getattr(p, "sharding", None)
    return _trimmed(sharding.spec) if isinstance(sharding, NamedSharding) else PartitionSpec()


def _given_spec(specs: Any, path: tuple) -> PartitionSpec:
    for branch, spec in jax.tree_util.tree_leaves_with_path(specs):
        if path[: len(branch)] == branch:
            return _trimmed(spec)
    raise ValueError(f"shard_state: specs has no PartitionSpec for the parameter at {jax.tree_util.keystr(path)}")


def _is_on(mesh: Mesh, p: Any) -> bool:
    """Whether an array is on the devices of a mesh, or free to go there."""
    if isinstance(p, jax.core.Tracer):
        found = jax.typeof(p).sharding.mesh
        return found.empty or found.shape_tuple == mesh.abstract_mesh.shape_tuple
    if not isinstance(p, jax.Array) or not p.committed:
        return True
    if isinstance(p.sharding, NamedSharding):
        return p.sharding.mesh == mesh
    return p.sharding.device_set == set(mesh.devices.flat)


def _places(p: Any) -> Any:
    sharding = jax.typeof(p).sharding if isinstance(p, jax.core.Tracer) else p.sharding
    return sharding.mesh if isinstance(sharding, NamedSharding) else sharding


def _constrain(mesh: Mesh, tree: Any, specs: Sequence[PartitionSpec]) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    mesh = mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    placed = [jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec)) for x, spec in zip(leaves, specs)]
    return jax.tree.unflatten(structure, placed)


def _bare(params: Any) -> Any:
    """Shapes and dtypes alone, of a sharding that they need not have yet."""
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(np.shape(p), jnp.result_type(p)), params)


def _check_axis(name: str, mesh: Mesh | AbstractMesh, axis: str) -> None:
    if axis not in mesh.axis_names:
        raise ValueError(
            f"{name}: the mesh has no axis {axis!r}; expected one of {', '.join(map(repr, mesh.axis_names))}"
        )


def _is_packed(x: Any) -> bool:
    return isinstance(x, Packed)


def _is_arrays(value: Any) -> bool:
    return all(isinstance(leaf, jax.Array | np.ndarray | float | int | complex) for leaf in jax.tree.leaves(value))
