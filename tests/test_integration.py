"""gdx goes where optax goes, unchanged: optax's wrappers, flax, equinox, and JAX's transformations."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax import export

import gdx
from tests.contract.table import assert_same_bits

PARAMS = {"w": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4), "b": np.zeros(4, np.float32)}
ALL = [
    gdx.gradient_descent(0.1),
    gdx.sgd(0.1, momentum=0.9, nesterov=True),
    gdx.momentum(0.1),
    gdx.nesterov(0.1),
    gdx.adam(0.1),
    gdx.adamw(0.1, weight_decay=0.01),
]
every = pytest.mark.parametrize("tx", ALL, ids=lambda tx: type(tx).__name__)


def gradient(params):
    return jax.tree.map(lambda p: jnp.sin(p) + 0.5, params)


def run(tx, steps=4):
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params


RATES = [0.1, 0.2, jnp.asarray(0.3)]  # another one compiles nothing, and an array is as good as a number


def run_with_rates(tx):
    return run(tx.replace(learning_rate=lambda count: jnp.asarray(RATES)[count]), steps=3)


@every
def test_optax_wrappers(tx):
    alone = run(tx)
    assert_same_bits(run(optax.chain(optax.identity(), tx, optax.identity())), alone)
    assert_same_bits(run(optax.partition({"x": tx, "y": tx}, {"w": "x", "b": "y"})), alone)
    # a conditional keeps the parameters from being updated in one fused multiply-add with the step
    np.testing.assert_allclose(run(optax.apply_if_finite(tx, 3))["w"], alone["w"], rtol=1e-5)
    masked = run(
        optax.chain(
            optax.masked(tx, {"w": True, "b": False}), optax.masked(optax.set_to_zero(), {"w": False, "b": True})
        )
    )
    assert_same_bits(masked["w"], alone["w"])
    assert_same_bits(masked["b"], jnp.asarray(PARAMS["b"]))
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides by its integer count
        np.testing.assert_allclose(run(optax.MultiSteps(tx, 1))["w"], alone["w"], rtol=1e-5)
        assert not np.array_equal(run(optax.MultiSteps(tx, 2))["w"], alone["w"])


@every
def test_inject_hyperparams_changes_no_bit(tx):
    injected = optax.inject_hyperparams(type(tx))(
        **tx.hyperparams, **({"nesterov": True} if type(tx) is gdx.sgd else {})
    )
    state = injected.init(PARAMS)
    assert set(tx.hyperparams) == set(state.hyperparams)
    assert_same_bits(run(injected), run(tx))


def test_schedule_free():
    for tx in (gdx.sgd(0.1), gdx.adamw(0.1, b1=0.0)):
        found = run(optax.contrib.schedule_free(tx, 0.1, b1=0.9))
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(found))


@every
def test_optax_tree_utilities(tx):
    state = tx.init(PARAMS)
    marked = optax.tree.map_params(tx, lambda x: "param", state, transform_non_params=lambda x: "other")
    moments = [leaf for leaf in jax.tree.leaves(marked) if leaf == "param"]
    assert len(moments) == len([leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 0])
    if isinstance(tx, gdx.adam | gdx.adamw):
        assert_same_bits(optax.tree.get(state, "mu"), jax.tree.map(jnp.zeros_like, PARAMS))
        assert optax.tree.get(state, "count") == 0
        changed = optax.tree.set(state, count=jnp.int32(5))
        assert optax.tree.get(changed, "count") == 5


@every
def test_flax_train_state(tx):
    state = TrainState.create(apply_fn=None, params=jax.tree.map(jnp.asarray, PARAMS), tx=tx)
    traces = []

    @jax.jit
    def step(tx, state):
        traces.append(tx)
        grads = gradient(state.params)
        return state.replace(tx=tx).apply_gradients(grads=grads).replace(tx=state.tx)

    for rate in RATES:
        state = step(tx.replace(learning_rate=rate), state)
    assert len(traces) == 1 and state.tx is tx and state.step == 3
    np.testing.assert_allclose(state.params["w"], run_with_rates(tx)["w"], rtol=1e-6)


@every
def test_flax_nnx_optimizer(tx):
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    nnx.update(model, {"kernel": PARAMS["w"], "bias": PARAMS["b"]})
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(optimizer.tx)
        optimizer.update(model, gradient(nnx.state(model, nnx.Param)))

    for rate in RATES:
        optimizer.tx = nnx.data(jax.device_put(tx.replace(learning_rate=rate)))
        step(model, optimizer)
    assert len(traces) == 1 and optimizer.tx == tx.replace(learning_rate=RATES[-1])
    assert nnx.merge(*nnx.split(optimizer)).tx == optimizer.tx
    np.testing.assert_allclose(model.kernel[...], run_with_rates(tx)["w"], rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        gdx.sgd,
        gdx.adamw,
        gdx.value(optax.lion),
        lambda rate: gdx.chain(gdx.value(optax.clip_by_global_norm)(10 * rate), gdx.scale_by_learning_rate(rate)),
        lambda rate: gdx.momentum(gdx.schedules.linear_schedule(rate, 0.0, transition_steps=10)),
        lambda rate: gdx.unstack(gdx.grid(gdx.sgd, learning_rate=rate * np.ones(2, np.float32)))[0],
    ],
)
def test_flax_takes_arrays_as_it_takes_numbers(make):
    """nnx refuses arrays in what is no data."""
    tx, model = make(jnp.asarray(0.1)), nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    assert tx == make(np.float32(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.state(model, nnx.Param)))(model, optimizer)
    state = TrainState.create(apply_fn=None, params=jax.tree.map(jnp.asarray, PARAMS), tx=tx)
    jax.jit(lambda state: state.apply_gradients(grads=state.params))(state)


def test_flax_nnx_optimizer_with_few_bits():
    """It makes mappings of the codes and scales that a step returns."""
    nu = gdx.storage.FourthRoot8(block=None, axis=None)  # with two arrays of scales
    tx = gdx.adam(0.01, mu_dtype=gdx.storage.SignedFourthRoot8(), nu_dtype=nu)
    model = nnx.Linear(64, 64, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    state = tx.init(params)
    assert isinstance(state[0].mu["kernel"], gdx.storage.Packed)
    for _ in range(3):
        gradients = nnx.grad(lambda m: (m(jnp.ones((1, 64))) ** 2).sum())(model)
        updates, state = tx.update(nnx.to_pure_dict(gradients), state, params)
        params = optax.apply_updates(params, updates)
        optimizer.update(model, gradients)
    assert_same_bits(nnx.to_pure_dict(nnx.state(model, nnx.Param))["kernel"], params["kernel"])


@every
def test_equinox_filter_jit_compiles_once(tx):
    model = eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0))
    traces = []

    @eqx.filter_jit
    def step(tx, model, state):
        traces.append(tx)
        gradients = eqx.filter_grad(lambda m: m(jnp.ones(2)).sum() ** 2)(model)
        updates, state = tx.update(gradients, state, eqx.filter(model, eqx.is_inexact_array))
        return eqx.apply_updates(model, updates), state

    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    for rate in RATES:
        model, state = step(tx.replace(learning_rate=rate), model, state)
    assert len(traces) == 1


@every
def test_gradients_with_respect_to_every_hyperparameter_are_finite(tx):
    """Also where a gradient is exactly zero, and where a decay is."""

    def final(tx):
        params = jax.tree.map(jnp.asarray, PARAMS)
        state = tx.init(params)
        for _ in range(3):
            g = jax.tree.map(lambda p: jnp.where(p > 0, p, jnp.zeros_like(p)), params)
            updates, state = tx.update(g, state, params)
            params = optax.apply_updates(params, updates)
        return sum(jnp.sum(p * p) for p in jax.tree.leaves(params))

    zero = {"b1": 0.0, "b2": 0.0} if "b1" in tx.hyperparams else {}
    for value in (tx, tx.replace(**zero)):
        slopes = jax.grad(final)(value)
        assert type(slopes) is type(tx)
        assert all(np.isfinite(slope) for slope in jax.tree.leaves(slopes))
        assert slopes.learning_rate != 0


@every
def test_jax_transformations(tx):
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = tx.init(params)
    shapes = jax.eval_shape(lambda tx: tx.init(params), tx)
    assert jax.tree.structure(shapes) == jax.tree.structure(state)

    step = jax.jit(lambda tx, g, state, params: tx.update(g, state, params), donate_argnums=(1, 2))
    gradients = gradient(params)
    updates, new_state = step(tx, gradients, state, params)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((gradients, state)))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), new_state) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)

    exported = export.export(jax.jit(lambda tx, g, state, params: tx.update(g, state, params)))(
        tx, gradient(params), tx.init(params), params
    )
    assert_same_bits(exported.call(tx, gradient(params), tx.init(params), params)[0], updates)


@pytest.mark.parametrize("factory", [gdx.gradient_descent, gdx.sgd, gdx.momentum, gdx.nesterov, gdx.adam, gdx.adamw])
def test_one_compile_for_twenty_rates_of_any_spelling(factory):
    traces = []

    @jax.jit
    def step(tx, params):
        traces.append(tx)
        return tx.update(params, tx.init(params), params)[0]

    spellings = [float, np.float64, np.float32, np.float16, jnp.float32, jnp.bfloat16, jnp.float16, jnp.asarray]
    for i in range(20):
        step(factory(spellings[i % len(spellings)]((i + 1) / 32)), jnp.ones(3))
    step(factory(1), jnp.ones(3))
    assert len(traces) == 1
