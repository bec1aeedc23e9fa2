"""Promise 8: pure functions, under JAX's strictest settings."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tests.contract.table import assert_same_bits, every_case, every_row, gradients, one_step, scan


@every_row
@hypothesis_settings(max_examples=3)
@given(seed=st.integers(0, 2**16))
def test_same_inputs_same_bits_and_inputs_untouched(row, seed):
    tx, params, g = row.tx, row.tree(seed), row.tree(seed + 1)
    state = tx.init(params)
    inputs = jax.tree.map(np.array, (tx, params, g, state))
    first = tx.update(g, state, params)
    assert_same_bits(tx.update(g, state, params), first)
    assert_same_bits(jax.tree.map(np.array, (tx, params, g, state)), inputs)


@every_row
def test_numpy_arrays_are_not_written_to(row):
    params, g = jax.tree.map(np.asarray, row.tree()), jax.tree.map(np.asarray, row.tree(1))
    for leaf in jax.tree.leaves((params, g)):
        assert not leaf.flags.writeable or leaf.setflags(write=False) is None
    row.tx.update(g, row.tx.init(params), params)


@pytest.fixture(scope="module")
def little_garbage():
    """JAX collects garbage after each trace in search of leaks: what is older need not be looked at every time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@every_row
@pytest.mark.usefixtures("little_garbage")
def test_no_tracer_leaks(row):
    # the first and the last: it keeps no traces, so is slow
    for settings in row.settings[:: max(len(row.settings) - 1, 1)]:
        tx, params, g = row.make(**settings), row.tree(), gradients(2)
        with jax.checking_leaks():
            jax.jit(scan).trace(tx, params, g)


@every_row
def test_without_jit_under_debug_nans(row):
    """Of the same gradients again, of zeros, and of parameters that are zero."""
    tx, params, g = row.tx, row.tree(), row.tree(1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    with jax.disable_jit(True), jax.debug_nans(True):
        for given, updates in ((params, [g, g, g, zeros]), (zeros, [zeros])):
            state = tx.init(given)
            for u in updates:
                _, state = tx.update(u, state, given)


@every_case
def test_under_debug_nans(row, settings):
    with jax.debug_nans(True):
        params = row.tree()
        zeros = jax.tree.map(jnp.zeros_like, params)
        tx = row.make(**settings)
        state = tx.init(params)
        for g in (params, zeros):
            _, state = tx.update(g, state, params)


@every_case
def test_moves_nothing_between_devices(row, settings):
    """A constant optimizer in a compiled step, and one whose hyperparameters were put on the device."""
    tx, params, g = row.make(**settings), row.tree(), jax.tree.map(lambda g: g[0], gradients(1))
    state, on_device = tx.init(params), jax.device_put(tx)
    closed, given_tx = jax.jit(lambda p, s, g: one_step(tx, p, s, g)), jax.jit(one_step)
    with jax.transfer_guard("disallow"):
        found = closed(params, state, g)
        other = given_tx(on_device, params, state, g)
    assert_same_bits(found, other)
