"""The measured critical batch size, against exact moments of SGD on a noisy quadratic and runs made by hand."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from gdx import noise
from gdx.noise.critical import _found

KEYS = jax.random.split(jax.random.key(1), 12)
SIZES, FACTORS, EXAMPLES, RATE = (1, 2, 4, 8, 16, 32), (0.5, 1.0, 2.0), 512, 2e-3
CURVATURE, START = np.array([1.0, 5.0, 50.0]), 10.0
DRAWN = np.random.default_rng(0).standard_normal((1 << 14, 3))
DATA = jnp.asarray((DRAWN - DRAWN.mean(axis=0)) / DRAWN.std(axis=0), jnp.float32)
TRACED: deque = deque()  # no list, whose content the program would be found by


def bowl(theta, examples):
    TRACED.append(theta)
    return 0.5 * jnp.mean((theta[None] - DATA[examples]) ** 2 @ jnp.asarray(CURVATURE, jnp.float32))


def expected_loss(size, rate, steps):
    """The expected mean loss on the last quarter of the examples, of so many steps: exact, of independent examples."""
    moment, found = np.full(3, START**2), []
    for i in range(EXAMPLES // size):
        found += [0.5 * CURVATURE @ (moment + 1)] * size
        if i < steps:
            moment = (1 - rate * CURVATURE) ** 2 * moment + (rate * CURVATURE) ** 2 / size
    return np.mean(found[-EXAMPLES // 4 :])


def measure(**changes):
    given = {"data": DATA, "batch_sizes": SIZES, "examples": EXAMPLES, "keys": KEYS, **changes}
    loss, tx = given.pop("loss", bowl), given.pop("tx", gdx.sgd(RATE))
    return noise.critical_batch_size(loss, tx, jnp.full(3, START), **given)


def test_a_noisy_quadratic_has_the_critical_batch_size_of_its_exact_moments():
    found = measure()
    each = np.array([[expected_loss(s, f * RATE * s, EXAMPLES // s) for f in FACTORS] for s in SIZES])
    excess = each.min(axis=1) - min(expected_loss(1, f * RATE, EXAMPLES * 7 // 16) for f in FACTORS)
    i = np.argmax(excess > 0)
    critical = SIZES[i - 1] * 2 ** (excess[i - 1] / (excess[i - 1] - excess[i]))
    assert 8 < critical < 10
    assert found.factors.tolist() == [FACTORS[i] for i in each.argmin(axis=1)] == [2, 2, 2, 1, 1, 0.5]
    assert np.all(np.abs(found.excess - excess) < 4 * found.error)
    np.testing.assert_allclose(found.batch_size, critical, rtol=0.1)
    assert found.low <= critical <= found.high
    assert not found.diverged[:4].any()
    traced = len(TRACED)
    again = measure(tx=gdx.sgd(RATE / 2), factors=(1.0, 2.0, 4.0))  # the same rates, in the same program
    np.testing.assert_array_equal(again.losses, found.losses)
    assert len(TRACED) == traced


@pytest.mark.parametrize(("tx", "exponent"), [(gdx.sgd(0.01), 1), (gdx.adamw(0.05, weight_decay=0.1), 0.5)])
def test_a_branch_is_the_run_with_that_batch_size(tx, exponent):
    def counting(theta, count, examples):  # with a state of the model, here of one number
        return bowl(theta, examples), count + 1

    start = lambda key: jax.random.normal(key, 3)  # noqa: E731
    keys, sizes, total = KEYS[:2], (2, 6), 1024
    given = {"examples": 96, "keys": keys, "factors": (1.0,), "tolerance": 100.0, "model_state": jnp.zeros(())}
    found = noise.critical_batch_size(counting, tx, start, total, sizes, **given)
    for row, size in zip(found.losses, sizes):
        scaled = tx.replace(learning_rate=tx.hyperparams["learning_rate"] * (size / 2) ** exponent)
        train = jax.jit(lambda params, batches, tx=scaled: gdx.train(bowl, tx, params, batches).losses)
        for loss, key in zip(row, keys):
            order = noise.epochs(key, total, 2)[: 96 // 2]
            losses = train(start(key), order.reshape(-1, size))
            np.testing.assert_allclose(loss, losses[-24 // size :].mean(), rtol=1e-5)
    assert found.batch_size == 6 and (found.low, found.high) == (6, np.inf)


def losses_of(*means):
    """Of two factors and three seeds, of which the second factor diverged."""
    apart = np.array([-0.1, 0.0, 0.1])  # alike in all branches, so that it does not count
    return np.array([[mean + apart, [np.nan, 0.0, 1.0]] for mean in means])


def found_in(losses, tolerance):
    return _found("noise", np.array([4, 8, 16, 32]), np.array([0.5, 1.0]), losses, tolerance)


def test_what_lies_between_two_sizes_and_what_is_certain():
    found = found_in(losses_of(1.0, 1.1, 1.4, 9.0, 1.25), None)  # the last stopped after half
    np.testing.assert_allclose(found.batch_size, 8 * 2**0.5)
    assert (found.low, found.high) == (8, 16)
    np.testing.assert_allclose(found.excess, [-0.25, -0.15, 0.15, 7.75])
    np.testing.assert_allclose(found.error, 0, atol=1e-12)
    assert found.diverged.tolist() == [[False, True]] * 4 and found.factors.tolist() == [0.5] * 4

    scattered = losses_of(1.0, 1.1, 1.4, 9.0, 1.25)
    scattered[:3, 0] += [[-0.3, 0.3, 0.0], [0.3, -0.3, 0.0], [0.3, -0.3, 0.0]]  # errors of 0.17
    found = found_in(scattered, None)
    assert (found.low, found.high) == (4, 32)
    np.testing.assert_allclose(found.error[:3], 0.3 / 3**0.5)

    # a better rate was found at 8: what is lost is lost to that
    found = found_in(losses_of(1.0, 0.8, 0.9, 0.95), 0.125)
    np.testing.assert_allclose(found.batch_size, 16 * 2**0.5)
    lost = losses_of(1.0, 1.1, 1.4, 9.0, 1.5)
    lost[3] = np.inf
    found = found_in(lost, None)
    assert found.batch_size == 16 and (found.low, found.high) == (16, 32) and np.isnan(found.error[3])


def test_what_has_no_answer_is_said():
    with pytest.raises(
        ValueError, match=r"batches of 4 gained nothing from the second half .*; expected more examples"
    ):
        found_in(losses_of(1.0, 1.1, 1.4, 9.0, 0.9), None)
    lost = losses_of(1.0, 1.1, 1.4, 9.0)
    lost[0] = np.nan
    with pytest.raises(ValueError, match=r"batches of 4 diverged with every factor; expected a lower learning rate"):
        found_in(lost, 0.1)


@pytest.mark.parametrize("fraction", [0.4, 0.8])
def test_what_was_interrupted_shows_nothing(fraction):
    def pressed(done, least, diverged):
        if done >= fraction:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match=r"noise\.critical_batch_size: interrupted after 0\.[48]"):
        measure(progress=pressed, batch_sizes=jnp.array([1, 4]), factors=(1.0,))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loss": lambda theta: 0.0}, TypeError, r"loss is .*expected a function of the parameters and indices"),
        ({"model_state": 0.0}, TypeError, r"loss is .*expected a function of the parameters and the model_state and"),
        ({"tx": optax.sgd(0.1)}, TypeError, r"tx is .*; expected one of gdx's optimizers"),
        ({"tx": gdx.scale_by_adam()}, ValueError, r"tx, scale_by_adam\(\), has no learning_rate; expected a number"),
        ({"tx": gdx.sgd(lambda n: 0.1)}, ValueError, r"has learning_rate=<.*>; expected a number, .*: no schedule"),
        ({"tx": gdx.grid(gdx.sgd, learning_rate=[0.1, 0.2])}, ValueError, r"no batch of optimizers"),
        ({"data": np.zeros(())}, ValueError, r"expected arrays with a leading axis of examples"),
        ({"data": 31}, ValueError, r"batch_sizes has 32, more than the data's 31 examples"),
        ({"batch_sizes": 4}, TypeError, r"batch_sizes is 4; expected at least two batch sizes"),
        ({"batch_sizes": (4, 8.0)}, TypeError, r"batch_sizes\[1\] is 8\.0; expected an integer"),
        ({"batch_sizes": (4,)}, ValueError, r"batch_sizes is \[4\]; expected at least two"),
        ({"batch_sizes": (8, 4)}, ValueError, r"batch_sizes is \[8, 4\]; expected .* ascending"),
        ({"batch_sizes": (4, 6)}, ValueError, r"batch_sizes is \[4, 6\]; expected .* a multiple of the first"),
        ({"batch_sizes": (0, 4)}, ValueError, r"batch_sizes\[0\] is 0; expected an integer >= 1"),
        ({"examples": 500}, ValueError, r"examples is 500; expected a multiple of 32, .* such as 512"),
        ({"examples": 64}, ValueError, r"examples is 64; expected .* at least 128, for 4 steps of the largest"),
        ({"examples": 512.0}, TypeError, r"examples is 512\.0; expected an integer"),
        ({"keys": jax.random.key(0)}, TypeError, r"keys is .*; expected random keys, such as jax\.random\.split"),
        ({"keys": KEYS[:1]}, ValueError, r"there is 1 key; expected at least 2"),
        ({"factors": 2.0}, TypeError, r"factors is 2\.0; expected numbers above 0, ascending"),
        ({"factors": ()}, ValueError, r"factors is \[\]; expected numbers above 0"),
        ({"factors": (1.0, 0.5)}, ValueError, r"factors is \[1\.0, 0\.5\]; expected numbers above 0, ascending"),
        ({"factors": (0.0, 1.0)}, ValueError, r"factors\[0\] is 0\.0; expected a number above 0"),
        ({"tolerance": 0}, ValueError, r"tolerance is 0; expected a number above 0, in units of the loss"),
        ({"tolerance": "1"}, TypeError, r"tolerance is '1'; expected a number above 0"),
        ({"exponent": "linear"}, TypeError, r"exponent is 'linear'; expected a finite number, such as 1"),
        ({"exponent": float("nan")}, ValueError, r"exponent is nan; expected a finite number, such as 1"),
        ({"exponent": float("inf")}, ValueError, r"exponent is inf; expected a finite number, such as 1"),
    ],
)
def test_refuses(changes, error, message):
    with pytest.raises(error, match=rf"(?s)^noise\.critical_batch_size:? .*{message}"):
        measure(**changes)
