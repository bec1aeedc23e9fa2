"""Promise 7: finite gradients make finite steps, of any magnitude that the docstrings allow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import gdx
from tests.contract.table import every_case

MAGNITUDES = [0.0, 1e-45, 1e-38, 1e-30, 1e-20, 1e-10, 1.0, 1e10, 1e19, 1e20, 1e30, 3e37, 3e38]


def assert_finite(*trees):
    for leaf in jax.tree.leaves(trees):
        assert np.all(np.isfinite(np.asarray(leaf, np.float32)))


@every_case
@hypothesis_settings(max_examples=10)
@given(data=st.data())
def test_gradients_of_any_magnitude(row, settings, data):
    allowed = [m for m in MAGNITUDES if m <= row.largest_gradient]
    signed = st.builds(lambda m, sign: m * sign, st.sampled_from(allowed), st.sampled_from([-1, 1]))
    rows = data.draw(st.lists(st.lists(signed, min_size=8, max_size=8), min_size=1, max_size=4))
    tx, params = row.make(**settings), jnp.linspace(-1, 1, 8)
    update, state = _compiled(tx), tx.init(params)
    for g in rows:
        updates, state = update(tx, jnp.asarray(np.asarray(g, np.float32)), state, params)
        if settings.get("eps") != 0.0:  # there a square that vanishes leaves nothing to divide by
            assert_finite(updates)
        assert_finite(state)


_compiled_by_kind: dict = {}


def _compiled(tx):
    """One compilation for all examples of a row."""
    return _compiled_by_kind.setdefault(
        jax.tree.structure(tx), jax.jit(lambda tx, g, state, params: tx.update(g, state, params))
    )


@every_case
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_with_the_default_settings(row, settings, dtype):
    largest = min(float(jnp.finfo(dtype).max) / 4, row.largest_gradient)
    params = jnp.ones(6, dtype)
    g = jnp.asarray(np.array([0, 1e-7, 1e-3, 1, 1e4, largest], np.float32), dtype)
    tx = row.make(**{**settings, "learning_rate": 0.01} if "learning_rate" in settings else settings)
    _, state = tx.update(g, tx.init(params), params)
    updates, state = tx.update(g / 2, state, params)
    assert_finite(state)
    if "momentum" not in tx.hyperparams or "learning_rate" in tx.hyperparams:
        assert_finite(updates)


@pytest.mark.parametrize("size", [2e19, 3e38, np.inf, -np.inf, np.nan])
def test_what_overflows_or_is_not_finite_is_seen(size):
    """optax's second moment is infinite for ever after, and the parameter never moves again."""
    tx = gdx.adam(0.1)
    updates, _ = tx.update(jnp.full(1, size, jnp.float32), tx.init(jnp.ones(1)))
    assert np.isnan(updates[0])


def test_adam_with_eps_zero_rests_where_the_gradient_is_zero():
    tx = gdx.adam(0.1, eps=0.0)
    updates, _ = tx.update(jnp.array([0.0, 1.0]), tx.init(jnp.ones(2)))
    np.testing.assert_allclose(updates, [0, -0.1], rtol=1e-6)
