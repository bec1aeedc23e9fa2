r"""Where state lives: split over the data-parallel axis of a mesh (ZeRO, stage 1), or in the host's memory.

`offload_state` keeps moments in the host's memory between steps, on one device or a mesh. The rest is `shard_state`.

With $n$ devices along the axis each holds, and updates, one $n$-th of the moments: gradients are
reduce-scattered to where the moments are, and the updates all-gathered to where the parameters
are, by the compiler.

A laptop has eight devices if XLA is told so before Python starts:
`XLA_FLAGS=--xla_force_host_platform_device_count=8 JAX_PLATFORMS=cpu python`. On one device the code below runs too,
and splits nothing.

>>> import gdx, jax, jax.numpy as jnp, optax
>>> mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
>>> params = jax.device_put({"w": jnp.ones((64, 512)), "b": jnp.ones(7)}, jax.NamedSharding(mesh, jax.P()))
>>> tx = gdx.sharding.shard_state(gdx.adamw(1e-3), mesh)  # gdx's optimizer or optax's
>>> state = tx.init(params)  # made in its places: never whole on one device
>>> def is_split(state):
...     return state[0].mu["w"].sharding.shard_shape((64, 512)) == (64 // mesh.size, 512)
>>> is_split(state)
True
>>> @jax.jit  # the training step is the one you have
... def step(params, state, gradients):
...     updates, state = tx.update(gradients, state, params)
...     return optax.apply_updates(params, updates), state
>>> params, state = step(params, state, params)
>>> params["w"].sharding.is_fully_replicated, is_split(state)
(True, True)

`gdx.describe` says what each device will hold, from shapes alone, and `state_shardings` where each leaf of a checkpoint
is to be restored. The state's structure is that of the optimizer alone, so its checkpoints are too.

Nothing else is sent than the gradients and updates, nothing compiles again, and everything is donated. The element-wise
optimizers of gdx, few-bit formats and rounding links too, have the same bits as on one device, given the same
gradients; sums over whole leaves (clipping by norm, LAMB, Muon) add up in another order. What it costs and sends, on 8
CPU devices and as compiled for 8 TPUs and GPUs: `python -m benchmarks sharding`.

A moment is split on the first dimension that divides into equal parts, and follows its parameter otherwise. If
parameters are themselves split, over a model axis, pass `specs=` (a tree of PartitionSpecs): with automatic axes JAX
hides them inside `jit`, and only `init` outside of it can notice that they are missing. With explicit axes nothing is
needed. Codes of 8 bits are never cut inside a block, which can leave a leaf whole: a vocabulary of 50,257 in 768
columns is (padded to 50,304 it is not).

On CPUs XLA reduces the whole gradient everywhere and then drops seven eighths of it. A gradient that is scattered
explicitly makes a step there a quarter faster; on TPUs and GPUs it saves nothing:

    def scattered(params, batch):
        own = jax.lax.pcast(params, "data", to="varying")  # before jax 0.8: jax.lax.pvary(params, "data")
        gradients = jax.grad(loss)(own, batch)
        return jax.tree.map(lambda g: jax.lax.psum_scatter(g, "data", tiled=True) / jax.device_count(), gradients)

    gradient = jax.shard_map(scattered, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))

Limits: the float32 updates of rounding links are gathered at 4 bytes per parameter. In which order a mesh has its
devices does not show under `jit`. A loop of your own on automatic axes, and optax's searches along a line on explicit
ones, need a line more: see `shard_state`. It has run on CPUs alone; for TPUs and GPUs it was compiled.

Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models (2020), section 5.1.
"""

from gdx.sharding.offload import offload_state
from gdx.sharding.state import shard_state, state_shardings

__all__ = ["offload_state", "shard_state", "state_shardings"]
