"""Promise 11: counts stop at 2^31 - 1, and everything else goes on."""

import jax
import jax.numpy as jnp
import numpy as np

import gdx
from tests.contract.table import every_case, one_step, tree

LAST = 2**31 - 1


def is_count(x):
    """Codes of moments and parameters are integers too, but of a byte."""
    return jnp.issubdtype(x.dtype, jnp.integer) and x.ndim == 0 and x.dtype.itemsize > 1


def at_count(state, count):
    """The state with every count replaced."""
    return jax.tree.map(lambda x: jnp.int32(count) if is_count(x) else x, state)


@every_case
def test_counts_saturate(row, settings):
    tx, params = row.make(**settings), row.tree()
    start = tx.init(params)
    params, state = one_step(tx, params, start, tree(1))
    # others count what is no usual step, such as one that is skipped
    is_counted = jax.tree.map(lambda old, new: is_count(old) and old != new, start, state)
    state = jax.tree.map(lambda x, counted: jnp.int32(LAST - 1) if counted else x, state, is_counted)
    for _ in range(3):
        params, state = one_step(tx, params, state, tree(1))
    counts = [x for x, counted in zip(jax.tree.leaves(state), jax.tree.leaves(is_counted)) if counted]
    assert all(count == LAST for count in counts)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))


def test_schedules_saturate():
    tx = gdx.sgd(lambda count: 1 / (1 + count.astype(jnp.float32)))
    state = at_count(tx.init(tree()), LAST)
    updates, state = tx.update(tree(), state)
    assert state[1].count == LAST
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(updates))


def test_the_correction_is_over_at_the_last_count():
    tx, g = gdx.scale_by_adam(0.5, 0.75), jnp.full(3, 2.0)
    state = at_count(tx.init(g), LAST)._replace(mu=g, nu=g * g)
    updates, _ = tx.update(g, state)
    np.testing.assert_allclose(updates, 1, rtol=1e-6)
