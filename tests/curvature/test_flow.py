"""Central flows against what is known in closed form, and against the optimizers that they are to predict."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from benchmarks import flows
from gdx.compat import enable_x64
from gdx.curvature import GaussNewton, Hessian, central_flow

RATE = 0.2
ONE = jnp.zeros(1)
rmsprop = gdx.value(optax.rmsprop)


def held(params, batch):
    """A valley across x, of curvature C + sum_m y_m A_m, which steepens down the way along y."""
    x, y = params["x"], params["y"]
    return 0.5 * x @ (batch[0] + jnp.tensordot(y, batch[1], 1)) @ x - batch[2] @ y


def test_two_walls_hold_it_up():
    """Where y stands still, <A_m, X> = 2 mu_m: three equations for the whole covariance, at two equal eigenvalues."""
    sigma = np.array([[0.5, 0.2], [0.2, 0.3]])
    moves = np.array([[[1, 0], [0, 0]], [[0, 0], [0, 1]], [[0, 1], [1, 0]]], float)
    slopes = 0.5 * np.einsum("mij,ij->m", moves, sigma)
    with enable_x64(True):
        batches = (jnp.asarray(np.diag([9.0, 8.5])), jnp.asarray(moves), jnp.asarray(slopes))
        start = {"x": jnp.array([0.1, -0.1]), "y": jnp.zeros(3)}
        hessian = Hessian(held, start, jax.tree.map(lambda x: x[None], batches))
        flow = central_flow(hessian, gdx.gradient_descent(RATE), 120, count=3)
        np.testing.assert_allclose(flow.sharpness[-1, :2], 2 / RATE, rtol=1e-6)
        np.testing.assert_allclose(flow.params["y"], [1, 1.5, 0], atol=1e-5)
        np.testing.assert_allclose(flow.variance[-1], np.trace(sigma), rtol=1e-5)
        np.testing.assert_allclose(flow.losses[-1] - flow.center_losses[-1], np.trace(sigma) / RATE, rtol=1e-5)
        # until the edge it is gradient flow, along y with a constant speed
        np.testing.assert_array_equal(flow.variance[:12], 0)
        np.testing.assert_array_equal(flow.losses[:12], flow.center_losses[:12])


def by_hand(scale, theta, nu, steps, parts, rate, decay):
    """RMSProp's flow for L = s x^2 (1 + y^2) / 2 + (y - 2)^2 / 2 at x = 0, in many small steps."""
    found = []
    (y,), nu = theta, np.array(nu, float)
    for i in range(steps * parts):
        p, curvature, slope = np.sqrt(nu) / rate, scale * (1 + y * y), y - 2
        c = (1 - decay) / decay
        # with <u, P u> = 1, of the edge 2 - u H u: what is lost to it in unit time, and what X gives back
        lost = 2 * scale * y * (-slope / p[1]) / p[0] + (curvature / p[0]) * c * nu[0] / (2 * nu[0])
        gives = (2 * scale * y / p[0]) * (scale * y / p[0]) / p[1] + (curvature / p[0]) * c * 4 * p[0] / (2 * nu[0])
        x = max(0.0, (lost - (2 - curvature / p[0]) * parts) / gives)
        if i % parts == 0:
            found.append((curvature / p[0] / rate, x / p[0]))
        y -= (slope + x * scale * y / p[0]) / p[1] / parts
        nu += c * (np.array([4 * p[0] * x, slope**2]) - nu) / parts
    return np.array(found).T


def test_rmsprop_by_hand():
    with enable_x64(True):
        tx = rmsprop(0.02, decay=0.95, eps=1e-12)
        start, nu = jnp.array([0.0, 0.5]), np.array([0.01, 2.25])
        state = jax.tree.map(lambda _: jnp.asarray([0.01 / 0.95, 2.25]), tx.init(start))  # that its first step makes nu

        def loss(p, s):
            return 0.5 * s * p[0] ** 2 * (1 + p[1] ** 2) + 0.5 * (p[1] - 2) ** 2

        flow = central_flow(Hessian(loss, start, jnp.array([3.0])), tx, 60, state=state, count=1)
        sharpness, variance = by_hand(3.0, start[1:], nu, 60, 200, 0.02, 0.95)
        assert variance[0] == 0 and variance[-1] > 0
        np.testing.assert_allclose(flow.sharpness[5:, 0], sharpness[5:], rtol=0.03)
        np.testing.assert_allclose(flow.variance[-20:], variance[-20:], rtol=0.06)


def test_below_the_edge_it_is_the_optimizer():
    """In float32, of many parameters; Adam without momentum is RMSProp with bias correction."""
    targets = jnp.linspace(-1.0, 1.0, 40)
    start = jnp.zeros(40)

    def loss(p, batch):
        return jnp.mean((jnp.tanh(p) - batch) ** 2)

    hessian = Hessian(loss, start, targets[None])
    for tx in (gdx.sgd(0.5), gdx.adam(1e-4, b1=0.0, b2=0.9), rmsprop(1e-4, eps_in_sqrt=False, bias_correction=True)):
        run = gdx.train(lambda p, _: loss(p, targets), tx, start, jnp.zeros(20))
        flow = central_flow(hessian, tx, 20, count=2)
        np.testing.assert_array_equal(flow.variance, 0)
        np.testing.assert_array_equal(flow.losses, flow.center_losses)
        np.testing.assert_allclose(flow.losses, run.losses, rtol=5e-3)


def test_a_count_of_32_bits_in_float64_and_no_momentum():
    with enable_x64(True):
        hessian = Hessian(lambda p, batch: jnp.sum(p**4), jnp.ones(2), jnp.zeros(1))
        flow = central_flow(hessian, gdx.adam(0.01, b1=0.0), 3, count=1)
        assert flow.losses.dtype == np.float64 and np.all(np.isfinite(flow.losses))
        flows = [central_flow(hessian, tx, 3, count=1) for tx in (gdx.sgd(0.01), gdx.sgd(0.01, momentum=0.0))]
        np.testing.assert_array_equal(flows[0].losses, flows[1].losses)


HESSIAN = Hessian(lambda p, batch: jnp.sum(p**4), jnp.ones(2), ONE)


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, r"tx is momentum\(.*without momentum", (HESSIAN, gdx.momentum(0.1), 5)),
        (TypeError, "without momentum", (HESSIAN, gdx.adam(0.1), 5)),
        (TypeError, "without momentum", (HESSIAN, rmsprop(0.1, momentum=0.9), 5)),
        (TypeError, "as values: .*call it", (HESSIAN, gdx.gradient_descent, 5)),
        (TypeError, "replace its schedules", (HESSIAN, gdx.sgd(optax.constant_schedule(0.1)), 5)),
        (ValueError, r"tx\.learning_rate is 0\.0; expected a positive", (HESSIAN, gdx.sgd(0.0), 5)),
        (ValueError, "steps is 0", (HESSIAN, gdx.sgd(0.1), 0)),
        (TypeError, "hessian is .*GaussNewton", (GaussNewton(jnp.add, jnp.add, jnp.ones(2), ONE), gdx.sgd(0.1), 5)),
        (TypeError, "complex parameters", (Hessian(lambda p, b: p, jnp.ones(2, "complex64"), ONE), gdx.sgd(0.1), 5)),
        (ValueError, "expected a scalar", (Hessian(lambda p, batch: p, jnp.ones(2), ONE), gdx.sgd(0.1), 5)),
    ],
)
def test_what_cannot_be_followed(error, words, arguments):
    with pytest.raises(error, match=f"{words}"):
        central_flow(*arguments)


def test_the_state_of_another_optimizer():
    with pytest.raises(TypeError, match="the state is"):
        central_flow(HESSIAN, rmsprop(0.1), 5, state=gdx.sgd(0.1).init(jnp.ones(2)))
    with pytest.raises(ValueError, match="count is 0"):
        central_flow(HESSIAN, gdx.sgd(0.1), 5, count=0)


def test_what_gradient_descent_does_on_a_network():
    """Loss and sharpness beyond the edge, in the mean over 300 steps: without oscillations it would be far lower."""

    def trained(tx, params, steps):
        return gdx.train(lambda p, _: flows.squared_error(p, data), tx, params, jnp.zeros(steps))

    tx = gdx.gradient_descent(0.7)
    with jax.numpy_rank_promotion("allow"):
        start, data = flows.tanh_digits()
        start = trained(tx, start, 300).params
        measured = trained(tx, start, 300).losses
        small = trained(tx.replace(learning_rate=0.07), start, 3000).losses
        hessian = Hessian(flows.squared_error, start, jax.tree.map(lambda x: x[None], data))
        flow = central_flow(hessian, tx, 300, count=2)
    means = [float(jnp.mean(x)) for x in (measured, small, flow.losses, flow.center_losses)]
    assert means[1] < 0.85 * means[0]
    np.testing.assert_allclose(means[2], means[0], rtol=0.02)
    assert means[3] < 0.9 * means[0]
    np.testing.assert_allclose(flow.sharpness[-100:, 0], 2 / 0.7, rtol=0.01)
