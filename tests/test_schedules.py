"""Schedules as values: optax's values, bits that do not depend on how a number arrives, slopes, and refusals."""

import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from gdx import schedules
from gdx.compat import enable_x64
from tests.contract.table import assert_same_bits

# edges that optax logs
pytestmark = pytest.mark.filterwarnings("ignore:.*, as in optax:UserWarning")


def root(count):
    return (1 + count) ** 0.5


WARMUP = {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 10}
# each name with settings, edges among them; the first is the usual case
CASES = {
    "constant_schedule": [{"value": 0.3}],
    "linear_schedule": [
        {"init_value": 1.0, "end_value": 0.1, "transition_steps": 30, "transition_begin": 5},
        {"init_value": 0.3, "end_value": 0.1, "transition_steps": 0},
        {"init_value": 0.3, "end_value": 0.1, "transition_steps": 9, "transition_begin": -3},
    ],
    "polynomial_schedule": [
        {"init_value": 1.0, "end_value": 0.1, "power": 1.7, "transition_steps": 30},
        {"init_value": 1.0, "end_value": 0.1, "power": 3.0, "transition_steps": 30},
        {"init_value": 1.0, "end_value": 0.1, "power": 0.5, "transition_steps": 30, "transition_begin": 4},
        {"init_value": 1.0, "end_value": 0.1, "power": 0.0, "transition_steps": 30},
        {"init_value": 1.0, "end_value": 0.0, "power": 0.1, "transition_steps": 41},
        {"init_value": 1.0, "end_value": 0.1, "power": 2.0, "transition_steps": 0},
    ],
    "exponential_decay": [
        {"init_value": 1.0, "transition_steps": 7, "decay_rate": 0.5, "end_value": 0.01},
        {"init_value": 1.0, "transition_steps": 7, "decay_rate": 0.5, "staircase": True, "transition_begin": 3},
        {"init_value": 1.0, "transition_steps": 41, "decay_rate": 0.5, "staircase": True},
        {"init_value": 0.1, "transition_steps": 7, "decay_rate": 1.5, "end_value": 2.0},
        {"init_value": 1.0, "transition_steps": 5, "decay_rate": 1.5, "staircase": True},
        {"init_value": 0.0, "transition_steps": 5, "decay_rate": 1.5},
        {"init_value": 0.1, "transition_steps": 7, "decay_rate": 0.0},
        {"init_value": 0.1, "transition_steps": 0, "decay_rate": 0.5},
    ],
    "cosine_decay_schedule": [
        {"init_value": 0.7, "decay_steps": 33, "alpha": 0.1, "exponent": 1.3},
        {"init_value": 0.7, "decay_steps": 33},
    ],
    "warmup_cosine_decay_schedule": [
        {**WARMUP, "decay_steps": 40, "end_value": 0.01},
        {**WARMUP, "warmup_steps": 0, "decay_steps": 9},
        {**WARMUP, "peak_value": 0.0, "decay_steps": 19},
    ],
    "warmup_constant_schedule": [WARMUP],
    "warmup_exponential_decay_schedule": [
        {**WARMUP, "transition_steps": 9, "decay_rate": 0.7},
        {**WARMUP, "transition_steps": 5, "decay_rate": 1.5, "end_value": 2.0},
    ],
    "piecewise_constant_schedule": [
        {"init_value": 1.0, "boundaries_and_scales": {5: 0.1, 20: 0.5}},
        {"init_value": 1.0},
    ],
    "join_schedules": [
        {
            "schedules": [
                schedules.warmup_constant_schedule(**WARMUP),
                schedules.cosine_decay_schedule(init_value=0.1, decay_steps=25),
            ],
            "boundaries": [20],
        },
        {"schedules": [schedules.linear_schedule(0.0, 1.0, 5), root, root], "boundaries": [5, 9]},
    ],
}
ALL = [(name, settings) for name, cases in CASES.items() for settings in cases]
every = pytest.mark.parametrize(("name", "settings"), ALL, ids=[f"{name}-{i}" for i, (name, _) in enumerate(ALL)])
OWN = {"init_value": 0.0, "peak_value": 1.0, "warmup_steps": 5, "stable_steps": 20, "decay_steps": 10, "end_value": 0.1}
OWNS = [("warmup_stable_decay_schedule", OWN), ("warmup_stable_decay_schedule", {**OWN, "exponent": 0.5})]
all_twelve = pytest.mark.parametrize(("name", "settings"), ALL + OWNS)
COUNTS = jnp.arange(50)
FAR = jnp.array([1000, 1100, 10**4, 2**24, 2**31 - 1])
along = jax.jit(lambda rate, counts: jax.lax.map(rate, counts))


def of_optax(name, settings, counts=COUNTS):
    with jax.numpy_dtype_promotion("standard"):
        rate = getattr(optax, name)(**settings)
        return np.array([rate(jnp.int32(count)) for count in counts])


def test_every_schedule_of_the_module_is_held_to_one_of_optax_or_a_formula():
    made = {name for name, x in vars(schedules).items() if isinstance(x, type) and issubclass(x, schedules.Schedule)}
    assert made - {"Schedule"} == {*CASES, "warmup_stable_decay_schedule"}


@every
def test_has_optax_values_at_every_count(name, settings):
    rate, expected = getattr(schedules, name)(**settings), of_optax(name, settings)
    tolerance = 2e-7 * np.max(np.abs(expected))
    np.testing.assert_allclose(along(rate, COUNTS), expected, rtol=1e-5, atol=tolerance)
    np.testing.assert_allclose([rate(count) for count in range(0, 50, 7)], expected[::7], rtol=1e-5, atol=tolerance)


def test_warmup_stable_decay_follows_its_formula():
    for exponent in (1.0, 0.5):
        rate = schedules.warmup_stable_decay_schedule(**OWN, exponent=exponent)
        t = np.arange(50)
        down = 1.0 - 0.9 * np.clip((t - 25) / 10, 0, 1) ** exponent
        np.testing.assert_allclose(along(rate, COUNTS), np.where(t < 5, t / 5, down), rtol=1e-5)


@every
def test_same_bits_as_constants_arguments_and_lanes(name, settings):
    rate = getattr(schedules, name)(**settings)
    expected = along(rate, COUNTS)
    assert_same_bits(jax.jit(lambda counts: jax.lax.map(rate, counts))(COUNTS), expected)
    lanes = jax.tree.map(lambda number: jnp.float32(number) * jnp.array([1, 0.9, 0.8], jnp.float32), rate)
    found = jax.jit(lambda lanes, counts: jax.lax.map(lambda t: jax.vmap(lambda rate: rate(t))(lanes), counts))
    assert_same_bits(found(lanes, COUNTS)[:, 0], expected)


@every
def test_has_optax_values_far_on_and_is_finite_where_they_are_not(name, settings):
    found, expected = along(getattr(schedules, name)(**settings), FAR), of_optax(name, settings, FAR)
    is_large = ~(np.abs(expected) < 1e36)
    np.testing.assert_allclose(found[~is_large], expected[~is_large], rtol=1e-5, atol=1e-7)
    assert np.all(np.isfinite(found)) and np.all(found[expected > 1e36] > 1e36)


@all_twelve
@pytest.mark.parametrize("dtype", ["int32", "float16"])
def test_same_bits_for_many_counts_as_for_one(name, settings, dtype):
    rate, counts = getattr(schedules, name)(**settings), COUNTS[::5].astype(dtype)
    expected = jnp.stack([rate(count) for count in counts])
    for call in (rate, jax.jit(rate), jax.vmap(rate), lambda counts, rate=rate: along(rate, counts)):
        assert_same_bits(call(counts), expected)
    assert_same_bits(jax.jit(rate)(counts.reshape(5, 1, 2)), expected.reshape(5, 1, 2))
    assert rate(counts[:0]).shape == (0,) and rate(counts.reshape(5, 2)).shape == (5, 2)


@every
def test_is_a_value(name, settings):
    make = getattr(schedules, name)
    rate, again = make(**settings), make(**settings)
    assert rate == again and hash(rate) == hash(again) and repr(rate) == repr(again)
    if "<" not in repr(rate):  # a plain function has no text that evaluates to it
        assert eval(repr(rate), vars(schedules)) == rate
    assert jax.tree.map(lambda x: x, rate) == rate == pickle.loads(pickle.dumps(rate)) == jax.jit(lambda r: r)(rate)
    halved = jax.tree.map(lambda number: number / 2, rate)
    assert halved != rate and gdx.sgd(halved) != gdx.sgd(rate)


@all_twelve
def test_slopes_are_finite_in_every_number_and_nothing_is_nan_on_the_way(name, settings):
    rate = jax.tree.map(jnp.float32, getattr(schedules, name)(**settings))
    lanes = jax.tree.map(lambda x: jnp.stack([x, x]), rate)
    slope = jax.grad(lambda rate, count: rate(count))
    counts = jnp.concatenate([COUNTS, FAR])
    with jax.debug_nans(True):
        slopes = [jax.jit(lambda rate: jax.lax.map(lambda count: slope(rate, count), counts))(rate)]
        slopes += [jax.jit(jax.grad(lambda rate: jnp.sum(jnp.tanh(jax.lax.map(rate, counts)))))(rate)]
        for count in (0, 2**31 - 1):
            slopes += [slope(rate, count), jax.vmap(slope, (0, None))(lanes, count)]
            jax.jit(rate)(count), jax.vmap(lambda rate, count=count: rate(count))(lanes)
    assert all(np.all(np.isfinite(slope)) for slope in jax.tree.leaves(slopes))


@all_twelve
def test_slopes_are_those_of_one_side_at_every_count(name, settings):
    with enable_x64(True):
        leaves, structure = jax.tree.flatten(getattr(schedules, name)(**settings))
        at = jax.jit(lambda numbers: jax.vmap(jax.tree.unflatten(structure, list(numbers)))(jnp.arange(50)))
        numbers = jnp.asarray(leaves)
        slopes, here = jax.jit(jax.jacobian(at))(numbers), at(numbers)
        for i in range(len(numbers)):
            after, before = ((at(numbers.at[i].add(step)) - here) / step for step in (1e-7, -1e-7))
            is_one = [np.isclose(slopes[:, i], side, rtol=1e-4, atol=1e-5) for side in (after, before)]
            jumps = ~(np.abs(after) < 1e4) & ~(np.abs(before) < 1e4)  # at the edge of what a number can be
            assert np.all(is_one[0] | is_one[1] | jumps), (i, slopes[:, i], after, before)


def test_slopes_in_every_number_are_right():
    with enable_x64(True):
        for name, settings in (("warmup_cosine_decay_schedule", {**WARMUP, "init_value": 0.02, "decay_steps": 40}),):
            rate = getattr(schedules, name)(**settings)
            leaves, structure = jax.tree.flatten(rate)

            def total(numbers, structure=structure):
                return sum(jax.tree.unflatten(structure, list(numbers))(count) for count in (1, 3, 17, 31))

            numbers = jnp.asarray(leaves)
            slopes = jax.jit(jax.grad(total))(numbers)
            for i, number in enumerate(numbers):
                step = 1e-6 * max(abs(float(number)), 1e-3)
                there, back = (total(numbers.at[i].add(sign * step)) for sign in (1, -1))
                np.testing.assert_allclose(slopes[i], (there - back) / (2 * step), rtol=1e-6, atol=1e-9)


def warmup(**changes):
    settings = {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 4, "decay_steps": 20, "end_value": 0.01}
    return schedules.warmup_cosine_decay_schedule(**{**settings, **changes})


def test_a_change_of_any_number_compiles_nothing_steps_included():
    step = jax.jit(lambda tx, count: tx.learning_rate(count))
    tx = gdx.adamw(warmup())
    for changes in ({}, {"peak_value": 0.2}, {"decay_steps": 50}, {"peak_value": 0}, {"warmup_steps": 0}):
        other = tx.replace(**changes)
        numbers = {name: getattr(other.learning_rate, name) for name in warmup().hyperparams if name != "exponent"}
        with jax.numpy_dtype_promotion("standard"):
            rate = optax.warmup_cosine_decay_schedule(**numbers)
            for count in (0, 3, 10, 30):
                np.testing.assert_allclose(step(other, count), rate(count), rtol=1e-5, atol=1e-8)
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


def test_numbers_in_containers_have_names():
    tx = gdx.sgd(schedules.piecewise_constant_schedule(1.0, {5: 0.5, 9: 0.1}))
    assert dict(tx.hyperparams) == {"init_value": 1.0, "boundaries_and_scales.5": 0.5, "boundaries_and_scales.9": 0.1}
    changed = tx.replace(**{"boundaries_and_scales.5": 0.2})
    assert changed.hyperparams["boundaries_and_scales.5"] == 0.2 and changed.hyperparams["init_value"] == 1
    assert gdx.labels(gdx.stack([tx, changed])) == [{"boundaries_and_scales.5": 0.5}, {"boundaries_and_scales.5": 0.2}]
    pairs = gdx.sgd(schedules.piecewise_constant_schedule(1.0, [(5, 0.5), (9, 0.1)]))
    assert pairs.replace(**{"boundaries_and_scales.0.0": 7.0}).learning_rate(6) == 1.0


def test_changes_are_made_before_they_are_checked():
    for changes in ({"warmup_steps": 1, "decay_steps": 3}, {"warmup_steps": 30, "decay_steps": 50}):
        for order in (changes, dict(reversed(changes.items()))):
            tx = gdx.sgd(warmup()).replace(**order)
            assert {name: tx.hyperparams[name] for name in changes} == changes
    with pytest.raises(ValueError, match=r"sgd\.replace: 0\.1 has no peak_value"):
        gdx.sgd(warmup()).replace(learning_rate=0.1, peak_value=0.2)
    assert gdx.sgd(warmup()).replace(learning_rate=warmup(), peak_value=0.2).hyperparams["peak_value"] == 0.2


def test_schedules_within_a_schedule():
    tx = gdx.sgd(schedules.join_schedules([warmup(), schedules.constant_schedule(0.5)], [5]))
    assert tx.hyperparams["peak_value"] == 0.1
    assert tx.replace(value=0.25).learning_rate(9) == 0.25


@gdx.schedule
def total(parts, by=1.0):
    parts = parts.values() if isinstance(parts, dict) else parts
    return lambda count: by * sum(part(count) if callable(part) else part for part in parts)


def half(count):
    return 0.5


@pytest.mark.parametrize(
    "rate",
    [
        schedules.join_schedules([warmup(), half], [5]),
        schedules.join_schedules((half, warmup(), half), [1, 5]),
        total([warmup(), half]),
        total({"a": half, "b": warmup()}),
        total([half, schedules.join_schedules([half, warmup()], [1])]),
    ],
)
def test_a_plain_function_takes_no_numbers_away(rate):
    tx = gdx.sgd(rate)
    assert tx.hyperparams["peak_value"] == 0.1 and list(tx.hyperparams.values()) == jax.tree.leaves(tx)
    changed = tx.replace(peak_value=0.2)
    assert changed.hyperparams["peak_value"] == 0.2 and changed != tx == pickle.loads(pickle.dumps(tx))
    assert changed.learning_rate(4) > rate(4) and "half" in repr(tx)
    step = jax.jit(lambda tx, count: tx.learning_rate(count))
    np.testing.assert_allclose([step(tx, 4), step(changed, 4)], [rate(4), changed.learning_rate(4)])
    assert step._cache_size() == 1
    assert gdx.labels(gdx.stack([tx, changed])) == [{"peak_value": 0.1}, {"peak_value": 0.2}]


def test_numbers_beside_a_plain_function():
    rate = total([0.25, half])
    assert rate(3) == 0.75 and jax.tree.leaves(rate) == [0.25, 1.0] and rate != total([0.5, half])
    assert total([half, half])(3) == 1.0 and total([half, half]) == total([half, half]) != total([half, jnp.sqrt])


def test_joined_schedules_are_called_in_their_own_time_only():
    def only(first, last):
        def at(count):
            assert first <= count <= last
            return count * 1.0

        return at

    rate = schedules.join_schedules([only(0, 3), only(0, 2), only(0, 90)], [4, 7])
    assert [float(rate(count)) for count in (0, 3, 4, 6, 7, 50)] == [0, 3, 0, 2, 0, 43]


@pytest.mark.parametrize("way", [jax.jit, jax.grad, lambda f: lambda x: jax.vmap(f)(jnp.stack([x, x]))[0]])
def test_is_made_inside_a_transformation_too(way):
    def rate(peak):
        return warmup(peak_value=peak)(10)

    expected = warmup()(10) if way is not jax.grad else warmup(peak_value=1.0)(10) - warmup(peak_value=0.0)(10)
    np.testing.assert_allclose(way(rate)(jnp.float32(0.1)), expected, rtol=1e-2)


def test_many_counts_at_once():
    rate = schedules.linear_schedule(1.0, 0.0, 10)
    for call in (rate, jax.jit(rate), jax.jit(lambda t, rate=rate: jax.tree.map(jnp.float32, rate)(t))):
        np.testing.assert_allclose(call(jnp.arange(3)), [1.0, 0.9, 0.8], rtol=1e-6)


@gdx.schedule
def decayed(peak: float, every: int, by: float = 0.5):
    return lambda count: peak * by ** (count // every)


def test_a_factory_of_ones_own_is_a_class_of_values():
    rate = decayed(1, every=3)
    assert rate(7) == 0.25 and rate == decayed(1.0, 3) != decayed(1.0, 4)
    assert jax.tree.leaves(rate) == [1.0, 0.5]
    assert pickle.loads(pickle.dumps(rate)) == rate and repr(rate) == "decayed(peak=1.0, every=3)"
    assert gdx.schedule(decayed) is decayed


def test_a_factory_of_ones_own_takes_anything_but_nan_where_nothing_is_annotated():
    made = gdx.schedule(lambda anything, other=None: lambda count: 0.5)
    for value in ("a", None, True, warmup(), half, [0.1, half], {"a": 1}, sum, object()):
        assert made(value)(3) == 0.5 and made(1.0, value)(3) == 0.5
    with pytest.raises(ValueError, match=r"other is nan; expected a finite number"):
        made(1.0, np.nan)


@gdx.schedule
def annotated(
    inner: optax.Schedule,
    either: gdx.Scalar,
    table: jax.Array,
    steps: int = 3,
    odd: "float" = None,  # noqa: RUF013
):
    return lambda count: inner(count) + (either(count) if callable(either) else either) + table[count]


def test_a_factory_of_ones_own_takes_what_its_annotations_say():
    for either in (0.5, half, schedules.constant_schedule(0.5), jnp.float32(0.5)):
        assert annotated(schedules.constant_schedule(1.0), either, jnp.arange(3.0))(2) == 3.5
    assert annotated(half, 0.5, jnp.arange(3.0), odd=None)(1) == 2
    for wrong, words in (
        ({"inner": 0.1}, r"inner is 0\.1; expected a function"),
        ({"either": "a"}, r"either is 'a'; "),
    ):
        with pytest.raises(TypeError, match=rf"annotated: {words}"):
            annotated(**{"inner": half, "either": 0.5, "table": jnp.arange(3.0), **wrong})


def test_a_factory_of_optax_keeps_its_steps_as_constants():
    rate = gdx.schedule(optax.cosine_decay_schedule)(init_value=0.7, decay_steps=33)
    assert list(rate.hyperparams) == ["init_value", "alpha", "exponent"] and pickle.loads(pickle.dumps(rate)) == rate
    expected = of_optax("cosine_decay_schedule", {"init_value": 0.7, "decay_steps": 33})
    np.testing.assert_allclose(along(rate, COUNTS), expected, rtol=1e-5, atol=1e-7)
    warm = gdx.schedule(optax.warmup_cosine_decay_schedule)(0.0, 0.1, 4, 20)
    with pytest.raises(TypeError, match=r"needs the value of a number that is traced.*gdx\.schedules"):
        jax.jit(lambda rate: rate(3))(warm)


@pytest.mark.parametrize(
    "made",
    [
        schedules.constant_schedule(0.1),
        optax.constant_schedule(0.1),
        optax.linear_schedule(1.0, 0.0, 10),
        optax.join_schedules([optax.constant_schedule(0.1)] * 2, [3]),
        optax.sgdr_schedule([{"init_value": 0.1, "peak_value": 1.0, "warmup_steps": 2, "decay_steps": 5}]),
        lambda count: 0.1 / (1 + count),
        lambda count, power=2: 0.1 / (1 + count) ** power,
    ],
    ids=["gdx's", "constant", "linear", "joined", "cycles", "own", "own with a default"],
)
def test_a_schedule_in_the_place_of_what_makes_one(made):
    with pytest.raises(TypeError, match=r"expected a function that makes .*; what returns a number is one already"):
        gdx.schedule(made)


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (lambda: optax.constant_schedule(0.25), 0.25),
        (lambda value=0.25: optax.constant_schedule(value), 0.25),
        (lambda value=0.25: schedules.constant_schedule(value), 0.25),
        (schedules.warmup_constant_schedule, None),
    ],
)
def test_functions_that_make_schedules_of_anything_are_taken(make, value):
    assert value is None or gdx.schedule(make)()(3) == value
    assert gdx.schedule(make) is gdx.schedule(make)


REFUSED = {
    "no function": (lambda: gdx.schedule(0.1), TypeError, r"schedule: got 0\.1; expected a function that makes"),
    "unknown argument": (
        lambda: schedules.constant_schedule(1.0, steps=3),
        TypeError,
        r"there is no argument 'steps'; expected value",
    ),
    "missing argument": (lambda: schedules.cosine_decay_schedule(1.0), TypeError, r"missing .*'decay_steps'"),
    "not finite": (
        lambda: schedules.constant_schedule(float("nan")),
        ValueError,
        r"constant_schedule: value is nan; expected a finite number",
    ),
    "no steps": (
        lambda: schedules.cosine_decay_schedule(1.0, -3),
        ValueError,
        r"cosine_decay_schedule: decay_steps is -3; expected a positive number of steps",
    ),
    "all of them warm-up": (
        lambda: warmup(decay_steps=3),
        ValueError,
        r"decay_steps - warmup_steps is -1; expected a positive number of steps",
    ),
    "negative scale": (
        lambda: schedules.piecewise_constant_schedule(1.0, {3: -0.5}),
        ValueError,
        r"a scale is -0\.5; expected a number >= 0",
    ),
    "boundaries": (
        lambda: schedules.join_schedules([warmup(), warmup()], []),
        ValueError,
        r"got 2 schedules and 0 boundaries; expected one boundary less",
    ),
    "returns a number": (
        lambda: gdx.schedule(lambda x, y: x)(1.0, 2.0),
        TypeError,
        r"returned .*1\.0.*; expected a function of the step count",
    ),
    "a root of a negative number": (
        lambda: schedules.exponential_decay(1.0, 10, -0.5),
        ValueError,
        r"exponential_decay: decay_rate is -0\.5; expected a number >= 0",
    ),
    "no such number": (lambda: warmup().replace(peak=3), ValueError, r"'peak' is unknown; choose from init_value"),
    "assignment": (lambda: setattr(warmup(), "peak_value", 3), AttributeError, "peak_value"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    make, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        make()


WRONG = [
    "a",
    None,
    True,
    np.True_,
    np.nan,
    np.inf,
    1e39,
    1j,
    jnp.ones(2),
    [0.1],
    half,
    schedules.constant_schedule(1.0),
]
NUMBERS = [
    (name, settings, parameter)
    for name, (settings, *_) in (*CASES.items(), ("warmup_stable_decay_schedule", [OWN]))
    for parameter, value in settings.items()
    if isinstance(value, int | float)
]


@pytest.mark.parametrize(("name", "settings", "parameter"), NUMBERS)
def test_refuses_what_is_no_number_in_the_call_that_makes_it(name, settings, parameter):
    make = getattr(schedules, name)
    for wrong in WRONG:
        if wrong is None and parameter == "end_value" and "exponential" in name:
            continue
        for refused in (
            lambda x: make(**{**settings, parameter: x}),
            lambda x: make(**settings).replace(**{parameter: x}),
        ):
            said = rf"^{name}: {parameter} (is|has) .*; expected a finite number"
            with pytest.raises((TypeError, ValueError), match=said):
                refused(wrong)
    for number in (np.float32(25), jnp.bfloat16(25), np.array(25), 25):
        make(**{**settings, parameter: number})


OTHERS = {
    "schedules.0 is 0.1; expected a function of the step count": lambda: schedules.join_schedules([0.1, 0.2], [5]),
    "schedules.1 is None; expected a function of the step count": lambda: schedules.join_schedules([half, None], [5]),
    "schedules is join_schedules(": lambda: schedules.join_schedules(schedules.join_schedules([half], []), []),
    "boundaries is 5; expected a list": lambda: schedules.join_schedules([half, half], 5),
    "boundaries.0 is 'a'; expected a finite number": lambda: schedules.join_schedules([half, half], ["a"]),
    "boundaries.1 is nan; expected a finite number": lambda: schedules.join_schedules([half] * 3, [1, np.nan]),
    "boundaries_and_scales is 3; expected a dict or a list or None": lambda: PIECES(1.0, 3),
    "boundaries_and_scales.5 is 'a'; expected a finite number": lambda: PIECES(1.0, {5: "a"}),
    "boundaries_and_scales: a key is 'a'; expected a finite number": lambda: PIECES(1.0, {"a": 0.5}),
    "boundaries_and_scales.0 is (5, 0.1, 3); expected a pair": lambda: PIECES(1.0, [(5, 0.1, 3)]),
    "boundaries_and_scales.0.1 is <half>; expected a finite number": lambda: PIECES(1.0, [(5, half)]),
    "staircase is 1; expected True or False": lambda: schedules.exponential_decay(1.0, 5, 0.5, staircase=1),
    "end_value is 'a'; expected a finite number or None": lambda: schedules.exponential_decay(
        1.0, 5, 0.5, end_value="a"
    ),
}
PIECES = schedules.piecewise_constant_schedule


@pytest.mark.parametrize("words", OTHERS)
def test_refuses_what_an_annotation_does_not_say(words):
    with pytest.raises((TypeError, ValueError), match=rf"^\w+: {re.escape(words)}"):
        OTHERS[words]()


STEPS = [case for case in NUMBERS if case[2].endswith(("_steps", "_begin"))]


@pytest.mark.parametrize(("name", "settings", "parameter"), STEPS)
def test_refuses_what_is_no_number_of_steps(name, settings, parameter):
    make = getattr(schedules, name)
    is_any = parameter.startswith("transition")  # below 0 it has a meaning in optax
    for wrong in (0.1, np.float32(0.5), jnp.float32(0.75), *((-0.5, -1, -20.0) if not is_any else ())):
        for refused in (
            lambda x: make(**{**settings, parameter: x}),
            lambda x: make(**settings).replace(**{parameter: x}),
        ):
            # less than the warm-up that is counted in
            said = rf"^{name}: {parameter} (is {float(wrong):g}|- warmup_steps is -).*; expected a .*number"
            with pytest.raises(ValueError, match=said):
                refused(wrong)
    changed = {**settings, parameter: 25}
    if name in CASES:
        np.testing.assert_allclose(along(make(**changed), COUNTS), of_optax(name, changed), rtol=1e-5, atol=1e-7)
    almost = {**settings, parameter: 25 * (1 + 1e-15)}
    assert make(**almost) == make(**{**settings, parameter: 25})
    # what is not read is not checked
    moved = jax.tree.map(lambda x: x * 0.9 + 0.3, make(**settings))
    np.testing.assert_allclose(moved(7), jax.jit(lambda rate: rate(7))(moved), rtol=1e-5)


LOGGED = {"transition_steps": (0, -3.0), "transition_begin": (-1, -0.5), "decay_rate": (0.0,)}


@pytest.mark.parametrize(("name", "settings", "parameter"), [case for case in NUMBERS if case[2] in LOGGED])
def test_warns_of_what_optax_logs(name, settings, parameter):
    rate = getattr(schedules, name)(**CASES[name][0])
    for wrong in LOGGED[parameter]:
        with pytest.warns(
            UserWarning, match=rf"^{name}: {parameter} is {float(wrong)}, which counts as none, as in optax"
        ):
            rate.replace(**{parameter: wrong})


BOUNDARIES = {
    "falling": (lambda: schedules.join_schedules([half] * 3, [20, 10]), "10.* >= 20.*, the one before"),
    "falling in an array": (lambda: schedules.join_schedules([half] * 3, np.array([20, 10])), "10.* >= 20"),
    "falling once": (lambda: schedules.join_schedules([half] * 4, [5, 9, 8.0]), "8.* >= 9"),
    "no whole one": (
        lambda: schedules.join_schedules([half] * 3, [0.5, 10]),
        r"0\.5; expected a number of steps, none of them between 0 and 1",
    ),
    "replaced": (
        lambda: schedules.join_schedules([half] * 3, [5, 10]).replace(boundaries=[10, 5]),
        "5.* >= 10",
    ),
    "one replaced": (
        lambda: schedules.join_schedules([half] * 3, [5, 10]).replace(**{"boundaries.0": 11}),
        "10.* >= 11",
    ),
    "keys": (lambda: PIECES(1.0, {0.1: 1000}), r"0\.1; expected a number of steps, none of them between 0 and 1"),
    "pairs": (
        lambda: PIECES(1.0, [(5, 0.1), (0.5, 0.1)]),
        r"0\.5; expected a number of steps, none of them between 0 and 1",
    ),
}


@pytest.mark.parametrize("case", BOUNDARIES)
def test_refuses_boundaries_that_are_no_steps_one_after_the_other(case):
    make, words = BOUNDARIES[case]
    with pytest.raises(ValueError, match=rf"^(join|piecewise_constant)_schedules?: boundaries.*: one is {words}"):
        make()


def test_boundaries_that_optax_takes_are_taken():
    parts = [optax.linear_schedule(0.0, 1.0, 10), optax.constant_schedule(3.0), optax.linear_schedule(1.0, 0.0, 10)]
    for boundaries in ([5, 5], [0, 7], [-3, 7], [0, 0]):
        expected = of_optax("join_schedules", {"schedules": parts, "boundaries": boundaries})
        np.testing.assert_allclose(along(schedules.join_schedules(parts, boundaries), COUNTS), expected, atol=1e-7)
    settings = {"init_value": 1.0, "boundaries_and_scales": {20: 0.5, 5: 0.1}}
    expected = of_optax("piecewise_constant_schedule", settings)
    np.testing.assert_allclose(along(PIECES(**settings), COUNTS), expected, rtol=1e-6)


def test_a_function_of_ones_own_may_call_anything_steps():
    rate = gdx.schedule(lambda peak, warmup_steps=0.5: lambda count: peak * warmup_steps)
    assert rate(1.0)(3) == 0.5 and rate(1.0, 0.25).replace(warmup_steps=0.125)(3) == 0.125


@pytest.mark.parametrize("count", ["a", None, 1j, True, object(), {"a": 1}, ["a"], [[1], [2, 3]], jax.random.key(0)])
@pytest.mark.parametrize("rate", [warmup(), schedules.constant_schedule(1.0), decayed(1.0, 3)])
def test_refuses_a_count_that_is_none(rate, count):
    with pytest.raises(TypeError, match=rf"(?s)^{type(rate).__name__}: count is .*; expected a step count, or an"):
        rate(count)
