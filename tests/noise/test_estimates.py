"""The noise scale: unbiased estimates, by the papers' formulas and from stacked gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gdx import noise
from gdx.compat import enable_x64
from tests.noise.examples import PARAMS, RAGGED, TRACE, G, N, loss, weighted_loss


def estimates(batches, number, loss=loss):
    """The estimates of each batch, from its micro-batches."""

    def one(batch):
        (_, micro), gradients = noise.value_and_grad(loss, number)(PARAMS, batch)
        big = sum(jnp.sum(g * g) for g in jax.tree.leaves(gradients))
        return noise.estimate(micro.squared_norm, big, small_batch=micro.size, big_batch=micro.size * micro.number)

    with enable_x64(True):
        return jax.tree.map(np.asarray, jax.jit(jax.vmap(one))(jax.tree.map(jnp.asarray, batches)))


def test_estimates_are_unbiased_with_replacement():
    found = estimates(np.array(list(itertools.product(range(N), repeat=4))), 2)
    np.testing.assert_allclose(found.squared_norm.mean(), G @ G, rtol=1e-10)
    np.testing.assert_allclose(found.covariance_trace.mean(), TRACE, rtol=1e-10)
    assert np.any(found.squared_norm < 0)


@pytest.mark.parametrize(("size", "number"), [(4, 2), (3, 3), (6, 2)])
def test_estimates_are_unbiased_without_replacement(size, number):
    found = estimates(np.array(list(itertools.permutations(range(N), size))), number)
    mean = noise.Noise(found.squared_norm.mean(), found.covariance_trace.mean()).within(N)
    np.testing.assert_allclose(mean.squared_norm, G @ G, rtol=1e-10)
    np.testing.assert_allclose(mean.covariance_trace, TRACE, rtol=1e-10)


@pytest.mark.parametrize(("filled", "size", "number"), [(2, 4, 2), (3, 4, 2), (3, 4, 4), (3, 6, 3)])
def test_estimates_from_batches_that_are_filled_up_are_unbiased(filled, size, number):
    examples = np.array([(*drawn, *[0] * (size - filled)) for drawn in itertools.permutations(range(N), filled)])
    weights = np.broadcast_to(np.arange(size) < filled, examples.shape).astype(np.float32)
    found = estimates(noise.Batches(examples, weights), number, weighted_loss)
    mean = noise.Noise(found.squared_norm.mean(), found.covariance_trace.mean()).within(N)
    np.testing.assert_allclose(mean.squared_norm, G @ G, rtol=1e-10)
    np.testing.assert_allclose(mean.covariance_trace, TRACE, rtol=1e-10)


def test_the_direct_definition():
    with enable_x64(True):
        each = jax.vmap(jax.grad(loss), (None, 0))(PARAMS, jnp.arange(N)[:, None])
        found = noise.of_gradients(each).within(N)
        np.testing.assert_allclose(found, (G @ G, TRACE), rtol=1e-12)
        np.testing.assert_allclose(found.scale, TRACE / (G @ G), rtol=1e-12)


@hypothesis_settings(max_examples=10)
@given(number=st.integers(2, 4), batch_size=st.integers(1, 4), seed=st.integers(0, 99))
def test_stacked_gradients_and_their_norms_agree(number, batch_size, seed):
    with enable_x64(True):
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


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_numbers_of_examples_may_be_traced(wrap):
    found = noise.Noise(jnp.array(2.0), jnp.array(90.0))
    np.testing.assert_allclose(wrap(found.variance)(10), 9, rtol=1e-6)
    np.testing.assert_allclose(wrap(found.variance)(10, 91), 9 * 81 / 90, rtol=1e-6)
    np.testing.assert_allclose(wrap(found.variance)(1, 1), 0)
    np.testing.assert_allclose(wrap(found.within)(9), (12, 80), rtol=1e-6)
    np.testing.assert_allclose(wrap(lambda b: noise.of_gradients(jnp.array([1.0, 3.0]), b))(8), (3, 16), rtol=1e-6)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
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
        (lambda: noise.Noise(1.0, 1.0).within(0), ValueError, r"within: examples is 0; expected at least 1$"),
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
