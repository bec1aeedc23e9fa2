"""gdx.value: any optimizer, link or wrapper of optax as a value."""

import functools
import inspect
import pickle

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
    tx = gdx.value(optax.sgd)(jnp.float32(0.1))
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
    "an unknown argument": (lambda: LION.replace(lr=3), ValueError, r"lion\.replace: 'lr' is unknown; choose from"),
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
