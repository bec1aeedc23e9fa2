"""The states that a derivative stores, the steps that it makes again, and the slopes that come of it."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdx
from gdx.compat import enable_x64
from gdx.rematerialising import plan
from tests.contract.table import assert_same_bits


@functools.cache
def fewest(steps, states):
    """The fewest steps ahead, by trying every place for the next state."""
    if steps == 1:
        return 0
    if states == 1:
        return steps * (steps - 1) // 2
    return min(m + fewest(m, states) + fewest(steps - m, states - 1) for m in range(1, steps))


def steps_ahead(steps, states):
    """How many the plan makes, followed by hand: each state is where it is looked for."""
    rows, back, stretches = plan(steps, states)
    stored, made = {int(row): step for step, row in enumerate(rows) if row < states}, steps
    for step in reversed(range(steps)):
        top, first, last = back[step]
        at = stored[int(top)]
        for begin, end, row in stretches[first:last]:
            assert at == begin < end
            at, made = int(end), made + int(end - begin)
            if row < states:
                stored[int(row)] = at
        assert at == step
    return made


def test_no_plan_makes_fewer_steps():
    for steps, states in itertools.product(range(1, 41), range(1, 7)):
        if states <= steps:
            least = fewest(steps, states)
            times = next(r for r in itertools.count() if math.comb(states + r, states) >= steps)
            assert least == (times * steps - math.comb(states + times, times - 1) if times else 0)
            assert least <= steps_ahead(steps, states) <= least + times + 1
    assert steps_ahead(10_000, 30) == 34_020


def loss(params, batch):
    x, key = batch
    noise = jax.random.uniform(key, (), x.dtype)
    return jnp.sum((jnp.tanh(params["w"] * x) - noise * params["b"]) ** 2), params["w"][:2]


STEPS, STATES = 23, 3
KEYS = jax.random.split(jax.random.key(0), STEPS)


def outcome(remat, tx, start, x):
    trained = gdx.train(loss, tx, start, (x, KEYS), remat=remat)
    return jnp.sum(trained.losses**2) + jnp.sum(trained.aux[3]) + trained.params["w"][0], trained


def test_slopes_of_all_that_a_run_is_made_of():
    with enable_x64(True):
        x = jnp.linspace(0.1, 1, STEPS * 3).reshape(STEPS, 3)
        start = {"w": jnp.ones(3), "b": jnp.array(0.5)}

        def slopes(remat):
            run = jax.jit(functools.partial(outcome, remat))  # in a program of its own, of which the slopes are
            return jax.jit(jax.value_and_grad(run, (0, 1, 2), has_aux=True))(gdx.adam(0.05), start, x)

        ((_, trained), found), ((_, same), right) = slopes(STATES), slopes(False)
        assert_same_bits(tuple(trained), tuple(same))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)
        h = 1e-5  # an oracle that knows nothing of derivatives, in a number that all the steps see
        ahead, behind = (outcome(False, gdx.adam(0.05 + k * h), start, x)[0] for k in (1, -1))
        np.testing.assert_allclose(found[0].learning_rate, (ahead - behind) / (2 * h), rtol=1e-6)


def test_a_population_and_second_derivatives():
    def bowl(theta, batch):
        return jnp.sum(theta**2)

    def last(remat, rate):
        return gdx.train(bowl, gdx.gradient_descent(rate), jnp.ones(2), jnp.zeros(9), remat=remat).losses[-1]

    rates = jnp.array([0.1, 0.3])
    first, second = jax.jit(jax.vmap(lambda rate: (jax.grad(functools.partial(last, 3))(rate),
                                                   jax.hessian(functools.partial(last, 3))(rate))))(rates)  # fmt: skip
    shrunk = 1 - 2 * np.array([0.1, 0.3])  # the loss before the last step is 2 (1 - 2 rate)^16
    np.testing.assert_allclose(first, -64 * shrunk**15, rtol=1e-5)
    np.testing.assert_allclose(second, 1920 * shrunk**14, rtol=1e-5)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(functools.partial(last, 3), (0.1,), (1.0,))


def test_the_steps_that_are_made_are_those_of_the_plan():
    made = []

    def counted(theta, batch):
        jax.debug.callback(lambda: made.append(1))
        return jnp.sum(theta**2)

    jax.jit(jax.grad(lambda tx: gdx.train(counted, tx, jnp.ones(2), jnp.zeros(40), remat=5).losses[-1]))(gdx.sgd(0.1))
    jax.effects_barrier()
    assert len(made) == steps_ahead(40, 5) + 40


def test_steps_that_are_made_again_are_no_progress():
    told = []
    run = functools.partial(gdx.train, lambda p, b: jnp.sum((p - b) ** 2), batches=jnp.zeros((6, 2)), remat=2)
    final = lambda tx: run(tx=tx, params=jnp.ones(2), progress=lambda done, *_: told.append(done)).losses[-1]  # noqa: E731
    jax.block_until_ready(jax.grad(final)(gdx.sgd(0.1)))
    jax.effects_barrier()
    assert told == pytest.approx(np.arange(1, 7) / 6)
