"""Mini-batches: what is drawn, and that their gradients are unbiased and as noisy as they should be."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdx
from gdx import noise
from gdx.compat import enable_x64
from tests.contract.table import assert_same_bits
from tests.noise.examples import INPUTS, PARAMS, RAGGED, TRACE, G, N, flat, loss, losses

KEY = jax.random.key(0)


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


def scatter(batches):
    """Mean and mean squared distance from the full gradient, over gradients of batches of indices."""
    with enable_x64(True):
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

    with enable_x64(True):
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
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call()


def test_takes_numpy_data_inside_jit():
    data = np.arange(6.0, dtype=np.float32)
    np.testing.assert_array_equal(jax.jit(lambda i: noise.take(data, i))(jnp.array([4, 1])), [4, 1])
