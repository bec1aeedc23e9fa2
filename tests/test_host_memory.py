"""State in the host's memory: its bits, where each part is, and that leaves are fetched one after the other."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from gdx.checkpoint import Checkpoints
from gdx.compat import memory_kinds
from tests.contract.table import assert_same_bits, one_step
from tests.sharded import EIGHT_BIT, both_kinds, make_mesh, make_params, put

needs_host_memory = pytest.mark.skipif(
    "pinned_host" not in memory_kinds(jax.devices()[0]),
    reason="no memory of the host's for programs on CPUs before jax 0.10",
)
SHAPES = {"a": (16, 64), "b": (16, 64), "c": (16, 64), "odd": (7,)}
off = functools.partial(gdx.sharding.offload_state, minimum_size=100)


def kinds(state):
    """Of the large arrays, and of the others."""
    leaves = jax.tree.leaves(state)
    return tuple({x.sharding.memory_kind for x in leaves if (x.size >= 100) is large} for large in (True, False))


@needs_host_memory
@pytest.mark.parametrize(
    "make",
    [
        lambda off: off(gdx.adamw(optax.linear_schedule(1e-2, 0.0, 10))),
        lambda off: off(gdx.adamw(1e-2, **EIGHT_BIT)),
        lambda off: gdx.chain(optax.clip_by_global_norm(1.0), off(optax.adam(1e-2))),
        lambda off: gdx.groups(off(gdx.adamw(1e-2)), {"a": {"learning_rate": 0.1}}),
        lambda off: gdx.skip_spikes(off(gdx.adam(1e-2))),
        lambda off: off(gdx.watch(gdx.average_parameters(gdx.adam(1e-2)), every=2)),
    ],
    ids=["schedule", "8-bit", "optax", "groups", "spikes", "calls in calls"],
)
def test_has_the_bits_of_state_on_the_device(make):
    params, *gradients = (make_params(seed=seed, shapes=SHAPES) for seed in range(4))

    def run(tx):
        step, carry = jax.jit(functools.partial(one_step, tx)), (params, tx.init(params))
        for g in gradients:
            carry = step(*carry, g)
        return carry

    found = run(make(off))
    assert_same_bits(found, run(make(lambda tx: tx)))
    assert kinds(found[1]) == ({"pinned_host"}, {"device"})


def traffic(jaxpr):
    """What a step does with the two memories, in order, and what has to wait for what."""
    while len(jaxpr.eqns) == 1:
        jaxpr = jaxpr.eqns[0].params["jaxpr"].jaxpr
    sent, waited, done = set(), set(), []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "optimization_barrier":
            waited |= {*equation.outvars} if sent & {*equation.invars} else set()
        elif equation.primitive.name == "device_put":
            if equation.params["devices"] == (jax.memory.Space.Host,):
                sent |= {*equation.outvars}
                done.append("send")
            else:
                done.append("fetch after" if waited & {*equation.invars} else "fetch")
    return done


@needs_host_memory
@pytest.mark.parametrize("tx", [gdx.adamw(1e-2), optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))])
def test_a_leaf_is_fetched_once_the_last_one_is_sent_back(tx):
    tx, params = off(tx), make_params(shapes=SHAPES)
    later = ["fetch after"] * 2 + ["send"] * 2
    assert traffic(jax.make_jaxpr(tx.update)(params, tx.init(params), params).jaxpr) == [
        *["fetch"] * 2,
        *["send"] * 2,
        *later,
        *later,
    ]


@needs_host_memory
@both_kinds
def test_on_a_mesh_each_part_waits_in_its_host(kind):
    mesh, tx = make_mesh(kind=kind), gdx.adamw(1e-2)
    sharded, params = gdx.sharding.shard_state(off(tx), mesh), make_params(shapes=SHAPES)
    step = jax.jit(functools.partial(one_step, sharded), donate_argnums=(0, 1))
    found = step(put(params, mesh), sharded.init(put(params, mesh)), put(params, mesh))
    assert_same_bits(found, jax.jit(functools.partial(one_step, tx))(params, tx.init(params), params))
    places = gdx.sharding.state_shardings(off(tx), params, mesh)
    for x, place in zip(jax.tree.leaves(found[1]), jax.tree.leaves(places), strict=True):
        assert x.sharding.is_equivalent_to(place, x.ndim) and x.sharding.memory_kind == (place.memory_kind or "device")
    assert places[0].mu["a"].memory_kind == "pinned_host" and places[0].mu["a"].shard_shape((16, 64)) == (2, 64)


@needs_host_memory
def test_checkpoints_and_states_go_from_one_memory_to_the_other(tmp_path):
    tx, params = gdx.adamw(1e-2), make_params(shapes=SHAPES)
    _, state = tx.update(params, tx.init(params), params)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tx, params, state)
        restored = checkpoints.restore(off(tx), params, off(tx).init(params)).state
    assert_same_bits(restored, state)
    expected = tx.update(params, state, params)
    for start in (restored, state):
        found = off(tx).update(params, start, params)
        assert kinds(found[1]) == ({"pinned_host"}, {"device"})
        assert_same_bits(found, expected)


@needs_host_memory
def test_in_a_loop_it_stays_there():
    params, xs = make_params(shapes=SHAPES), jnp.arange(3.0)
    train = lambda tx: gdx.train(lambda p, x: sum(jnp.sum((w - x) ** 2) for w in p.values()), tx, params, xs)  # noqa: E731
    found = train(off(gdx.adamw(0.1)))
    assert_same_bits(found[:2], train(gdx.adamw(0.1))[:2])
    assert kinds(found.state) == ({"pinned_host"}, {"device"})


@pytest.mark.parametrize("traced", [False, True])
def test_without_such_memory_it_says_so(traced, monkeypatch):
    monkeypatch.setattr("gdx.sharding.offload.memory_kinds", lambda device: ["device"])
    tx, p = off(gdx.adam(0.1)), np.ones((16, 64), np.float32)
    init, update = (jax.jit(tx.init), jax.jit(tx.update)) if traced else (tx.init, tx.update)
    words = r"offload_state: programs on .* have the memory 'device'; expected 'pinned_host' .* Leave"
    with pytest.raises(ValueError, match=words):
        init(p)
    with pytest.raises(ValueError, match=words):
        update(p, gdx.adam(0.1).init(p), p)


@needs_host_memory
def test_a_checkpoint_goes_on(tmp_path):
    tx, params = off(gdx.adamw(1e-2)), make_params(shapes=SHAPES)
    step = jax.jit(functools.partial(one_step, tx))
    params, state = step(params, tx.init(params), params)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tx, params, state)
        found = checkpoints.restore(tx, params, tx.init(params))
    assert kinds(found.state) == kinds(state) == ({"pinned_host"}, {"device"})
    assert_same_bits(step(found.params, found.state, params), step(params, state, params))


@needs_host_memory
def test_a_run_goes_on_with_a_state_that_is_put_there():
    tx, start = gdx.adamw(1e-2), make_params(shapes=SHAPES)
    loss, batches = lambda p, batch: optax.tree.norm(p, squared=True) + batch, jnp.zeros(3)
    state = off(tx).put(tx.init(start), jax.memory.Space.Host)
    found, expected = (gdx.train(loss, *x[:1], start, batches, state=x[1]) for x in ((off(tx), state), (tx, None)))
    assert_same_bits((found.params, found.state), (expected.params, expected.state))


@needs_host_memory
@pytest.mark.parametrize("mesh", [None, make_mesh()], ids=["one device", "mesh"])
def test_it_is_said_what_is_on_the_host(mesh):
    tx, params = off(gdx.adamw(1e-2, mu_dtype="bfloat16")), make_params(shapes=SHAPES)
    state = tx.init(params) if mesh is None else gdx.sharding.shard_state(tx, mesh).init(put(params, mesh))
    found = gdx.describe(tx, params, mesh)
    large, small = ([x for x in jax.tree.leaves(state) if (x.size >= 100) is is_large] for is_large in (True, False))
    assert found.nbytes_on_host == sum(x.nbytes for x in large) == 3 * 1024 * 6
    # what is small does not divide
    assert found.nbytes_per_device == sum(x.nbytes for x in small) and found.nbytes == found.nbytes_on_host + 46
    assert {(m.name, m.format, m.memory, m.nbytes) for m in found.moments} == {
        ("mu", "bfloat16", "host", 6144),
        ("nu", "float32", "host", 12288),
        ("mu", "bfloat16", "device", 14),
        ("nu", "float32", "device", 28),
        ("scalars", "int32", "device", 4),
    }
    assert "18,432 of them in the host's memory" in repr(found) and "mu       bfloat16, on the host" in repr(found)
    assert gdx.describe(tx.tx, params, mesh).nbytes_on_host == 0
