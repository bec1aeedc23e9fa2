"""chain, lift and Composed."""

import jax
import jax.numpy as jnp
import optax
import pytest

import gdx
from tests.contract.table import assert_same_bits


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


def clip_and(tx):
    return optax.chain(optax.clip_by_global_norm(1.0), tx)


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


def test_chain_with_a_scheduled_link_counts_for_it():
    tx = gdx.chain(gdx.scale_by_momentum(0.5), gdx.scale_by_learning_rate(lambda count: 0.1))
    params, state = run(tx)
    assert_same_bits(params, run(gdx.sgd(0.1, momentum=0.5))[0])
    assert state[1].count == 5


@pytest.mark.parametrize("links", [(), (1.0,), (gdx.sgd(0.1), gdx.sgd)])
def test_chain_refuses_what_is_no_transform(links):
    with pytest.raises((TypeError, ValueError), match=r"chain: .*expected"):
        gdx.chain(*links)


def test_lift_keeps_hyperparameters_as_leaves():
    tx = gdx.lift((gdx.adam(0.1),), clip_and)
    assert tx.hyperparams["learning_rate"] == 0.1
    assert_same_bits(run(tx), run(clip_and(gdx.adam(0.1))))
    assert tx == gdx.lift((gdx.adam(0.1),), clip_and)
    compiled = jax.jit(lambda tx: tx.update(jnp.ones(3), tx.init(jnp.ones(3)))[0])
    for learning_rate in (0.1, 0.2):
        compiled(tx.replace(learning_rate=learning_rate))
    assert compiled._cache_size() == 1


@pytest.mark.parametrize("arguments", [(gdx.sgd(0.1), clip_and), ((0.1,), clip_and), ((gdx.sgd(0.1),), 3)])
def test_lift_refuses_what_is_no_transform(arguments):
    with pytest.raises(TypeError, match=r"lift: (transforms|wrap).* is .*; expected a"):
        gdx.lift(*arguments)


def test_lift_takes_multi_steps_and_several_transforms():
    def every_second(tx):
        return optax.MultiSteps(tx, 2)

    def by_name(a, b):
        return optax.partition({"a": a, "b": b}, {"w": "a", "b": "b"})

    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides by its integer count
        assert_same_bits(run(gdx.lift((gdx.sgd(0.1),), every_second)), run(optax.MultiSteps(gdx.sgd(0.1), 2)))
    both = gdx.lift((gdx.sgd(0.1), gdx.adam(0.2)), by_name)
    assert_same_bits(run(both), run(by_name(gdx.sgd(0.1), gdx.adam(0.2))))
    assert list(both.hyperparams)[:2] == ["sgd.learning_rate", "adam.learning_rate"]


def test_a_foreign_state_is_refused():
    tx = gdx.adamw(0.1)
    params = jnp.ones(2)
    for state in (tx.init(params)[:2], list(tx.init(params)), {}, None, gdx.sgd(lambda count: 0.1).init(params)):
        with pytest.raises(TypeError, match=r"adamw: the state is .*expected a tuple of 3.*init"):
            tx.update(params, state, params)
