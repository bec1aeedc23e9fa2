"""Schedules as values: optax's numbers, bits that do not depend on how a number arrives, and clear refusals."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from gdx.compat import enable_x64
from tests.contract.table import assert_same_bits

CYCLES = [{"init_value": 0.0, "peak_value": 1.0, "warmup_steps": 2, "decay_steps": n} for n in (10, 20)]
WARMUP = {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 10}
DECAY = {"init_value": 0.1, "decay_steps": 25}
PARTS = [gdx.schedule(optax.warmup_constant_schedule, **WARMUP), gdx.schedule(optax.cosine_decay_schedule, **DECAY)]
CASES = [
    (optax.constant_schedule, {"value": 0.3}),
    (optax.linear_schedule, {"init_value": 1.0, "end_value": 0.1, "transition_steps": 30, "transition_begin": 5}),
    (optax.polynomial_schedule, {"init_value": 1.0, "end_value": 0.1, "power": 1.7, "transition_steps": 30}),
    (optax.exponential_decay, {"init_value": 1.0, "transition_steps": 7, "decay_rate": 0.5, "end_value": 0.01}),
    (optax.exponential_decay, {"init_value": 1.0, "transition_steps": 7, "decay_rate": 0.5, "staircase": True}),
    (optax.cosine_decay_schedule, {"init_value": 0.7, "decay_steps": 33, "alpha": 0.1, "exponent": 1.3}),
    (
        optax.warmup_cosine_decay_schedule,
        {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 10, "decay_steps": 40, "end_value": 0.01},
    ),
    (optax.warmup_constant_schedule, {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 10}),
    (
        optax.warmup_exponential_decay_schedule,
        {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 10, "transition_steps": 9, "decay_rate": 0.7},
    ),
    (optax.piecewise_constant_schedule, {"init_value": 1.0, "boundaries_and_scales": {5: 0.1, 20: 0.5}}),
    (
        optax.piecewise_interpolate_schedule,
        {"interpolate_type": "cosine", "init_value": 1.0, "boundaries_and_scales": {5: 0.1, 20: 0.5}},
    ),
    (functools.partial(optax.cosine_onecycle_schedule, 30), {"peak_value": 0.1}),
    (optax.sgdr_schedule, {"cosine_kwargs": CYCLES}),
    (optax.join_schedules, {"schedules": PARTS, "boundaries": [20]}),
]
every = pytest.mark.parametrize(("factory", "arguments"), CASES, ids=range(len(CASES)))
COUNTS = jnp.arange(50)
along = jax.jit(lambda rate, counts: jax.lax.map(rate, counts))


@every
def test_follows_optax(factory, arguments):
    with jax.numpy_dtype_promotion("standard"):
        expected = np.array([factory(**arguments)(count) for count in range(0, 50, 3)])
    found = np.array([gdx.schedule(factory, **arguments)(count) for count in range(0, 50, 3)])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6 * np.max(expected))


@every
def test_same_bits_as_constants_arguments_and_lanes(factory, arguments):
    rate = gdx.schedule(factory, **arguments)
    expected = along(rate, COUNTS)
    assert_same_bits(jax.jit(lambda counts: jax.lax.map(rate, counts))(COUNTS), expected)
    lanes = jax.tree.map(lambda number: jnp.float32(number) * jnp.array([1, 0.9, 0.8], jnp.float32), rate)
    found = jax.jit(lambda lanes, counts: jax.lax.map(lambda t: jax.vmap(lambda rate: rate(t))(lanes), counts))
    assert_same_bits(found(lanes, COUNTS)[:, 0], expected)


@pytest.mark.parametrize("seed", range(10))
def test_same_bits_for_drawn_numbers(seed):
    random = np.random.default_rng(seed)
    a, b, power = random.uniform(0.01, 1.5, 3)
    rate = gdx.schedule(
        optax.polynomial_schedule, init_value=a, end_value=b, power=power, transition_steps=random.integers(1, 60)
    )
    assert_same_bits(jax.jit(lambda counts: jax.lax.map(rate, counts))(COUNTS), along(rate, COUNTS))


@every
def test_is_a_value(factory, arguments):
    rate = gdx.schedule(factory, **arguments)
    again = gdx.schedule(factory, **arguments)
    assert rate == again and hash(rate) == hash(again) and repr(rate) == repr(again)
    assert jax.tree.map(lambda x: x, rate) == rate
    if not isinstance(factory, functools.partial):
        assert pickle.loads(pickle.dumps(rate)) == rate
    halved = jax.tree.map(lambda number: number / 2, rate)
    assert halved != rate and gdx.sgd(halved) != gdx.sgd(rate)


def warmup(**changes):
    arguments = {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 4, "decay_steps": 20, "end_value": 0.01}
    return gdx.schedule(optax.warmup_cosine_decay_schedule, **{**arguments, **changes})


def test_a_change_of_any_number_compiles_nothing_also_where_optax_makes_another_schedule():
    step = jax.jit(lambda tx, count: tx.learning_rate(count))
    tx = gdx.adamw(warmup())
    for changes in ({}, {"peak_value": 0.2}, {"decay_steps": 50}, {"peak_value": 0}, {"warmup_steps": 0}):
        other = tx.replace(**changes)
        for count in (0, 3, 10, 30):
            with jax.numpy_dtype_promotion("standard"):
                expected = optax.warmup_cosine_decay_schedule(**dict(other.learning_rate.numbers))(count)
            np.testing.assert_allclose(step(other, count), expected, rtol=1e-5, atol=1e-8)
    assert step._cache_size() == 1


def test_names_and_replaces_like_hyperparameters():
    tx = gdx.chain(gdx.scale_by_adam(), gdx.scale_by_learning_rate(warmup()))
    assert tx.hyperparams["peak_value"] == 0.1 and "learning_rate" not in tx.hyperparams
    assert list(tx.hyperparams.values()) == jax.tree.leaves(tx)
    assert tx.replace(peak_value=0.2).hyperparams["peak_value"] == 0.2
    assert tx.replace(learning_rate=0.5).hyperparams["learning_rate"] == 0.5
    assert tx.replace(learning_rate=warmup(peak_value=1)).hyperparams["peak_value"] == 1
    two = gdx.adamw(warmup(), schedule_multiplier=warmup(peak_value=1.0))
    with pytest.raises(ValueError, match=r"ambiguous.*learning_rate\.peak_value, schedule_multiplier\.peak_value"):
        two.replace(peak_value=3.0)
    assert two.replace(**{"learning_rate.peak_value": 3.0}).learning_rate.peak_value == 3


@pytest.mark.parametrize("way", [jax.jit, jax.grad, lambda f: lambda x: jax.vmap(f)(jnp.stack([x, x]))[0]])
def test_is_made_inside_a_transformation_too(way):
    def rate(peak):
        return warmup(peak_value=peak)(10)

    expected = warmup()(10) if way is not jax.grad else warmup(peak_value=1.0)(10) - warmup(peak_value=0.0)(10)
    np.testing.assert_allclose(way(rate)(jnp.float32(0.1)), expected, rtol=1e-2)


def test_slopes_in_every_number():
    with enable_x64(True):
        rate = warmup(init_value=0.02)

        def total(numbers):
            return sum(jax.tree.unflatten(jax.tree.structure(rate), list(numbers))(count) for count in (1, 3, 9, 15))

        numbers = jnp.asarray(jax.tree.leaves(rate))
        slopes = jax.jit(jax.grad(total))(numbers)
        for i, number in enumerate(numbers):
            step = 1e-6 * number
            there, back = (total(numbers.at[i].add(sign * step)) for sign in (1, -1))
            np.testing.assert_allclose(slopes[i], (there - back) / (2 * step), rtol=1e-6)


def test_does_not_follow_a_state_without_a_count():
    tx = gdx.sgd(warmup())
    assert tx.init(jnp.ones(2)).count == 0


@pytest.mark.parametrize(
    ("factory", "numbers"),
    [
        (
            optax.warmup_cosine_decay_schedule,
            {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 0, "decay_steps": 9},
        ),
        (
            optax.warmup_cosine_decay_schedule,
            {"init_value": 0.0, "peak_value": 0.0, "warmup_steps": 3, "decay_steps": 9},
        ),
        (optax.linear_schedule, {"init_value": 0.3, "end_value": 0.1, "transition_steps": 0}),
    ],
)
@pytest.mark.parametrize("lanes", [False, True])
def test_a_way_that_is_not_taken_leaves_no_nan_in_slopes(factory, numbers, lanes):
    rate = gdx.schedule(factory, **numbers)

    def total(rate):
        return sum(rate(count) for count in (0, 1, 4, 20))

    value = "peak_value" if "peak_value" in numbers else "init_value"
    with jax.numpy_dtype_promotion("standard"):
        expected = jax.grad(lambda x: sum(factory(**{**numbers, value: x})(c) for c in (0, 1, 4, 20)))(
            numbers[value] or 1e-6
        )
    if lanes:
        batch = jax.tree.map(lambda number: jnp.stack([jnp.float32(number)] * 2), rate)
        slopes = jax.tree.map(lambda x: x[0], jax.jit(jax.vmap(jax.grad(total)))(batch))
    else:
        slopes = jax.jit(jax.grad(total))(jax.tree.map(jnp.float32, rate))
    assert all(map(np.isfinite, jax.tree.leaves(slopes)))
    np.testing.assert_allclose(getattr(slopes, value), expected, rtol=1e-4)


def test_traced_numbers_that_the_factory_refuses_make_nan():
    with pytest.raises(ValueError, match="positive decay_steps"):
        warmup(decay_steps=3)
    at_5 = jax.jit(lambda steps: warmup(decay_steps=steps)(5))
    assert np.isnan(at_5(jnp.float32(3))) and at_5(jnp.float32(20)) == jax.jit(warmup())(5)


def test_numbers_in_trees_have_names():
    tx = gdx.sgd(
        gdx.schedule(optax.piecewise_constant_schedule, init_value=1.0, boundaries_and_scales={5: 0.5, 9: 0.1})
    )
    assert dict(tx.hyperparams) == {"init_value": 1.0, "boundaries_and_scales.5": 0.5, "boundaries_and_scales.9": 0.1}
    changed = tx.replace(**{"boundaries_and_scales.5": 0.2})
    assert changed.hyperparams["boundaries_and_scales.5"] == 0.2 and changed.hyperparams["init_value"] == 1
    assert gdx.labels(gdx.stack([tx, changed])) == [{"boundaries_and_scales.5": 0.5}, {"boundaries_and_scales.5": 0.2}]
    tx = gdx.sgd(gdx.schedule(optax.sgdr_schedule, cosine_kwargs=CYCLES))
    assert tx.replace(**{"cosine_kwargs.1.peak_value": 9.0}).hyperparams["cosine_kwargs.1.peak_value"] == 9


def test_changes_are_made_before_they_are_checked():
    shorter = {"warmup_steps": 1, "decay_steps": 3}
    longer = {"warmup_steps": 30, "decay_steps": 50}
    for changes in (shorter, longer, dict(reversed(longer.items()))):
        tx = gdx.sgd(warmup()).replace(**changes)
        assert {name: tx.hyperparams[name] for name in changes} == changes
    with pytest.raises(ValueError, match=r"sgd\.replace: learning_rate becomes 0\.1, which has no peak_value"):
        gdx.sgd(warmup()).replace(learning_rate=0.1, peak_value=0.2)
    assert gdx.sgd(warmup()).replace(learning_rate=warmup(), peak_value=0.2).hyperparams["peak_value"] == 0.2


def test_schedules_within_a_schedule():
    parts = [warmup(), gdx.schedule(optax.constant_schedule, value=0.5)]
    rate = gdx.schedule(optax.join_schedules, schedules=parts, boundaries=[5])
    with jax.numpy_dtype_promotion("standard"):
        expected = optax.join_schedules([optax.warmup_cosine_decay_schedule(0.0, 0.1, 4, 20, 0.01), lambda _: 0.5], [5])
        for count in (0, 3, 4, 5, 20):
            np.testing.assert_allclose(jax.jit(lambda rate, t: rate(t))(rate, count), expected(count), rtol=1e-6)
    tx = gdx.sgd(rate)
    assert tx.hyperparams["schedules.0.peak_value"] == 0.1
    assert tx.replace(**{"schedules.1.value": 0.25}).learning_rate(9) == 0.25


def test_many_comparisons_of_constants_are_one_way():
    rate = gdx.schedule(optax.sgdr_schedule, cosine_kwargs=CYCLES * 4)
    with jax.numpy_dtype_promotion("standard"):
        expected = optax.sgdr_schedule(CYCLES * 4)(25)
    np.testing.assert_allclose(jax.jit(rate)(25), expected, rtol=1e-6)


def test_a_partial_is_a_value_and_its_numbers_stay_constants():
    def make(steps=30):
        return gdx.schedule(functools.partial(optax.cosine_onecycle_schedule, steps), peak_value=0.1)

    assert make() == make() and hash(make()) == hash(make()) and pickle.loads(pickle.dumps(make())) == make()
    assert make() != make(40) and make().replace(transition_steps=40) == make(40)
    assert repr(make()) == "schedule(partial(cosine_onecycle_schedule, transition_steps=30), peak_value=0.1)"
    assert len(jax.tree.leaves(make())) == 1 and gdx.labels(gdx.stack([gdx.sgd(make()), gdx.sgd(make())])) == [{}, {}]


def test_the_order_of_the_keywords_does_not_matter():
    one = gdx.schedule(optax.linear_schedule, init_value=1.0, end_value=0.0, transition_steps=10)
    other = gdx.schedule(optax.linear_schedule, transition_steps=10, end_value=0.0, init_value=1.0)
    assert one == other and jax.tree.structure(one) == jax.tree.structure(other)


def test_many_counts_at_once():
    rate = gdx.schedule(optax.linear_schedule, init_value=1.0, end_value=0.0, transition_steps=10)
    for call in (rate, jax.jit(rate), jax.jit(lambda t, rate=rate: jax.tree.map(jnp.float32, rate)(t))):
        np.testing.assert_allclose(call(jnp.arange(3)), [1.0, 0.9, 0.8], rtol=1e-6)


class Ramp:
    def __init__(self, peak):
        self.peak = peak

    def __call__(self, count):
        return self.peak * count


def recursive(peak):
    def ramp(count, again=True):
        return ramp(count, again=False) if again else peak * count

    return ramp


@pytest.mark.parametrize(
    "factory",
    [
        lambda peak: functools.partial(lambda peak, count: peak * count, peak),
        lambda peak: lambda count, peak=peak: peak * count,
        lambda peak: lambda count, *, peak=peak: jnp.multiply(peak, count),
        Ramp,
        lambda peak: Ramp(peak).__call__,
        recursive,
        lambda peak: Ramp(abs(-peak)),
    ],
)
def test_factories_of_any_kind(factory):
    rate = gdx.schedule(factory, peak=0.5)
    for call in (lambda rate: rate(3), jax.jit(lambda rate: rate(3))):
        np.testing.assert_allclose(call(rate), 1.5, rtol=1e-6)


REFUSED = {
    "no function": (lambda: gdx.schedule(0.1), TypeError, r"schedule: got 0\.1; expected a function such as optax"),
    "unknown argument": (
        lambda: gdx.schedule(optax.cosine_decay_schedule, init_value=1.0, steps=3),
        TypeError,
        r"cosine_decay_schedule: missing a required argument: 'decay_steps'; it takes init_value, decay_steps",
    ),
    "not finite": (
        lambda: gdx.schedule(optax.constant_schedule, value=float("nan")),
        ValueError,
        r"schedule: constant_schedule: value is nan; expected a finite number",
    ),
    "text in a tree": (
        lambda: gdx.schedule(optax.sgdr_schedule, cosine_kwargs=[{"peak_value": "a"}]),
        TypeError,
        r"cosine_kwargs is 'a'; expected a finite number",
    ),
    "optax refuses": (
        lambda: gdx.schedule(optax.cosine_decay_schedule, init_value=1.0, decay_steps=-3),
        ValueError,
        r"positive decay_steps, got decay_steps=-3\.0",
    ),
    "a function in a tree": (
        lambda: gdx.schedule(optax.join_schedules, schedules=[optax.constant_schedule(1.0)], boundaries=[]),
        TypeError,
        r"join_schedules: schedules has <constant_schedule.lambda> in it; expected numbers, or schedules",
    ),
    "a function of a number": (
        lambda: gdx.schedule(lambda peak: lambda count, log=jnp.log(peak): log, peak=0.5),  # noqa: B008
        TypeError,
        r"<lambda> computes with its numbers by more than operators while it makes the schedule; do it in the function",
    ),
    "an integer is needed": (
        lambda: gdx.schedule(optax.linear_onecycle_schedule, transition_steps=9, peak_value=0.1),
        TypeError,
        r"needs this number while it makes the schedule; give it as a constant.*functools\.partial",
    ),
    "no schedule": (lambda: gdx.schedule(float, x=1.0), TypeError, r"schedule: float: .*it takes"),
    "returns a number": (
        lambda: gdx.schedule(lambda x: x, x=1.0),
        TypeError,
        r"returned .*1\.0.*; expected a function of the step count",
    ),
    "no such number": (lambda: warmup().replace(peak=3), TypeError, r"unexpected keyword argument 'peak'"),
    "assignment": (lambda: setattr(warmup(), "peak_value", 3), AttributeError, r"use replace\(peak_value=\.\.\.\)"),
    "too many ways": (
        lambda: jax.jit(lambda rate: rate(3))(gdx.schedule(optax.sgdr_schedule, cosine_kwargs=CYCLES * 4)),
        TypeError,
        r"sgdr_schedule compares traced numbers in more than 64 ways; give some of cosine_kwargs as constants",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    make, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        make()
