"""Guards: what is skipped leaves no trace, what is made has the bits of the optimizer alone."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import gdx
from tests.contract.table import assert_same_bits, one_step

SHAPES = {"w": (4, 16), "b": (5,)}
BLOCKS = {"block": 8, "minimum_size": 1}


def params_of(dtype="float32"):
    random = np.random.default_rng(0)
    params = {name: random.standard_normal(shape) for name, shape in SHAPES.items()}
    params["b"][:2] = -0.0, 0.0
    return {name: jnp.asarray(p, dtype) for name, p in params.items()}


def gradients_of(steps, dtype="float32", seed=1):
    random = np.random.default_rng(seed)
    return [{k: jnp.asarray(random.standard_normal(s), dtype) for k, s in SHAPES.items()} for _ in range(steps)]


def spoilt(g, how):
    """A gradient that is to be skipped."""
    return {**g, "b": g["b"].at[1].set(how)} if not np.isfinite(how) else jax.tree.map(lambda x: x * how, g)


@jax.jit
def step(tx, params, state, g):
    updates, state = tx.update(g, state, params)
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates), state


def run(tx, params, gradients):
    """Parameters and state after jitted steps."""
    state = tx.init(params)
    for g in gradients:
        params, state = step(tx, params, state, g)
    return params, state


SCHEDULE = gdx.schedules.linear_schedule(0.1, 0.01, transition_steps=20)
OPTIMIZERS = {
    "sgd": gdx.sgd(0.1),
    "momentum": gdx.momentum(0.1, 0.9),
    "adamw": gdx.adamw(SCHEDULE, weight_decay=0.1),
    "8 bits": gdx.adamw(
        SCHEDULE,
        mu_dtype=gdx.storage.SignedFourthRoot8(**BLOCKS),
        nu_dtype=gdx.storage.FourthRoot8(**BLOCKS),
    ),
    "optax": optax.nadamw(optax.linear_schedule(0.1, 0.01, 20)),
    "a value of optax": gdx.value(optax.lion)(0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@hypothesis_settings(max_examples=4)
@given(data=st.data())
def test_a_skipped_batch_was_never_seen(name, dtype, data):
    """Parameters, moments, counts, schedules and averages, bit for bit; NaN from the first step on."""
    tx = gdx.skip_spikes(OPTIMIZERS[name], warmup_steps=5)
    kept = gradients_of(14, dtype)
    bad = []
    for seen, g in enumerate(kept):
        # never more in a row than it skips
        for how in data.draw(st.lists(st.sampled_from([np.nan, np.inf, -np.inf, 1e3]), max_size=3)):
            if np.isfinite(how) and seen < 5:
                how = np.nan
            bad.append(spoilt(g, how))
        bad.append(g)
    skipped = len(bad) - len(kept)
    params, state = run(tx, params_of(dtype), bad)
    expected_params, expected = run(tx, params_of(dtype), kept)
    assert state.skipped == skipped
    assert_same_bits(params, expected_params)
    assert_same_bits(state._replace(skipped=expected.skipped), expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("clip", [False, True])
def test_a_step_that_is_made_has_the_bits_of_the_optimizer_alone(name, clip):
    plain, guarded = OPTIMIZERS[name], gdx.skip_spikes(OPTIMIZERS[name], clip=clip, warmup_steps=5)
    params = params_of()
    state, guarded_state = plain.init(params), guarded.init(params)
    one = jax.jit(optax.with_extra_args_support(plain).update)
    other = jax.jit(guarded.update)
    for g in gradients_of(12):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = one(g, state, params)
        found, guarded_state = other(g, guarded_state, params)
        assert_same_bits(found, updates)
        assert_same_bits(guarded_state.inner_state, state)
        params = optax.apply_updates(params, updates)
    assert guarded_state.skipped == 0 and guarded_state.count == 12


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("jitted", [False, True])
def test_a_skipped_step_changes_no_bit_of_a_parameter(dtype, jitted):
    tiny = jnp.finfo(dtype).smallest_subnormal
    params = jnp.array([0.0, -0.0, 1.0, -1.0, tiny, -tiny, jnp.inf, -jnp.inf], dtype)
    tx = gdx.skip_spikes(gdx.adamw(0.1))
    step = jax.jit(one_step) if jitted else one_step
    new, state = step(tx, params, tx.init(params), jnp.full(8, jnp.nan, dtype))
    usual = np.abs(np.asarray(params, np.float32)) != np.float32(tiny)  # which XLA takes for 0 in any sum
    assert np.asarray(new)[usual].tobytes() == np.asarray(params)[usual].tobytes()
    assert state.skipped == 1


def test_a_skipped_step_changes_no_bit_of_a_complex_parameter():
    params = jnp.asarray(np.array([complex(x, y) for x in (0.0, -0.0, 1.0) for y in (0.0, -0.0, 1.0)], np.complex64))
    tx = gdx.skip_spikes(gdx.sgd(0.1))
    new, _ = one_step(tx, params, tx.init(params), jnp.full(9, jnp.nan, params.dtype))
    assert np.asarray(new).tobytes() == np.asarray(params).tobytes()


# What is a spike.


def oracle_of(norms, *, threshold=6.0, decay=0.99, warmup_steps=64, most=10, clip=False):
    """Which steps are made, with which factor, from the weighted mean and deviation of all norms so far."""
    used, row, found = [], 0, []
    for x in norms:
        weights = decay ** np.arange(len(used))[::-1]
        mean = np.average(used, weights=weights) if len(used) else 0.0
        deviation = np.sqrt(np.average((used - mean) ** 2, weights=weights)) if len(used) else 0.0
        limit, factor = mean + threshold * max(deviation, 1e-6 * abs(mean)), 1.0
        is_above = np.isfinite(x) and len(used) >= warmup_steps and x > limit
        if clip and is_above:
            x, factor, is_above = limit, limit / x, False
        is_usual = np.isfinite(x) and not is_above
        is_made = is_usual or row >= most
        row = 0 if is_usual else row + 1
        if is_made and np.isfinite(x):
            used = np.append(used, x)
        found.append((is_made, factor, mean, deviation))
    return found


@hypothesis_settings(max_examples=8)
@given(data=st.data())
def test_norms_are_judged_as_numpy_does(data):
    options = {
        "threshold": data.draw(st.sampled_from([1.5, 2.5, 6.0])),
        "decay": data.draw(st.sampled_from([0.0, 0.9, 0.99])),
        "warmup_steps": data.draw(st.integers(2, 8)),
        "most": data.draw(st.integers(1, 3)),
        "clip": data.draw(st.booleans()),
    }
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    norms = np.exp(random.standard_normal(60)) * np.where(random.random(60) < 0.1, 30, 1)
    norms[random.random(60) < 0.1] = np.nan
    norms = norms.astype(np.float32).astype(float)
    tx = gdx.skip_spikes(gdx.sgd(1.0), **options)

    @jax.jit
    def trajectory(tx, norms):
        def step(state, x):
            updates, new = tx.update(jnp.stack([x * 0.6, x * -0.8]), state)
            return new, (updates, state.mean, state.deviation, new.skipped)

        return jax.lax.scan(step, tx.init(jnp.zeros(2)), norms)[1]

    updates, means, deviations, skipped = map(np.asarray, trajectory(tx, jnp.asarray(norms, jnp.float32)))
    made, factors, expected_means, expected_deviations = map(np.array, zip(*oracle_of(norms, **options)))
    np.testing.assert_array_equal(np.diff(skipped, prepend=0) == 0, made)
    np.testing.assert_allclose(means, expected_means, rtol=1e-4)
    np.testing.assert_allclose(deviations, expected_deviations, rtol=1e-3, atol=1e-5)
    expected = np.where(made, -norms * factors, 0)[:, None] * [0.6, -0.8]
    np.testing.assert_allclose(updates, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("scale", [1e-42, 1e-37, 1e-25, 1.0, 1e18, 1e25, 1e37])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "complex64"])
def test_norms_whose_squares_overflow_or_vanish(scale, dtype):
    """The same is skipped at any scale of gradients that the dtype holds."""
    if dtype == "float16":
        scale = np.clip(scale, 1e-2, 1e2)
    tx = gdx.skip_spikes(gdx.sgd(0.0), warmup_steps=4)
    params = jnp.ones(64, dtype)
    gradients = [jnp.asarray((1 + 0.1 * np.sin(t)) * scale * np.ones(64), dtype) for t in range(8)]
    _, state = run(tx, params, [*gradients, jnp.asarray(5 * scale * np.ones(64), dtype), gradients[0]])
    if scale > 1e-40:
        assert (state.count, state.skipped) == (9, 1)
        np.testing.assert_allclose(state.mean, 8 * scale, rtol=0.1)
    assert np.isfinite(state.mean) and np.isfinite(state.deviation)


def test_a_norm_is_that_of_all_leaves_and_of_none():
    tx = gdx.skip_spikes(gdx.sgd(0.1))
    _, state = tx.update({"a": jnp.array([3.0]), "b": jnp.zeros((0, 2)), "c": jnp.array(4.0)}, tx.init({}))
    assert state.mean == 5
    _, state = tx.update({}, tx.init({}))
    assert (state.count, state.mean) == (1, 0)


def test_nothing_is_nan_on_the_way():
    """Neither in an eager step nor in a compiled one: an update from NaN is never worked out."""
    with jax.debug_nans(True):
        tx, params = gdx.skip_spikes(OPTIMIZERS["adamw"]), params_of()
        state = tx.init(params)
        with jax.debug_nans(False):
            g = spoilt(params, np.nan)
        for update in (tx.update, jax.jit(tx.update)):
            _, state = update(g, state, params)
    assert state.skipped == 2


def test_the_loss_is_judged():
    tx, plain = gdx.skip_spikes(gdx.adam(0.1), of="value", warmup_steps=4), gdx.adam(0.1)
    params, values = params_of(), [-3.0, -3.1, -2.9, -3.0, -3.05, 1.0, np.nan, -3.0]
    all_gradients = gradients_of(len(values))
    state, kept = tx.init(params), []
    for g, value in zip(all_gradients, values):
        _, new = jax.jit(tx.update)(g, state, params, value=jnp.float32(value))
        kept += [g] if new.skipped == state.skipped else []
        state = new
    assert (state.skipped, state.count) == (2, 6)
    expected = plain.init(params)
    for g in kept:
        _, expected = jax.jit(plain.update)(g, expected, params)
    assert_same_bits(state.inner_state, expected)
    _, state = tx.update(spoilt(params, np.inf), state, params, value=-3.0)  # the gradient is none
    assert state.skipped == 3


@pytest.mark.parametrize(("of", "level"), [("gradient", 0.3), ("value", 0.3), ("value", -5.0)])
def test_after_what_was_all_alike_a_rounding_is_no_spike(of, level):
    tx = gdx.skip_spikes(gdx.sgd(1.0), of=of, warmup_steps=3)
    alike = level + np.abs(level) * np.array([0, 0, 0, 0, 2e-7, 4e-7, 4e-6, 0.01])

    def step(state, x):
        _, state = tx.update(x if of == "gradient" else jnp.ones(()), state, value=x)
        return state, state.skipped

    skipped = jax.jit(lambda levels: jax.lax.scan(step, tx.init(jnp.zeros(())), levels)[1])(jnp.float32(alike))
    assert skipped.tolist() == [0] * 7 + [1]


@pytest.mark.parametrize("given", [{}, {"value": None}, {"value": jnp.ones(2)}, {"value": "x"}, {"value": 1j}])
def test_a_loss_that_is_none(given):
    tx = gdx.skip_spikes(gdx.sgd(0.1), of="value")
    with pytest.raises(TypeError, match=r"skip_spikes: of='value' judges the loss, .*update\(.*value=loss\)"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)), **given)


def test_what_is_no_transform():
    with pytest.raises(TypeError, match=r"skip_spikes: tx is 0\.1; expected a transform"):
        gdx.skip_spikes(0.1)


# Giving up.


@pytest.mark.parametrize("clip", [False, True])
def test_it_gives_up_on_what_is_nan_for_good(clip):
    tx = gdx.skip_spikes(gdx.adam(0.1), most=3, clip=clip)
    params = params_of()
    params, state = run(tx, params, 3 * [spoilt(params, np.nan)])
    gdx.check_spikes(state)
    assert (state.skipped, state.in_a_row) == (3, 3)
    params, state = run(tx, params, 5 * [spoilt(params, np.nan)])
    assert np.isnan(params["b"][1])
    assert (state.skipped, state.in_a_row, state.let_through) == (3, 5, 2)
    with pytest.raises(RuntimeError, match=r"skip_spikes: gave up: .* 2 \(5 in a row up to now, 3 skipped\)"):
        gdx.check_spikes((optax.EmptyState(), state))


def test_it_follows_a_level_that_has_risen_for_good():
    tx = gdx.skip_spikes(gdx.sgd(0.1), decay=0.9, warmup_steps=4, most=3)
    _, state = run(tx, params_of(), [*gradients_of(20), *(spoilt(g, 100.0) for g in gradients_of(20, seed=2))])
    assert state.skipped == 3
    assert state.in_a_row == 0  # and is on guard again
    assert state.let_through < 10


def test_checking_what_has_no_guard_and_a_batch():
    with pytest.raises(TypeError, match=r"check_spikes: the state, .*, has no skip_spikes in it"):
        gdx.check_spikes(gdx.adam(0.1).init(jnp.ones(2)))
    with pytest.raises(TypeError, match=r"^check_spikes: .* is traced, .*; call check_spikes outside of jax\.jit"):
        jax.jit(gdx.check_spikes)(gdx.skip_spikes(gdx.sgd(0.1)).init(jnp.ones(2)))
    batch = gdx.stack([gdx.skip_spikes(gdx.sgd(rate), most=1) for rate in (0.1, 0.2)])
    state = jax.vmap(lambda tx: tx.init(jnp.ones(2)))(batch)
    update = jax.vmap(lambda tx, g, state: tx.update(g, state)[1])
    for _ in range(2):
        gdx.check_spikes(state)
        state = update(batch, jnp.array([[1.0, 1.0], [1.0, np.nan]]), state)
    with pytest.raises(RuntimeError, match=r"gave up: .*: 1 "):
        gdx.check_spikes(state)


def test_counts_saturate():
    last = jnp.int32(2**31 - 1)
    tx = gdx.skip_spikes(gdx.sgd(0.1))
    state = tx.init(jnp.ones(2))._replace(skipped=last, in_a_row=last, let_through=last)
    _, state = tx.update(jnp.full(2, jnp.nan), state)
    assert state.skipped == state.in_a_row == state.let_through == last
    _, state = tx.update(jnp.full(2, jnp.nan), state._replace(in_a_row=jnp.int32(0)))
    assert state.skipped == last


# Where it stands.


def bad_and_kept(steps=10):
    kept = gradients_of(steps)
    return [x for g in kept for x in (spoilt(g, np.nan), g)], kept


def assert_skips(tx, *, strict=True, params=None):
    """The run with bad batches in it ends where that without them does."""
    params = params_of() if params is None else params
    bad, kept = bad_and_kept()
    (found, state), (expected, expected_state) = run(tx, params, bad), run(tx, params, kept)
    assert_same_bits(found, expected)
    assert optax.tree.get(state, "skipped") == len(bad) - len(kept)
    assert_same_bits(optax.tree.set(state, skipped=0), optax.tree.set(expected_state, skipped=0))


GUARDED = gdx.skip_spikes(gdx.adamw(SCHEDULE, weight_decay=0.1))
MASK = {"w": True, "b": True}
PLACES = {
    "gdx.chain": gdx.chain(GUARDED),
    "nested": gdx.chain(gdx.chain(GUARDED)),
    "optax.chain": gdx.value(lambda tx: optax.chain(optax.identity(), tx))(GUARDED),
    "masked": gdx.value(optax.masked)(GUARDED, MASK),
    "around masked": gdx.skip_spikes(gdx.value(optax.masked)(gdx.adam(0.1), {"w": True, "b": False})),
    "around MultiSteps": gdx.skip_spikes(gdx.value(optax.MultiSteps)(gdx.adam(0.1), 3)),
    "around a schedule of its own": gdx.skip_spikes(gdx.adam(0.1), threshold=lambda count: 6.0 + 1.0 / (1 + count)),
    "around another": gdx.skip_spikes(gdx.chain(gdx.scale_by_adam(), gdx.scale_by_learning_rate(0.1)), clip=True),
}


@pytest.mark.parametrize("place", PLACES)
def test_in_every_place(place):
    assert_skips(PLACES[place])


def test_inside_multi_steps():
    """A spike in one micro-batch is one in the mean: the whole step is skipped."""
    tx = gdx.value(optax.MultiSteps)(gdx.skip_spikes(gdx.adam(0.1), warmup_steps=2), 2)
    good = gradients_of(8)
    with jax.numpy_dtype_promotion("standard"):  # MultiSteps divides by its integer count
        params, state = run(tx, params_of(), [*good[:5], spoilt(good[5], 1e3), *good[6:]])
        expected, _ = run(tx, params_of(), [*good[:4], *good[6:]])
    assert_same_bits(params, expected)
    assert optax.tree.get(state, "skipped") == 1


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("few", [False, True])
def test_with_shard_state(explicit, inside, few):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    tx = gdx.adamw(SCHEDULE) if not few else OPTIMIZERS["8 bits"]
    if inside:
        tx = gdx.sharding.shard_state(gdx.skip_spikes(tx), mesh)
    else:
        tx = gdx.skip_spikes(gdx.sharding.shard_state(tx, mesh))
    place = functools.partial(jax.device_put, device=jax.NamedSharding(mesh, jax.P()))
    bad, kept = bad_and_kept(4)
    found, state = run(tx, place(params_of()), map(place, bad))
    expected, _ = run(tx, place(params_of()), map(place, kept))
    assert_same_bits(found, expected)
    assert optax.tree.get(state, "skipped") == 4
    plain, _ = run(gdx.skip_spikes(gdx.adamw(SCHEDULE) if not few else OPTIMIZERS["8 bits"]), params_of(), kept)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(plain)):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    eager, _ = tx.update(place(kept[0]), tx.init(place(params_of())), place(params_of()))
    assert np.all(np.isfinite(eager["w"]))


@pytest.mark.parametrize("explicit", [False, True])
def test_parameters_split_over_a_mesh(explicit):
    kind = jax.sharding.AxisType.Explicit if explicit else jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,), devices=jax.devices()[:4])
    where = {"w": jax.NamedSharding(mesh, jax.P("data")), "b": jax.NamedSharding(mesh, jax.P())}
    bad, kept = bad_and_kept(4)
    tx = gdx.skip_spikes(OPTIMIZERS["8 bits"])
    found, state = run(tx, jax.device_put(params_of(), where), [jax.device_put(g, where) for g in bad])
    expected, _ = run(tx, jax.device_put(params_of(), where), [jax.device_put(g, where) for g in kept])
    assert_same_bits(found, expected)
    assert state.skipped == 4


def test_inside_shard_map():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])
    tx = gdx.skip_spikes(gdx.adamw(0.1))

    def step(params, state, g, mean):
        return tx.update(jax.lax.pmean(g, "data") if mean else g, state, params)

    def mapped(mean):
        specs = (jax.P(), jax.P(), jax.P("data"))
        return jax.jit(
            jax.shard_map(functools.partial(step, mean=mean), mesh=mesh, in_specs=specs, out_specs=(jax.P(), jax.P()))
        )

    params, g = jnp.ones((1, 3)), jnp.arange(12.0).reshape(4, 3)
    updates, state = mapped(True)(params, tx.init(params), g)
    assert_same_bits(updates, jax.jit(tx.update)(g.mean(0, keepdims=True), tx.init(params), params)[0])
    updates, state = mapped(True)(params, state, g.at[2, 1].set(jnp.nan))
    assert state.skipped == 1 and not np.any(updates)
    with pytest.raises(ValueError, match=r"skip_spikes: in jax\.shard_map .* differ along 'data'.*pmean"):
        mapped(False)(params, tx.init(params), g)


@pytest.mark.parametrize(
    "link", [gdx.round_with_correction(), gdx.round_with_compensation(), gdx.round_with_master()], ids=repr
)
def test_around_what_rounds_parameters(link):
    tx = gdx.skip_spikes(gdx.chain(gdx.adamw(0.01), link))
    params = params_of("bfloat16")
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert updates["w"].dtype == np.float32
    assert_skips(tx, params=params)


def test_a_batch_of_thresholds_is_swept():
    data = jnp.asarray(np.random.default_rng(0).standard_normal((40, 8, 3)), jnp.float32).at[30].multiply(20.0)
    loss = lambda theta, batch: jnp.mean((theta[None] - batch) ** 2)  # noqa: E731
    grid = gdx.grid(lambda threshold: gdx.skip_spikes(gdx.sgd(0.1), threshold, warmup_steps=8), threshold=[1e4, 4.0])
    assert [*gdx.labels(grid)[0]] == ["threshold"]
    swept = gdx.sweep(loss, grid, jnp.ones(3), data)
    for member, losses in zip(gdx.unstack(grid), swept.losses):
        trained = gdx.train(loss, member, jnp.ones(3), data)
        np.testing.assert_allclose(losses, trained.losses, rtol=1e-5)
        assert trained.state.skipped == int(member.hyperparams["threshold"] == 4.0)


def test_training_passes_the_loss():
    loss = lambda theta, batch: jnp.sum((theta - batch) ** 2)  # noqa: E731
    batches = jnp.zeros((20, 3)).at[12].set(jnp.inf)
    trained = gdx.train(loss, gdx.skip_spikes(gdx.adam(0.1), of="value"), jnp.ones(3), batches)
    assert trained.state.skipped == 1 and np.all(np.isfinite(trained.params))


def test_hyperparameters_in_use_are_those_inside():
    tx = gdx.skip_spikes(gdx.adamw(SCHEDULE), threshold=gdx.schedules.linear_schedule(2.0, 4.0, 20))
    params = params_of()
    bad, _ = bad_and_kept(10)
    _, state = run(tx, params, bad)
    in_use = gdx.hyperparams_in_use(tx, state)
    assert (float(in_use["learning_rate"]), float(in_use["threshold"])) == (np.float32(0.055), 3.0)
    assert in_use["decay"] == 0.99
    assert optax.tree.get(state, "inner_state")[0].count == state.count == 10


@pytest.mark.parametrize("clip", [False, True])
def test_a_spike_has_the_same_bits_however_a_number_arrives(clip):
    tx, params = gdx.skip_spikes(gdx.adamw(0.1), 3.0, warmup_steps=4, clip=clip), params_of()
    g = gradients_of(30)
    g[10], g[20] = spoilt(g[10], 50.0), spoilt(g[20], 7.0)
    g = jax.tree.map(lambda *x: jnp.stack(x), *g)

    def scanned(tx, params, g):
        return jax.lax.scan(lambda carry, g: (one_step(tx, *carry, g), None), (params, tx.init(params)), g)[0]

    expected, state = jax.jit(scanned)(tx, params, g)
    assert (state.skipped == 0) == clip
    assert_same_bits(jax.jit(lambda p, g: scanned(tx, p, g)[0])(params, g), expected)
    batch = jax.tree.map(lambda x: jnp.float32(x) * jnp.ones(2, jnp.float32), tx)
    mapped = jax.jit(lambda tx: jax.lax.map(lambda tx: scanned(tx, params, g)[0], tx))(batch)
    assert_same_bits(jax.tree.map(lambda x: x[0], mapped), expected)
    if not clip:  # a clipped step has the last bits of its norm
        lanes = jax.jit(jax.vmap(lambda tx: scanned(tx, params, g)[0]))(batch)
        assert_same_bits(jax.tree.map(lambda x: x[0], lanes), expected)


@pytest.mark.parametrize("clip", [False, True])
def test_slopes_through_spikes_are_finite(clip):
    """Those of the run without the batches that are skipped."""
    bad, kept = bad_and_kept(6)

    def final(tx, gradients):
        g = jax.tree.map(lambda *x: jnp.stack(x), *gradients)
        step = lambda carry, g: (one_step(tx, *carry, g), None)  # noqa: E731
        (params, _), _ = jax.lax.scan(step, (params_of(), tx.init(params_of())), g)
        return sum(jnp.sum(p * p) for p in jax.tree.leaves(params))

    tx = gdx.skip_spikes(gdx.adamw(0.1, weight_decay=0.1), clip=clip, warmup_steps=3)
    found, expected = jax.grad(final)(tx, bad), jax.grad(final)(tx, kept)
    assert_same_bits(found.hyperparams["threshold"], jnp.zeros(()))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=1e-6)
    assert found.hyperparams["learning_rate"] != 0
    zeros = jax.grad(final)(tx, [jax.tree.map(jnp.zeros_like, g) for g in kept])
    assert all(map(np.isfinite, jax.tree.leaves(zeros)))


def test_a_checkpoint_goes_on(tmp_path):
    tx, params = GUARDED, params_of()
    bad, _ = bad_and_kept(6)
    half, state = run(tx, params, bad[:7])
    with gdx.checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(7, tx, half, state)
        restored = checkpoints.restore(tx, params, tx.init(params))
        assert_same_bits((restored.params, restored.state), (half, state))
        with pytest.raises(gdx.checkpoint.CheckpointError, match="threshold"):
            checkpoints.restore(tx.replace(threshold=3.0), params, tx.init(params))


def test_it_is_a_value():
    tx = gdx.skip_spikes(gdx.adamw(1e-3), most=3, of="value")
    assert repr(tx) == "skip_spikes(tx=adamw(learning_rate=0.001), most=3, of='value')"
    assert pickle.loads(pickle.dumps(tx)) == tx
    assert tx.replace(learning_rate=0.1).tx == gdx.adamw(0.1)
