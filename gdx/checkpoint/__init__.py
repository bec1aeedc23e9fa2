"""Checkpoints of training, on Orbax: saved while training goes on, restored onto any mesh, checked bit for bit.

It needs `gdx-jax[checkpoint]`. Saving goes on in the background while training donates its arrays, and each process
saves the parts that it holds. What Orbax alone does not do, and this does:

- Every array has a checksum, which no mesh and no number of processes changes. A checkpoint that is truncated,
  missing, foreign or damaged raises a `CheckpointError`, and what runs stays as it is. Of some 150 kinds of damage to
  every file none restored anything but what was saved; files that Orbax does not read again may change.
- The optimizer is saved as a value, and compared: "learning_rate is 0.1, saved 0.002". To go on with the new
  value, say so: `restore(..., allow=["learning_rate"])`. Schedules are compared by their numbers, or by their values.
- Nothing is cast. Another dtype or storage format is refused by the path of the array; go there by restoring with
  the optimizer that saved it, and `gdx.storage.convert(state, tx.init(params))`.
- A process that is killed while it saves leaves the checkpoints before: after each of 50 kills -9 at random moments the
  newest one restored (`python -m pytest tests/checkpoint/test_damage.py --soak`).

>>> import gdx, jax, jax.numpy as jnp, tempfile
>>> tx, params = gdx.adam(0.1), {"w": jnp.ones(3)}
>>> folder = tempfile.TemporaryDirectory()
>>> with gdx.checkpoint.Checkpoints(folder.name) as checkpoints:
...     checkpoints.save(1, tx, params, tx.init(params))
...     step, params, state, _ = checkpoints.restore(tx, params, tx.init(params))
>>> step, params["w"].tolist()
(1, [1.0, 1.0, 1.0])
>>> folder.cleanup()

What is passed to `restore` says where the arrays are to be: on as many devices as there are then. On the same mesh
training goes on bit for bit, and another one gives the same bits (8, 4, 1, 2x4, 8 devices):

    sharded = gdx.sharding.shard_state(tx, mesh)
    step, params, state, extra = checkpoints.restore(sharded, params, sharded.init(params))

The parameters alone, for inference or another model, need neither the optimizer nor its state, which is not read
either. Layers that only the checkpoint has are left out, and where a pattern matches, what is passed stays; the result
says both. The state begins with `tx.init(params)`:

    params = checkpoints.restore_params(params).params
    step, params, extra, skipped, unread = checkpoints.restore_params(model_with_a_new_head, skip=["^head/"])

Batch statistics that inference needs belong into what is saved as `params`; an average of the parameters is in the
state, from where `gdx.read_average` takes it after `restore`.

Files: the arrays of step 100 are in `100/arrays`, where Orbax alone reads them by the names of the tree (keys,
attributes and indices; a slash in a key makes a folder of it), those of random keys as their data, without checksums:

    orbax.checkpoint.PyTreeCheckpointer().restore(folder / "100" / "arrays")["params"]["layer"]["kernel"]

States are optax's: a run of `optax.adamw` that Orbax alone saved goes on with `gdx.adamw`, by restoring it onto
`gdx.adamw(...).init(params)` with Orbax. It takes over every bit; from there steps differ from optax's by rounding.

Costs: a checksum reads each array once, on its devices, when it is saved and when it is restored.

Limits: one writer at a time; two that save into one folder at the same moment are not kept apart. The fields of gdx's
transforms and of `gdx.value`s are compared, also inside optax's wrappers; the numbers of optax's transforms as they
are, which are functions, are not.
"""

from gdx.checkpoint.checkpoints import CheckpointError, Checkpoints, Restored, RestoredParams
from gdx.checkpoint.checksums import checksum

__all__ = ["CheckpointError", "Checkpoints", "Restored", "RestoredParams", "checksum"]
