"""The link that measures the noise scale, and the gradients by micro-batches that feed it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from gdx import noise
from gdx.compat import enable_x64
from tests.contract.table import assert_same_bits, gradients, one_step, tree
from tests.noise.examples import INPUTS, PARAMS, loss, weighted_loss


@pytest.mark.parametrize("number", [2, 4])
def test_micro_batches_give_the_gradient_of_the_batch(number):
    batch = jnp.array([0, 3, 5, 1])
    with enable_x64(True):
        (value, micro), gradients = jax.jit(lambda p: noise.value_and_grad(loss, number)(p, batch))(PARAMS)
        expected = jax.value_and_grad(loss)(PARAMS, batch)
        for a, b in zip(jax.tree.leaves((value, gradients)), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a, b, rtol=1e-12)
    assert (micro.size, micro.number) == (4 // number, number)


@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("filled", [1, 2, 3, 4])
def test_filled_up_batches_have_the_gradient_of_their_examples(filled, number):
    batch = noise.Batches(jnp.array([2, 3, 5, 1]), jnp.where(jnp.arange(4) < filled, 1.0, 0.0))
    value_and_grad = noise.value_and_grad(weighted_loss, number)
    with enable_x64(True):
        (value, micro), gradients = value_and_grad(PARAMS, batch)
        expected = jax.value_and_grad(loss)(PARAMS, batch.examples[:filled])
        for a, b in zip(jax.tree.leaves((value, gradients)), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a, b, rtol=1e-12)
        tx = noise.measure_noise()
        state = tx.update(gradients, tx.init(PARAMS), micro_batches=micro)[1]
        assert state.measured == int(filled > 1) and bool(jnp.isnan(micro.squared_norm)) == (filled == 1)
        if filled == 4:
            assert (micro.size, micro.number) == (4 // number, number)
            (_, alike), _ = noise.value_and_grad(loss, number)(PARAMS, batch.examples)
            np.testing.assert_allclose(micro.squared_norm, alike.squared_norm, rtol=1e-12)


def test_filled_up_batches_in_bfloat16():
    def average(theta, batch):
        return jnp.average(theta * batch.examples.astype(theta.dtype), weights=batch.weights.astype(theta.dtype))

    batch = noise.Batches(jnp.array([2, 3, 5, 1]), jnp.array([1.0, 1.0, 1.0, 0.0]))
    (value, _), gradient = noise.value_and_grad(average, 2)(jnp.ones((), jnp.bfloat16), batch)
    assert gradient.dtype == value.dtype == jnp.bfloat16
    np.testing.assert_allclose(gradient.astype(float), 10 / 3, rtol=2**-7)


def test_complex_parameters():
    x = jnp.array([1.0, 2.0, 3.0, 4.0])

    def square(theta, x):
        return jnp.mean(jnp.abs(theta - x.astype(theta.dtype)) ** 2)

    (value, micro), gradient = noise.value_and_grad(square, 2)(jnp.array(1 + 2j), x)
    for a, b in zip((value, gradient), jax.value_and_grad(square)(jnp.array(1 + 2j), x)):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    np.testing.assert_allclose(micro.squared_norm, np.mean([4 + 16, 16 + 16]), rtol=1e-6)


def train(tx, number, steps=40):
    """Parameters and states after each step, with the keyword and without."""
    value_and_grad = noise.value_and_grad(loss, number)
    batches = noise.with_replacement(jax.random.key(0), INPUTS, 4, steps)

    def step(carry, batch):
        params, state = carry
        (_, micro), g = value_and_grad(params, batch)
        updates, state = tx.update(g, state, params, micro_batches=micro)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, state, micro.squared_norm, g)

    start = jax.tree.map(jnp.float32, PARAMS)
    return jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), batches)[1])()


def test_training_is_bit_identical_with_and_without_it():
    tx = gdx.adamw(0.01)
    assert_same_bits(train(gdx.chain(noise.measure_noise(), tx), 2)[0], train(gdx.chain(optax.identity(), tx), 2)[0])


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_averages_are_those_of_the_formula(decay):
    _, state, small, g = train(gdx.chain(noise.measure_noise(decay), gdx.sgd(0.01)), 2)
    big = np.sum(np.asarray(g["w"], float) ** 2, axis=1) + np.asarray(g["b"], float) ** 2
    small = np.asarray(small, float)
    found = optax.tree.get(state, "noise")
    for n in range(1, 41):
        weights = decay ** np.arange(n)[::-1]
        for average, each in zip(found, ((4 * big - 2 * small) / 2, (small - big) / (1 / 2 - 1 / 4))):
            np.testing.assert_allclose(average[n - 1], np.average(each[:n], weights=weights), rtol=1e-4, atol=1e-5)
    assert np.array_equal(optax.tree.get(state, "measured"), np.arange(1, 41))


def test_finds_the_noise_scale_of_a_bowl():
    """Gradients with |G|^2 = 3 and trace 12, in 500 batches of 32: the averages scatter by 2 % and less."""
    g = np.random.default_rng(0).standard_normal((500, 4, 8, 3)).astype(np.float32) * 2 + 1
    tx = noise.measure_noise(0.999)

    def step(state, g):
        micro = jnp.mean(g, axis=1)
        given_ = noise.MicroBatches(jnp.mean(jnp.sum(micro**2, axis=1)), 8, 4)
        return tx.update(jnp.mean(micro, axis=0), state, micro_batches=given_)[1], None

    found = jax.lax.scan(step, tx.init(jnp.zeros(3)), jnp.asarray(g))[0].noise
    each = noise.of_gradients(jnp.asarray(g).reshape(-1, 3))
    np.testing.assert_allclose(found.scale, 4.0, rtol=0.1)
    np.testing.assert_allclose(found, each, rtol=0.1)


def test_updates_pass_unchanged_and_what_is_not_finite_is_left_out():
    tx, g = noise.measure_noise(0.9), tree(1)
    state = tx.init(tree())
    micro = noise.MicroBatches(jnp.float32(2000.0), 8, 4)
    updates, one = tx.update(g, state, micro_batches=micro)
    assert_same_bits(updates, g)
    for norm, bad in ((jnp.inf, g), (jnp.nan, g), (1.0, jax.tree.map(lambda x: x * jnp.nan, g))):
        assert_same_bits(tx.update(bad, one, micro_batches=micro._replace(squared_norm=jnp.float32(norm)))[1], one)
    assert_same_bits(tx.update(g, one, micro_batches=None), (g, one))
    assert np.isnan(state.noise.scale) and one.measured == 1


def test_batch_sizes_may_change_without_a_compile():
    tx, g = noise.measure_noise(0.0), tree(1)
    update = jax.jit(tx.update)
    state = tx.init(g)
    for size, number in ((8, 4), (16, 2), (1, 100)):
        micro = noise.MicroBatches(jnp.float32(2000.0), size, number)
        found = update(g, state, g, micro_batches=micro)[1].noise
        np.testing.assert_allclose(found, tx.update(g, state, micro_batches=micro)[1].noise, rtol=1e-6)
    assert update._cache_size() == 1


def test_under_multi_steps():
    """The running mean of squared norms, passed to every mini-step, is the mean when the step is made."""
    g = gradients(12)
    small = sum(np.sum(np.asarray(x, float).reshape(12, -1) ** 2, axis=1) for x in jax.tree.leaves(g))

    tx = gdx.value(optax.MultiSteps)(gdx.chain(noise.measure_noise(0.0), gdx.sgd(0.1)), 4)

    def mini_step(carry, inputs):
        params, state, mean = carry
        g, squared_norm = inputs
        mean = jnp.where(state.mini_step == 0, 0.0, mean)
        mean += (squared_norm - mean) / (state.mini_step + 1)
        updates, state = tx.update(g, state, params, micro_batches=noise.MicroBatches(mean, 8, 4))
        return (optax.apply_updates(params, updates), state, mean), None

    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides by its integer count
        start = tree(), tx.init(tree()), jnp.zeros(())
        (_, state, _), _ = jax.lax.scan(mini_step, start, (g, jnp.asarray(small, jnp.float32)))
    assert optax.tree.get(state, "measured") == 3
    last = jax.tree.map(lambda x: x[8:], g)
    np.testing.assert_allclose(optax.tree.get(state, "noise"), noise.of_gradients(last, 8), rtol=1e-3)


def test_one_program_on_a_mesh():
    """Each device has a part of the batch: the mean over devices of its gradient's squared norm."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    g = jnp.asarray(np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32))
    tx = noise.measure_noise()

    @jax.shard_map(mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P())
    def measured(g):
        small = jax.lax.pmean(jnp.sum(g * g), "data")
        state = tx.init(g[0])
        return tx.update(jax.lax.pmean(g[0], "data"), state, micro_batches=noise.MicroBatches(small, 16, 8))[1].noise

    np.testing.assert_allclose(jax.jit(measured)(g), noise.of_gradients(g, 16), rtol=1e-5)


def test_its_text_evaluates_to_it():
    tx = gdx.chain(noise.measure_noise(0.9), gdx.sgd(0.1))
    assert repr(tx) == "chain(noise.measure_noise(decay=0.9), sgd(learning_rate=0.1))"
    assert eval(repr(tx), vars(gdx)) == tx


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: noise.value_and_grad(loss, 1), ValueError, r"value_and_grad: number is 1; expected at least 2"),
        (lambda: noise.value_and_grad(loss, 2.0), TypeError, r"value_and_grad: number is 2\.0; expected an integer"),
        (
            lambda: noise.value_and_grad(loss, 4)(PARAMS, jnp.arange(6)),
            ValueError,
            r"value_and_grad: a batch of 6 examples does not split into 4 micro-batches; expected a positive",
        ),
        (
            lambda: noise.value_and_grad(loss, 2)(PARAMS, jnp.arange(0)),
            ValueError,
            r"value_and_grad: a batch of 0 examples",
        ),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("extra", "error", "words"),
    [
        ({}, TypeError, r"measure_noise: got none; expected update\(gradients, state, params, micro_batches=\.\.\.\)"),
        ({"micro_batches": 3.0}, TypeError, r"measure_noise: micro_batches is 3\.0; expected"),
        ({"micro_batches": (1.0, 8, 4)}, TypeError, r"measure_noise: micro_batches is \(1\.0, 8, 4\); expected"),
        ({"micro_batches": noise.MicroBatches(1.0, 8, 1)}, ValueError, r"small_batch is 8 and big_batch is 8"),
        ({"micro_batches": noise.MicroBatches(1.0, 0, 4)}, ValueError, r"small_batch is 0 and big_batch is 0"),
    ],
)
def test_a_link_without_micro_batches(extra, error, words):
    tx = noise.measure_noise()
    with pytest.raises(error, match=words):
        tx.update(tree(), tx.init(tree()), tree(), **extra)


def test_the_link_trains_in_a_step_that_passes_extra_arguments():
    tx = gdx.chain(noise.measure_noise(), gdx.sgd(0.1))
    with pytest.raises(TypeError, match="micro_batches"):
        one_step(tx, tree(), tx.init(tree()), tree(1))
