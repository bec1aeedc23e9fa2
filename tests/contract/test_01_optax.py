"""Promise 1: it is an optax transform, and composes as one."""

import jax
import numpy as np
import optax

import gdx
from tests.contract.table import assert_same_bits, every_case, every_row, gradients, one_step, scan, tree


def steps(tx, count=5):
    """Parameters after single jitted steps: of a value by one program, of what is built around it by its own."""
    step = jax.jit(one_step if isinstance(tx, gdx.Transform) else lambda _, *args: one_step(tx, *args))
    params, all_gradients = tree(), jax.tree.map(np.asarray, gradients(count))
    state = tx.init(params)
    for i in range(count):
        g = jax.tree.map(lambda g: g[i], all_gradients)  # noqa: B023
        params, state = step(tx if isinstance(tx, gdx.Transform) else None, params, state, g)
    return params


@every_row
def test_is_an_instance_and_a_pair(row):
    tx = row.tx
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    init, update = tx
    updates, _ = update(tree(), init(tree()), tree(), value=1.0)
    assert jax.tree.structure(updates) == jax.tree.structure(tree())


@every_case
def test_composes_before_and_after_optax_links(row, settings):
    tx = row.make(**settings)
    before = optax.chain(optax.clip_by_global_norm(1.0), tx)
    after = optax.chain(tx, optax.clip(0.5))
    for composed in (before, after):
        params = jax.jit(lambda p, g: scan(composed, p, g))(tree(), gradients(5))  # noqa: B023
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(params))


@every_row
def test_under_masked(row):
    mask = {"w": True, "b": False, "s": True}
    found, alone = steps(optax.masked(row.tx, mask)), steps(row.tx)
    assert_same_bits((found["w"], found["s"]), (alone["w"], alone["s"]))
    assert not np.array_equal(found["b"], alone["b"])


@every_row
def test_under_partition(row):
    labels = {"w": "here", "b": "there", "s": "here"}
    assert_same_bits(steps(optax.partition({"here": row.tx, "there": row.tx}, labels)), steps(row.tx))


@every_row
def test_under_multi_steps(row):
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides by its integer count
        found = steps(optax.MultiSteps(row.tx, 1))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(steps(row.tx))):
        # its conditional keeps XLA from adding the update in one fused multiply-add
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@every_case
def test_under_inject_hyperparams(row, settings):
    tx = row.injected(settings)
    assert_same_bits(steps(tx), steps(row.make(**settings)))
    state = tx.init(tree())
    for name, value in row.numbers(settings).items():
        assert state.hyperparams[name] == np.float32(value)
