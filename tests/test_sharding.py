"""State over a mesh: its size, place and bits, what the compiled step sends, and what is refused."""

import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import gdx
from gdx.compat import unregister_event_duration_listener
from tests.contract.table import assert_same_bits, one_step
from tests.sharded import (
    AUTO,
    EIGHT_BIT,
    ELEMENTWISE,
    EXPLICIT,
    FEW,
    SHAPES,
    both_kinds,
    collectives,
    every_case,
    make_mesh,
    make_params,
    on_device,
    put,
    run,
    sharded_run,
    step_of,
    unsharded_run,
)


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
        unregister_event_duration_listener(listener)


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


@both_kinds
@pytest.mark.parametrize("own", [P(), P(None, "model")], ids=["whole", "split"])
def test_training_returns_parameters_as_they_were(kind, own):
    """Where they are split as the moments are, the next call compiles again and `init` refuses them."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    params = jax.device_put({"w": jnp.ones((64, 512))}, NamedSharding(mesh, own))
    tx = gdx.sharding.shard_state(gdx.adamw(1e-2), mesh, specs=None if kind is EXPLICIT else own)
    batches = jax.device_put(jnp.ones((5, 32, 64)), NamedSharding(mesh, P(None, "data")))

    def loss(params, batch):
        return jnp.mean(jnp.tanh(batch @ params["w"]) ** 2)

    state = tx.init(params)
    found, after, *_ = gdx.train(loss, tx, params, batches, state=state)
    for was, now in zip(jax.tree.leaves((params, state)), jax.tree.leaves((found, after)), strict=True):
        assert now.sharding.is_equivalent_to(was.sharding, was.ndim)
    tx.init(found)


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


MIXTURES = pytest.mark.parametrize("kinds", [(AUTO, EXPLICIT), (EXPLICIT, AUTO)], ids=["model typed", "data typed"])


@MIXTURES
@pytest.mark.parametrize("where", [lambda f: f, jax.jit], ids=["eager", "jitted"])
@pytest.mark.parametrize("own", [{}, OWN], ids=["whole", "split"])
def test_axes_of_both_types(kinds, where, own):
    tx, mesh = gdx.adamw(1e-2), jax.make_mesh((4, 2), ("data", "model"), axis_types=kinds)
    specs = OWN if own and kinds[1] is AUTO else None
    sharded, (params, g) = gdx.sharding.shard_state(tx, mesh, specs=specs), (make_params(seed=i) for i in range(2))
    placed, start = put(params, mesh, own), tx.init(params)
    state = sharded.init(placed)
    found = where(sharded.update)(put(g, mesh, own), state, placed)
    assert_same_bits(found, where(tx.update)(g, start, params))
    for was, now in zip(jax.tree.leaves((placed, state)), jax.tree.leaves(found), strict=True):
        assert now.sharding.is_equivalent_to(was.sharding, was.ndim) and jax.typeof(now) == jax.typeof(was)


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


def init(**kwargs):
    mesh, params = make_mesh(), put(make_params(shapes=FEW), make_mesh())
    return gdx.sharding.shard_state(**{"tx": gdx.adam(0.1), "mesh": mesh, **kwargs}).init(params)


ABSTRACT = jax.sharding.AbstractMesh((8,), ("data",))


def other_mesh():
    return jax.make_mesh((4,), ("data",), axis_types=(AUTO,), devices=jax.devices()[4:])


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (lambda: init(axis="dat"), ValueError, r"shard_state: axis is 'dat', and the mesh has no such.* axis='data'$"),
        (lambda: init(mesh=8), TypeError, r"shard_state: mesh is 8; expected a mesh of devices, .*jax\.make_mesh"),
        (lambda: init(tx=0.1), TypeError, r"shard_state: tx is 0\.1; expected a transform"),
        (
            lambda: init(tx=optax.MultiSteps(gdx.adam(0.1), 2)),
            TypeError,
            r"shard_state: tx is a MultiSteps, no transform; pass its \.gradient_transformation\(\)",
        ),
        (lambda: init(specs={"w": "data"}), TypeError, r"specs is 'data' at \['w'\]; expected a PartitionSpec, as in"),
        (lambda: init(specs={"w": P()}), ValueError, r"specs has no PartitionSpec for the parameter at \['odd'\]"),
        (
            lambda: init(specs=P("model")),
            ValueError,
            r"specs has \w+\('model',?\) at \['odd'\], but the mesh no axis 'model'",
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
            r"state_shardings: axis is 'model', and the mesh has no such axis; expected axis='data'$",
        ),
        (
            lambda: gdx.describe(gdx.adam(0.1), make_params(), make_mesh(), "x"),
            ValueError,
            r"describe: axis is 'x', and the mesh has no such axis; expected axis='data'$",
        ),
        (
            lambda: gdx.sharding.state_shardings(gdx.adam(0.1), put(make_params(), make_mesh(4)), make_mesh()),
            ValueError,
            r"state_shardings: the parameter at \['odd'\] is on .*'data': 4.*, expected on .*'data': 8",
        ),
        *(
            (lambda ask=ask, given=given: ask(gdx.adam(0.1), *given), TypeError, f"{ask.__name__}: {words}")
            for ask in (gdx.describe, gdx.sharding.state_shardings)
            for given, words in (
                ((make_params(), "data"), "mesh is 'data'; expected a mesh of devices"),
                ((make_params(), 8), "mesh is 8; expected a mesh of devices"),
                ((make_params(), ABSTRACT, "data", "data"), "specs is 'data' at the root; expected a PartitionSpec"),
                ((make_params(), ABSTRACT, "data", ABSTRACT), "specs is .* at the root; expected a PartitionSpec"),
                (("data", ABSTRACT), "params is 'data' at the root; expected arrays"),
                (({"w": abs}, ABSTRACT), r"params is .* at \['w'\]; expected arrays"),
                ((ABSTRACT, ABSTRACT), "params is .* at the root; expected arrays"),
            )
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


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_split_parameters_that_jit_would_hide(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, AUTO))
    params = put(make_params(shapes=FEW), mesh, {"w": P("model")})
    with pytest.raises(
        ValueError,
        match=r"parameter at \['w'\] is split as \w+\('model',?\), which jax\.jit hides.*specs=.*out_shardings=",
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
