"""Promise 6: a step is exact to a few roundings, at any step count and decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from gdx.compat import enable_x64
from tests import oracle
from tests.contract.table import every_case, few_bits, history

COUNTS = np.unique(np.geomspace(1, 10**6, 60).astype(int))


@jax.jit
def update(tx, g, state):
    return tx.update(g, state)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("b2", [0.9, 0.99, 0.999, 0.9999, 0.99999])
@pytest.mark.parametrize("b1", [0.0, 0.5, 0.9, 0.95, 0.999])
def test_adam_step_at_any_count(b1, b2, nesterov):
    """Relative to the largest entry, against the exact step from the same float32 state and hyperparameters."""
    random = np.random.default_rng(0)
    size, worst = 64, 0.0
    tx = gdx.scale_by_adam(b1, b2, eps=1e-8, nesterov=nesterov)
    exact = {
        "b1": oracle.exact(np.float32(b1)),
        "b2": oracle.exact(np.float32(b2)),
        "eps": oracle.exact(np.float32(1e-8)),
    }
    for t in COUNTS:
        g, mu = random.standard_normal((2, size)).astype(np.float32)
        nu = (random.standard_normal(size) ** 2).astype(np.float32) * np.float32(-np.expm1(t * np.log(b2)))
        state = optax.ScaleByAdamState(jnp.int32(t - 1), jnp.asarray(mu), jnp.asarray(nu))
        found, _ = update(tx, jnp.asarray(g), state)
        memory = {"m": oracle.exact(mu), "v": oracle.exact(nu)}
        expected = oracle.adam_direction(int(t), oracle.exact(g), memory, **exact, nesterov=nesterov)
        worst = max(worst, np.max(abs(np.asarray(found) - expected)) / np.max(abs(expected)))
    assert worst <= 2e-6


@every_case
def test_float32_steps_are_within_the_rounding_bound(row, settings):
    if few_bits(settings):
        pytest.skip("a moment in fewer bits is rounded on purpose")
    gradients = oracle.gradients(100, seed=2).astype(np.float32)[:, 1:]
    if settings.get("eps") == 0.0:
        gradients = gradients[:, [0, 1, 2, 5, 6]]  # squares of the others vanish, which needs eps
    theta = np.linspace(-2, 2, gradients.shape[1]).astype(np.float32)
    rounded = {k: v if isinstance(v, bool) else np.float32(v) for k, v in settings.items()}
    bounded = list(oracle.trajectory(row.step, theta, gradients, oracle.Rounded, **rounded))
    found = np.asarray(history(row.make(**settings), jnp.asarray(theta), jnp.asarray(gradients)))
    assert np.all(abs(found - np.stack([b.value for b in bounded])) <= np.stack([b.error for b in bounded]))


@pytest.mark.soak
@pytest.mark.parametrize("tx", [gdx.sgd(1e-3, momentum=0.9), gdx.adamw(1e-3, weight_decay=0.1)], ids=["sgd", "adamw"])
def test_a_hundred_thousand_steps_do_not_drift(tx):
    """float32 against float64 on a stochastic quadratic, where errors are forgotten rather than amplified."""

    def final(dtype):
        curvature = jnp.asarray(np.geomspace(0.1, 10, 16), dtype)

        def step(carry, i):
            params, state = carry
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (16,), jnp.float32).astype(dtype)
            updates, state = tx.update(curvature * params + noise, state, params)
            return (optax.apply_updates(params, updates), state), None

        start = jnp.ones(16, dtype)
        return np.asarray(jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), jnp.arange(100_000))[0][0])(start))

    with enable_x64(True):
        double = final(np.float64)
    single = final(np.float32)
    assert np.max(abs(single - double)) < 2e-4 * np.max(abs(double))
