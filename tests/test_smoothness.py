"""Metasmoothness: its formula, what is smooth and what is chaotic."""

import jax.numpy as jnp
import numpy as np
import pytest

import gdx
from gdx.compat import enable_x64

START = np.linspace(-1.2, 1.2, 128)


def wells(theta, batch):
    return jnp.sum((theta**2 - 1) ** 2) / 4


def trained(tx):
    return gdx.train(wells, tx, jnp.asarray(START), jnp.zeros(40)).params


def by_hand(rate, momentum):
    theta, velocity = START, 0 * START
    for _ in range(40):
        velocity = momentum * velocity + theta**3 - theta
        theta = theta - rate * velocity
    return theta


def test_is_the_formula_in_float64():
    with enable_x64(True):
        found = gdx.metasmoothness(trained, gdx.sgd(1.2, 0.3), change=0.01)
    for name, smaller in {"learning_rate": (0.01, 0), "momentum": (0, 0.01)}.items():
        first, second, third = (by_hand(1.2 * (1 - i * smaller[0]), 0.3 * (1 - i * smaller[1])) for i in range(3))
        d, other = first - second, second - third
        right = np.sum(np.abs(d) * np.sign(d) * np.sign(other)) / np.sum(np.abs(d))
        assert -1 < right < 0.99
        np.testing.assert_allclose(found.hyperparams[name], right, rtol=1e-6)


def test_tells_smooth_from_chaotic():
    smooth, chaotic = (gdx.metasmoothness(trained, gdx.gradient_descent(rate)) for rate in (0.02, 1.9))
    assert smooth.learning_rate > 0.999
    assert chaotic.learning_rate < 0
    # the neighbours of 0 are below a momentum's largest value, and what is not used is no number
    found = gdx.metasmoothness(lambda tree: {"theta": START * tree["used"], "count": 3}, {"used": 0.0, "unused": 1.0})
    assert found["used"] == 1
    assert np.isnan(found["unused"])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((gdx.sgd(0.1), trained), TypeError, "run is sgd.*; expected a function of an optimizer"),
        ((trained, 3), TypeError, "tx is 3; expected hyperparameters that are floating-point numbers"),
        ((lambda tx: 3, gdx.sgd(0.1)), TypeError, "run returned no floating-point array; expected the trained"),
        ((lambda tx: {"a": "low"}, gdx.sgd(0.1)), TypeError, r"what run returned is 'low' at \['a'\]; expected arrays"),
        (
            (trained, {"a": [jnp.bfloat16(0.1)]}),
            ValueError,
            r"change is 0\.001 for tx at \['a'\]\[0\], in bfloat16, .*; expected at least 0\.031, or that number",
        ),
        ((trained, gdx.sgd(0.1), 0.5), ValueError, r"change is 0\.5; expected a positive number below 0\.5"),
        ((trained, gdx.sgd(0.1), 0.0), ValueError, r"change is 0\.0; expected a positive number"),
    ],
)
def test_refuses(arguments, error, words):
    run, tx, *change = arguments
    with pytest.raises(error, match=f"metasmoothness: {words}"):
        gdx.metasmoothness(run, tx, **({"change": change[0]} if change else {}))
