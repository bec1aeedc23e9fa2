"""A transform that keeps its state split over a mesh."""

import dataclasses
import functools
import reprlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from gdx.checks import check_state_like
from gdx.fields import static
from gdx.mesh import constrained, held, hidden_axes, is_inside_shard_map, names_of, sharding_of, typed_sharding, untyped
from gdx.sharding.placement import Plan, check_devices, plan_of
from gdx.transform import Transform, to_transform
from gdx.trees import check_arrays, path_text


def _to_mesh(label: str, value: Any, *others: type) -> Any:
    if not isinstance(value, (Mesh, *others)):
        raise TypeError(f"{label} is {reprlib.repr(value)}; expected a mesh of devices, such as jax.make_mesh returns")
    return value


def _to_specs(label: str, value: Any) -> Any:
    for path, spec in jax.tree_util.tree_leaves_with_path(value):
        if not isinstance(spec, PartitionSpec):
            raise TypeError(
                f"{label} is {reprlib.repr(spec)} at {path_text(path)}; "
                f"expected a PartitionSpec, as in jax.tree.map(lambda p: p.sharding.spec, params)"
            )
    return value


class shard_state(Transform):
    """Keeps the state of any transform split over an axis of a mesh, and computes each part where it is.

    Each moment has the sharding of its parameter and is split further along the axis, on the first
    dimension that divides into equal parts: rather on one that is not split already, and on the last
    only if no other will do or its parts are multiples of 128. Scalars are on every device, and so
    is what does not divide (see `gdx.describe`). `init` makes the state in its places, also outside
    `jax.jit`; `update` keeps it there, and its updates have the parameters' own sharding. The state's
    structure is that of `tx` alone.

    With automatic axes a function under `jax.jit` cannot see how its arguments are sharded: pass
    `specs` if the parameters themselves are split over the mesh. Around a loop of steps, such as `jax.lax.scan`,
    the compiler may then return the parameters split as the moments are; compile it with
    `jax.jit(..., out_shardings=jax.tree.map(lambda x: x.sharding, (params, state)))`.

    With explicit axes nothing is needed, except where optax searches along a line. A `value_fn` takes arrays
    as arguments, not from a closure: `update(..., value_fn=loss, batch=batch)`. And
    `optax.value_and_grad_from_state` needs the gradient in the state to have the parameters' type, here that of
    whole arrays:
    `optax.tree.set(state, grad=jax.sharding.reshard(optax.tree.get(state, "grad"), jax.NamedSharding(mesh, jax.P())))`.

    Args:
      tx: the transform, gdx's or optax's.
      mesh: the devices, with automatic or explicit axes, or both.
      axis: the axis of the mesh that the state is split along: that of data parallelism.
      specs: the parameters' own PartitionSpecs, a tree like them in which one PartitionSpec may stand for a whole
        branch; None to read them off the parameters, which with automatic axes have then to be whole on each device.

    Raises:
      TypeError: tx is no transform, mesh no mesh of devices, or specs holds something else than PartitionSpecs.
      ValueError: the mesh has no such axis; parameters are on another mesh (of other devices, in another order, or
        with axes of other types), or gradients or state on other devices or in another order; parameters are split
        with automatic axes and without specs, or do not divide as their specs say; the state is that of another
        transform.

    >>> import gdx, jax
    >>> mesh = jax.sharding.Mesh(jax.devices(), ("data",))
    >>> tx = gdx.sharding.shard_state(gdx.adam(1e-3), mesh)
    >>> tx.replace(b1=0.8).hyperparams["b1"]
    0.8
    """

    tx: Transform = dataclasses.field(metadata={"convert": to_transform})
    mesh: Mesh = static(convert=_to_mesh)
    axis: str = static(default="data")
    specs: Any = static(default=None, convert=_to_specs)

    def validate(self) -> None:
        check_layout("shard_state", self.mesh, self.axis, self.specs)

    def init_tree(self, params: optax.Params) -> optax.OptState:
        self._check_outside()
        check_devices("shard_state", "parameter", params, self.mesh)
        state, plan = _abstract("shard_state", self.tx, params, self.mesh, self.axis, self.specs)
        self._check_seen(params)
        return jax.jit(_init, out_shardings=_shardings(state, plan, self.mesh))(self.tx, params)

    def update_tree(
        self, updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        like = updates if params is None else params
        self._check_outside()
        check_devices("shard_state", "parameter", params, self.mesh)
        check_devices("shard_state", "gradient", updates, self.mesh)
        expected, plan = _abstract("shard_state", self.tx, like, self.mesh, self.axis, self.specs)
        check_state_like(self, state, expected)
        check_devices("shard_state", "state", state, self.mesh)

        def step(tx: Transform, updates: Any, state: Any, params: Any, arrays: dict[str, Any]) -> tuple[Any, Any]:
            constrain = functools.partial(constrained, self.mesh)
            updates, params = (constrain(tree, plan.moments) for tree in (updates, params))
            updates, state = tx.update(updates, constrain(state, plan.state), params, **arrays, **others)
            return constrain(updates, plan.params), constrain(state, plan.state)

        arrays = {name: value for name, value in extra_args.items() if is_arrays(value)}
        others = {name: value for name, value in extra_args.items() if name not in arrays}
        out = tuple(
            jax.tree.unflatten(jax.tree.structure(tree), [typed_sharding(self.mesh, spec) for spec in specs])
            for tree, specs in ((updates, plan.params), (state, plan.state))
        )
        # types would have to agree in every operation of the transform; inside, the compiler sees to it
        return untyped(step, self.mesh, out)(self.tx, updates, state, params, arrays)

    def _check_outside(self) -> None:
        """Raises inside `jax.shard_map` over the axis."""
        if is_inside_shard_map(self.axis):
            raise ValueError(
                f"shard_state: inside jax.shard_map over {self.axis!r} an array is one device's part; call it outside"
            )

    def _check_seen(self, params: Any) -> None:
        """Raises where `update` would, under jit, take parameters for whole that are not."""
        if self.specs is not None:
            return
        hidden = hidden_axes(self.mesh)
        for path, p in jax.tree_util.tree_leaves_with_path(params):
            sharding = sharding_of(p)
            if sharding is not None and hidden & {name for entry in sharding.spec for name in names_of(entry)}:
                raise ValueError(
                    f"shard_state: the parameter at {path_text(path)} is split as {sharding.spec}, which jax.jit hides "
                    f"where axes are automatic. If it is meant to be, pass it on: "
                    f"shard_state(tx, mesh, specs=jax.tree.map(lambda p: p.sharding.spec, params)). If a compiled loop "
                    f"returned it so, move it back, jax.device_put(params, jax.NamedSharding(mesh, jax.P())), and "
                    f"compile the loop with out_shardings=jax.tree.map(lambda x: x.sharding, (params, state))"
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
      A tree like the state with a `NamedSharding` for each array, in the host's memory where `offload_state` is in tx.

    Raises:
      TypeError: tx is no transform, mesh no mesh of devices, params holds something else than arrays, or specs than
        PartitionSpecs.
      ValueError: the mesh has no such axis, specs has nothing for a parameter, or a parameter is on another mesh or
        does not divide as its spec says.

    >>> import gdx, jax
    >>> mesh = jax.sharding.AbstractMesh((8,), ("data",))
    >>> params = {"w": jax.ShapeDtypeStruct((3, 64), "float32")}
    >>> tuple(gdx.sharding.state_shardings(gdx.sgd(0.1, 0.9), params, mesh)[0].trace["w"].spec)
    (None, 'data')
    """
    return _shardings(*_abstract("state_shardings", tx, params, mesh, axis, specs), mesh)


def _abstract(
    name: str, tx: optax.GradientTransformation, params: Any, mesh: Mesh | AbstractMesh, axis: str, specs: Any
) -> tuple[Any, Plan]:
    """The state in shapes and dtypes, and its plan, for the function of this name."""
    check_layout(name, mesh, axis, specs)
    traced = jax.jit(_init).trace(to_transform(f"{name}: tx", tx), bare(name, params))
    # types, which say in which memory each array is
    state = jax.tree.unflatten(jax.tree.structure(traced.out_info), traced.jaxpr.out_avals)
    return state, plan_of(name, state, params, mesh, axis, specs)


def bare(name: str, params: Any) -> Any:
    check_arrays(f"{name}: params", params)
    return jax.tree.map(lambda p: jax.ShapeDtypeStruct(np.shape(p), jnp.result_type(p)), params)


def _shardings(state: Any, plan: Plan, mesh: Mesh | AbstractMesh) -> Any:
    leaves, structure = jax.tree.flatten(state)
    return jax.tree.unflatten(structure, [held(mesh, spec, x) for x, spec in zip(leaves, plan.state)])


def _init(tx: Transform, params: optax.Params) -> optax.OptState:
    return tx.init(params)


def check_layout(name: str, mesh: Mesh | AbstractMesh, axis: str, specs: Any) -> None:
    _to_mesh(f"{name}: mesh", mesh, AbstractMesh)
    _to_specs(f"{name}: specs", specs)
    if axis not in mesh.axis_names:
        raise ValueError(
            f"{name}: axis is {axis!r}, and the mesh has no such axis; expected axis="
            f"{' or '.join(map(repr, mesh.axis_names))}"
        )


def is_arrays(value: Any) -> bool:
    return all(isinstance(leaf, jax.Array | np.ndarray | float | int | complex) for leaf in jax.tree.leaves(value))
