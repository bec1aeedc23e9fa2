"""Promise 5: dtypes, shapes, weak types and shardings are the same before and after a step."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import gdx
from gdx.compat import enable_x64
from tests.contract.table import every_case, every_row, one_step, tree

DTYPES = ("float32", "bfloat16", "float16", "float64")


def kind(x):
    return x.shape, x.dtype, x.weak_type


def kinds(tree):
    return jax.tree.structure(tree), list(map(kind, jax.tree.leaves(tree)))


@every_case
@pytest.mark.parametrize("param_dtype", DTYPES)
@pytest.mark.parametrize("gradient_dtype", DTYPES)
def test_dtypes_never_drift(row, settings, param_dtype, gradient_dtype):
    with enable_x64(True):
        tx, params, g = row.make(**settings), tree(dtype=param_dtype), tree(1, gradient_dtype)
        before = jax.eval_shape(tx.init, params)
        updates, after = jax.eval_shape(tx.update, g, before, params)
        assert kinds(after) == kinds(before)
        expected = np.promote_types(jnp.dtype(gradient_dtype), "float32") if row.rounds(param_dtype) else gradient_dtype
        assert kinds(updates) == kinds(jax.eval_shape(lambda: tree(1, expected)))
        eager = tx.init(params)
        assert kinds(eager) == kinds(before)


@every_row
@hypothesis_settings(max_examples=4)
@given(params=st.sampled_from(DTYPES[:3]), gradients=st.sampled_from(DTYPES[:3]), seed=st.integers(0, 99))
def test_works_as_a_scan_carry_and_is_donated(row, params, gradients, seed):
    tx, start, g = row.tx, tree(seed, params), tree(seed + 1, gradients)
    (_, state), _ = jax.lax.scan(lambda carry, _: (one_step(tx, *carry, g), None), (start, tx.init(start)), None, 3)
    assert kinds(state) == kinds(tx.init(start))

    state = tx.init(start)
    if row.rounds(params) and gradients != "float32":
        return  # updates to be added in float32 have no place in the gradients' buffers
    step = jax.jit(tx.update, donate_argnums=(0, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a donated buffer that cannot be used warns
        given_up = jax.tree.leaves((g, state))
        step(g, state, start)
    assert all(leaf.is_deleted() for leaf in given_up)


@every_row
@pytest.mark.parametrize("jitted", [False, True])
def test_state_is_sharded_like_the_parameters_and_stays_so(row, jitted):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    params = jax.device_put({"w": jnp.ones((16, 3)), "b": jnp.ones(8)}, sharding)
    tx = row.tx
    if isinstance(tx, gdx.sharding.shard_state):
        pytest.skip("places its state on a mesh of its own")
    state = tx.init(params)
    moments = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 0]
    assert all(leaf.sharding.is_equivalent_to(sharding, leaf.ndim) for leaf in moments)
    update = jax.jit(tx.update) if jitted else tx.update
    updates, after = update(params, state, params)
    for old, new in zip(jax.tree.leaves(state), jax.tree.leaves(after), strict=True):
        assert new.sharding.is_equivalent_to(old.sharding, old.ndim) or old.ndim == 0
    for update, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params)):
        assert update.sharding.is_equivalent_to(param.sharding, param.ndim)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_moments_of_half_precision_parameters_are_float32(dtype):
    """optax keeps them in the parameter's dtype, where nu stalls and float16 overflows."""
    from gdx import adam

    state = adam(0.1).init(tree(dtype=dtype))
    moments = optax.tree.get(state, "mu"), optax.tree.get(state, "nu")
    assert {leaf.dtype for leaf in jax.tree.leaves(moments)} == {np.dtype("float32")}
    assert {leaf.dtype for leaf in jax.tree.leaves(adam(0.1, mu_dtype=dtype).init(tree())[0].mu)} == {jnp.dtype(dtype)}
