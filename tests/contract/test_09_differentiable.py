"""Promise 9: the gradient of a 10-step run matches finite differences, in every hyperparameter and parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gdx.compat import enable_x64
from tests.contract.table import every_case, few_bits

CURVATURE = np.geomspace(0.3, 3, 6)


def final_loss(tx, params):
    state = tx.init(params)
    for t in range(10):
        g = jnp.asarray(CURVATURE) * params + 0.1 * np.cos(t + np.arange(6.0))
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, 0.1 * updates)
    return jnp.sum(jnp.asarray(CURVATURE) * params * params)


@every_case
def test_gradients_match_finite_differences(row, settings):
    with enable_x64(True):
        tx = row.make(**{k: v for k, v in settings.items() if k not in few_bits(settings)})
        tx = jax.tree.map(lambda h: h or 0.01, tx)  # at 0 only one side of the difference is valid
        leaves, structure = jax.tree.flatten(tx)
        start = np.concatenate([np.asarray(leaves), np.linspace(-1, 2, 6)])

        def loss(point):
            return final_loss(jax.tree.unflatten(structure, list(point[: len(leaves)])), point[len(leaves) :])

        slopes = jax.jit(jax.grad(loss))(jnp.asarray(start))
        compiled = jax.jit(loss)
        for i, value in enumerate(start):
            step = 1e-6 * max(abs(value), 1e-3)
            points = start + np.eye(len(start))[i] * np.array([[step], [-step], [2 * step], [-2 * step]])
            a, b, c, d = (float(compiled(jnp.asarray(point))) for point in points)
            expected = (8 * (a - b) - (c - d)) / (12 * step)
            np.testing.assert_allclose(slopes[i], expected, rtol=2e-5, atol=2e-6)


@every_case
def test_slopes_are_finite_where_a_gradient_is_zero(row, settings):
    """The second moment of a parameter without gradient is 0, where the square root has no slope."""
    if settings.get("eps") == 0.0:
        pytest.skip("0 / 0 has no slope either")

    def total(tx):
        params = jnp.ones(3)
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(jnp.array([0.0, 1.0, -2.0]), state, params)
            params = optax.apply_updates(params, updates)
        return jnp.sum(params)

    slopes = jax.grad(total)(row.make(**settings))
    assert all(np.isfinite(slope) for slope in jax.tree.leaves(slopes))
