"""The theory of quadratics as a test of the optimizers: contraction, best rates, edges of stability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdx
from gdx import curvature
from gdx.compat import enable_x64

SPECTRUM = np.array([1.0, 1.7, 6.0, 25.0, 100.0])


@pytest.fixture(autouse=True)
def _x64():
    with enable_x64(True):
        yield


def walk(tx, steps, spectrum=SPECTRUM, start=None):
    """The parameters after each step on the quadratic with this diagonal Hessian."""
    start = np.ones(len(spectrum)) if start is None else start

    def advance(carry, _):
        params, state = carry
        trained = gdx.train(bowl, tx, params, jnp.asarray(spectrum)[None], state=state)
        return (trained.params, trained.state), trained.params

    start = jnp.asarray(start)
    _, points = jax.lax.scan(advance, (start, tx.init(start)), None, steps)
    return np.asarray(points)


def bowl(theta, spectrum):
    return 0.5 * jnp.sum(spectrum * theta**2)


def recurrence(points):
    """The contraction of each mode, from the recurrence x'' = a x' + b x that four of its points satisfy."""
    found = []
    for x in points.T:
        a, b = np.linalg.solve([[x[1], x[0]], [x[2], x[1]]], x[2:4])
        found.append(np.max(np.abs(np.roots([1, -a, -b]))))
    return np.array(found)


@pytest.mark.parametrize("rate", [0.003, 0.01, 2 / 101, 0.0201])
def test_gradient_descent_contracts_by_one_minus_eta_lambda_along_each_mode(rate):
    points = walk(gdx.gradient_descent(rate), 6)
    # multiplied out: along a mode with rate * eigenvalue = 1 all points but the first are 0
    error = np.abs(points[1:] - points[:-1] * (1 - rate * SPECTRUM))
    assert np.all(error <= (1e-12 * np.abs(1 - rate * SPECTRUM) + 1e-15) * np.abs(points[:-1]))


def mode_roots(optimizer, rate, mu):
    """The modulus of the larger root for each mode, from the two-step recurrence of the method."""
    found = []
    for curvature_ in SPECTRUM:
        h = 1 - rate * curvature_
        polynomial = {
            gdx.gradient_descent: [1, -h, 0],
            gdx.momentum: [1, -(h + mu), mu],
            gdx.nesterov: [1, -(1 + mu) * h, mu * h],
        }[optimizer]
        found.append(np.max(np.abs(np.roots(polynomial))))
    return np.array(found)


@pytest.mark.parametrize("optimizer", [gdx.momentum, gdx.nesterov])
@pytest.mark.parametrize(("rate", "mu"), [(0.009, 0.5), (0.013, 0.9), (0.003, 0.97)])
def test_momentum_contracts_along_each_mode_as_its_recurrence(optimizer, rate, mu):
    points = walk(optimizer(rate, mu), 8)[3:7]
    np.testing.assert_allclose(recurrence(points), mode_roots(optimizer, rate, mu), rtol=1e-6)


PREDICTED = {
    gdx.gradient_descent: lambda kappa: (kappa - 1) / (kappa + 1),
    gdx.momentum: lambda kappa: (np.sqrt(kappa) - 1) / (np.sqrt(kappa) + 1),
    gdx.nesterov: lambda kappa: 1 - 2 / np.sqrt(3 * kappa + 1),
}


@pytest.mark.parametrize("optimizer", PREDICTED)
def test_the_best_rate_contracts_as_predicted(optimizer):
    best = curvature.best_learning_rate(SPECTRUM[0], SPECTRUM[-1], optimizer)
    np.testing.assert_allclose(best.contraction, PREDICTED[optimizer](100.0), rtol=1e-12)
    tx = optimizer(
        *([best.learning_rate] if optimizer is gdx.gradient_descent else [best.learning_rate, best.momentum])
    )
    distances = np.linalg.norm(walk(tx, 400), axis=1)
    # a double root makes k rho^k of the momentum methods' slowest mode
    growth = 1 if optimizer is gdx.gradient_descent else 2
    measured = (distances[399] / distances[199] / growth) ** (1 / 200)
    np.testing.assert_allclose(measured, best.contraction, rtol=2e-4)


@pytest.mark.parametrize("optimizer", PREDICTED)
def test_no_other_rate_or_momentum_contracts_faster(optimizer):
    best = curvature.best_learning_rate(SPECTRUM[0], SPECTRUM[-1], optimizer)
    slowest = mode_roots(optimizer, float(best.learning_rate), float(best.momentum)).max()
    np.testing.assert_allclose(slowest, best.contraction, rtol=1e-6)
    for rate in (0.97, 1.0, 1.03):
        for mu in (0.97, 1.0, 1.03):
            other = mode_roots(optimizer, float(best.learning_rate) * rate, float(best.momentum) * mu).max()
            assert other >= slowest - 1e-6
            assert rate == mu == 1 or optimizer is gdx.gradient_descent or other > slowest + 1e-4


EDGES = {
    "gradient_descent": (gdx.gradient_descent(0.02), 2 / 0.02),
    "sgd": (gdx.sgd(0.02), 2 / 0.02),
    "sgd with momentum": (gdx.sgd(0.02, 0.8), 3.6 / 0.02),
    "sgd with nesterov": (gdx.sgd(0.02, 0.8, nesterov=True), 3.6 / 2.6 / 0.02),
    "momentum": (gdx.momentum(0.02, 0.9), 3.8 / 0.02),
    "momentum 0": (gdx.momentum(0.02, 0.0), 2 / 0.02),
    "nesterov": (gdx.nesterov(0.02, 0.9), 3.8 / 2.8 / 0.02),
}


@pytest.mark.parametrize("name", EDGES)
def test_divergence_exactly_beyond_the_edge(name):
    tx, edge = EDGES[name]
    np.testing.assert_allclose(curvature.stability_edge(tx), edge, rtol=1e-12)
    spectrum = edge * np.array([0.999, 1.0, 1.001])
    points = np.abs(walk(tx, 10_000, spectrum))
    inside, on, beyond = points[-100:].max(axis=0) / points[:100].max(axis=0)
    assert inside < 1e-4 and 0.1 < on < 10 and beyond > 1e4


@pytest.mark.parametrize("b1", [0.0, 0.9])
@pytest.mark.parametrize("nesterov", [False, True])
def test_adam_diverges_beyond_its_edge_of_the_preconditioned_sharpness(b1, nesterov):
    """Where eps is far above the gradients it is all of the scale, so that the preconditioner stands still."""
    rate, eps = 1e-3, 1.0
    tx = gdx.adam(rate, b1=b1, eps=eps, nesterov=nesterov)
    edge = float(curvature.stability_edge(tx))
    np.testing.assert_allclose(edge, 2 * (1 + b1) / (1 - b1) / rate / (1 + 2 * b1 * nesterov), rtol=1e-12)
    spectrum = edge * eps * np.array([0.999, 1.001])
    start = np.full(2, 1e-100)  # gradients far below eps, also after the first steps, which are too large
    points = np.abs(walk(tx, 20_000, spectrum, start))
    inside, beyond = points[-100:].max(axis=0) / points[100:300].max(axis=0)
    assert inside < 1e-4 and beyond > 1e4
    _, state = tx.update(jnp.asarray(spectrum * start), tx.init(jnp.asarray(start)))
    settled = jax.tree.map(lambda x: jnp.full_like(x, 10**6) if x.dtype == jnp.int32 else x, state)
    hessian = curvature.Hessian(bowl, jnp.asarray(start), jnp.asarray(spectrum)[None])
    operator = curvature.adam_preconditioned(hessian, tx, settled)
    found = curvature.spectrum_edges(operator, jax.random.key(0), tolerance=1e-9)
    np.testing.assert_allclose([found.smallest.value, found.largest.value], edge * np.array([0.999, 1.001]), rtol=1e-6)


def network_loss(params, batch):
    inputs, targets = batch
    return 0.5 * jnp.mean(jnp.sum((jnp.tanh(inputs @ params["a"]) @ params["b"] - targets) ** 2, axis=1))


@pytest.mark.parametrize("optimizer", ["gradient_descent", "adam"])
def test_sharpness_rises_to_the_edge_and_stays_there(optimizer):
    """Cohen et al. 2021, figure 1, and 2022, figure 1, on a small network."""
    random = np.random.default_rng(0)
    inputs = random.standard_normal((24, 6))
    batch = jnp.asarray(inputs), jnp.asarray(np.sign(inputs[:, :2] * inputs[:, 2:4]))
    params = {
        "a": jnp.asarray(random.standard_normal((6, 20)) / 6),
        "b": jnp.asarray(random.standard_normal((20, 2)) / 9),
    }
    tx = {"gradient_descent": gdx.gradient_descent(0.25), "adam": gdx.adam(1e-2)}[optimizer]
    edge = float(curvature.stability_edge(tx))
    data = jax.tree.map(lambda x: x[None], batch)
    every = 25

    @jax.jit
    def run(params):
        def segment(carry, _):
            params, state, tracked = carry
            repeated = jax.tree.map(lambda x: jnp.broadcast_to(x, (every, *x.shape)), batch)
            trained = gdx.train(network_loss, tx, params, repeated, state=state)
            operator = curvature.Hessian(network_loss, trained.params, data)
            if optimizer == "adam":
                operator = curvature.adam_preconditioned(operator, tx, trained.state)
            tracked = curvature.update_sharpness(tracked, operator, products=6)
            return (trained.params, trained.state, tracked), (tracked.value, trained.losses[-1])

        carry = params, tx.init(params), curvature.init_sharpness(params, jax.random.key(0))
        return jax.lax.scan(segment, carry, None, 160)[1]

    sharpness, losses = map(np.asarray, run(params))
    assert sharpness[2] < 0.7 * edge
    assert losses[-1] < 0.5 * losses[0]
    late = sharpness[-60:] / edge
    assert 0.9 < np.median(late) < 1.1 and late.max() < 1.5
