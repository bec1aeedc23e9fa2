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
EIGHT_BIT = {"mu_dtype": gdx.storage.SignedFourthRoot8(**BLOCKS), "nu_dtype": gdx.storage.FourthRoot8(**BLOCKS)}
BFLOAT16 = {"mu_dtype": "bfloat16", "nu_dtype": gdx.storage.StochasticBfloat16()}

# the element-wise family, with the dtype of the parameters
ELEMENTWISE = {
    "momentum": (gdx.momentum(0.1, 0.9), "float32"),
    "8bit momentum": (gdx.momentum(0.1, 0.9, accumulator_dtype=EIGHT_BIT["mu_dtype"]), "float32"),
    "8bit sgd": (gdx.sgd(0.1, 0.9, True, EIGHT_BIT["mu_dtype"]), "float32"),
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
@pytest.mark.parametrize("name", ["8bit momentum", "8bit", "stochastic"])
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
FURTHER = {
    "w": P("data", "model"),
    "stack": P(None, ("model", "data")),  # rather than rows of 16
    "wide": P(None, "data"),
    "odd": P(),
    "s": P(),
}


@both_kinds
@pytest.mark.parametrize("name", ["adamw", "8bit"])
def test_parameters_that_are_split_themselves(name, kind):
    """Moments are split over both axes, and the parameters stay as they are."""
    tx, dtype = ELEMENTWISE[name]
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    sharded = gdx.sharding.shard_state(tx, mesh, specs=None if kind is EXPLICIT else OWN)
    params, *gradients = (put(make_params(dtype, seed), mesh, OWN) for seed in range(4))
    found, expected = run(sharded, params, gradients), unsharded_run(name)

    moments = optax.tree.get(found.start, "mu")
    assert {key: jax.tree.leaves(moments[key])[0].spec for key in SHAPES} == FURTHER
    sent = set(collectives(found.text))
    assert {operation for operation, _ in sent} == {"all-gather"}
    assert max(size for _, size in sent) == math.prod(SHAPES["w"]) / 2
    assert_same_bits((found.params, found.state), (expected.params, expected.state))
    for key, p in found.params.items():
        assert p.sharding.is_equivalent_to(NamedSharding(mesh, OWN[key]), p.ndim)


OPTAX = {
    "adam": optax.adam(0.1),
    "adafactor": optax.adafactor(0.1, min_dim_size_to_factor=16),
    "lion": optax.lion(0.1),
    "muon": optax.contrib.muon(0.1),
    "lamb": optax.lamb(0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1)),
    "multi_steps": optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation(),
    "masked": optax.masked(optax.adam(0.1), {"w": True, "wide": False, "odd": True}),
    "partition": optax.partition({"a": optax.adam(0.1), "b": optax.sgd(0.1, 0.9)}, {"w": "a", "wide": "b", "odd": "a"}),
    "inject": optax.inject_hyperparams(optax.adam)(0.1),
    "noisy": optax.noisy_sgd(0.1, eta=0.01, key=0),
    "schedule_free": optax.contrib.schedule_free_adamw(0.1),
    "finite": optax.apply_if_finite(optax.adam(0.1), 3),
    "lookahead-like ema": optax.chain(optax.trace(0.9), optax.ema(0.9)),
    "lbfgs": optax.chain(optax.scale_by_lbfgs(memory_size=3), optax.scale(-0.1)),
}
FEW = {"w": (16, 64), "wide": (3, 64), "odd": (7,)}


@pytest.mark.parametrize("name", OPTAX)
def test_state_of_any_transform_of_optax_is_split(name):
    """All of it that follows a parameter which divides, also a history of gradients."""
    with jax.numpy_dtype_promotion("standard"):
        params = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in FEW.items()}
        state = jax.eval_shape(OPTAX[name].init, params)
        found = gdx.sharding.state_shardings(OPTAX[name], params, AbstractMesh((8,), ("data",)))
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(found)):
        spec = {(16, 64): ("data",), (3, 64): (None, "data")}.get(leaf.shape[-2:], ())
        assert sharding.spec == P(*[None] * (len(leaf.shape) - 2) * bool(spec), *spec)


@pytest.mark.parametrize("name", ["adafactor", "muon", "clipped", "multi_steps", "partition"])
def test_steps_of_transforms_of_optax(name):
    """Those of an unsharded run, to within the rounding of sums in another order."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        mesh, tx = make_mesh(), OPTAX[name]
        params, *gradients = (make_params(seed=seed, shapes=FEW) for seed in range(3))
        found = run(gdx.sharding.shard_state(tx, mesh), put(params, mesh), [put(g, mesh) for g in gradients])
        expected = run(tx, params, gradients)
    for a, b in zip(jax.tree.leaves((found.params, found.state)), jax.tree.leaves((expected.params, expected.state))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert all(p.sharding.is_fully_replicated for p in jax.tree.leaves(found.params))
    assert "all-to-all" not in {operation for operation, _ in collectives(found.text)}


@pytest.mark.parametrize("name", ["adafactor", "multi_steps"])
def test_explicit_axes_around_any_transform(name):
    """Types would not agree inside all of them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        mesh, tx = make_mesh(8, EXPLICIT), OPTAX[name]
        params, g = (put(make_params(seed=seed, shapes=FEW), mesh) for seed in range(2))
        tx = gdx.sharding.shard_state(tx, mesh)
        updates, _ = jax.jit(tx.update)(g, tx.init(params), params)
    assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, params)


@both_kinds
def test_a_search_along_a_line(kind):
    """With explicit axes as its docstring says: the gradient in the state has another type than a new one."""
    mesh, tx = make_mesh(8, kind), optax.lbfgs(memory_size=3)
    params, batch = make_params(shapes=FEW), jnp.linspace(0.5, 2, 64)

    def loss(params, batch):
        return sum(
            jnp.sum((jnp.expand_dims(batch[: p.shape[-1]], range(p.ndim - 1)) * p - 1) ** 2) for p in params.values()
        )

    def trained(tx, params, batch, typed):
        @jax.jit
        def step(params, state):
            value, g = optax.value_and_grad_from_state(loss)(params, batch, state=typed(state))
            updates, state = tx.update(g, state, params, value=value, grad=g, value_fn=loss, batch=batch)
            return optax.apply_updates(params, updates), state

        state = tx.init(params)
        for _ in range(3):
            params, state = step(params, state)
        return params, state

    def typed(state):
        return optax.tree.set(state, grad=jax.reshard(optax.tree.get(state, "grad"), NamedSharding(mesh, P())))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = trained(tx, params, batch, lambda state: state)
        sharded, on_mesh = gdx.sharding.shard_state(tx, mesh), put({**params, "batch": batch}, mesh)
        batch = on_mesh.pop("batch")
        found = trained(sharded, on_mesh, batch, typed if kind is EXPLICIT else lambda state: state)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert optax.tree.get(found[1], "diff_params_memory")["w"].sharding.spec[1] == "data"


@pytest.mark.parametrize("place", ["chain", "masked", "partition", "TrainState", "scan"])
def test_inside_what_is_built_around_it(place):
    mesh = make_mesh()
    alone, params, g = gdx.adam(0.1), make_params(shapes=FEW), make_params(seed=1, shapes=FEW)
    labels = {"w": "a", "wide": "b", "odd": "a"}
    around = {
        "masked": lambda tx: optax.masked(tx, {"w": True, "wide": True, "odd": False}),
        "partition": lambda tx: optax.partition({"a": tx, "b": optax.sgd(0.1)}, labels),
    }.get(place, lambda tx: optax.chain(optax.clip(0.5), tx))

    def trained(tx, params, g):
        tx = around(tx)
        if place == "TrainState":
            train_state = TrainState.create(apply_fn=None, params=params, tx=tx)
            train_state = jax.jit(lambda s, g: s.apply_gradients(grads=g))(train_state, g)
            return train_state.params, train_state.opt_state
        state = tx.init(params)
        if place == "scan":
            return jax.jit(lambda c: jax.lax.scan(lambda c, _: (one_step(tx, *c, g), None), c, None, 3)[0])(
                (params, state)
            )
        return jax.jit(lambda *args: one_step(tx, *args))(params, state, g)

    found = trained(gdx.sharding.shard_state(alone, mesh), put(params, mesh), put(g, mesh))
    assert_same_bits(found, trained(alone, params, g))
    moments = [leaf for leaf in jax.tree.leaves(found[1]) if leaf.shape == FEW["w"]]
    assert moments and all(leaf.sharding.spec[0] == "data" for leaf in moments)
    assert all(p.sharding.is_fully_replicated for p in jax.tree.leaves(found[0]))


@both_kinds
def test_shardings_for_a_restore_are_those_of_init(kind):
    mesh = make_mesh(8, kind)
    params = put(make_params(), mesh)
    tx = gdx.sharding.shard_state(gdx.adamw(1e-2, **EIGHT_BIT), mesh)
    state = tx.init(params)
    for given in (tx.tx, tx):
        abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
        found = gdx.sharding.state_shardings(given, abstract, mesh)
        assert jax.tree.structure(found) == jax.tree.structure(state)
        for sharding, leaf in zip(jax.tree.leaves(found), jax.tree.leaves(state)):
            assert sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


def test_the_report_counts_what_devices_hold():
    mesh, tx = make_mesh(), gdx.adamw(1e-2, **EIGHT_BIT)
    params = put(make_params(), mesh)
    state = gdx.sharding.shard_state(tx, mesh).init(params)
    found = gdx.sharding.report(tx, params, mesh)
    assert found.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert found.nbytes_per_device == on_device(state)
    whole = [leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.sharding.is_fully_replicated]
    assert found.nbytes_replicated == sum(whole)
    assert [p.nbytes for p in found.replicated] == sorted(whole, reverse=True)
    reasons = {p.path: p.why for p in found.replicated}
    assert reasons["[0].count"] == "a scalar"
    assert reasons["[0].mu['odd']"] == "no dimension of (7,) divides into 8"
    assert f"state of {found.nbytes:,} bytes: {found.nbytes_per_device:,} on each device" in repr(found)


def test_the_report_says_why_blocks_are_not_cut():
    tx, p = gdx.adam(0.1, **EIGHT_BIT), jax.ShapeDtypeStruct((3, 320), "float32")
    found = gdx.sharding.report(tx, p, AbstractMesh((4,), ("data",)))
    reasons = {place.path: place.why for place in found.replicated}
    assert reasons["[0].mu.codes"] == "no dimension of (3, 320) divides into 4 parts of whole blocks"


def test_the_report_stays_short():
    params = [jax.ShapeDtypeStruct((7,), "float32")] * 500
    assert len(repr(gdx.sharding.report(gdx.adam(0.1), params, AbstractMesh((8,), ("data",)))).splitlines()) == 22


def init(**kwargs):
    mesh, params = make_mesh(), put(make_params(shapes=FEW), make_mesh())
    return gdx.sharding.shard_state(**{"tx": gdx.adam(0.1), "mesh": mesh, **kwargs}).init(params)


def other_mesh():
    return jax.make_mesh((4,), ("data",), axis_types=(AUTO,), devices=jax.devices()[4:])


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (lambda: init(axis="dat"), ValueError, r"shard_state: the mesh has no axis 'dat'; expected one of 'data'"),
        (lambda: init(mesh=8), TypeError, r"shard_state: mesh is 8; expected a mesh of devices, .*jax\.make_mesh"),
        (lambda: init(tx=0.1), TypeError, r"shard_state: tx is 0\.1; expected a transform"),
        (lambda: init(specs={"w": "data"}), TypeError, r"specs is 'data' at \['w'\]; expected a PartitionSpec, as in"),
        (lambda: init(specs={"w": P()}), ValueError, r"specs has no PartitionSpec for the parameter at \['odd'\]"),
        (
            lambda: init(specs=P("model")),
            ValueError,
            r"specs has P\('model'\S* at \['odd'\], but the mesh no axis 'model'",
        ),
        (
            lambda: init(mesh=other_mesh()),
            ValueError,
            r"shard_state: the parameter at \['odd'\] is on .*'data': 8.*, expected on .*'data': 4.*jax\.device_put",
        ),
        (lambda: init(specs=P(None, "data")), ValueError, r"the parameter at \['odd'\] has the shape \(7,\), which"),
        (
            lambda: gdx.sharding.state_shardings(gdx.adam(0.1), make_params(), make_mesh(), "model"),
            ValueError,
            r"state_shardings: the mesh has no axis 'model'",
        ),
        (
            lambda: gdx.sharding.report(gdx.adam(0.1), make_params(), make_mesh(), "x"),
            ValueError,
            r"report: the mesh has",
        ),
        (
            lambda: gdx.sharding.state_shardings(gdx.adam(0.1), put(make_params(), make_mesh(4)), make_mesh()),
            ValueError,
            r"state_shardings: the parameter at \['odd'\] is on .*'data': 4.*, expected on .*'data': 8",
        ),
    ],
)
def test_bad_arguments(wrong, error, words):
    with pytest.raises(error, match=words):
        wrong()


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("other", [optax.sgd(0.1, 0.9), optax.adam(0.1, nesterov=True), optax.adafactor(0.1)])
def test_the_state_of_another_optimizer(other, jitted):
    """Also where the transform is optax's, which would take it apart by position."""
    mesh, params = make_mesh(), put(make_params(shapes=FEW), make_mesh())
    tx = gdx.sharding.shard_state(optax.chain(optax.scale_by_rss(), optax.scale(0.1), optax.identity()), mesh)
    update = jax.jit(tx.update) if jitted else tx.update
    with pytest.raises((TypeError, ValueError), match=r"shard_state: the state is .*expected .*Pass the state that"):
        update(params, other.init(params), params)


def test_a_state_of_other_parameters():
    mesh, params = make_mesh(), put(make_params(shapes=FEW), make_mesh())
    tx = gdx.sharding.shard_state(optax.adam(0.1), mesh)
    wrong = tx.init({**params, "w": params["w"][:8]})
    with pytest.raises(
        ValueError, match=r"the state is float32\[8,64\] at \[0\]\.mu\['w'\], expected the shape \(16, 64\)"
    ):
        jax.jit(tx.update)(params, wrong, params)


def test_parameters_on_one_of_the_devices():
    params = jax.device_put(make_params(shapes=FEW), jax.devices()[3])
    with pytest.raises(
        ValueError, match=r"parameter at \['odd'\] is on SingleDeviceSharding.*or move them: jax\.device_put"
    ):
        gdx.sharding.shard_state(gdx.adam(0.1), make_mesh()).init(params)


def test_split_parameters_that_jit_would_hide():
    mesh = make_mesh()
    params = put(make_params(shapes=FEW), mesh, {"w": P("data")})
    with pytest.raises(
        ValueError, match=r"parameter at \['w'\] is split as P\('data',?\), which jax\.jit hides.*specs="
    ):
        gdx.sharding.shard_state(gdx.adam(0.1), mesh).init(params)


def test_inside_shard_map():
    mesh, params = make_mesh(), put(make_params(shapes=FEW), make_mesh())
    tx = gdx.sharding.shard_state(gdx.adam(0.1), mesh)
    with pytest.raises(ValueError, match=r"inside jax\.shard_map over 'data' an array is one device's part"):
        jax.shard_map(tx.init, mesh=mesh, in_specs=P(), out_specs=P())(params)


def test_it_is_a_value():
    tx = gdx.sharding.shard_state(gdx.adam(0.1), make_mesh())
    assert tx == gdx.sharding.shard_state(gdx.adam(0.1), make_mesh())
    assert tx != gdx.sharding.shard_state(gdx.adam(0.1), make_mesh(4))
    assert repr(tx).startswith(
        "shard_state(tx=adam(learning_rate=0.1), mesh=Mesh(axis_sizes=(8,), axis_names=('data',)"
    )
    assert tx.replace(learning_rate=0.2).hyperparams["learning_rate"] == 0.2


@both_kinds
@pytest.mark.parametrize("where", [lambda f: f, jax.jit], ids=["eager", "jitted"])
def test_parameters_on_no_mesh_yet(kind, where):
    params = make_params(shapes=FEW)
    tx = gdx.sharding.shard_state(gdx.momentum(0.1, 0.9), make_mesh(8, kind))
    state = where(tx.init)(params)
    updates, after = where(tx.update)(params, state, params)
    for kept in (state, after):
        moments = optax.tree.get(kept, "trace")
        assert {"data"} == set(moments["w"].sharding.spec) - {None} == set(moments["wide"].sharding.spec) - {None}
    assert all(
        update.sharding.is_fully_replicated and len(update.sharding.device_set) == 8 for update in updates.values()
    )
