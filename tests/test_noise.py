"""Mini-batches: what is drawn, that gradients are unbiased and as noisy as they should be, and how that is measured."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import gdx
from gdx import noise
from tests.contract.table import assert_same_bits, gradients, one_step, tree

N = 6
random = np.random.default_rng(0)
INPUTS, TARGETS = random.standard_normal((N, 3)), random.standard_normal(N)
PARAMS = {"w": random.standard_normal(3), "b": np.array(0.3)}


def losses(params, examples):
    inputs, targets = (jnp.asarray(column)[examples] for column in (INPUTS, TARGETS))
    return (jnp.tanh(inputs @ jnp.asarray(params["w"])) + jnp.asarray(params["b"]) - targets) ** 2


def loss(params, examples):
    return jnp.mean(losses(params, examples))


def flat(gradients):
    return np.concatenate([np.asarray(g).reshape(len(gradients["b"]), -1) for g in jax.tree.leaves(gradients)], axis=1)


def moments():
    """Gradient and trace of the covariance of the single examples, in float64 and by numpy."""
    with jax.enable_x64(True):
        each = flat(jax.vmap(jax.grad(loss), (None, 0))(PARAMS, jnp.arange(N)[:, None]))
    return each.mean(axis=0), float(np.sum(each.var(axis=0)))


G, TRACE = moments()


# What is drawn.


def test_an_epoch_has_every_example_once():
    batches = np.asarray(noise.epochs(jax.random.key(0), 12, 4, number=5))
    assert batches.shape == (15, 4) and batches.dtype == np.int32
    epochs = batches.reshape(5, 12)
    assert np.array_equal(np.sort(epochs), np.tile(np.arange(12), (5, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 5


@pytest.mark.parametrize(("size", "batch_size", "number"), [(1, 1, 3), (10, 3, 2), (12, 4, 1), (7, 7, 2), (7, 1, 2)])
def test_padded_epochs_weigh_every_example_once(size, batch_size, number):
    key = jax.random.key(size)
    examples, weights = noise.padded_epochs(key, size, batch_size, number)
    steps = math.ceil(size / batch_size)
    assert examples.shape == weights.shape == (number * steps, batch_size)
    assert np.all((examples >= 0) & (examples < size))
    for epoch in range(number):
        rows = slice(epoch * steps, (epoch + 1) * steps)
        seen = np.bincount(np.ravel(examples[rows]), weights=np.ravel(weights[rows]), minlength=size)
        assert np.array_equal(seen, np.ones(size))
        assert np.all(weights[rows][:-1] == 1) and weights[rows][-1, 0] == 1
    whole = size // batch_size
    dropped = noise.epochs(key, size, batch_size, number).reshape(number, whole, batch_size)
    assert np.array_equal(dropped, examples.reshape(number, steps, batch_size)[:, :whole])


@pytest.mark.parametrize("sampler", [noise.epochs, noise.padded_epochs, noise.with_replacement])
def test_same_key_same_batches_and_jit_vmap_and_scan(sampler):
    keys = jax.random.split(jax.random.key(1), 3)
    mapped = jax.jit(jax.vmap(lambda key: sampler(key, 10, 4, 2)))(keys)
    first, second = (jax.tree.map(lambda x: x[i], mapped) for i in range(2))  # noqa: B023
    assert_same_bits(sampler(keys[0], 10, 4, 2), first)
    assert not np.array_equal(jax.tree.leaves(first)[0], jax.tree.leaves(second)[0])
    assert_same_bits(jax.lax.scan(lambda carry, key: (carry, sampler(key, 10, 4, 2)), 0, keys)[1], mapped)


def assert_uniform(counts):
    """Within 5 standard deviations of equally often."""
    counts = np.asarray(counts)
    total, p = counts.sum(), 1 / len(counts)
    assert np.all(abs(counts - total * p) < 5 * np.sqrt(total * p * (1 - p)))


def test_every_subset_is_equally_likely():
    """Also in the last batch, and in the remainder that only padded epochs show."""
    keys = jax.random.split(jax.random.key(2), 4000)
    examples, weights = jax.vmap(lambda key: noise.padded_epochs(key, 5, 2))(keys)
    codes = np.asarray(jnp.sum(2 ** examples[:, :2], axis=-1))
    for batch in codes.T:
        counts = np.bincount(batch, minlength=32)
        subsets = [2**i + 2**j for i, j in itertools.combinations(range(5), 2)]
        assert counts[subsets].sum() == 4000
        assert_uniform(counts[subsets])
    assert_uniform(np.bincount(np.asarray(examples[:, 2, 0]), minlength=5))
    assert np.array_equal(weights[0, 2], [1, 0])


def test_with_replacement_every_tuple_is_equally_likely():
    pairs = np.asarray(noise.with_replacement(jax.random.key(3), 4, 2, 8000))
    assert_uniform(np.bincount(pairs @ [4, 1], minlength=16))


def test_take_takes_from_every_leaf():
    data = {"x": np.arange(10.0).reshape(5, 2), "y": (jnp.arange(5),)}
    taken = noise.take(data, jnp.array([4, 0]))
    assert taken["x"].tolist() == [[8, 9], [0, 1]] and taken["y"][0].tolist() == [4, 0]


def test_train_takes_the_batches():
    batches = noise.padded_epochs(jax.random.key(0), INPUTS, 4, number=10)
    start = jax.tree.map(jnp.float32, PARAMS)

    def weighted(params, batch):
        return jnp.average(losses(params, batch.examples), weights=batch.weights)

    trained = jax.jit(lambda tx: gdx.train(weighted, tx, start, batches))(gdx.sgd(0.05))
    assert trained.losses.shape == (20,)
    assert loss(trained.params, jnp.arange(N)) < loss(start, jnp.arange(N))


# The gradient of a mini-batch, over all batches that there are.


def scatter(batches):
    """Mean and mean squared distance from the full gradient, over gradients of batches of indices."""
    with jax.enable_x64(True):
        found = flat(jax.jit(jax.vmap(jax.grad(loss), (None, 0)))(PARAMS, jnp.asarray(batches)))
    return found.mean(axis=0), np.mean(np.sum((found - G) ** 2, axis=1))


@pytest.mark.parametrize("size", range(1, N + 1))
def test_without_replacement_unbiased_with_the_variance_of_theory(size):
    mean, variance = scatter(list(itertools.combinations(range(N), size)))
    np.testing.assert_allclose(mean, G, rtol=1e-12)
    np.testing.assert_allclose(variance, TRACE / size * (N - size) / (N - 1), rtol=1e-10, atol=1e-15)
    predicted = noise.Noise(float(G @ G), TRACE).variance(size, examples=N)
    np.testing.assert_allclose(predicted, variance, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("size", range(1, 5))
def test_with_replacement_unbiased_with_the_variance_of_theory(size):
    mean, variance = scatter(list(itertools.product(range(N), repeat=size)))
    np.testing.assert_allclose(mean, G, rtol=1e-12)
    np.testing.assert_allclose(variance, TRACE / size, rtol=1e-10)
    np.testing.assert_allclose(noise.Noise(float(G @ G), TRACE).variance(size), variance, rtol=1e-10)


def test_a_padded_batch_is_as_noisy_as_the_examples_in_it():
    def weighted(params, examples, weights):
        return jnp.average(losses(params, examples), weights=weights)

    with jax.enable_x64(True):
        batches = jnp.asarray([(*pair, 0, 0) for pair in itertools.permutations(range(N), 2)])
        weights = jnp.array([1.0, 1.0, 0.0, 0.0])
        found = flat(jax.vmap(jax.grad(weighted), (None, 0, None))(PARAMS, batches, weights))
    np.testing.assert_allclose(found.mean(axis=0), G, rtol=1e-12)
    np.testing.assert_allclose(np.mean(np.sum((found - G) ** 2, axis=1)), TRACE / 2 * (N - 2) / (N - 1), rtol=1e-10)


@pytest.mark.parametrize("size", [4, 64])
@pytest.mark.parametrize("replace", [False, True])
def test_variance_of_what_is_drawn(replace, size):
    """A statistical bound: the mean of 3,000 squared distances against its own standard error."""
    each = np.random.default_rng(1).standard_normal((100, 8)) * np.geomspace(0.1, 3, 8)
    keys = jax.random.split(jax.random.key(size), 3000)
    sampler = noise.with_replacement if replace else noise.epochs
    batches = jax.vmap(lambda key: sampler(key, 100, size)[0])(keys)
    distances = np.sum((each[np.asarray(batches)].mean(axis=1) - each.mean(axis=0)) ** 2, axis=1)
    predicted = noise.Noise(0.0, float(each.var(axis=0).sum())).variance(size, None if replace else 100)
    assert abs(distances.mean() - predicted) < 5 * distances.std() / np.sqrt(len(distances))


# The noise scale.


def estimates(batches, number):
    """The estimates of each batch of indices, from its micro-batches."""

    def one(batch):
        (_, micro), gradients = noise.value_and_grad(loss, number)(PARAMS, batch)
        big = sum(jnp.sum(g * g) for g in jax.tree.leaves(gradients))
        return noise.estimate(micro.squared_norm, big, small_batch=micro.size, big_batch=micro.size * micro.number)

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(jnp.asarray(batches)))


def test_estimates_are_unbiased_with_replacement():
    found = estimates(list(itertools.product(range(N), repeat=4)), 2)
    np.testing.assert_allclose(found.squared_norm.mean(), G @ G, rtol=1e-10)
    np.testing.assert_allclose(found.covariance_trace.mean(), TRACE, rtol=1e-10)
    assert np.any(found.squared_norm < 0)


@pytest.mark.parametrize(("size", "number"), [(4, 2), (3, 3), (6, 2)])
def test_estimates_are_unbiased_without_replacement(size, number):
    found = estimates(list(itertools.permutations(range(N), size)), number)
    mean = noise.Noise(found.squared_norm.mean(), found.covariance_trace.mean()).within(N)
    np.testing.assert_allclose(mean.squared_norm, G @ G, rtol=1e-10)
    np.testing.assert_allclose(mean.covariance_trace, TRACE, rtol=1e-10)


def test_the_direct_definition():
    with jax.enable_x64(True):
        each = jax.vmap(jax.grad(loss), (None, 0))(PARAMS, jnp.arange(N)[:, None])
        found = noise.of_gradients(each).within(N)
        np.testing.assert_allclose(found, (G @ G, TRACE), rtol=1e-12)
        np.testing.assert_allclose(found.scale, TRACE / (G @ G), rtol=1e-12)


@hypothesis_settings(max_examples=10)
@given(number=st.integers(2, 4), batch_size=st.integers(1, 4), seed=st.integers(0, 99))
def test_stacked_gradients_and_their_norms_agree(number, batch_size, seed):
    with jax.enable_x64(True):
        g = np.random.default_rng(seed).standard_normal((number, 4)) + 1
        found = noise.of_gradients({"a": jnp.asarray(g[:, :3]), "b": jnp.asarray(g[:, 3])}, batch_size)
        small, big = np.mean(np.sum(g * g, axis=1)), np.sum(g.mean(axis=0) ** 2)
        expected = noise.estimate(small, big, small_batch=batch_size, big_batch=batch_size * number)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_stacked_gradients_that_hardly_differ():
    """Where the difference of the norms has no digit left in float32."""
    g = jnp.asarray([[1000.0], [1000.0001220703125]], jnp.float32)
    np.testing.assert_allclose(noise.of_gradients(g).covariance_trace, 0.0001220703125**2 / 2, rtol=1e-5)


def test_half_precision_gradients_are_measured_in_float32():
    g = jnp.full((2, 2000), 0.5, "bfloat16")
    found = noise.of_gradients(g)
    assert found.squared_norm.dtype == np.float32 and found.squared_norm == 500 and found.covariance_trace == 0


def test_complex_gradients():
    found = noise.of_gradients(jnp.array([[1 + 1j], [1 - 1j]], jnp.complex64))
    np.testing.assert_allclose(found, (0, 2), atol=1e-6)


@pytest.mark.parametrize(
    ("squared_norm", "trace", "scale"),
    [(2.0, 6.0, 3.0), (0.0, 1.0, np.inf), (-1.0, 1.0, np.inf), (0.0, 0.0, np.nan), (1.0, 0.0, 0.0)],
)
def test_scales(squared_norm, trace, scale):
    with jax.debug_nans(not np.isnan(scale)):
        found = noise.Noise(jnp.array(squared_norm), jnp.array(trace)).scale
    np.testing.assert_array_equal(found, np.float32(scale))


@pytest.mark.parametrize("number", [2, 4])
def test_micro_batches_give_the_gradient_of_the_batch(number):
    batch = jnp.array([0, 3, 5, 1])
    with jax.enable_x64(True):
        (value, micro), gradients = jax.jit(lambda p: noise.value_and_grad(loss, number)(p, batch))(PARAMS)
        expected = jax.value_and_grad(loss)(PARAMS, batch)
        for a, b in zip(jax.tree.leaves((value, gradients)), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a, b, rtol=1e-12)
    assert (micro.size, micro.number) == (4 // number, number)


# The link.


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

    def in_four(tx):
        return optax.MultiSteps(tx, 4)

    tx = gdx.lift((gdx.chain(noise.measure_noise(0.0), gdx.sgd(0.1)),), in_four)

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


# What is refused.

KEY = jax.random.key(0)
RAGGED = {"x": np.zeros((5, 2)), "y": np.zeros(4)}


@pytest.mark.parametrize("sampler", [noise.epochs, noise.padded_epochs, noise.with_replacement])
@pytest.mark.parametrize(
    ("data", "batch_size", "error", "words"),
    [
        (5, 6, ValueError, r"batch_size is 6, more than the data's 5 examples; expected 1 to 5"),
        (np.zeros((5, 2)), 6, ValueError, r"batch_size is 6, more than the data's 5 examples"),
        (5, 0, ValueError, r"batch_size is 0; expected at least 1"),
        (5, -2, ValueError, r"batch_size is -2; expected at least 1"),
        (5, 2.0, TypeError, r"batch_size is 2\.0; expected an integer"),
        (5, True, TypeError, r"batch_size is True; expected an integer"),
        (0, 1, ValueError, r"data has 0 examples; expected at least 1"),
        (np.zeros((0, 3)), 1, ValueError, r"data has 0 examples; expected at least 1"),
        (
            RAGGED,
            2,
            ValueError,
            r"\['x'\] has shape \(5, 2\), \['y'\] has shape \(4,\); expected arrays with a leading",
        ),
        (np.float32(3), 2, ValueError, r"the root has shape \(\); expected arrays"),
        ({}, 2, ValueError, r"there are no arrays; expected arrays"),
    ],
)
def test_bad_batches(sampler, data, batch_size, error, words):
    with pytest.raises(error, match=rf"noise\.{sampler.__name__}: {words}"):
        sampler(KEY, data, batch_size)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: noise.epochs(KEY, 5, 2, number=0), ValueError, r"epochs: number is 0; expected at least 1"),
        (lambda: noise.epochs(KEY, 5, 2, number=1.5), TypeError, r"epochs: number is 1\.5; expected an integer"),
        (lambda: noise.with_replacement(KEY, 5, 2, 0), ValueError, r"with_replacement: steps is 0; expected at least"),
        (lambda: noise.take(RAGGED, jnp.arange(2)), ValueError, r"take: \['x'\] has shape \(5, 2\), \['y'\]"),
        (lambda: noise.take(np.zeros(5), jnp.array([0, 5])), IndexError, r"take: examples are 0 to 5; expected 0 to 4"),
        (lambda: noise.take(np.zeros(5), jnp.array([-1])), IndexError, r"take: examples are -1 to -1; expected 0 to 4"),
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
        (
            lambda: noise.estimate(1.0, 1.0, small_batch=8, big_batch=8),
            ValueError,
            r"estimate: small_batch is 8 and big_batch is 8; expected 1 <= small_batch < big_batch",
        ),
        (lambda: noise.estimate(1.0, 1.0, small_batch=0, big_batch=8), ValueError, r"estimate: small_batch is 0"),
        (lambda: noise.of_gradients(np.zeros((1, 3))), ValueError, r"of_gradients: there is 1 gradient; expected at"),
        (lambda: noise.of_gradients(np.zeros((2, 3)), 0), ValueError, r"of_gradients: batch_size is 0; expected at"),
        (lambda: noise.of_gradients(RAGGED), ValueError, r"of_gradients: .*a leading axis of micro-batches"),
        (lambda: noise.Noise(1.0, 1.0).variance(0), ValueError, r"variance: batch_size is 0; expected at least 1$"),
        (
            lambda: noise.Noise(1.0, 1.0).variance(9, 8),
            ValueError,
            r"batch_size is 9; expected at least 1 and at most 8",
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
