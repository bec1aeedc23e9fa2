"""Watching: the numbers are those of a run in float64, and the run is the one that nobody watches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from tests.contract.table import assert_same_bits, one_step

SHAPES = {"bias": (5,), "embed": (7, 8), "kernel": (2, 8)}
SCHEDULE = gdx.schedules.linear_schedule(0.1, 0.02, transition_steps=8)
GROUPS = {"bias": {"weight_decay": 0.0}, "^embed": {"learning_rate": gdx.times(0.1)}}
ADAMW = gdx.adamw(SCHEDULE, weight_decay=0.1)
STEPS = 8


def tree(seed, scale=1.0):
    random = np.random.default_rng(seed)
    return {
        name: jnp.asarray(scale * random.standard_normal(s), "bfloat16" if name == "embed" else "float32")
        for name, s in SHAPES.items()
    }


def gradients_of(scale=1.0):
    return [tree(seed, scale) for seed in range(1, 1 + STEPS)]


def stacked(trees):
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def by_step(tx, gradients, params=None, state=None, step=one_step):
    """Parameters before each step, updates and states, one jitted call after the other."""
    params = tree(0) if params is None else params
    state = tx.init(params) if state is None else state
    run, step = [], jax.jit(step)
    for g in gradients:
        updates, _ = tx.update(g, state, params)
        after, state = step(tx, params, state, g)
        run.append((params, updates, state, after))
        params = after
    return run


def expected(g, u, p, after, names):
    """Of some leaves: gradient norm, update norm, parameter norm, ratio, cosine, unmoved. In float64."""
    flat = lambda tree: np.concatenate([np.asarray(tree[name], np.float64).ravel() for name in names])  # noqa: E731
    g, u, old = flat(g), flat(u), flat(p)
    size = np.linalg.norm
    narrow = [np.asarray(after[name] == p[name]).ravel() for name in names if p[name].dtype == jnp.bfloat16]
    ratio = np.sqrt(np.mean(u**2)) / np.sqrt(np.mean(old**2))
    return size(g), size(u), size(old), ratio, u @ g / size(u) / size(g), np.mean(narrow) if narrow else 0.0


PER = {
    "all": {"": [*SHAPES]},
    "group": {"bias": ["bias"], "^embed": ["embed"], "others": ["kernel"]},
    "leaf": {name: [name] for name in SHAPES},
}


@pytest.mark.parametrize("per", PER)
def test_the_numbers_are_those_of_the_run_in_float64(per):
    tx = gdx.watch(gdx.groups(ADAMW, GROUPS), 3, per)
    run, g = by_step(tx, gradients_of(1e-2)), gradients_of(1e-2)
    rates = {"learning_rate": lambda t: 0.1 - 0.01 * t, "bias.weight_decay": lambda t: 0.0, "b1": lambda t: 0.9}
    for t, (_, _, state, _) in enumerate(run):
        last = t - t % 3
        watched = gdx.read_watch(state)
        assert watched.step == last and watched.step.dtype == np.int32
        assert watched.names == (() if per == "all" else tuple(PER[per]))
        p, u, _, after = run[last]
        rows = [expected(g[last], u, p, after, names) for names in PER[per].values()]
        found = np.stack(watched[1:7], -1)
        np.testing.assert_allclose(found, rows[0] if per == "all" else rows, rtol=1e-5, atol=1e-6)
        for name, rate in rates.items():
            np.testing.assert_allclose(watched.hyperparameters[name], rate(last), rtol=1e-6)
    assert 0 < np.max(found[..., 5]) < 1  # some of the bfloat16 parameters stand still, and some move


def test_sizes_beyond_squares_and_trees_of_every_kind():
    tx = gdx.watch(optax.sgd(0.5), 1)
    g = {"z": jnp.array([3 + 4j], "complex64"), "a": None, "e": jnp.zeros((0, 2)), "h": jnp.full(2, 6.0, "float16")}
    _, state = tx.update(g, tx.init(g), g)
    watched = gdx.read_watch(state)
    np.testing.assert_allclose(watched[1:6], (97**0.5, 97**0.5 / 2, 97**0.5, 0.5, -1), rtol=1e-6)
    assert watched.unmoved is None and watched.hyperparameters == {}
    for scale in (1e-30, 1e30):
        _, state = tx.update(jnp.full(4, scale), tx.init(jnp.ones(4)), jnp.ones(4))
        np.testing.assert_allclose(gdx.read_watch(state)[1:6], (2 * scale, scale, 2, scale / 2, -1), rtol=1e-5)
    for p, ratio in ((jnp.zeros(2), np.inf), (jnp.ones(2), 0.5)):
        _, state = tx.update(jnp.ones(2), tx.init(p), p)
        assert gdx.read_watch(state).update_over_parameter == ratio
    _, state = tx.update(jnp.zeros(2), tx.init(jnp.zeros(2)), jnp.zeros(2))
    assert gdx.read_watch(state)[1:6] == (0, 0, 0, 0, 0)
    tx = gdx.watch(gdx.sgd(0.1), 1, "leaf")
    assert gdx.read_watch(tx.init(jnp.ones(2))).names == ("the root",)
    for empty in ({}, None):
        for per in ("all", "leaf"):
            tx = gdx.watch(gdx.adamw(0.1), per=per)
            assert jax.tree.structure(tx.update(empty, tx.init(empty), empty)[1]) == jax.tree.structure(tx.init(empty))


OPTIMIZERS = {
    "adamw": ADAMW,
    "sgd": gdx.sgd(0.1, 0.9),
    "groups": gdx.groups(ADAMW, GROUPS),
    "8 bits": gdx.adamw(
        SCHEDULE,
        mu_dtype=gdx.storage.SignedFourthRoot8(block=8, minimum_size=1),
        nu_dtype=gdx.storage.FourthRoot8(block=8, minimum_size=1),
    ),
    "rounds": gdx.chain(gdx.adamw(0.01), gdx.round_stochastically()),
    "optax": gdx.value(optax.sgd)(0.1, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_run_is_the_one_that_nobody_watches(name):
    tx, gradients = OPTIMIZERS[name], gradients_of()
    if name == "8 bits":
        gradients = [{k: g[k] for k in ("embed", "kernel")} for g in gradients]
    start = {k: tree(0)[k] for k in gradients[0]}
    watch = gdx.watch(tx, 3)

    def scanned(tx, params, gradients):
        step = lambda carry, g: (one_step(tx, *carry, g), None)  # noqa: E731
        return jax.lax.scan(step, (params, tx.init(params)), gradients)[0]

    def looped(tx):
        state, params = tx.init(start), start
        step = jax.jit(functools.partial(one_step, tx), donate_argnums=(1,))
        for g in gradients:
            params, state = step(params, state, g)
        return params, state

    params, state = looped(watch)
    assert_same_bits((params, state.inner_state), looped(tx))
    params, state = jax.jit(functools.partial(scanned, watch))(start, stacked(gradients))
    assert_same_bits((params, state.inner_state), jax.jit(functools.partial(scanned, tx))(start, stacked(gradients)))
    assert gdx.read_watch(state).step == 6
    updates, _ = watch.update(gradients[0], watch.init(start), start)
    assert_same_bits(updates, tx.update(gradients[0], tx.init(start), start)[0])


def test_a_batch_of_optimizers():
    grid, g = gdx.grid(lambda rate: gdx.watch(gdx.adamw(rate), 3), rate=[0.1, 0.01]), stacked(gradients_of())

    def scanned(tx):
        step = lambda carry, g: (one_step(tx, *carry, g), None)  # noqa: E731
        return jax.lax.scan(step, (tree(0), tx.init(tree(0))), g)[0]

    params, state = jax.jit(jax.vmap(scanned))(grid)
    plain, inner = jax.jit(jax.vmap(lambda tx: scanned(tx.tx)))(grid)
    assert_same_bits((params, state.inner_state), (plain, inner))
    for i, tx in enumerate(gdx.unstack(grid)):
        alone = gdx.read_watch(jax.jit(scanned)(tx)[1])
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x[i], y, rtol=1e-5), gdx.read_watch(state), alone)  # noqa: B023


def bowl(theta, batch):
    return jnp.mean((theta["a"][None] - batch) ** 2) + jnp.sum(theta["b"] ** 2)


def test_train_collects_the_curves_of_a_loop():
    start, batches = {"a": jnp.ones(3), "b": jnp.ones(2)}, jnp.arange(54.0).reshape(9, 2, 3)
    inner = gdx.groups(gdx.adamw(SCHEDULE), {"b": {"learning_rate": 1.0}})
    tx = gdx.chain(gdx.value(optax.clip)(1e9), gdx.watch(inner, 4, "group"))
    params, state, rows = start, tx.init(start), []
    for i, batch in enumerate(batches):
        params, state = jax.jit(one_step)(tx, params, state, jax.grad(bowl)(params, batch))
        if i % 4 == 0:
            rows.append(gdx.read_watch(state))
    close = functools.partial(jax.tree.map, functools.partial(np.testing.assert_allclose, rtol=1e-4))
    for remat in (False, True):
        trained = gdx.train(bowl, tx, start, batches, remat=remat)
        assert trained.watched.names == ("b", "others")
        close(trained.watched, stacked(rows))
    assert gdx.train(bowl, inner, start, batches).watched is None
    # on from another step, also where that is traced: room for what may be measured, and nothing in the rest of it
    first = gdx.train(bowl, tx, start, batches[:3])
    rest = functools.partial(gdx.train, bowl, tx, first.params, batches[3:8])
    close(rest(state=first.state).watched, jax.tree.map(lambda x: x[1:2], trained.watched))
    assert jax.jit(lambda state: rest(state=state))(first.state).watched.step.tolist() == [4, -1]
    slope = jax.grad(lambda tx: gdx.train(bowl, tx, start, batches, remat=True).losses[-1])
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), slope(tx).transforms[1].tx, slope(inner))
    # a slope of 0 times that of a norm at 0 would be NaN
    flat = functools.partial(gdx.train, bowl, params={"a": jnp.ones(3), "b": jnp.zeros(2)}, batches=batches)
    slope = jax.grad(lambda tx: flat(tx=tx).losses[-1])
    np.testing.assert_allclose(
        slope(gdx.watch(gdx.sgd(0.1), 1, "leaf")).tx.learning_rate, slope(gdx.sgd(0.1)).learning_rate
    )
    # steps that are not made are no measurements
    spiked = gdx.skip_spikes(gdx.watch(gdx.sgd(0.1), 2))
    assert gdx.train(bowl, spiked, start, batches.at[2:5].set(jnp.nan)).watched.step.tolist() == [0, 2, 4]


def test_a_checkpoint_goes_on(tmp_path):
    tx, g = gdx.watch(gdx.groups(ADAMW, GROUPS), 3, "group"), gradients_of()
    whole = by_step(tx, g)
    params, state = whole[3][3], whole[3][2]
    with gdx.checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, tx, params, state)
        restored = checkpoints.restore(tx, tree(0), tx.init(tree(0)))
    assert_same_bits((restored.params, restored.state), (params, state))
    assert_same_bits(by_step(tx, g[4:], restored.params, restored.state)[-1], whole[-1])


@pytest.mark.parametrize("explicit", [False, True])
def test_on_a_mesh_of_eight_devices(explicit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    place = functools.partial(jax.device_put, device=jax.NamedSharding(mesh, jax.P("data")))
    tx, params = gdx.watch(gdx.adamw(0.1), 2, "leaf"), {"w": jnp.arange(32.0).reshape(16, 2), "b": jnp.ones(8)}
    g = jax.tree.map(jnp.sin, params)
    step = jax.jit(one_step, donate_argnums=2)
    state, plain = tx.init(place(params)), tx.init(params)
    for _ in range(2):
        after, state = step(tx, place(params), state, place(g))
        _, plain = step(tx, params, plain, g)
        assert after["w"].sharding.spec[0] == "data"
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), gdx.read_watch(state), gdx.read_watch(plain))
    mapped = jax.shard_map(tx.update, mesh=mesh, in_specs=(jax.P("data"), jax.P(), jax.P()), out_specs=jax.P())
    one = jnp.ones(1)
    with pytest.raises(ValueError, match=r"watch: in jax\.shard_map gradients .* differ along 'data'.*pmean"):
        jax.eval_shape(mapped, place(jnp.ones(8)), tx.init(one), one)


def test_what_is_refused():
    p = jnp.ones(2)
    tx = gdx.watch(gdx.sgd(0.1))
    assert repr(gdx.watch(gdx.sgd(0.1), 5, "leaf")) == "watch(tx=sgd(learning_rate=0.1), every=5, per='leaf')"
    with pytest.raises(
        ValueError, match=r"watch: update needs the parameters; call update\(gradients, state, params\)"
    ):
        tx.update(p, tx.init(p))
    with pytest.raises(TypeError, match=r"watch: tx is 0\.1; expected a transform"):
        gdx.watch(0.1)
    for wrong in ("tree", None, 3, jnp.ones(2)):
        with pytest.raises(ValueError, match=r"watch: per is .*; expected 'all', 'group' or 'leaf'"):
            gdx.watch(gdx.sgd(0.1), per=wrong)
    for inner, found in ((gdx.sgd(0.1), "none"), (gdx.chain(*[gdx.groups(gdx.sgd(0.1), {"a": None})] * 2), "2")):
        with pytest.raises(
            ValueError, match=rf"watch: per='group' takes .* has {found} in it; expected watch\(gdx\.gr"
        ):
            gdx.watch(inner, per="group")
    for state, count in ((gdx.sgd(0.1).init(p), "no record"), ((tx.init(p), tx.init(p)), "2 records")):
        with pytest.raises(ValueError, match=rf"read_watch: the state has {count}; expected that of one gdx\.watch\("):
            gdx.read_watch(state)
    pair = optax.LookaheadParams(p, p)
    with pytest.raises(TypeError, match=r"watch: params is a pair of optax\.lookahead; expected optax\.lookahead\(wa"):
        tx.update(p, tx.init(p), pair)
    around = optax.lookahead(tx, 2, 0.5)
    with jax.numpy_dtype_promotion("standard"):
        _, state = around.update(p, around.init(pair), pair)
    assert gdx.read_watch(state).step == 0
