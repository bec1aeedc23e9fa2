"""Checkpoints of training, on Orbax: saved while training goes on, restored onto any mesh, checked bit for bit.

Beside the arrays stands a manifest: the optimizer's fields, and of every array its path, shape, dtype and
checksum. Orbax alone would load a damaged array without a word, cast it to another dtype, and take the
optimizer to be that of whoever restores.

>>> import gdx, jax, jax.numpy as jnp, tempfile
>>> tx, params = gdx.adam(0.1), {"w": jnp.ones(3)}
>>> folder = tempfile.TemporaryDirectory()
>>> with gdx.checkpoint.Checkpoints(folder.name) as checkpoints:
...     checkpoints.save(1, tx, params, tx.init(params))
...     step, params, state, _ = checkpoints.restore(tx, params, tx.init(params))
>>> step, params["w"].tolist()
(1, [1.0, 1.0, 1.0])
>>> folder.cleanup()
"""

from gdx.checkpoint.checkpoints import CheckpointError, Checkpoints, Restored
from gdx.checkpoint.checksums import checksum

__all__ = ["CheckpointError", "Checkpoints", "Restored", "checksum"]
