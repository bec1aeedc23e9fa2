"""The sharpness while training, from a few products every now and then."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdx
from gdx import curvature
from gdx.compat import enable_x64
from tests.curvature import networks

KEY = jax.random.key(0)


def test_it_follows_the_largest_eigenvalues_through_training():
    with enable_x64(True):
        data = networks.data(1)

        def mean_loss(params, _):
            return networks.mean_loss(params, data)

        @jax.jit
        def run(params):
            def segment(carry, _):
                params, *tracked = carry
                params = gdx.train(mean_loss, gdx.gradient_descent(0.05), params, jnp.zeros(10)).params
                hessian = curvature.Hessian(networks.loss, params, data)
                tracked = [curvature.update_sharpness(state, hessian) for state in tracked]
                return (params, *tracked), (params, *tracked)

            states = curvature.init_sharpness(params, KEY), curvature.init_sharpness(params, KEY, count=3)
            return jax.lax.scan(segment, (params, *states), None, 12)[1]

        visited, one, three = run(networks.start())
        dense = [networks.dense(networks.loss, jax.tree.map(lambda x, i=i: x[i], visited), data) for i in range(12)]
    exact = np.array([np.linalg.eigvalsh(matrix)[:-4:-1] for matrix in dense])
    assert three.value.shape == three.error.shape == (12, 3)
    for tracked, expected in ((one, exact[:, 0]), (three, exact)):
        value, error = np.asarray(tracked.value), np.asarray(tracked.error)
        assert np.all(value <= expected * (1 + 1e-12))
        np.testing.assert_allclose(value[2:], expected[2:], rtol=5e-3)
        assert np.all(expected - value <= error)
    for i, matrix in enumerate(dense):
        vectors = np.concatenate([np.reshape(x[i], (3, -1)) for x in jax.tree.leaves(three.vector)], axis=1)
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(3), atol=1e-10)
        residuals = np.linalg.norm(vectors @ matrix - np.asarray(three.value)[i, :, None] * vectors, axis=1)
        np.testing.assert_allclose(residuals, np.asarray(three.error)[i], rtol=1e-6, atol=1e-10)


def test_it_finds_an_eigenvector_that_overtakes():
    """The two directions do not mix: without noise the start would stay in the first for ever."""
    key = jax.random.key(1)
    state = curvature.init_sharpness(jnp.zeros(50), key)._replace(vector=jnp.eye(50)[0])
    spectrum = jnp.full(50, 0.1).at[0].set(1.0).at[1].set(1.5)
    hessian = curvature.Hessian(lambda p, s: 0.5 * jnp.sum(s * p**2), jnp.ones(50), spectrum[None])
    for _ in range(10):
        state = curvature.update_sharpness(state, hessian)
    np.testing.assert_allclose(state.value, 1.5, rtol=1e-3)
    assert abs(state.vector[1]) > 0.99


def test_a_scan_over_a_mesh_with_explicit_axes():
    """The state has the same types before and after."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    params = jax.device_put(jnp.arange(1.0, 9.0), jax.NamedSharding(mesh, jax.P("data")))
    hessian = curvature.Hessian(lambda p, batch: jnp.sum(p**3), params, jnp.zeros(1))

    def update(state, _):
        return curvature.update_sharpness(state, hessian), None

    state, _ = jax.lax.scan(update, curvature.init_sharpness(params, KEY), None, 5)
    np.testing.assert_allclose(state.value, 48, rtol=1e-4)


def test_the_state_keeps_its_types_in_low_precision():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), networks.start(np.float32))
    data = jax.tree.map(lambda x: x.astype(jnp.bfloat16), networks.data(1, dtype=np.float32))
    state = curvature.init_sharpness(params, KEY)
    after = curvature.update_sharpness(state, curvature.Hessian(networks.loss, params, data))
    assert jax.tree.map(jnp.result_type, state) == jax.tree.map(jnp.result_type, after)
    assert jax.tree.structure(state) == jax.tree.structure(after)
    assert state.value.dtype == np.float32 and np.isinf(state.error) and np.isfinite(after.error)


@pytest.mark.parametrize("count", [None, 2])
def test_what_is_nan_once_is_seen_and_not_gone_on_from(count):
    def loss(p, batch):
        return jnp.sum(batch * p**2) / 2

    good, bad = (curvature.Hessian(loss, jnp.ones(3), jnp.array([[3.0, x, 1.0]])) for x in (2.0, np.nan))
    before = curvature.update_sharpness(curvature.init_sharpness(jnp.ones(3), KEY, count), good, products=3)
    spoiled = curvature.update_sharpness(before, bad, products=3)
    assert np.isnan(spoiled.value).all() and np.isnan(spoiled.error).all()
    after = curvature.update_sharpness(spoiled, good, products=3)
    np.testing.assert_allclose(np.atleast_1d(after.value), [3, 2][: count or 1], rtol=1e-4)


def test_one_parameter_and_too_few_products():
    hessian = curvature.Hessian(lambda p, batch: 3 * p**2, jnp.ones(()), jnp.zeros(1))
    state = curvature.update_sharpness(curvature.init_sharpness(jnp.ones(()), KEY), hessian)
    np.testing.assert_allclose([state.value, state.error], [6, 0], atol=1e-5)
    with pytest.raises(ValueError, match="update_sharpness: products is 1; expected at least 2"):
        curvature.update_sharpness(state, hessian, products=1)
    several, wider = (
        curvature.init_sharpness(jnp.ones(5), KEY, count=3),
        dataclasses.replace(hessian, params=jnp.ones(5)),
    )
    with pytest.raises(ValueError, match="update_sharpness: products is 3; expected at least 4"):
        curvature.update_sharpness(several, wider, products=3)
    with pytest.raises(ValueError, match="init_sharpness: count is 2; expected 1 to 1, the number of parameters"):
        curvature.init_sharpness(jnp.ones(()), KEY, count=2)
    with pytest.raises(TypeError, match=r"update_sharpness: products is 2\.5; expected an integer"):
        curvature.update_sharpness(state, hessian, products=2.5)


def test_the_state_of_other_parameters():
    state = curvature.init_sharpness({"a": jnp.ones(2), "b": jnp.ones(3)}, KEY)
    for params, words in (
        (
            {"a": jnp.ones(3), "b": jnp.ones(2)},
            r"the vector at \['a'\] is float32\[2\], the parameter there float32\[3",
        ),
        ({"a": jnp.ones(5)}, "pass a vector with the tree of the parameters"),
    ):
        hessian = curvature.Hessian(lambda p, batch: jnp.sum(p["a"] ** 2), params, jnp.zeros(1))
        with pytest.raises(ValueError, match=f"update_sharpness: in the state, .*{words}"):
            curvature.update_sharpness(state, hessian)
