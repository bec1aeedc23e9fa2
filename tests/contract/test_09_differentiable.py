"""Promise 9: the gradient of a 10-step run matches finite differences, in every hyperparameter and parameter."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gdx.compat import enable_x64
from gdx.storage import Blocks, Simulated
from tests.contract.table import every_case, few_bits

CURVATURE = np.geomspace(0.3, 3, 6)


def final_loss(tx, params):
    def step(carry, noise):
        params, state = carry
        updates, state = tx.update(jnp.asarray(CURVATURE) * params + noise, state, params)
        return (optax.apply_updates(params, 0.1 * updates), state), None

    noise = 0.1 * np.cos(np.arange(10.0)[:, None] + np.arange(6.0))
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), noise)
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
            step = min(1e-5 * max(abs(value), 1e-3), 0.4 * abs(value))  # far above rounding; an eps stays positive
            points = start + np.eye(len(start))[i] * np.array([[step], [-step], [2 * step], [-2 * step]])
            a, b, c, d = (float(compiled(jnp.asarray(point))) for point in points)
            expected = (8 * (a - b) - (c - d)) / (12 * step)
            np.testing.assert_allclose(slopes[i], expected, rtol=2e-5, atol=2e-6)


@jax.jit
@jax.grad
def slopes_of_a_run(tx, g):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(g, state, params)
        return (optax.apply_updates(params, updates), state), None

    params = jnp.ones(3)
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=3)
    return jnp.sum(params)


@every_case
def test_slopes_are_finite_where_a_gradient_is_zero(row, settings):
    """The second moment of a parameter without gradient is 0, where the square root has no slope."""
    if settings.get("eps") == 0.0:
        pytest.skip("0 / 0 has no slope either")

    settings = {name: Simulated(x) if isinstance(x, Blocks) else x for name, x in settings.items()}
    slopes = slopes_of_a_run(row.make(**settings), jnp.array([0.0, 1.0, -2.0]))
    assert all(np.isfinite(slope) for slope in jax.tree.leaves(slopes))
