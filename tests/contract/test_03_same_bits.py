"""Promise 3: the same bits whichever way a hyperparameter arrives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import gdx
from tests.contract.table import Row, assert_same_bits, every_case, every_row, gradients, one_step, scan

STEPS = 200
# of parameters and their gradients, beside those of the table
LOW = (("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float32"))


def trees(row: Row) -> tuple[dict, dict]:
    """Parameters and all gradients, some of them in half precision."""
    params, all_gradients = row.tree(), gradients(STEPS)
    for p, g in LOW:
        params[f"{p} {g}"] = row.tree(seed=2)["w"].astype(p)
        all_gradients[f"{p} {g}"] = gradients(STEPS, seed=3)["w"].astype(g)
    return params, all_gradients


def by_argument(row: Row, settings: dict):
    """The reference: the optimizer is an argument of the compiled program."""
    return jax.jit(scan)(row.make(**settings), *trees(row))


@every_case
def test_a_constant_in_a_closure(row, settings):
    tx = row.make(**settings)
    assert_same_bits(jax.jit(lambda p, g: scan(tx, p, g))(*trees(row)), by_argument(row, settings))


@every_case
def test_a_schedule_returning_that_value(row, settings):
    if not row.takes_schedules:
        pytest.skip("not each of its numbers can be a schedule")
    schedules = {name: (lambda count, value=value: value) for name, value in row.numbers(settings).items()}
    tx = row.make(**{**settings, **schedules})
    assert_same_bits(jax.jit(lambda p, g: scan(tx, p, g))(*trees(row)), by_argument(row, settings))


@every_case
def test_optax_inject_hyperparams(row, settings):
    tx = row.injected(settings)
    assert_same_bits(jax.jit(lambda p, g: scan(tx, p, g))(*trees(row)), by_argument(row, settings))


@every_case
def test_inside_optax_chain(row, settings):
    tx = optax.chain(optax.identity(), row.make(**settings), optax.identity())
    assert_same_bits(jax.jit(lambda p, g: scan(tx, p, g))(*trees(row)), by_argument(row, settings))


@every_case
def test_a_call_per_step(row, settings):
    """A jitted step in a Python loop instead of a scan."""
    step = jax.jit(one_step)
    tx, (params, all_gradients) = row.make(**settings), trees(row)
    state, all_gradients = tx.init(params), jax.tree.map(np.asarray, all_gradients)
    for i in range(STEPS):
        params, state = step(tx, params, state, jax.tree.map(lambda g: g[i], all_gradients))  # noqa: B023
    assert_same_bits(params, by_argument(row, settings))


def batch_of(row: Row, settings: dict):
    """Three optimizers, the first with these settings, every hyperparameter differing."""
    tx = row.make(**settings)
    return jax.tree.map(lambda h: jnp.float32(h) * jnp.array([1.0, 0.5, 0.25], jnp.float32), tx)


@jax.jit
def mapped(batch, p, g):
    return jax.lax.map(lambda tx: scan(tx, p, g), batch)


@every_case
def test_lax_map(row, settings):
    found = mapped(batch_of(row, settings), *trees(row))
    assert_same_bits(jax.tree.map(lambda x: x[0], found), by_argument(row, settings))


lanes = jax.jit(jax.vmap(scan, (0, None, None)))


@every_case
def test_lanes_of_vmap(row, settings):
    batch, (params, g) = batch_of(row, settings), trees(row)
    found = lanes(batch, params, g)
    single = jax.jit(scan)
    for lane in range(3):
        tx = jax.tree.map(lambda h: h[lane], batch)  # noqa: B023
        assert_same_bits(jax.tree.map(lambda x: x[lane], found), single(tx, params, g))  # noqa: B023


@every_row
@hypothesis_settings(max_examples=3)
@given(data=st.data())
def test_any_value(row, data):
    """Constants, which the compiler may fold, against arguments, for drawn values."""
    ranges = {"learning_rate": (0.0, 2.0), "weight_decay": (0.0, 1.0), "schedule_multiplier": (0.0, 1.0)}
    ranges |= {"eps": (0.0, 0.125), "eps_root": (0.0, 0.125), "transition_steps": (1.0, 400.0)}

    def drawn(name: str) -> float:
        least, most = ranges.get(name, (0.0, 0.9990234375))
        return data.draw(st.floats(least, most, width=32, allow_subnormal=False), label=name)

    settings = {name: drawn(name) for name in row.numbers(row.settings[0])}
    tx = row.make(**settings)
    assert_same_bits(jax.jit(lambda p, g: scan(tx, p, g))(*trees(row)), by_argument(row, settings))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("make", [gdx.gradient_descent, gdx.sgd, gdx.adamw, gdx.scale_by_learning_rate])
def test_powers_of_two_as_constants(make, dtype):
    """The product with one is exact in half precision too, where a compiler then takes it."""
    random = np.random.default_rng(2)
    p, g = (jnp.asarray(random.standard_normal((*steps, 16, 33)), dtype) for steps in ((), (STEPS,)))
    for rate in (2.0**-3, 2.0**-13, 2.0**-23):
        for tx in (make(rate), gdx.chain(make(rate), gdx.round_with_compensation())):
            assert_same_bits(jax.jit(lambda p, g: scan(tx, p, g))(p, g), jax.jit(scan)(tx, p, g))  # noqa: B023


@pytest.mark.parametrize(
    "make", [gdx.scale_by_adam, functools.partial(gdx.adamw, 0.01)], ids=["scale_by_adam", "adamw"]
)
@pytest.mark.parametrize("nesterov", [False, True])
def test_many_decays_as_constants(make, nesterov):
    """A few pairs have another correction where the compiler works it out, or another contraction of the moments."""
    random = np.random.default_rng(0)
    scanned = jax.jit(scan)
    params = {"v": jnp.zeros(64), "s": jnp.ones(())}
    g = {name: jnp.asarray(random.standard_normal((100, *p.shape)).astype(np.float32)) for name, p in params.items()}
    for b1, b2 in random.uniform(0.5, 0.9999, (30, 2)).astype(np.float32).tolist():
        tx = make(b1=b1, b2=b2, nesterov=nesterov)
        assert_same_bits(jax.jit(lambda p, g: scan(tx, p, g))(params, g), scanned(tx, params, g))  # noqa: B023


def assert_same_on_scalars(tx):
    """Where nothing is vectorised the compiler contracts sums of two products most freely."""
    random = np.random.default_rng(0)
    scanned, constant = jax.jit(scan), jax.jit(lambda p, g: scan(tx, p, g))
    for p, g in zip(random.standard_normal(40), random.standard_normal((40, 100))):
        arguments = jnp.float32(p), jnp.asarray(g.astype(np.float32))
        assert_same_bits(constant(*arguments), scanned(tx, *arguments))


@pytest.mark.filterwarnings("ignore:.*no leaf fits")
@every_case
def test_a_scalar_leaf_with_constants(row, settings):
    assert_same_on_scalars(row.make(**settings))


@pytest.mark.parametrize("b1", [0.7, 0.8, 0.95])
def test_a_scalar_leaf_with_other_decays(b1):
    assert_same_on_scalars(gdx.adamw(0.01, b1, 0.99))


@every_case
def test_eager_and_jitted_steps_differ_by_one_rounding(row, settings):
    """Eagerly each leaf's step is one program and adding the update another; jitted, XLA contracts that sum."""
    tx, params = row.make(**settings), row.tree()
    g = jax.tree.map(lambda g: g[0], gradients(1))
    updates, _ = tx.update(g, tx.init(params), params)
    eager, _ = one_step(tx, params, tx.init(params), g)
    jitted, _ = jax.jit(one_step)(tx, params, tx.init(params), g)
    for a, b, *terms in zip(*map(jax.tree.leaves, (eager, jitted, params, updates)), strict=True):
        largest = np.max(np.abs(np.stack([a, *terms])), axis=0)
        assert np.all(np.abs(np.asarray(a) - np.asarray(b)) <= np.spacing(largest))
