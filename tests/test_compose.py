"""chain: the result does not depend on how it is put together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from tests.contract.table import assert_same_bits

DTYPES = ("float32", "bfloat16", "float16")
RATE, DECAY = 0.035, 1e-3  # RATE * (1 + DECAY) is not what RATE is in bfloat16


def run(tx, steps=5):
    params = {"w": jnp.arange(1.0, 4.0), "b": jnp.ones(())}
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def test_chain_is_optax_chain():
    links = (gdx.scale_by_adam(), gdx.add_decoupled_weight_decay(0.1), gdx.scale_by_learning_rate(0.1))
    assert_same_bits(run(gdx.chain(*links)), run(optax.chain(*links)))
    assert_same_bits(run(gdx.chain(*links)), run(gdx.adamw(0.1, weight_decay=0.1)))


def test_chain_takes_optax_links_and_extra_args():
    seen = []

    def record(updates, state, params=None, *, value=None, **extra_args):
        seen.append(value)
        return updates, state

    recorder = optax.GradientTransformationExtraArgs(lambda params: (), record)
    tx = gdx.chain(optax.clip(1.0), recorder, gdx.sgd(0.1))
    tx.update(jnp.ones(2), tx.init(jnp.ones(2)), value=7)
    assert seen == [7]
    assert_same_bits(run(gdx.chain(optax.clip(0.5), gdx.sgd(0.1))), run(optax.chain(optax.clip(0.5), gdx.sgd(0.1))))


class learning_rate_of_mine(gdx.scale_by_learning_rate):
    """A link that is subclassed."""


class passes(gdx.Transform):
    """A link of one's own that changes nothing."""

    def init_tree(self, params):
        return optax.EmptyState()

    def update_tree(self, updates, state, params=None, **extra_args):
        return updates, state


ADAM, DECAYS = gdx.scale_by_adam(), gdx.add_decoupled_weight_decay(DECAY)
DESCENT, ROUNDS = gdx.scale_by_learning_rate(RATE), gdx.round_stochastically(0)
LINKS = (ADAM, DECAYS, DESCENT, ROUNDS)
SCHEDULED = gdx.scale_by_learning_rate(lambda count: RATE)
# the same optimizer, put together in other ways
WAYS = {
    "a schedule": gdx.chain(ADAM, DECAYS, SCHEDULED, ROUNDS),
    "a schedule that is a value": gdx.chain(
        ADAM, DECAYS, gdx.scale_by_learning_rate(gdx.schedules.constant_schedule(RATE)), ROUNDS
    ),
    "a scheduled decay": gdx.chain(ADAM, gdx.add_decoupled_weight_decay(lambda count: DECAY), DESCENT, ROUNDS),
    "nested at the front": gdx.chain(gdx.chain(ADAM, DECAYS), DESCENT, ROUNDS),
    "nested at the back": gdx.chain(ADAM, gdx.chain(DECAYS, gdx.chain(SCHEDULED, ROUNDS))),
    "a call": gdx.chain(gdx.adamw(RATE, weight_decay=DECAY), ROUNDS),
    "a scheduled call": gdx.chain(gdx.adamw(lambda count: RATE, weight_decay=DECAY), ROUNDS),
    "clipping in front": gdx.chain(optax.clip_by_global_norm(1e9), *LINKS),
    "clipping as a value": gdx.chain(gdx.value(optax.clip_by_global_norm)(1e9), *LINKS),
    "a foreign link in the middle": gdx.chain(ADAM, DECAYS, optax.identity(), DESCENT, ROUNDS),
    "a foreign link before decay": gdx.chain(ADAM, optax.identity(), DECAYS, passes(), DESCENT, ROUNDS),
    "a foreign link at the end": gdx.chain(*LINKS, optax.identity()),
    "a link subclassed": gdx.chain(ADAM, DECAYS, learning_rate_of_mine(RATE), ROUNDS),
    "in a wrapper of optax's": gdx.value(optax.with_extra_args_support)(gdx.chain(*LINKS)),
}


def trained(tx, param_dtype, gradient_dtype, closed_over):
    """Parameters after 20 steps in one program, in which the gradients are arguments."""
    random = np.random.default_rng(0)
    shapes = {"w": (5, 9), "s": ()}
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape).astype("f4"))  # noqa: E731
    params = {name: draw(*shape).astype(param_dtype) for name, shape in shapes.items()}
    gs = {name: draw(20, *shape).astype(gradient_dtype) for name, shape in shapes.items()}

    def scan(tx, params, gs):
        def step(carry, g):
            params, state = carry
            updates, state = tx.update(g, state, params)
            with jax.numpy_dtype_promotion("standard"):
                return (optax.apply_updates(params, updates), state), updates

        return jax.lax.scan(step, (params, tx.init(params)), gs)

    if closed_over:
        (params, _), updates = jax.jit(lambda params, gs: scan(tx, params, gs))(params, gs)
    else:
        (params, _), updates = jax.jit(scan)(tx, params, gs)
    return params, updates


@pytest.mark.parametrize("gradient_dtype", DTYPES)
@pytest.mark.parametrize("param_dtype", DTYPES)
def test_the_result_does_not_depend_on_how_it_is_put_together(param_dtype, gradient_dtype):
    expected = trained(gdx.chain(*LINKS), param_dtype, gradient_dtype, closed_over=True)
    assert_same_bits(trained(gdx.chain(*LINKS), param_dtype, gradient_dtype, closed_over=False), expected)
    different = []
    for way, tx in WAYS.items():
        for closed_over in (True, False):
            try:
                assert_same_bits(trained(tx, param_dtype, gradient_dtype, closed_over), expected)
            except AssertionError as error:
                different.append(f"{way}, closed_over={closed_over}: {error}")
    assert not different, "\n".join(different)


@pytest.mark.parametrize(
    "link", [gdx.scale_by_adam, gdx.scale_by_momentum, gdx.add_decoupled_weight_decay, gdx.scale_by_learning_rate]
)
def test_a_rate_in_front_of_any_link_is_no_part_of_its_numbers(link):
    """Of two factors that are constants a compiler makes one, whose product is rounded another way."""
    for rate, number in np.random.default_rng(0).uniform(0.01, 0.99, (6, 2)):
        tx = gdx.chain(gdx.scale_by_learning_rate(rate), link(number))
        assert_same_bits(*(trained(tx, "float32", "float32", closed_over) for closed_over in (True, False)))


@pytest.mark.parametrize("gradient_dtype", DTYPES)
def test_a_small_decay_counts_in_any_of_them(gradient_dtype):
    """In bfloat16 a thousandth of the parameter would vanish beside the direction."""
    params = {"w": jnp.full(2**20, 1.0, jnp.bfloat16)}  # so many that what they are rounded by is 1e-6 on average
    g = jax.tree.map(lambda p: jnp.ones(p.shape, gradient_dtype), params)
    for tx in (gdx.chain(*LINKS), *WAYS.values()):
        updates, _ = tx.update(g, tx.init(params), params)
        assert abs(float(jnp.mean(updates["w"])) + RATE * (1 + DECAY)) < RATE * DECAY / 2


def test_a_chain_with_a_scheduled_link_counts_for_it():
    tx = gdx.chain(gdx.scale_by_momentum(0.5), gdx.scale_by_learning_rate(lambda count: 0.1))
    params, state = run(tx)
    assert_same_bits(params, run(gdx.sgd(0.1, momentum=0.5))[0])
    assert state[1] == optax.ScaleByScheduleState(5)


def test_a_foreign_state_keeps_its_dtype():
    """Updates are at least float32 inside, which would make optax's velocity so, and compile a second time."""
    tx = gdx.chain(optax.trace(0.9), gdx.scale_by_learning_rate(0.1))
    params = jnp.ones(3, jnp.bfloat16)
    state = tx.init(params)
    _, after = tx.update(params, state, params)
    assert after[0].trace.dtype == state[0].trace.dtype == jnp.bfloat16


@pytest.mark.parametrize("links", [(), (1.0,), (gdx.sgd(0.1), gdx.sgd)])
def test_chain_refuses_what_is_no_transform(links):
    with pytest.raises((TypeError, ValueError), match=r"chain: .*expected"):
        gdx.chain(*links)


def test_a_chain_takes_no_keywords():
    with pytest.raises(TypeError, match=r"chain: got transforms by keyword; .*tx\.replace\(learning_rate=0\.1\)"):
        dataclasses.replace(gdx.chain(gdx.sgd(0.1)))


def test_groups_take_no_keywords():
    with pytest.raises(
        TypeError, match=r"groups: got patterns, settings by keyword; .*tx\.replace\(learning_rate=0\.1\)"
    ):
        dataclasses.replace(gdx.groups(gdx.sgd(0.1), {"b": {"learning_rate": 1.0}}))


def test_a_foreign_state_is_refused():
    tx = gdx.adamw(0.1)
    params = jnp.ones(2)
    for state in (tx.init(params)[:2], list(tx.init(params)), {}, None, gdx.sgd(lambda count: 0.1).init(params)):
        with pytest.raises(TypeError, match=r"adamw: the state is .*expected a tuple of 3.*init"):
            tx.update(params, state, params)
