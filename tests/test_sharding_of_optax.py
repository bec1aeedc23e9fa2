"""State over a mesh of optax's transforms, and inside what they are built into."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gdx
from tests.contract.table import assert_same_bits, one_step
from tests.sharded import EXPLICIT, FEW, both_kinds, collectives, make_mesh, make_params, put, run

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
        return optax.tree.set(state, grad=jax.sharding.reshard(optax.tree.get(state, "grad"), NamedSharding(mesh, P())))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        expected = trained(tx, params, batch, lambda state: state)
        sharded, on_mesh = gdx.sharding.shard_state(tx, mesh), put({**params, "batch": batch}, mesh)
        batch = on_mesh.pop("batch")
        found = trained(sharded, on_mesh, batch, typed if kind is EXPLICIT else lambda state: state)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    assert optax.tree.get(found[1], "diff_params_memory")["w"].sharding.spec[1] == "data"


def three_steps(tx, params, state):
    def loss(params):
        return sum(jnp.sum(jnp.sin(p) ** 2) for p in params.values())

    def step(carry, _):
        return one_step(tx, *carry, jax.grad(loss)(carry[0])), None

    return jax.lax.scan(step, (params, state), None, 3)[0]


@pytest.mark.parametrize("place", ["chain", "masked", "partition", "TrainState", "scan"])
def test_inside_what_is_built_around_it(place):
    mesh = make_mesh()
    alone, params, g = gdx.adamw(0.1), make_params(shapes=FEW), make_params(seed=1, shapes=FEW)
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
        if place == "scan":  # as the docstring says: the compiler would leave the parameters split
            places = jax.tree.map(lambda x: x.sharding, (params, state))
            return jax.jit(three_steps, static_argnums=0, out_shardings=places)(tx, params, state)
        return jax.jit(lambda *args: one_step(tx, *args))(params, state, g)

    found = trained(gdx.sharding.shard_state(alone, mesh), put(params, mesh), put(g, mesh))
    assert_same_bits(found, trained(alone, params, g))
    moments = [leaf for leaf in jax.tree.leaves(found[1]) if leaf.shape == FEW["w"]]
    assert moments and all(leaf.sharding.spec[0] == "data" for leaf in moments)
    assert all(p.sharding.is_fully_replicated for p in jax.tree.leaves(found[0]))
