"""gdx.value: any optimizer, link or wrapper of optax as a value."""

import collections
import functools
import inspect
import pickle
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from gdx.checkpoint.describe import describe
from gdx.compat import enable_x64
from tests.contract.table import assert_same_bits

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Specifying a key will be required:UserWarning"),
]
PARAMS = {"w": jnp.linspace(-1.0, 1.0, 12).reshape(4, 3), "b": jnp.ones(3)}


def loss(params, target):
    return jnp.sum((params["w"] - target) ** 2) + jnp.sum(params["b"] ** 2)


# every optimizer of optax and optax.contrib with a learning rate that needs no other argument
OF_OPTAX = """
    adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad fromage lamb lars lbfgs lion nadam
    nadamw noisy_sgd novograd optimistic_adam optimistic_adam_v2 optimistic_gradient_descent radam rmsprop rprop sgd
    sign_sgd signum sm3 yogi
"""
OF_CONTRIB = """
    acprop ademamix adopt cocob dadapt_adamw dog dowg galore madgrad momo momo_adam muon prodigy schedule_free_adamw
    schedule_free_sgd simplified_ademamix sophia
"""
NAMES = [f"optax.{name}" for name in OF_OPTAX.split()] + [f"optax.contrib.{name}" for name in OF_CONTRIB.split()]
# what they cannot do, and why
UNABLE = {
    "optax.lbfgs": {"slopes": "its line search is a while loop"},
    "optax.radam": {"slopes": "divides 0 by 0 in the branch that is not taken"},
    "optax.contrib.sophia": {"run": "needs the loss beside the gradient"},
}


def of(name):
    return functools.reduce(getattr, name.split(".")[1:], optax)


def test_the_list_is_complete():
    found = set()
    for path, module in (("optax", optax), ("optax.contrib", optax.contrib)):
        for name, function in vars(module).items():
            is_function = inspect.isfunction(function) or isinstance(function, functools.partial)
            if name.startswith(("_", "scale_by")) or not is_function:
                continue
            parameters = inspect.signature(function).parameters
            required = {p.name for p in parameters.values() if p.default is p.empty} - {"learning_rate"}
            if "learning_rate" in parameters and not required:
                found.add(f"{path}.{name}")
    assert found == {*NAMES}


def run(tx, steps=3):
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        value, g = jax.value_and_grad(loss)(params, 0.5)
        extra = {"value": value, "grad": g, "value_fn": lambda params: loss(params, 0.5)}
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, state = optax.with_extra_args_support(tx).update(g, state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params


every = pytest.mark.parametrize("name", NAMES)


def unless_unable(name, what):
    if what in UNABLE.get(name, {}) or "run" in UNABLE.get(name, {}):
        pytest.skip(str(UNABLE[name]))


@every
def test_is_a_value(name):
    make, kind = of(name), gdx.value(of(name))
    tx = kind(learning_rate=0.02)
    assert repr(tx) == f"{name.split('.')[-1]}(learning_rate=0.02)"
    assert tx == kind(0.02) and hash(tx) == hash(kind(0.02)) and kind is gdx.value(make)
    assert tx != tx.replace(learning_rate=0.04) and tx.replace(learning_rate=0.04).replace(learning_rate=0.02) == tx
    assert jax.jit(lambda tx: tx)(tx) == tx
    assert describe(tx)["learning_rate"] == "0.02" and describe(tx)["optimizer"].startswith(name.split(".")[-1])
    assert pickle.loads(pickle.dumps(tx)) == tx


@every
def test_trains_as_optax_compiled_once_for_any_number(name):
    unless_unable(name, "run")
    tx = gdx.value(of(name))(learning_rate=0.02)
    compiled = jax.jit(lambda tx: run(tx))
    with jax.numpy_rank_promotion("allow"):
        expected = jax.jit(lambda: run(of(name)(learning_rate=0.02)))()
        for a, b in zip(jax.tree.leaves(compiled(tx)), jax.tree.leaves(expected)):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
        for number, value in tx.hyperparams.items():
            compiled(tx.replace(**{number: 0.9 * value}))
    assert compiled._cache_size() == 1


@every
def test_is_swept_and_learnt(name):
    unless_unable(name, "slopes")
    with jax.numpy_rank_promotion("allow"):
        batch = gdx.grid(gdx.value(of(name)), learning_rate=[0.02, 0.04])
        swept = jax.jit(jax.vmap(lambda tx: loss(run(tx), 0.5)))(batch)
        alone = [loss(run(tx), 0.5) for tx in gdx.unstack(batch)]
        np.testing.assert_allclose(swept, alone, rtol=1e-5)
        slopes = jax.jit(jax.grad(lambda tx: loss(run(tx), 0.5)))(batch_member(batch))
    assert all(np.all(np.isfinite(slope)) for slope in jax.tree.leaves(slopes))


def batch_member(batch):
    return jax.tree.map(lambda x: jnp.float32(x[0]), batch)


# Links and wrappers.

LION = gdx.value(optax.lion)(1e-3)
CLIPPED = gdx.chain(gdx.value(optax.clip_by_global_norm)(1.0), gdx.adamw(1e-3))
WRAPPED = {
    "clip and adamw": (CLIPPED, lambda: optax.chain(optax.clip_by_global_norm(1.0), gdx.adamw(1e-3))),
    "MultiSteps": (
        gdx.value(optax.MultiSteps)(LION, every_k_schedule=2),
        lambda: optax.MultiSteps(optax.lion(1e-3), 2).gradient_transformation(),
    ),
    "apply_if_finite": (
        gdx.value(optax.apply_if_finite)(LION, max_consecutive_errors=3),
        lambda: optax.apply_if_finite(optax.lion(1e-3), 3),
    ),
    "masked": (
        gdx.value(optax.masked)(LION, {"w": True, "b": False}),
        lambda: optax.masked(optax.lion(1e-3), {"w": True, "b": False}),
    ),
    "partition": (
        gdx.value(optax.partition)({"a": LION, "z": gdx.sgd(0.1)}, {"w": "a", "b": "z"}),
        lambda: optax.partition({"a": optax.lion(1e-3), "z": optax.sgd(0.1)}, {"w": "a", "b": "z"}),
    ),
    "schedule_free": (
        gdx.value(optax.contrib.schedule_free)(gdx.sgd(0.1), learning_rate=0.1),
        lambda: optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
    ),
    "mechanize": (
        gdx.value(optax.contrib.mechanize)(gdx.sgd(1.0)),
        lambda: optax.contrib.mechanize(optax.sgd(1.0)),
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_are_values_too(name):
    tx, make = WRAPPED[name]
    assert tx == pickle.loads(pickle.dumps(tx)) and hash(tx) == hash(pickle.loads(pickle.dumps(tx)))
    assert jax.tree.map(lambda x: x, tx) == tx == jax.jit(lambda tx: tx)(tx)
    compiled = jax.jit(lambda tx: run(tx))
    expected = jax.jit(lambda: run(make()))()
    for a, b in zip(jax.tree.leaves(compiled(tx)), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    for number, value in tx.hyperparams.items():
        compiled(tx.replace(**{number: 0.9 * value}))
    assert compiled._cache_size() == 1 and len(tx.hyperparams) > 0


def test_the_commonest_chain_is_swept_and_its_numbers_are_compared():
    twin = gdx.chain(gdx.value(optax.clip_by_global_norm)(1.0), gdx.adamw(1e-3))
    assert twin == CLIPPED and hash(twin) == hash(CLIPPED)
    batch = gdx.stack([CLIPPED, CLIPPED.replace(max_norm=0.5)])
    assert gdx.labels(batch) == [{"max_norm": 1.0}, {"max_norm": 0.5}]
    assert describe(CLIPPED)["max_norm"] == "1.0" != describe(CLIPPED.replace(max_norm=0.5))["max_norm"]


def test_transforms_in_a_dict_have_names():
    tx, _ = WRAPPED["partition"]
    assert {"a.learning_rate", "z.learning_rate"} < {*tx.hyperparams}
    assert tx.replace(**{"a.learning_rate": 0.5}).transforms["a"] == LION.replace(learning_rate=0.5)


@gdx.value
def heavy_adam(learning_rate, momentum=0.9):
    """Adam with a velocity behind it."""
    return gdx.chain(gdx.adam(learning_rate), gdx.scale_by_momentum(momentum))


@gdx.value
def only_if(rate: float, on: bool = True, steps: int = 3):
    return gdx.sgd(rate if on else 0.0)


def test_a_function_of_ones_own():
    tx = heavy_adam(1e-3)
    assert tx.replace(momentum=0.5) == heavy_adam(1e-3, momentum=0.5) and pickle.loads(pickle.dumps(tx)) == tx
    assert repr(tx) == "heavy_adam(learning_rate=0.001)" and heavy_adam.__doc__ == "Adam with a velocity behind it."
    assert_same_bits(jax.jit(run)(tx), jax.jit(run)(gdx.chain(gdx.adam(1e-3), gdx.scale_by_momentum())))
    assert jax.tree.leaves(only_if(1, steps=4)) == [1.0]
    assert jax.tree.structure(only_if(1, steps=4)) != jax.tree.structure(only_if(1))
    assert gdx.value(heavy_adam) is heavy_adam


def test_the_function_is_called_once_for_the_same_constants():
    calls = []

    def counted(learning_rate: float):
        calls.append(learning_rate)
        return optax.sgd(learning_rate)

    tx = gdx.value(counted)(0.1)
    state = tx.init(PARAMS)
    before = len(calls)
    for _ in range(5):
        tx.update(PARAMS, state, PARAMS)
    assert len(calls) == before


@gdx.value
def computed(rate: float):
    return gdx.sgd(jnp.where(rate > 0, rate, 0.0) / 2)


def test_what_a_function_computes_is_no_tracer_of_a_program_around_it():
    tx = computed(0.5)
    state = jax.jit(tx.init)(PARAMS)
    with jax.checking_leaks():
        updates, _ = jax.jit(lambda g, state: tx.update(g, state))(PARAMS, state)
    again, _ = tx.update(PARAMS, state)
    np.testing.assert_allclose(again["b"], updates["b"])
    np.testing.assert_allclose(again["b"], -0.25)


def test_a_number_on_the_device_leaves_no_tracer_behind():
    """What the function makes of it inside a program is of that program only."""
    tx = jax.tree.map(jnp.float32, gdx.value(optax.sgd)(0.1))
    state = jax.jit(tx.init)(PARAMS)
    found, _ = jax.jit(tx.update)(PARAMS, state, PARAMS)
    assert_same_bits(found, tx.update(PARAMS, state, PARAMS)[0])


def test_numbers_are_no_wider_than_the_program():
    """optax's clipping does not promote what it is given: doubles beside float32 would be an error of JAX's."""
    with enable_x64(True):
        tx = gdx.value(optax.clip_by_global_norm)(1.0)
        g = jax.tree.map(lambda p: p.astype(jnp.float32), PARAMS)
        updates, _ = jax.jit(lambda tx: tx.update(g, tx.init(g)))(tx)
        np.testing.assert_allclose(optax.tree.norm(updates), 1.0, rtol=1e-6)
        assert {u.dtype for u in jax.tree.leaves(updates)} == {np.dtype("float32")}


def branching(learning_rate: float):
    return optax.sgd(learning_rate if learning_rate > 0 else 0.1)


REFUSED = {
    "no function": (lambda: gdx.value(3), TypeError, r"value: got 3; expected a function that returns a transform"),
    "returns no transform": (lambda: gdx.value(float)(0.1), (TypeError, ValueError), r"float|signature"),
    "a number": (lambda: gdx.value(lambda rate: rate)(0.5), TypeError, r"the function returned 0\.5; expected a tr"),
    "any number of arguments": (lambda: gdx.value(optax.chain), TypeError, r"chain takes \*args.*gdx\.chain"),
    "an unknown argument": (
        lambda: LION.replace(lr=3),
        ValueError,
        r"lion\.replace: 'lr' is unknown; did you mean learning_rate\?",
    ),
    "branches on a traced number": (
        lambda: jax.jit(run)(gdx.value(branching)(0.1)),
        TypeError,
        r"branching: it needs the value of a number that is traced.*close over the optimizer",
    ),
    "a wrong number": (lambda: heavy_adam(-1.0), ValueError, r"heavy_adam: learning_rate is -1\.0; expected"),
    "an inner wrong number": (
        lambda: gdx.value(optax.MultiSteps)(gdx.sgd(-1.0), 2),
        ValueError,
        r"^sgd: learning_rate is -1\.0",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    make, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        make()


# What is kept of arguments.


@pytest.mark.parametrize("kind", [lambda x: x, dict, collections.OrderedDict, lambda x: [x, {"c": True}]])
@pytest.mark.parametrize(
    "make",
    [
        lambda mask: gdx.adamw(1e-3, mask=mask),
        lambda mask: gdx.add_decoupled_weight_decay(mask=mask),
        lambda mask: gdx.value(optax.adamw)(1e-3, mask=mask),
        lambda mask: gdx.value(optax.masked)(LION, mask),
        lambda mask: gdx.chain(gdx.value(optax.freeze)(mask)),
    ],
)
def test_a_container_changed_from_outside_changes_no_value(make, kind):
    given = {"w": True, "b": False}
    mask = kind(given)
    tx, twin = make(mask), make(kind({"w": True, "b": False}))
    before = hash(tx), repr(tx)
    given["w"] = False
    next(iter([mask] if isinstance(mask, dict) else mask))["b"] = True
    assert tx == twin and (hash(tx), repr(tx)) == before


def test_numbers_and_arrays_changed_from_outside_change_no_value():
    boundaries, weights, transforms = [5.0], np.ones(3), {"a": LION, "z": gdx.sgd(0.1)}
    values = [
        gdx.schedules.join_schedules([gdx.schedules.constant_schedule(0.5)] * 2, boundaries),
        weighted(weights),
        weighted([weights]),
        gdx.value(optax.partition)(transforms, {"w": "a", "b": "z"}),
    ]
    before = [pickle.loads(pickle.dumps(tx)) for tx in values]
    boundaries[0], weights[0] = 7.0, 3.0
    transforms["a"] = gdx.sgd(1.0)
    assert values == before


@gdx.value
def weighted(weights=jnp.ones(3), rate: float = 0.1):  # noqa: B008
    return optax.stateless(lambda updates, params: jax.tree.map(lambda g: -rate * jnp.sum(weights[0]) * g, updates))


@gdx.value
def preconditioned(diagonal: jax.Array, rate: float = 0.1):
    return optax.stateless(
        lambda updates, params: jax.tree.map(lambda g: -rate * jnp.broadcast_to(diagonal, g.shape) * g, updates)
    )


DIAGONALS = [jnp.ones(3), np.arange(3.0), jnp.arange(6.0).reshape(2, 3), np.float16([1, 2, 3]), 2.0, jnp.float32(2.0)]


@pytest.mark.parametrize("diagonal", DIAGONALS, ids=str)
def test_what_is_declared_as_an_array_may_have_a_shape(diagonal):
    tx = preconditioned(diagonal)
    assert tx == pickle.loads(pickle.dumps(tx)) == jax.jit(lambda tx: tx)(tx) == preconditioned(jnp.asarray(diagonal))
    assert hash(tx) == hash(preconditioned(diagonal)) and tx != tx.replace(diagonal=3 * diagonal + 1)
    assert repr(tx).startswith("preconditioned(diagonal=") and describe(tx)["rate"] == "0.1"
    assert describe(tx)["diagonal"] != describe(tx.replace(diagonal=3 * diagonal + 1))["diagonal"]
    g = jnp.ones((2, 3))
    updates, _ = jax.jit(lambda tx: tx.update(g, tx.init(g)))(tx)
    np.testing.assert_allclose(updates, -0.1 * np.broadcast_to(np.float32(diagonal), (2, 3)), rtol=1e-6)
    assert_same_bits(tx.update(g, tx.init(g))[0], updates)
    slopes = jax.grad(lambda tx: jnp.sum(tx.update(g, tx.init(g))[0]))(jax.tree.map(jnp.float32, tx))
    assert np.shape(slopes.diagonal) == np.shape(diagonal)


def test_a_default_may_have_a_shape():
    tx = weighted()
    assert repr(tx) == "weighted()" and repr(weighted(jnp.zeros(3))) == "weighted(weights=<float32[3]>)"
    assert tx == weighted(np.ones(3)) == pickle.loads(pickle.dumps(tx)) != weighted(2 * np.ones(3))
    assert hash(tx) == hash(weighted(np.ones(3)))
    tx.update(PARAMS, tx.init(PARAMS))


@gdx.value
def seeded(key: jax.Array | int | None = None, rate: float = 0.1):
    return optax.chain(optax.add_noise(rate, 0.5, jax.random.key(0) if key is None else key), optax.sgd(rate))


SEEDED = {
    "add_noise": lambda key: gdx.value(optax.add_noise)(0.1, 0.5, key=key),
    "noisy_sgd": lambda key: gdx.value(optax.noisy_sgd)(0.1, key=key),
    "of one's own": seeded,
}


@pytest.mark.parametrize("name", SEEDED)
def test_a_seed_stays_an_integer(name):
    tx = SEEDED[name](3)
    assert type(tx.key) is int and "key=3" in repr(tx) and "key" not in tx.hyperparams
    assert tx == pickle.loads(pickle.dumps(tx)) != SEEDED[name](4)
    assert_same_bits(run(tx), run(SEEDED[name](jax.random.key(3))))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
@pytest.mark.parametrize("name", SEEDED)
def test_a_random_key_is_a_child(name, impl):
    make = SEEDED[name]
    tx, twin, other = (make(jax.random.key(seed, impl=impl)) for seed in (3, 3, 4))
    assert tx == twin and hash(tx) == hash(twin) and repr(tx) == repr(twin)
    assert tx != other and hash(tx) != hash(other) and repr(tx) != repr(other)
    assert tx != make(jax.random.key(3, impl={"rbg": "threefry2x32"}.get(impl, "rbg")))
    assert (
        pickle.loads(pickle.dumps(tx))
        == tx
        == jax.jit(lambda tx: tx)(tx)
        == tx.replace(key=jax.random.key(3, impl=impl))
    )
    assert describe(tx) == describe(twin) != describe(other)
    assert any(leaf is tx.key for leaf in jax.tree.leaves(tx))
    compiled = jax.jit(lambda tx: run(tx))
    assert_same_bits(compiled(tx), compiled(twin))
    assert np.any(compiled(tx)["b"] != compiled(other)["b"])
    assert compiled._cache_size() == 1
    batch = gdx.stack([tx, other])
    assert gdx.unstack(batch) == [tx, other] and "key" in repr(batch)


@gdx.value
def with_a_raw_key(key: jax.Array, rate: float = 0.1):
    return seeded(jax.random.wrap_key_data(key), rate)


def test_a_raw_key_is_a_child():
    tx = with_a_raw_key(jax.random.PRNGKey(3))
    assert tx == with_a_raw_key(jax.random.PRNGKey(3)) != with_a_raw_key(jax.random.PRNGKey(4))
    assert tx == pickle.loads(pickle.dumps(tx)) and describe(tx)["key"] != describe(with_a_raw_key(tx.key + 1))["key"]
    large = with_a_raw_key(jnp.uint32([0, 2**31]))
    assert describe(large) != describe(large.replace(key=large.key + 1))
    assert_same_bits(run(tx), run(seeded(jax.random.key(3))))


def test_integers_of_a_description_stay_integers():
    dims = optax.contrib.MuonDimensionNumbers((0,), (1,))
    assert gdx.value(optax.contrib.scale_by_muon)().ns_coeffs == (3.4445, -4.775, 2.0315)  # no pair
    tx = gdx.value(optax.contrib.muon)(0.1, muon_weight_dimension_numbers=dims)
    assert tx.muon_weight_dimension_numbers == dims and type(tx.muon_weight_dimension_numbers.output_axis[0]) is int


# What is refused in the call.

NUMBERS = [
    (path, p.name)
    for path in [*NAMES, "optax.clip_by_global_norm", "optax.scale", "optax.add_decayed_weights", "optax.trace"]
    for p in inspect.signature(of(path)).parameters.values()
    if isinstance(p.default, float) or p.name in ("learning_rate", "max_norm", "step_size", "decay")
]
WRONG = {
    "True": (True, TypeError, "True"),
    "numpy's True": (np.True_, TypeError, "np.True_"),
    "text": ("a", TypeError, "'a'"),
    "nan": (float("nan"), ValueError, "nan"),
    "infinity": (np.float32("inf"), ValueError, "inf"),
    "minus infinity": (-np.inf, ValueError, "-inf"),
    "too large for a float": (10**400, TypeError, r"1000.*000; expected a finite number"),
    "an array": (jnp.ones(3), ValueError, r"\(3,\); expected a finite number.*gdx\.stack.*jax\.Array"),
    "a list": ([0.1, 0.2], TypeError, r"\[0\.1, 0\.2\]; expected a finite number"),
    "a dict": ({"w": 0.1}, TypeError, r"\{'w': 0\.1\}; expected a finite number"),
    "a transform": (gdx.sgd(0.1), TypeError, r"sgd\(learning_rate=0\.1\); expected a finite number"),
    "a transform of optax": (optax.identity(), TypeError, r"Gradient.*; expected a finite number"),
    "a factory of schedules": (optax.linear_schedule, TypeError, r"<linear_schedule>; expected a finite number"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_number_is_refused_in_the_call(wrong):
    value, error, words = WRONG[wrong]
    for path, parameter in NUMBERS:
        required = {"learning_rate": 0.1} if "learning_rate" in inspect.signature(of(path)).parameters else {}
        for make in (gdx.value(of(path)), lambda **given: gdx.value(of(path))(**required).replace(**given)):  # noqa: B023
            if make is gdx.value(of(path)) or required:
                name = path.split(".")[-1]
                with pytest.raises(error, match=rf"^{name}: {parameter} (is|has shape) {words}"):
                    make(**{**(required if make is gdx.value(of(path)) else {}), parameter: value})


def test_a_number_in_a_container_is_named():
    with pytest.raises(ValueError, match=r"^prodigy: betas\.1 is nan; expected a finite number"):
        gdx.value(optax.contrib.prodigy)(betas=(0.9, float("nan")))


@gdx.value
def lenient(
    rate: float | str = "auto",
    nesterov: bool | float = 0.5,
    choice: Literal["a", "b"] | float = 1.0,
    most: float = float("inf"),
    anything=None,
):
    return optax.sgd(0.1)


def test_what_an_annotation_names_is_taken():
    tx = lenient("a", nesterov=True, choice="b", anything="c")
    assert (tx.rate, tx.nesterov, tx.choice, tx.anything) == ("a", True, "b", "c")
    assert repr(tx) == "lenient(rate='a', nesterov=True, choice='b', anything='c')"
    assert tx == tx.replace(most=float("inf")) == pickle.loads(pickle.dumps(tx)) == lenient("a", True, "b", np.inf, "c")
    assert lenient(1, nesterov=1).hyperparams == {"rate": 1.0, "nesterov": 1.0, "choice": 1.0, "most": np.inf}
    assert gdx.value(optax.freeze)({"w": True, "b": False}).mask == {"w": True, "b": False}
    assert gdx.value(optax.contrib.dog)(init_step=("distance", 0.5)).init_step == ("distance", 0.5)
    with pytest.raises(ValueError, match=r"lenient: most is -inf"):
        lenient(most=-np.inf)


# Functions.


def by_position(rate, momentum=0.5, /, decay: float = 0.0, *, nesterov=False):
    return optax.chain(optax.add_decayed_weights(decay), optax.sgd(rate, momentum, nesterov))


def by_keyword(rate, momentum, decay: float):
    return by_position(rate, momentum, decay)


def test_parameters_by_position_only():
    make = gdx.value(by_position)
    tx = make(0.1, 0.25, decay=0.5)
    assert tx == make(0.1, 0.25, 0.5) == pickle.loads(pickle.dumps(tx)) and tx.replace(momentum=0.5) == make(
        0.1, decay=0.5
    )
    assert repr(tx) == "by_position(rate=0.1, momentum=0.25, decay=0.5)"
    assert_same_bits(jax.jit(run)(tx), jax.jit(run)(gdx.value(by_keyword)(0.1, 0.25, 0.5)))
    rate = gdx.schedule(lambda value, steps, /: lambda count: value * jnp.where(count < steps, 1, 0))(0.5, 3.0)
    assert float(rate(1)) == 0.5 and float(rate.replace(steps=1.0)(1)) == 0.0


OF_SGD = [*inspect.signature(optax.sgd).parameters]
OF_VALUES = ["self", "cls", "_made", *(name for name in dir(gdx.value(optax.sgd)) if not name.startswith("_"))]


@pytest.mark.parametrize("name", sorted({*OF_VALUES} - {"count", "index", *OF_SGD}))
@pytest.mark.parametrize("kind", ["value", "schedule"])
def test_parameters_called_as_something_of_values(name, kind):
    function = eval(f"lambda rate, {name}=0.5: optax.sgd(rate)")
    if kind == "schedule" and name not in ("self", "cls", "_made", "replace", "validate", "hyperparams"):
        pytest.skip("schedules have nothing of that name")
    with pytest.raises(TypeError, match=rf"{kind}: lambda_ has a parameter '{name}'.*calls it otherwise"):
        getattr(gdx, kind)(function)


@pytest.mark.parametrize("name", ["count", "index"])
def test_parameters_called_as_something_of_tuples(name):
    tx = gdx.value(eval(f"lambda rate, {name}=0.5: __import__('optax').sgd(rate)"))(0.1)
    assert tx.replace(**{name: 0.25}).hyperparams[name] == 0.25


@pytest.mark.parametrize("make", [gdx.value, gdx.schedule])
@pytest.mark.parametrize("function", [dict, max, type, str])
def test_what_has_no_signature_is_refused(make, function):
    with pytest.raises(
        TypeError, match=rf"^{make.__name__}: \w+ (has no signature|takes \*|has a parameter).*; wrap it in a function"
    ):
        make(function)(a=1)


class Maker:
    def __init__(self, scale):
        self.scale = scale

    def __call__(self, rate: float):
        return optax.sgd(self.scale * rate)

    def make(self, rate: float):
        return self(rate)

    @classmethod
    def of_class(cls, rate: float):
        return optax.sgd(rate)


at_top_level = functools.partial(by_position, decay=0.5)
maker = Maker(2.0)
PICKLED = {"a partial": at_top_level, "an object": maker, "of a class": Maker.of_class, "of optax": optax.nadamw}
NOT_PICKLED = {
    "a partial": functools.partial(by_position, decay=0.5),
    "a partial of optax": functools.partial(optax.lion, b1=0.5),
    "a method": maker.make,
    "an object": Maker(3.0),
}


@pytest.mark.parametrize("name", PICKLED)
def test_a_pickle_is_equal(name):
    tx = gdx.value(PICKLED[name])(0.1)
    assert pickle.loads(pickle.dumps(tx)) == tx


@pytest.mark.parametrize("name", NOT_PICKLED)
def test_a_pickle_that_would_be_unequal_is_refused(name):
    tx = gdx.value(NOT_PICKLED[name])(0.1)
    with pytest.raises(pickle.PicklingError, match=r"its function, .* is not found as .*; pickle .* the top level"):
        pickle.dumps(tx)


def test_keys_that_cannot_be_sorted_are_named():
    with pytest.raises(
        ValueError, match=r"^partition: transforms is a dict with the keys \[None, 'a'\].*can be sorted"
    ):
        gdx.value(optax.partition)({None: LION, "a": LION}, {"w": None, "b": "a"})
    with pytest.raises(ValueError, match=r"^adamw: mask is a dict with the keys \['w', 1\].*can be sorted"):
        gdx.adamw(0.1, mask={"w": True, 1: False})


WHOLE = {
    "join": (
        gdx.schedules.join_schedules([gdx.schedules.constant_schedule(0.5)] * 2, [3]),
        {"boundaries": [5]},
        gdx.schedules.join_schedules([gdx.schedules.constant_schedule(0.5)] * 2, [5]),
    ),
    "both at once": (
        gdx.schedules.join_schedules([gdx.schedules.constant_schedule(0.5)] * 2, [3]),
        {"boundaries": [], "schedules": [gdx.schedules.constant_schedule(0.25)]},
        gdx.schedules.join_schedules([gdx.schedules.constant_schedule(0.25)], []),
    ),
    "inside": (
        gdx.chain(gdx.adam(gdx.schedules.piecewise_constant_schedule(1.0, {4: 0.5}))),
        {"boundaries_and_scales": {4: 0.25, 9: 0.5}},
        gdx.chain(gdx.adam(gdx.schedules.piecewise_constant_schedule(1.0, {4: 0.25, 9: 0.5}))),
    ),
    "transforms": (
        WRAPPED["partition"][0],
        {"transforms": {"a": gdx.sgd(0.5), "z": LION}, "param_labels": {"w": "z", "b": "a"}},
        gdx.value(optax.partition)({"a": gdx.sgd(0.5), "z": LION}, {"w": "z", "b": "a"}),
    ),
    "a chain": (CLIPPED, {"transforms": (LION,)}, gdx.chain(LION)),
    "numbers": (
        gdx.value(optax.contrib.prodigy)(),
        {"betas": (0.5, 0.75)},
        gdx.value(optax.contrib.prodigy)(betas=(0.5, 0.75)),
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_container_is_replaced_whole(name):
    before, changes, after = WHOLE[name]
    assert before != after == before.replace(**changes) and hash(after) == hash(before.replace(**changes))


def test_names_of_numbers_go_before_those_of_containers():
    tx = gdx.chain(gdx.value(optax.contrib.prodigy)(), lenient(), betas_alone(0.5))
    assert tx.hyperparams["betas"] == 0.5
    assert tx.replace(betas=0.25) == gdx.chain(gdx.value(optax.contrib.prodigy)(), lenient(), betas_alone(0.25))
    assert tx.replace(**{"prodigy.betas": (0.5, 0.75)}).hyperparams["betas.1"] == 0.75


@gdx.value
def betas_alone(betas: float):
    return optax.sgd(betas)


@pytest.mark.parametrize("way", ["%s", "%r", "%a", "{}", "{!r}", "{!a}"])
@pytest.mark.parametrize("tx", [LION, CLIPPED, gdx.scale_by_adam()], ids=repr)
def test_is_shown_as_its_call(tx, way):
    assert (way % tx if "%" in way else way.format(tx)) == repr(tx)


@pytest.mark.parametrize("make", [optax.adam, optax.lion, gdx.adam], ids=lambda make: make.__module__.split(".")[0])
def test_a_dtype_by_any_of_its_names_is_one_value(make):
    txs = [gdx.value(make)(0.1, mu_dtype=dtype) for dtype in ("bfloat16", jnp.bfloat16, np.dtype("bfloat16"))]
    assert len(set(txs)) == 1
    assert {repr(tx) for tx in txs} == {f"{make.__name__}(learning_rate=0.1, mu_dtype='bfloat16')"}
    assert gdx.stack(txs).hyperparams["learning_rate"].shape == (3,)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_state_in_half_precision_meets_wider_updates(dtype):
    """novograd's `jax.lax.cond` compares the dtypes of its state and of what it works out."""
    params = {"w": jnp.arange(1.0, 7.0).reshape(2, 3).astype(dtype)}
    for tx in (gdx.value(optax.novograd)(0.1), gdx.chain(optax.novograd(0.1))):
        state = tx.init(params)
        updates, after = jax.jit(tx.update)(params, state, params)
        assert [x.dtype for x in jax.tree.leaves((updates, after))] == [
            x.dtype for x in jax.tree.leaves((params, state))
        ]
        assert bool(jnp.all(jnp.isfinite(updates["w"]))) and bool(jnp.all(updates["w"] < 0))
