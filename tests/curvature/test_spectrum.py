"""Edges, density and trace against dense eigensolvers, their errors, and spectra where Lanczos breaks down."""

import contextlib
import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType

from gdx import curvature
from gdx.compat import enable_x64
from tests.curvature import networks

KEY = jax.random.key(0)


@pytest.fixture
def x64():
    with enable_x64(True):
        yield


def quadratic(eigenvalues, seed=None):
    """A Hessian with this spectrum, diagonal or in random directions."""
    spectrum = np.asarray(eigenvalues, float)
    matrix = np.diag(spectrum)
    if seed is not None:
        q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal(matrix.shape))
        matrix = q @ matrix @ q.T
    matrix = jnp.asarray(matrix, float)
    return curvature.Hessian(half_square, jnp.ones(len(spectrum)), matrix[None])


def half_square(theta, matrix):
    return 0.5 * theta @ matrix @ theta


def network_hessian(dtype=np.float64):
    return curvature.Hessian(networks.loss, networks.start(dtype), networks.data(3, dtype=dtype))


@pytest.fixture(scope="module")
def spectrum():
    with enable_x64(True):
        return np.linalg.eigvalsh(networks.dense(networks.loss, networks.start(), networks.data(3)))


@pytest.mark.parametrize("krylov_size", [4, 100])
def test_edges_are_those_of_the_dense_matrix(x64, spectrum, krylov_size):
    edges = curvature.spectrum_edges(network_hessian(), KEY, krylov_size=krylov_size, rounds=60, tolerance=1e-6)
    assert edges.converged
    scale = np.max(np.abs(spectrum))
    for edge, expected in ((edges.smallest, spectrum[0]), (edges.largest, spectrum[-1])):
        assert abs(edge.value - expected) <= edge.error + 1e-12 and edge.error <= 1e-6 * scale
        flat = ravel_pytree(edge.vector)[0]
        np.testing.assert_allclose(jnp.linalg.norm(flat), 1, rtol=1e-12)
        image = ravel_pytree(network_hessian()(edge.vector))[0]
        np.testing.assert_allclose(jnp.linalg.norm(image - edge.value * flat), edge.error, rtol=1e-3, atol=1e-10)


def test_the_largest_eigenpairs_are_those_of_the_dense_matrix(x64, spectrum):
    found = curvature.largest_eigenpairs(network_hessian(), KEY, 4, krylov_size=16, rounds=40, tolerance=1e-6)
    assert found.converged and found.products > 2 * 16
    assert np.all(np.abs(found.values - spectrum[:-5:-1]) <= found.errors + 1e-12)
    flat = np.stack([ravel_pytree(jax.tree.map(lambda x, i=i: x[i], found.vectors))[0] for i in range(4)])
    np.testing.assert_allclose(flat @ flat.T, np.eye(4), atol=1e-5)
    dense = networks.dense(networks.loss, networks.start(), networks.data(3))
    residuals = np.linalg.norm(flat @ dense - found.values[:, None] * flat, axis=1)
    np.testing.assert_allclose(residuals, found.errors, rtol=1e-4, atol=1e-10)


WITH_A_TOP = {
    "thrice": [*np.linspace(-1, 6, 57), 7, 7, 7],
    "identity": [5.0] * 60,
    "blocks of the identity": [*[1.0] * 20, *[2.0] * 20, *[3.0] * 3, *[4.0] * 17],
    "gaps of 1e-4": [*np.linspace(-0.9, 0.9, 52), *(1 - 1e-4 * np.arange(8))],
    "close": np.arange(1, 61),
    "indefinite": [*-np.linspace(1, 10, 40), *np.linspace(0, 1, 20)],
    "negative": -np.linspace(1, 3, 60),
    "zero": [0.0] * 60,
    **{f"random {i}": np.random.default_rng(i).integers(-4, 4, 60) / (1 + i) for i in range(3)},
}


@jax.jit
def six_largest(hessians, key):
    return jax.lax.map(lambda h: curvature.largest_eigenpairs(h, key, 6, krylov_size=24, rounds=60), hessians)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_has_converged_has_close_and_repeated_eigenvalues_too(dtype):
    tolerance = 1e-3
    with enable_x64(dtype == np.float64):
        hessians = jax.tree.map(lambda *x: jnp.stack(x), *(quadratic(x, seed=2) for x in WITH_A_TOP.values()))
        for seed in range(3):
            values, vectors, _, converged, _ = six_largest(hessians, jax.random.key(seed))
            assert np.all(converged)
            for i, spectrum in enumerate(WITH_A_TOP.values()):
                scale = np.max(np.abs(np.sort(spectrum)[-6:]))
                np.testing.assert_allclose(values[i], np.sort(spectrum)[:-7:-1], atol=1.01 * tolerance * scale, rtol=0)
                np.testing.assert_allclose(vectors[i] @ vectors[i].T, np.eye(6), atol=1e-5)
                residuals = vectors[i] @ hessians.batches[i, 0] - values[i][:, None] * vectors[i]
                assert np.all(np.linalg.norm(residuals, axis=1) <= 1.01 * tolerance * scale)


def test_nearly_all_eigenpairs_and_too_few_products():
    hessian = quadratic(np.arange(9) // 2, seed=3)
    for count in (8, 9):
        found = curvature.largest_eigenpairs(hessian, KEY, count)
        assert found.converged and found.products == 9 + count
        np.testing.assert_allclose(found.values, [4, 3, 3, 2, 2, 1, 1, 0, 0][:count], atol=1e-5)
    close = quadratic(np.linspace(1, 2, 60), seed=3)
    assert not curvature.largest_eigenpairs(close, KEY, 4, krylov_size=8, rounds=2).converged


def test_the_block_of_a_layer_is_that_of_the_dense_matrix(x64):
    hessian = network_hessian()
    block = curvature.Block(hessian, "first")
    dense = networks.dense(networks.loss, hessian.params, hessian.batches)
    marked = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.full(np.shape(x), "first" in jax.tree_util.keystr(path)), hessian.params
    )
    inside = np.asarray(ravel_pytree(marked)[0], bool)
    assert 0 < inside.sum() < len(inside)
    expected = np.linalg.eigvalsh(dense[np.ix_(inside, inside)])
    edges = curvature.spectrum_edges(block, KEY, tolerance=1e-6)
    np.testing.assert_allclose([edges.smallest.value, edges.largest.value], expected[[0, -1]], atol=1e-5 * expected[-1])
    for pattern, words in (("none", r"'none' matches no path; .*The paths are "), ("(", "is no regular expression")):
        with pytest.raises(ValueError, match=f"Block: the pattern .*{words}"):
            curvature.spectrum_edges(curvature.Block(hessian, pattern), KEY)


def test_rounds_end_once_converged_and_say_when_not(x64):
    hessian = quadratic(np.linspace(1, 2, 200), seed=0)
    short = curvature.spectrum_edges(hessian, KEY, krylov_size=5, rounds=2, tolerance=1e-6)
    assert not short.converged and short.products == 5 + 3 + 2
    long = curvature.spectrum_edges(hessian, KEY, krylov_size=40, rounds=50, tolerance=1e-4)
    assert long.converged and long.products < 40 * 50
    assert abs(long.smallest.value - 1) <= long.smallest.error < 2e-4
    assert short.smallest.error > long.smallest.error


def test_in_float32_the_error_still_bounds(spectrum):
    edges = curvature.spectrum_edges(network_hessian(np.float32), KEY, tolerance=1e-4)
    assert edges.converged
    for edge, expected in ((edges.smallest, spectrum[0]), (edges.largest, spectrum[-1])):
        assert abs(edge.value - expected) <= edge.error + 1e-5 * np.max(np.abs(spectrum))


@pytest.mark.parametrize(
    "eigenvalues",
    [[3.0], [-1.0, 4.0], [0.0] * 40, [5.0] * 40, [1.0] * 20 + [3.0] * 20, [-2.0] * 3 + [0.0] * 34 + [7.0] * 3],
    ids=["one", "pair", "zero", "identity", "two values", "three values"],
)
def test_where_the_krylov_space_is_exhausted(eigenvalues):
    hessian = quadratic(eigenvalues, seed=1)
    edges = curvature.spectrum_edges(hessian, KEY)
    assert edges.converged
    tolerance = 1e-5 * max(map(abs, eigenvalues))
    np.testing.assert_allclose(edges.smallest.value, min(eigenvalues), atol=tolerance, rtol=0)
    np.testing.assert_allclose(edges.largest.value, max(eigenvalues), atol=tolerance, rtol=0)
    if len(eigenvalues) == 40:  # one program for all of them
        density = curvature.spectral_density(hessian, KEY, probes=3)
        assert density.nodes.shape == density.weights.shape == (3, 40)
        np.testing.assert_allclose(density.weights.sum(axis=1), 1, rtol=1e-5)
        means = jnp.sum(density.weights * density.nodes, axis=1)
        assert jnp.all((means >= min(eigenvalues) - tolerance) & (means <= max(eigenvalues) + tolerance))


@pytest.mark.parametrize("exponent", [-100, -60, 60, 100])
def test_a_spectrum_in_another_unit_is_the_same(exponent):
    """A power of two rounds nothing, and its square is no float32."""
    q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((40, 40)))
    matrix = (q * np.linspace(-1, 9, 40)) @ q.T

    def found(unit):
        hessian = curvature.Hessian(half_square, jnp.ones(40), jnp.asarray(matrix * unit, jnp.float32)[None])
        edges = curvature.spectrum_edges(hessian, KEY, krylov_size=12)
        density = curvature.spectral_density(hessian, KEY, krylov_size=12, probes=2)
        heights = [x * unit for x in density.at(jnp.linspace(-1.0, 9.0, 5) * unit, unit)]
        state = curvature.update_sharpness(curvature.init_sharpness(hessian.params, KEY), hessian)
        assert edges.converged and edges.largest.error > 0 and state.error > 0
        ends = [(edge.value, edge.error) for edge in (edges.smallest, edges.largest)]
        scaled = ends, density.nodes, state.value, state.error, curvature.trace(hessian, KEY, samples=4)
        return jax.tree.map(lambda x: x / unit, scaled), heights, edges.largest.vector, density.weights, state.vector

    for a, b in zip(jax.tree.leaves(found(2.0**exponent)), jax.tree.leaves(found(1.0))):
        np.testing.assert_array_equal(a, b)


def test_under_jit_it_is_the_same(x64):
    hessian = network_hessian()
    outside = curvature.spectrum_edges(hessian, KEY)
    inside = jax.jit(curvature.spectrum_edges)(hessian, KEY)
    np.testing.assert_allclose(inside.largest.value, outside.largest.value, rtol=1e-12)


def on_mesh(mesh, x, *spec):
    return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))


def everything(hessian):
    edges = curvature.spectrum_edges(hessian, KEY, krylov_size=20)
    density = curvature.spectral_density(hessian, KEY, krylov_size=6, probes=2)
    tracked = curvature.update_sharpness(curvature.init_sharpness(hessian.params, KEY), hessian)
    trace = curvature.trace(hessian, KEY)
    pairs = curvature.largest_eigenpairs(hessian, KEY, 2, krylov_size=20)
    found = edges.smallest.value, edges.largest.value, jnp.mean(density.nodes), trace.value, tracked.value
    return (*found, *pairs.values)


@pytest.fixture(scope="module")
def without_a_mesh():
    return everything(network_hessian(np.float32))


@pytest.mark.parametrize(
    ("kind", "in_jit", "entered"),
    [("Auto", False, False), ("Auto", True, True), *itertools.product(["Explicit"], [False, True], [False, True])],
)
def test_on_a_mesh_it_is_the_same(kind, in_jit, entered, without_a_mesh):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(getattr(AxisType, kind),) * 2)
    alone = network_hessian(np.float32)
    with jax.set_mesh(mesh) if entered else contextlib.nullcontext():
        params = jax.tree.map(lambda x: on_mesh(mesh, x), alone.params)
        first, last = alone.params["first"], alone.params["last"]
        params["first"] = {"w": on_mesh(mesh, first["w"], None, "model"), "b": on_mesh(mesh, first["b"], "model")}
        params["last"] = (on_mesh(mesh, last[0], "model"), *params["last"][1:])
        batches = jax.tree.map(lambda x: on_mesh(mesh, x, None, "data"), alone.batches)
        got = (jax.jit(everything) if in_jit else everything)(curvature.Hessian(networks.loss, params, batches))
    np.testing.assert_allclose(got, without_a_mesh, rtol=2e-3, atol=2e-4)


def test_a_loss_that_states_its_shardings():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)

    def loss(w, x):
        return jnp.mean(jnp.einsum("bi,io->bo", jnp.tanh(x), w, out_sharding=jax.P("data")) ** 2)

    def plain(w, x):
        return jnp.mean((jnp.tanh(x) @ w) ** 2)

    w, x = jnp.ones((4, 2)), networks.data(2, dtype=np.float32)[0][..., :4]
    expected = curvature.spectrum_edges(curvature.Hessian(plain, w, x), KEY).largest.value
    typed = jax.sharding.explicit_axes(loss, in_sharding=(jax.P("model"), jax.P("data")))
    hessian = curvature.Hessian(typed, on_mesh(mesh, w, "model"), on_mesh(mesh, x, None, "data"))
    np.testing.assert_allclose(curvature.spectrum_edges(hessian, KEY).largest.value, expected, rtol=1e-3)


def test_memory_is_bounded_by_the_size_of_the_krylov_space():
    from gdx.curvature import spectrum

    count = 1_000_000
    hessian = curvature.Hessian(
        lambda p, batch: jnp.sum(jnp.cos(p * batch)),
        jax.ShapeDtypeStruct((count,), jnp.float32),
        jnp.ones((2, 1)),
    )
    key = jax.eval_shape(lambda: KEY)
    lowered = spectrum._edges.lower(hessian, key, 16, 1000, 1e-3, None)
    held = lowered.compile().memory_analysis().temp_size_in_bytes / (4 * count)
    assert held < 1.25 * 16 + 6


def test_progress_comes_after_each_product():
    heard = []
    hessian = quadratic(np.linspace(1, 9, 50), seed=0)
    for _ in range(2):  # the second run meets the compiled program
        heard.clear()
        edges = curvature.spectrum_edges(hessian, KEY, krylov_size=6, rounds=20, progress=heard.append)
        jax.effects_barrier()
        assert edges.converged and 6 < len(heard) <= edges.products
        assert heard == sorted(heard) and heard[0] == 1 / (6 + 19 * 4) and heard[-1] == 1
    heard.clear()
    curvature.trace(hessian, KEY, samples=4, progress=heard.append)
    jax.effects_barrier()
    assert heard == [0.25, 0.5, 0.75, 1.0]
    heard.clear()
    curvature.spectral_density(hessian, KEY, krylov_size=5, probes=2, progress=heard.append)
    jax.effects_barrier()
    np.testing.assert_allclose(heard, np.arange(1, 11) / 10)


def test_density_has_the_moments_of_the_spectrum(x64, spectrum):
    density = curvature.spectral_density(network_hessian(), KEY, krylov_size=20, probes=200)
    for power in (1, 2, 3):
        found = np.asarray(jnp.sum(density.weights * density.nodes**power, axis=1))
        error = found.std(ddof=1) / np.sqrt(len(found))
        assert abs(found.mean() - np.mean(spectrum**power)) < 4 * error


def test_density_at_points_is_the_smoothed_spectrum(x64, spectrum):
    points, width = np.linspace(spectrum[0] - 1, spectrum[-1] + 1, 40), 0.3
    expected = np.exp(-(((points[:, None] - spectrum) / width) ** 2) / 2).mean(axis=1) / width / np.sqrt(2 * np.pi)
    density, error = curvature.spectral_density(network_hessian(), KEY, probes=100).at(points, width)
    assert density.shape == error.shape == (40,)
    assert np.mean(np.abs(density - expected) < 2 * error + 1e-12) > 0.8 and np.all(error < 0.2 * expected.max())
    alone, unknown = curvature.spectral_density(network_hessian(), KEY, probes=1).at(points, width)
    assert np.all(np.isfinite(alone)) and np.all(np.isnan(unknown))


def test_trace_is_unbiased_and_knows_its_error(x64, spectrum):
    estimates = [curvature.trace(network_hessian(), jax.random.key(i), samples=16) for i in range(60)]
    scores = np.array([(e.value - spectrum.sum()) / e.error for e in estimates])
    assert abs(scores.mean()) < 4 / np.sqrt(60) and 0.7 < scores.std() < 1.5
    assert np.isnan(curvature.trace(network_hessian(), KEY, samples=1).error)


def test_a_trace_with_exact_directions_is_unbiased_and_has_less_error(x64, spectrum):
    hessian, keys = network_hessian(), jax.random.split(KEY, 60)
    estimates = jax.jit(lambda keys: jax.lax.map(lambda key: curvature.trace(hessian, key, rank=8, samples=16), keys))
    values, errors = estimates(keys)
    scores = (values - spectrum.sum()) / errors
    assert abs(scores.mean()) < 4 / np.sqrt(60) and 0.7 < scores.std() < 1.5
    plain = curvature.trace(hessian, KEY, samples=32)  # as many products
    assert np.mean(errors) < 0.7 * plain.error
    every = curvature.trace(hessian, KEY, samples=2, rank=1000)
    np.testing.assert_allclose(every.value, spectrum.sum(), rtol=1e-9)


def test_the_preconditioned_spectrum_is_that_of_the_inverse_times_the_matrix(x64, spectrum):
    hessian = network_hessian()
    p = jax.tree.map(lambda x: 0.5 + jnp.abs(x), hessian.params)
    operator = curvature.Preconditioned(hessian, jax.tree.map(jax.lax.rsqrt, p))
    dense = networks.dense(networks.loss, hessian.params, hessian.batches)
    expected = np.sort(np.linalg.eigvals(dense / np.asarray(ravel_pytree(p)[0])[:, None]).real)
    edges = curvature.spectrum_edges(operator, KEY, tolerance=1e-6)
    np.testing.assert_allclose([edges.smallest.value, edges.largest.value], expected[[0, -1]], rtol=1e-4)


@pytest.mark.parametrize(
    ("loss", "params", "reason"),
    [
        (lambda p, batch: jnp.sum(jnp.log(p)), -1.0, "the loss is nan on batch 0"),
        (lambda p, batch: jnp.sum(p / batch), 1.0, "the loss is inf on batch 1"),
        (lambda p, batch: jnp.sum(jnp.sqrt(p)), 0.0, "it has no finite second derivative here"),
    ],
    ids=["nan", "inf", "root"],
)
@pytest.mark.parametrize("function", [curvature.spectrum_edges, curvature.spectral_density, curvature.trace])
def test_what_is_not_finite_says_why(function, loss, params, reason):
    hessian = curvature.Hessian(loss, jnp.full(3, params), jnp.array([1.0, 0.0]))
    with pytest.raises(ValueError, match=f"{function.__name__}: Hessian.*{reason}"):
        function(hessian, KEY)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: curvature.spectrum_edges(h, KEY, krylov_size=2), "krylov_size is 2; expected at least 3"),
        (lambda h: curvature.spectrum_edges(h, KEY, rounds=0), "rounds is 0; expected at least 1"),
        (lambda h: curvature.spectrum_edges(h, KEY, tolerance=0.0), "tolerance is 0.0; expected a positive number"),
        (lambda h: curvature.spectral_density(h, KEY, probes=0), "probes is 0; expected at least 1"),
        (lambda h: curvature.trace(h, KEY, samples=0), "samples is 0; expected at least 1"),
        (lambda h: curvature.trace(h, KEY, rank=-1), "trace: rank is -1; expected an integer >= 0"),
        (lambda h: curvature.largest_eigenpairs(h, KEY, 3), "count is 3; expected at most 2, the number of parameters"),
        (
            lambda h: curvature.largest_eigenpairs(dataclasses.replace(h, params=jnp.ones(9)), KEY, 3, krylov_size=5),
            "krylov_size is 5; expected at least 6, twice the count",
        ),
        (lambda h: curvature.trace(curvature.Hessian(h.loss, {}, h.batches), KEY), "the operator has no parameters"),
    ],
)
def test_options_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call(quadratic([1.0, 2.0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda h: curvature.spectrum_edges(h, KEY, krylov_size=4.5), "edges: krylov_size is 4.5; expected an integer"),
        (lambda h: curvature.spectrum_edges(h, KEY, rounds=2.0), "spectrum_edges: rounds is 2.0; expected an integer"),
        (lambda h: curvature.spectral_density(h, KEY, probes=2.0), "density: probes is 2.0; expected an integer"),
        (lambda h: curvature.trace(h, KEY, samples=True), "trace: samples is True; expected an integer"),
        (
            lambda h: curvature.trace(curvature.Hessian(h.loss, jnp.arange(2), h.batches), KEY),
            r"Hessian: the parameter at the root is int32\[2\], expected a floating-point array",
        ),
    ],
)
def test_options_and_parameters_of_another_type(call, message):
    with pytest.raises(TypeError, match=message):
        call(quadratic([1.0, 2.0]))
