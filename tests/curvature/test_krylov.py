"""Lanczos where the span of a start is exhausted: few distinct eigenvalues, low rank, few dimensions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdx import curvature
from gdx.compat import enable_x64
from gdx.curvature.krylov import apart, lanczos

SPECTRA = {
    "one": [3.0],
    "pair": [-1.0, 4.0],
    "two like one": [2.0, 2.0],
    "zero": [0.0] * 100,
    "identity": [5.0] * 100,
    "one and ninety-nine": [1.0] + [2.0] * 99,
    "low rank": [0.0] * 95 + [1.0, 2.0, 3.2343, 4.0, 4.671],
    "repeated": [-2.0] * 3 + [0.0] * 94 + [7.0] * 3,
    "clusters": [*np.linspace(1, 1 + 1e-7, 50), *np.linspace(3, 3 + 1e-7, 50)],
    "twenty powers": [10.0**-i for i in range(20)] * 5,
}


def half_square(theta, matrix):
    return 0.5 * theta @ matrix @ theta


def outputs(theta, root):
    return root @ theta


def half_squares(outputs, root):
    return 0.5 * jnp.sum(outputs**2)


def hessian(spectrum):
    """One with this spectrum, in random directions."""
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((len(spectrum), len(spectrum))))
    return curvature.Hessian(half_square, jnp.zeros(len(spectrum)), jnp.asarray((q * spectrum) @ q.T, float)[None])


@jax.jit
def everything(operator, keys):
    def with_key(key):
        def update(state, _):
            state = curvature.update_sharpness(state, operator, products=4)
            return state, (state.value, state.error)

        state = curvature.update_sharpness(curvature.init_sharpness(operator.params, key), operator, products=2)
        _, later = jax.lax.scan(update, state, length=3)
        sharpness = jax.tree.map(jnp.append, (state.value, state.error), later)
        edges = curvature.spectrum_edges(operator, key)
        return edges, curvature.spectral_density(operator, key, probes=5), sharpness

    return jax.lax.map(with_key, keys)


@jax.jit
def heights(density, points, width):
    return jax.lax.map(lambda density: density.at(points, width), density)


@functools.partial(jax.jit, static_argnums=1)
def krylov(operator, size, key):
    return lanczos(operator, jax.random.normal(key, (1, *operator.params.shape), float), size, key)


every = pytest.mark.parametrize("name", SPECTRA)
precise = pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])


@pytest.fixture
def precision(x64):
    with enable_x64(x64):
        yield 200 * float(jnp.finfo(jnp.result_type(float)).eps)


def check_all(operator, spectrum, count, rounding):
    """With every key: edges and sharpness that are within their errors, nodes in the spectrum, and true masses."""
    spectrum = np.sort(spectrum)
    scale = np.max(np.abs(spectrum))
    keys = jax.random.split(jax.random.key(0), (count // 10, 10))  # ten at a time, by one program
    found = [jax.tree.map(np.asarray, everything(operator, ten)) for ten in keys]
    edges, density, sharpness = jax.tree.map(lambda *tens: np.concatenate(tens), *found)
    assert np.all(edges.converged)
    for edge, expected in ((edges.smallest, spectrum[0]), (edges.largest, spectrum[-1])):
        assert np.all(np.abs(edge.value - expected) <= edge.error + rounding * scale)
        assert np.all(edge.error <= 1e-3 * scale)
    value, error = sharpness
    assert np.all(value <= spectrum[-1] + rounding * scale)
    assert np.all(np.min(np.abs(value[..., None] - spectrum), axis=-1) <= error + rounding * scale)
    nodes, weights = density
    assert np.all(nodes >= spectrum[0] - rounding * scale) and np.all(nodes <= spectrum[-1] + rounding * scale)
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=rounding)

    # means of the smoothed density over all probes, and what each key says about its own
    points, width = np.linspace(spectrum[0] - 0.1, spectrum[-1] + 0.1, 30), 0.2
    exact = np.exp(-(((points[:, None] - spectrum) / width) ** 2) / 2).mean(axis=1) / width / np.sqrt(2 * np.pi)
    found, error = heights(density, points, width)
    error, spread = np.sqrt(np.mean(error**2, axis=0)), np.std(found, axis=0)
    least = 10 * rounding * np.max(exact)
    assert np.all(np.abs(np.mean(found, axis=0) - exact) <= 5 * error / np.sqrt(count) + least)
    assert np.all((0.5 * error - least <= spread) & (spread <= 1.5 * error + least))


@every
@precise
def test_with_every_key(name, x64, precision):
    check_all(hessian(SPECTRA[name]), SPECTRA[name], 10, precision)


@precise
def test_one_and_ninety_nine_with_300_keys(x64, precision):
    spectrum = SPECTRA["one and ninety-nine"]
    bowl = curvature.Hessian(half_square, jnp.zeros(100), jnp.diag(jnp.asarray(spectrum, float))[None])
    check_all(bowl, spectrum, 300, precision)
    density = curvature.spectral_density(bowl, jax.random.key(0))
    np.testing.assert_allclose(np.where(density.nodes < 1.5, density.weights, 0).sum(axis=1), 0.01, rtol=precision)


@precise
def test_a_gauss_newton_matrix_of_low_rank(x64, precision):
    root = np.random.default_rng(0).standard_normal((5, 100)) / 10
    matrix = curvature.GaussNewton(outputs, half_squares, jnp.zeros(100), jnp.asarray(root, float)[None])
    check_all(matrix, np.append(np.zeros(95), np.linalg.eigvalsh(root @ root.T)), 10, precision)


@every
@precise
def test_the_basis_is_orthonormal_and_has_the_operator_in_it(name, x64, precision):
    operator, size = hessian(SPECTRA[name]), min(len(SPECTRA[name]), 64)
    matrix = np.asarray(operator.batches[0], np.float64)
    for i in range(3):
        values, coefficients, basis, _ = (np.asarray(x, np.float64) for x in krylov(operator, size, jax.random.key(i)))
        np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)), atol=precision)
        span = coefficients.T @ basis
        np.testing.assert_allclose(
            span @ matrix @ span.T, np.diag(values), atol=precision * max(1, np.max(np.abs(matrix)))
        )


@precise
def test_all_eigenvalues_where_the_space_is_the_whole(x64, precision):
    for name in ("repeated", "clusters", "twenty powers"):
        operator = hessian(SPECTRA[name])
        found = krylov(operator, 100, jax.random.key(1))
        expected = np.sort(SPECTRA[name])
        np.testing.assert_allclose(found.values, expected, rtol=0, atol=precision * np.max(np.abs(expected)))


@precise
def test_what_is_apart_is_orthogonal_however_little_it_is(x64, precision):
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((100, 100)))
    basis, eps = jnp.asarray(q[:, :60].T, float), float(jnp.finfo(jnp.result_type(float)).eps)
    for little in (1.0, 1e-2, 100 * eps):
        left = apart(jnp.asarray(q[:, :60] @ np.linspace(-1, 1, 60) + little * q[:, 60], float), basis)
        np.testing.assert_allclose(np.linalg.norm(basis @ left), 0, atol=100 * eps * np.linalg.norm(left))
        assert abs(np.linalg.norm(left) / little - 1) < 0.5
