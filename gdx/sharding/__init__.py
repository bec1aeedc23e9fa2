r"""Where state lives on a device mesh: optimizer state split over the data-parallel axis (ZeRO, stage 1).

With $n$ devices along the axis each holds, and updates, one $n$-th of the moments: gradients are
reduce-scattered to where the moments are, and the updates all-gathered to where the parameters
are, by the compiler.

>>> import gdx, jax, jax.numpy as jnp
>>> mesh = jax.sharding.Mesh(jax.devices(), ("data",))
>>> params = jax.device_put({"w": jnp.ones((64, 3))}, jax.NamedSharding(mesh, jax.P()))
>>> tx = gdx.sharding.shard_state(gdx.adamw(1e-3), mesh)
>>> tuple(tx.init(params)[0].mu["w"].sharding.spec)
('data',)

Source: Rajbhandari et al., ZeRO: Memory Optimizations Toward Training Trillion Parameter Models (2020), section 5.1.
"""

from gdx.sharding.state import Place, Report, report, shard_state, state_shardings

__all__ = ["Place", "Report", "report", "shard_state", "state_shardings"]
