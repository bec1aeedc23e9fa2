"""Products with Hessians and Gauss-Newton matrices against dense ones; what is no loss is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import gdx
from gdx import curvature
from gdx.compat import enable_x64
from tests.curvature import networks


@pytest.fixture
def x64():
    with enable_x64(True):
        yield


def flat(tree):
    return np.asarray(ravel_pytree(tree)[0])


@pytest.mark.parametrize("batches", [1, 3])
def test_hessian_products_are_those_of_the_dense_matrix(x64, batches):
    params, data = networks.start(), networks.data(batches)
    v = networks.vector(params)
    expected = networks.dense(networks.loss, params, data) @ flat(v)
    found = jax.jit(lambda h, v: h(v))(curvature.Hessian(networks.loss, params, data), v)
    assert jax.tree.structure(found) == jax.tree.structure(params)
    np.testing.assert_allclose(flat(found), expected, rtol=1e-12, atol=1e-12)


def test_gauss_newton_products_are_those_of_the_dense_matrix(x64):
    params, data = networks.start(), networks.data(3)
    start, back = ravel_pytree(params)
    expected = np.zeros((start.size, start.size))
    for i in range(3):
        batch = jax.tree.map(lambda x, i=i: x[i], data)
        j = np.asarray(jax.jacobian(lambda v, batch=batch: networks.outputs(back(v), batch).ravel())(start))
        expected += j.T @ j * 2 / j.shape[0] / 3  # the mean of squares has the Hessian 2 / number
    v = networks.vector(params)
    found = curvature.GaussNewton(networks.outputs, networks.squares, params, data)(v)
    np.testing.assert_allclose(flat(found), expected @ flat(v), rtol=1e-12, atol=1e-12)


def test_gauss_newton_of_a_linear_model_is_the_hessian(x64):
    x, labels = networks.data(2)[0], jnp.array([[0, 1, 2, 0, 1, 2, 0, 1]] * 2)
    params = jnp.asarray(np.random.default_rng(0).standard_normal((5, 3)))

    def logits(params, batch):
        return batch[0] @ params

    def entropy(logits, batch):
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]))

    v = networks.vector(params)
    gauss_newton = curvature.GaussNewton(logits, entropy, params, (x, labels))(v)
    hessian = curvature.Hessian(lambda p, b: entropy(logits(p, b), b), params, (x, labels))(v)
    np.testing.assert_allclose(gauss_newton, hessian, rtol=1e-12, atol=1e-14)


def test_complex_parameters_count_as_pairs_of_real_ones(x64):
    random = np.random.default_rng(0)
    matrix = random.standard_normal((4, 3)) + 1j * random.standard_normal((4, 3))
    theta, v = (jnp.asarray(random.standard_normal(3) + 1j * random.standard_normal(3)) for _ in range(2))

    def loss(theta, batch):
        return jnp.sum(jnp.abs(batch @ theta) ** 2) / 2

    batches = jnp.asarray(matrix)[None]
    np.testing.assert_allclose(curvature.Hessian(loss, theta, batches)(v), matrix.conj().T @ matrix @ v)
    gauss_newton = curvature.GaussNewton(
        lambda theta, batch: batch @ theta, lambda z, batch: jnp.sum(jnp.abs(z) ** 2) / 2, theta, batches
    )
    np.testing.assert_allclose(gauss_newton(v), matrix.conj().T @ matrix @ v)
    edges = curvature.spectrum_edges(curvature.Hessian(loss, theta, batches), jax.random.key(0))
    expected = np.linalg.eigvalsh(matrix.conj().T @ matrix)
    np.testing.assert_allclose([edges.smallest.value, edges.largest.value], expected[[0, -1]], rtol=1e-6)


def test_low_precision_parameters_give_float32_products():
    params, data = networks.start(np.float32), networks.data(2, dtype=np.float32)
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    data = jax.tree.map(lambda x: x.astype(jnp.bfloat16), data)
    v = networks.vector(params)
    found = curvature.Hessian(networks.loss, low, data)(v)
    assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype(np.float32)}
    as_stored = jax.tree.map(lambda x: x.astype(jnp.float32), (low, data))
    exact = flat(curvature.Hessian(networks.loss, *as_stored)(v))
    assert np.linalg.norm(flat(found) - exact) < 0.05 * np.linalg.norm(exact)


def test_an_operator_is_a_value_and_new_numbers_compile_nothing():
    traces = []

    @jax.jit
    def product(operator, v):
        traces.append(1)
        return operator(v)

    params, data = networks.start(np.float32), networks.data(2, dtype=np.float32)
    v = networks.vector(params)
    first = product(curvature.Hessian(networks.loss, params, data), v)
    second = product(curvature.Hessian(networks.loss, jax.tree.map(lambda p: 2 * p, params), data), v)
    assert len(traces) == 1 and not np.allclose(flat(first), flat(second))


def test_memory_is_that_of_one_batch():
    def temporary(count):
        hessian = curvature.Hessian(networks.loss, networks.start(np.float32), networks.data(count, 512, np.float32))
        compiled = jax.jit(lambda h, v: h(v)).lower(hessian, hessian.params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(16) < 1.2 * temporary(2)


def test_corners_count_for_nothing(x64):
    corners = jnp.array([-1.0, 0.0, 2.0])
    hessian = curvature.Hessian(lambda p, batch: jnp.sum(jax.nn.relu(p) + p**2), corners, jnp.zeros(1))
    np.testing.assert_array_equal(hessian(jnp.ones(3)), [2.0, 2.0, 2.0])


@jax.custom_vjp
def only_backward(x):
    return x**2


only_backward.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))


def test_a_loss_with_a_derivative_of_its_own():
    hessian = curvature.Hessian(lambda p, batch: jnp.sum(only_backward(p)), jnp.ones(3), jnp.zeros(1))
    np.testing.assert_array_equal(hessian(jnp.ones(3)), [2.0, 2.0, 2.0])
    matrix = curvature.GaussNewton(
        lambda p, batch: only_backward(p), lambda z, batch: jnp.sum(z**2), jnp.ones(3), jnp.zeros(1)
    )
    with pytest.raises(TypeError, match=r"GaussNewton: the loss cannot be differentiated .*jax\.custom_jvp"):
        matrix(jnp.ones(3))


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda p, b: p, ValueError, r"Hessian: the loss has shape \(2,\); expected a scalar, such as the mean"),
        (lambda p, b: (p.sum(), 1), TypeError, "Hessian: the loss returns a tuple; expected a scalar array alone"),
        (lambda p, b: jax.lax.complex(p.sum(), p.sum()), TypeError, "the loss returns complex64; expected a real"),
        (lambda p, b: jnp.int32(1), TypeError, "the loss returns int32; expected a real"),
        (
            lambda p, b: jax.lax.while_loop(lambda x: x < 9, lambda x: 2 * x, p.sum()),
            TypeError,
            "cannot be differentiated twice, .*a fixed number of turns",
        ),
    ],
    ids=["vector", "tuple", "complex", "integer", "while"],
)
def test_what_is_no_loss(loss, error, message):
    hessian = curvature.Hessian(loss, jnp.ones(2), jnp.zeros(1))
    with pytest.raises(error, match=message):
        hessian(jnp.ones(2))
    with pytest.raises(error, match=message):
        curvature.spectrum_edges(hessian, jax.random.key(0))


@pytest.mark.parametrize(
    ("params", "vector", "error", "message"),
    [
        ({"w": jnp.ones(2)}, {"v": jnp.ones(2)}, ValueError, "pass a vector with the tree of the parameters"),
        ({"w": jnp.ones(2)}, {"w": jnp.ones(3)}, ValueError, r"the vector at \['w'\] is float32\[3\], the parameter"),
        ({"w": jnp.ones(2)}, {"w": jnp.ones(2, complex)}, ValueError, "real where the parameter is"),
        ({"w": jnp.arange(2)}, {"w": jnp.ones(2)}, TypeError, r"Hessian: the parameter at \['w'\] is int32\[2\]"),
    ],
)
def test_vectors_and_parameters_that_do_not_fit(params, vector, error, message):
    with pytest.raises(error, match=message):
        curvature.Hessian(lambda p, b: jnp.sum(p["w"].astype(jnp.float32) ** 2), params, jnp.zeros(1))(vector)


@pytest.mark.parametrize("batches", [(), jnp.zeros(()), jnp.zeros((0, 2)), (jnp.zeros(2), jnp.zeros(3))])
def test_batches_without_a_common_axis(batches):
    with pytest.raises(ValueError, match=r"Hessian: in batches, .*; for a single batch, "):
        curvature.Hessian(lambda p, b: jnp.sum(p**2), jnp.ones(2), batches)(jnp.ones(2))


def adam_state(tx, params, data, steps):
    return gdx.train(lambda p, _: networks.mean_loss(p, data), tx, params, jnp.zeros(steps)).state


@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize(
    "tx",
    [
        gdx.adam(1e-2),
        gdx.adamw(1e-2, b1=0.8, b2=0.99, eps=1e-3, eps_root=1e-4),
        gdx.chain(gdx.scale_by_adam(b1=0.5), gdx.scale_by_learning_rate(optax.constant_schedule(0.1))),
    ],
    ids=["adam", "adamw", "chain"],
)
def test_the_preconditioned_hessian_is_that_of_the_formula(x64, tx, steps):
    params, data = networks.start(), networks.data(2)
    state = adam_state(tx, params, data, steps)
    h = tx.hyperparams
    nu = flat(next(s for s in jax.tree.leaves(state, is_leaf=lambda s: hasattr(s, "nu")) if hasattr(s, "nu")).nu)
    p = (1 - h["b1"] ** steps) * (np.sqrt(nu / (1 - h["b2"] ** steps) + h["eps_root"]) + h["eps"])
    v = networks.vector(params)
    expected = networks.dense(networks.loss, params, data) @ (flat(v) / np.sqrt(p)) / np.sqrt(p)
    operator = curvature.adam_preconditioned(curvature.Hessian(networks.loss, params, data), tx, state)
    np.testing.assert_allclose(flat(operator(v)), expected, rtol=1e-7)


def test_a_preconditioner_from_few_bits_and_from_optax():
    params, data = {"w": jnp.ones((16, 512))}, jnp.zeros(1)

    def loss(p, batch):
        return jnp.sum(jnp.cos(p["w"] * jnp.arange(512.0)[None, :] / 512))

    def scale(tx, described=None):
        _, state = tx.update(jax.grad(loss)(params, 0), tx.init(params), params)
        return curvature.adam_preconditioned(curvature.Hessian(loss, params, data), described or tx, state).scale["w"]

    with jax.numpy_dtype_promotion("standard"):  # for optax
        theirs = scale(optax.adam(0.1, eps=1e-3), gdx.scale_by_adam(eps=1e-3))
    exact = scale(gdx.adam(0.1, eps=1e-3))
    np.testing.assert_allclose(theirs, exact, rtol=1e-4)
    few = scale(gdx.adam(0.1, eps=1e-3, nu_dtype=gdx.storage.FourthRoot8()))
    assert 0 < np.max(np.abs(few / exact - 1)) < 0.5


def test_where_adam_divides_by_zero():
    def loss(p, batch):
        return jnp.sum(p["w"] ** 2) + 0 * jnp.sum(p["unused"])

    params, tx = {"w": jnp.ones(2), "unused": jnp.ones(3)}, gdx.adam(0.1, eps=0.0)
    hessian = curvature.Hessian(loss, params, jnp.zeros(1))
    for g in (jax.grad(loss)(params, 0), {"w": jnp.full(2, jnp.nan), "unused": jnp.ones(3)}):
        _, state = tx.update(g, tx.init(params), params)
        place = "w" if np.isnan(g["w"][0]) else "unused"
        with pytest.raises(
            ValueError, match=rf"adam_preconditioned: the second moment \(nu\) at \['{place}'\] is NaN, or"
        ):
            curvature.adam_preconditioned(hessian, tx, state)
        scale = jax.jit(lambda state: curvature.adam_preconditioned(hessian, tx, state).scale)(state)
        assert not np.isfinite(scale[place]).any()


def test_what_has_no_adam():
    hessian = curvature.Hessian(lambda p, b: jnp.sum(p**2), jnp.ones(2), jnp.zeros(1))
    tx = gdx.adam(0.1)
    with pytest.raises(ValueError, match="the state has taken no step"):
        curvature.adam_preconditioned(hessian, tx, tx.init(jnp.ones(2)))
    with pytest.raises(TypeError, match=r"tx is sgd\(learning_rate=0.1\); expected an optimizer with"):
        curvature.adam_preconditioned(hessian, gdx.sgd(0.1), tx.init(jnp.ones(2)))
    with pytest.raises(TypeError, match="the state has 0 parts with a count and a second moment"):
        curvature.adam_preconditioned(hessian, tx, gdx.momentum(0.1).init(jnp.ones(2)))
