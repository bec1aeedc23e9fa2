"""State over a mesh: its size, place and bits, what the compiled step sends, and what is refused."""

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

import gdx
from tests.contract.table import assert_same_bits, one_step

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
P = PartitionSpec
both_kinds = pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["automatic", "explicit"])

BLOCKS = {"block": 64, "minimum_size": 1}
EIGHT_BIT = {"mu_dtype": gdx.storage.SignedSqrt8(**BLOCKS), "nu_dtype": gdx.storage.FourthRoot8(**BLOCKS)}
BFLOAT16 = {"mu_dtype": "bfloat16", "nu_dtype": gdx.storage.StochasticBfloat16()}

# the element-wise family, with the dtype of the parameters
ELEMENTWISE = {
    "momentum": (gdx.momentum(0.1, 0.9), "float32"),
    "adamw": (gdx.adamw(optax.linear_schedule(1e-2, 0.0, 10)), "float32"),
    "8bit": (gdx.adamw(1e-2, **EIGHT_BIT), "float32"),
    "stochastic": (gdx.chain(gdx.adamw(1e-2, **BFLOAT16), gdx.round_stochastically()), "bfloat16"),
    "compensated": (gdx.chain(gdx.momentum(0.1, 0.9), gdx.round_with_compensation()), "bfloat16"),
    "master": (gdx.chain(gdx.momentum(0.1, 0.9), gdx.round_with_master()), "bfloat16"),
}
CASES = [(name, AUTO, 8) for name in ELEMENTWISE] + [(name, EXPLICIT, 8) for name in ("adamw", "8bit", "stochastic")]
every_case = pytest.mark.parametrize(("name", "kind", "count"), CASES)

SHAPES = {"w": (64, 512), "stack": (3, 16, 64), "wide": (3, 1024), "odd": (7,), "s": ()}


def make_mesh(count=8, kind=AUTO):
    return jax.make_mesh((count,), ("data",), axis_types=(kind,), devices=jax.devices()[:count])


def make_params(dtype="float32", seed=0, shapes=SHAPES):
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.standard_normal(shape).astype("float32"), dtype) for name, shape in shapes.items()}


def put(tree, mesh, specs=None):
    """A copy on the mesh, so that donating it takes nothing from the original."""
    place = lambda name: NamedSharding(mesh, (specs or {}).get(name, P()))  # noqa: E731
    return {name: jax.device_put(np.array(x), place(name)) for name, x in tree.items()}


def step_of(tx):
    return jax.jit(functools.partial(one_step, tx), donate_argnums=(0, 1))


class Run(NamedTuple):
    """Three steps, and the program that made them."""

    start: Any
    params: Any
    state: Any
    text: str


def run(tx, params, gradients):
    start = tx.init(params)
    compiled = step_of(tx).lower(params, start, gradients[0]).compile()
    held = jax.tree.map(lambda x: x.sharding, start)
    state = start
    for g in gradients:
        params, state = compiled(params, state, g)
    return Run(held, params, state, compiled.as_text())


@functools.cache
def sharded_run(name, kind, count):
    tx, dtype = ELEMENTWISE[name]
    mesh = make_mesh(count, kind)
    params, *gradients = (put(make_params(dtype, seed), mesh) for seed in range(4))
    return run(gdx.sharding.shard_state(tx, mesh), params, gradients)


@functools.cache
def unsharded_run(name):
    tx, dtype = ELEMENTWISE[name]
    params, *gradients = (make_params(dtype, seed) for seed in range(4))
    return run(tx, params, gradients)


def on_device(tree):
    """Bytes of the arrays of a tree on the first device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def collectives(text):
    """The collective operations of a compiled program, each with its number of elements."""
    operations = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return [
        (operation, max(math.prod(map(int, filter(None, d.split(",")))) for d in re.findall(r"\[([\d,]*)\]", shape)))
        for shape, operation in re.findall(rf"= (.*?) ({operations})(?:-start)?\(", text)
    ]


@every_case
def test_steps_have_the_bits_of_an_unsharded_run(name, kind, count):
    found, expected = sharded_run(name, kind, count), unsharded_run(name)
    assert_same_bits((found.params, found.state), (expected.params, expected.state))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", ["8bit", "stochastic"])
def test_few_bits_are_the_same_on_any_number_of_devices(name, count):
    found, expected = sharded_run(name, AUTO, count), sharded_run(name, AUTO, 8)
    assert_same_bits((found.params, found.state), (expected.params, expected.state))


@every_case
def test_each_device_holds_its_share(name, kind, count):
    """What divides is divided, within 1 %; scalars, the odd leaf and the count are whole."""
    state = sharded_run(name, kind, count).state
    kept = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 7]
    assert on_device(kept) <= 1.01 * sum(leaf.nbytes for leaf in kept) / count
    assert on_device(state) - on_device(kept) <= 100


@every_case
def test_where_it_was_born_it_stays(name, kind, count):
    found = sharded_run(name, kind, count)
    for before, after in zip(jax.tree.leaves(found.start), jax.tree.leaves(found.state), strict=True):
        assert after.sharding.is_equivalent_to(before, after.ndim)
    assert all(p.sharding.is_fully_replicated for p in jax.tree.leaves(found.params))


@every_case
def test_what_the_compiled_step_sends(name, kind, count):
    """Each parameter's update is gathered once, and nothing else is sent."""
    sent = collectives(sharded_run(name, kind, count).text)
    assert sorted(sent) == sorted(("all-gather", math.prod(SHAPES[key])) for key in ("w", "stack", "wide"))


@both_kinds
def test_it_is_born_in_its_places_outside_jit_too(kind):
    mesh = make_mesh(8, kind)
    params = put(make_params(), mesh)
    tx = gdx.sharding.shard_state(gdx.adamw(1e-2), mesh)
    before = {id(array) for array in jax.live_arrays()}
    state = tx.init(params)
    new = [array for array in jax.live_arrays() if id(array) not in before and array.ndim]
    assert max(map(on_device, new)) == state[0].mu["w"].nbytes // 8
    # one program makes it, so that nothing whole is made on the way
    assert [equation.primitive.name for equation in jax.make_jaxpr(tx.init)(params).eqns] == ["jit"]


@both_kinds
def test_one_compile_with_everything_donated(kind):
    mesh, compiles = make_mesh(8, kind), []
    params, g = put(make_params(), mesh), put(make_params(seed=1), mesh)
    tx = gdx.sharding.shard_state(gdx.adamw(1e-2), mesh)
    step, state = step_of(tx), tx.init(params)
    params, state = step(params, state, g)
    listener = lambda event, *_, **__: compiles.append(event) if "backend_compile" in event else None  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        for _ in range(2):
            given_up = jax.tree.leaves((params, state))
            params, state = step(params, state, g)
            assert all(leaf.is_deleted() for leaf in given_up)
        assert not compiles
        jax.jit(lambda x: x - 1)(jnp.ones(3))
        assert compiles  # the listener listens
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


def test_hyperparameters_compile_nothing():
    """The transform is an argument of the step, as any."""
    mesh, traces = make_mesh(), []
    params = put(make_params(), mesh)

    @jax.jit
    def step(tx, params, state, g):
        traces.append(1)
        return one_step(tx, params, state, g)

    tx = gdx.sharding.shard_state(gdx.momentum(0.1, 0.9), mesh)
    for rate in (0.1, 0.2):
        step(tx.replace(learning_rate=rate), params, tx.init(params), params)
    assert len(traces) == 1


def test_eager_steps():
    mesh = make_mesh()
    params, g = put(make_params(), mesh), put(make_params(seed=1), mesh)
    tx = gdx.sharding.shard_state(gdx.momentum(0.1, 0.9), mesh)
    start = tx.init(params)
    updates, state = tx.update(g, start, params)
    expected, _ = tx.tx.update(make_params(seed=1), tx.tx.init(make_params()), make_params())
    assert_same_bits(updates, expected)
    for before, after in zip(jax.tree.leaves(start), jax.tree.leaves(state)):
        assert after.sharding == before.sharding
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(updates))


# over a model axis of 2, and how a moment is then split over a data axis of 4
OWN = {"w": P(None, "model"), "stack": P(None, "model"), "wide": P(), "odd": P(), "s": P()}
FURTHER = {"w": P("data", "model"), "wide": P(None, "data"), "odd": P(), "s": P()}


@both_kinds
@pytest.mark.parametrize(
    ("name", "stack"),
    # 64 is one block of 8-bit codes, which is not cut
    [("adamw", P(None, "model", "data")), ("8bit", P(None, ("model", "data")))],
)
def test_parameters_that_are_split_themselves(name, stack, kind):
    """Moments are split over both axes, and the parameters stay as they are."""
    tx, dtype = ELEMENTWISE[name]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    sharded = gdx.sharding.shard_state(tx, mesh, specs=None if kind is EXPLICIT else OWN)
    params, *gradients = (put(make_params(dtype, seed), mesh, OWN) for seed in range(4))
    found, expected = run(sharded, params, gradients), unsharded_run(name)

    moments = optax.tree.get(found.start, "mu")
    assert {key: jax.tree.leaves(moments[key])[0].spec for key in SHAPES} == {**FURTHER, "stack": stack}
    sent = set(collectives(found.text))
    assert {operation for operation, _ in sent} == {"all-gather"}
    assert max(size for _, size in sent) == math.prod(SHAPES["w"]) / 2
    assert_same_bits((found.params, found.state), (expected.params, expected.state))
    for key, p in found.params.items():
        assert p.sharding.is_equivalent_to(NamedSharding(mesh, OWN[key]), p.ndim)
