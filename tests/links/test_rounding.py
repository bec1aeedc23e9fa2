"""Links that round bfloat16 parameters: exact sums, their formulas, and unmodified training loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import gdx

LINKS = [
    gdx.round_stochastically(),
    gdx.round_with_correction(),
    gdx.round_with_compensation(),
    gdx.round_with_master(),
]
every_link = pytest.mark.parametrize("link", LINKS, ids=lambda link: type(link).__name__)
BF16 = jnp.bfloat16
SIGMAS = 5.4


def apply(params, updates):
    with jax.numpy_dtype_promotion("standard"):
        return optax.apply_updates(params, updates)


def run(link, theta, updates):
    """Parameters after each update, compiled."""

    def step(carry, u):
        theta, state = carry
        u, state = link.update(u, state, theta)
        theta = apply(theta, u)
        return (theta, state), theta

    (_, state), found = jax.jit(lambda t, us: jax.lax.scan(step, (t, link.init(t)), us))(theta, updates)
    return np.asarray(found, np.float64), state


@every_link
def test_apply_updates_adds_exactly(link):
    """What is added is a bfloat16 number without any rounding, over steps of every size."""
    random = np.random.default_rng(0)
    theta = jnp.asarray(random.standard_normal(4096).astype(np.float32), BF16)
    sizes = 10.0 ** random.uniform(-8, 1, 4096)
    u = jnp.asarray((random.standard_normal(4096) * sizes).astype(np.float32))
    update, _ = jax.jit(link.update)(u, link.init(theta), theta)
    assert update.dtype == np.float32
    exact = np.asarray(theta, np.float64) + np.asarray(update, np.float64)
    new = np.asarray(apply(theta, update), np.float64)
    wide = abs(new) >= abs(np.asarray(theta, np.float64)) / 2**16
    assert np.mean(wide) > 0.99
    np.testing.assert_array_equal(new[wide], exact[wide])


def test_stochastic_is_unbiased_and_moves_by_small_steps():
    size, steps = 2**14, 50
    theta, found = jnp.ones(size, BF16), None
    updates = jnp.full((steps, size), -1e-4)
    found, state = run(gdx.round_stochastically(), theta, updates)
    assert state.count == steps
    # below 1 neighbours are 2^-8 apart: each step's variance is at most that of a coin between them
    bound = SIGMAS * 2.0**-8 / 2 * np.sqrt(steps / size)
    assert abs(found[-1].mean() - (1 - 1e-4 * steps)) < bound
    assert bound < 1e-4 * steps / 4
    assert np.all(np.isin(found[0], [1, 1 - 2.0**-8]))


def test_seeds_leaves_and_steps_differ_and_repeat():
    theta = {"a": jnp.ones(4096, BF16), "b": jnp.ones(4096, BF16)}
    u = jax.tree.map(lambda p: jnp.full(p.shape, -(2.0**-9)), theta)

    def once(seed, skip=0):
        link = gdx.round_stochastically(seed)
        state = link.init(theta)
        for _ in range(skip + 1):
            found, state = link.update(u, state, theta)
        return np.concatenate([found["a"], found["b"]])

    first = once(0)
    np.testing.assert_array_equal(first, once(0))
    for other in (once(1), once(0, skip=1), np.roll(first, 4096)):
        assert 0.4 < np.mean(first == other) < 0.6


def corrected(theta, correction):
    """What a bfloat16 and its correction mean, by the neighbour on that side of it."""
    theta, correction = np.asarray(theta), np.asarray(correction)
    away = np.where(correction < 0, BF16(0), np.copysign(BF16(np.inf), theta))
    unit = np.abs(np.nextafter(theta, away).astype(np.float64) - theta.astype(np.float64))
    return theta.astype(np.float64) + np.copysign(correction / 256 * unit, theta.astype(np.float64) * correction)


def to_flashoptim(x):
    """What a float32 becomes in 24 bits of theirs: the nearest bfloat16, and 127ths of half a unit of its binade."""
    theta = x.astype(BF16).astype(np.float64)
    half = 2.0 ** (np.frexp(theta)[1] - 9)
    return theta + np.rint((x - theta) / half * 127) / 127 * half


def test_corrected_at_every_exponent():
    """Against float64: the result is one of the two neighbours in 24 bits, in the only way to write it."""
    link, random = gdx.round_with_correction(), np.random.default_rng(0)
    # all parameters but those so small that their steps are flushed to 0, or so large that they overflow
    raw = np.repeat(np.arange(27 << 7, 252 << 7, dtype=np.uint16), 4)
    theta = np.concatenate([raw, raw | 0x8000]).view(BF16)
    correction = random.integers(-128, 128, theta.size).astype(np.int8)
    before = corrected(theta, correction)
    state = link.init(jnp.asarray(theta))._replace(correction=jnp.asarray(correction))
    step = jax.jit(link.update)
    updates, same = step(jnp.zeros(theta.shape), state, jnp.asarray(theta))
    assert not np.any(updates)
    np.testing.assert_array_equal(same.correction, correction)
    # of the size of the last bits, of the parameter, and across zero
    u = (before * random.standard_normal(theta.size) * 2.0 ** random.uniform(-20, 1, theta.size)).astype(np.float32)
    updates, state = step(jnp.asarray(u), state, jnp.asarray(theta))
    new = np.asarray(apply(jnp.asarray(theta), updates))
    stored, exact = corrected(new, state.correction), before.astype(np.float32) + u
    spacing = 2.0 ** (np.frexp(exact.astype(np.float64))[1] - 16)
    down, up = np.floor(exact / spacing) * spacing, np.ceil(exact / spacing) * spacing
    assert np.all((stored == down) | (stored == up))
    assert 0.49 < np.mean(stored[down < up] == up[down < up]) < 0.51
    unit = 2.0 ** (np.frexp(exact.astype(np.float64))[1] - 8)
    assert np.all(np.abs(stored - new.astype(np.float64)) <= unit / 2)
    # a step's error, at the worst of each exponent and parameter, is no larger than theirs to nearest
    assert np.max(np.abs(stored - exact) / unit) <= np.max(np.abs(to_flashoptim(exact) - exact) / unit) < 1 / 253


def test_corrected_does_not_stand_still():
    """Steps of 2^-18 of the parameter, 1/8 of a unit of 24 bits, which to nearest would all be lost."""
    size, steps = 2**12, 1000
    updates = jnp.full((steps, size), -(2.0**-18))
    found, state = run(gdx.round_with_correction(), jnp.ones(size, BF16), updates)
    assert state.count == steps
    off = corrected(found[-1].astype(BF16), state.correction) - (1 - steps * 2.0**-18)
    sigma = 2.0**-16 * np.sqrt(steps) / 2  # of a coin between two neighbours in each step, at most
    assert abs(off.mean()) < SIGMAS * sigma / np.sqrt(size)
    assert abs(off).max() < SIGMAS * sigma < 0.4 * steps * 2.0**-18


def test_corrected_where_something_else_changes_it():
    """It stays what it was set to, to half a unit; what is no number shows, and goes no further."""
    link, largest = gdx.round_with_correction(), float(jnp.finfo(BF16).max)
    theta = jnp.asarray([0.0, -0.0, 3.0, 1.0, np.inf, -np.inf, np.nan, largest, -largest, 1.0, 1.0], BF16)
    for code in (-128, -1, 0, 127):
        state = link.init(theta)._replace(correction=jnp.full(theta.shape, code, jnp.int8))
        updates, state = link.update(jnp.zeros(theta.shape).at[-2:].set([np.inf, np.nan]), state, theta)
        new = np.asarray(apply(theta, updates), np.float32)
        expected = np.asarray(theta, np.float32)
        expected[-2:] = np.inf, np.nan
        np.testing.assert_array_equal(new[:4], expected[:4])
        np.testing.assert_array_equal(new[7:], expected[7:])
        assert not np.any(np.isfinite(new[4:7]))
        np.testing.assert_array_equal(state.correction[2:4], code)
    updates, _ = link.update(jnp.full(2, 1e38), link.init(theta[7:9]), theta[7:9])
    assert apply(theta[7:9], updates)[0] == np.inf


def test_corrected_needs_little_memory():
    tx, theta = gdx.chain(gdx.adamw(1e-3), gdx.round_with_correction()), jnp.ones((256, 256), BF16)
    state = tx.init(theta)
    assert state[1].correction.nbytes == theta.size

    def step(theta, state, gradient):
        updates, state = tx.update(gradient, state, theta)
        return apply(theta, updates), state

    memory = jax.jit(step, donate_argnums=(0, 1)).lower(theta, state, theta).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4.1 * theta.size


def test_compensated_follows_its_formula():
    random = np.random.default_rng(0)
    updates = (1e-3 * random.standard_normal((100, 64))).astype(np.float32)
    theta = np.ones(64, np.float32)
    found, state = run(gdx.round_with_compensation(), jnp.asarray(theta, BF16), jnp.asarray(updates))
    c, bf16 = np.zeros(64, np.float32), lambda x: np.asarray(jnp.asarray(x, BF16), np.float32)
    for t, u in enumerate(updates):
        s = u + c
        new = bf16(theta + s)
        c, theta = bf16(s - (new - theta)), new
        np.testing.assert_array_equal(found[t], theta)
    np.testing.assert_array_equal(np.asarray(state.compensation, np.float32), c)
    # and it is far nearer to the exact sum than half a unit in the last place
    exact = 1 + updates.astype(np.float64).sum(0)
    assert np.max(abs(theta.astype(float) + c - exact)) < 2.0**-13


def test_master_is_the_float32_run_rounded():
    random = np.random.default_rng(0)
    updates = (1e-3 * random.standard_normal((100, 64))).astype(np.float32)
    found, state = run(gdx.round_with_master(), jnp.ones(64, BF16), jnp.asarray(updates))
    exact = np.ones(64, np.float32)
    for u in updates:
        exact = exact + u
    np.testing.assert_array_equal(state.master, exact)
    np.testing.assert_array_equal(found[-1], np.asarray(jnp.asarray(exact, BF16), np.float64))


@every_link
def test_other_dtypes_pass(link):
    params = {"half": jnp.ones(3, "float16"), "single": jnp.ones(3), "bf16": jnp.ones(3, BF16)}
    u = jax.tree.map(lambda p: jnp.full(p.shape, 1e-4, p.dtype), params)
    updates, _ = link.update(u, link.init(params), params)
    for name in ("half", "single"):
        np.testing.assert_array_equal(updates[name], u[name])
    assert [updates[name].dtype for name in ("half", "single", "bf16")] == ["float16", "float32", "float32"]


@every_link
def test_without_parameters(link):
    params = jnp.ones(3, BF16)
    with pytest.raises(ValueError, match=f"{type(link).__name__}: update needs the parameters"):
        link.update(params, link.init(params))


@every_link
def test_in_flax_train_state(link):
    tx = gdx.chain(gdx.sgd(2e-4), link)
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(256, BF16)}, tx=tx)
    step = jax.jit(lambda state: state.apply_gradients(grads={"w": jnp.ones(256, BF16)}))
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(100):
            state = step(state)
    assert state.params["w"].dtype == BF16
    np.testing.assert_allclose(np.asarray(state.params["w"], np.float32).mean(), 0.98, atol=2e-3)


@every_link
def test_in_nnx_optimizer(link):
    model = nnx.Linear(4, 64, rngs=nnx.Rngs(0), param_dtype=BF16)
    model.kernel[...] = jnp.ones((4, 64), BF16)
    optimizer = nnx.Optimizer(model, gdx.chain(gdx.sgd(2e-4), link), wrt=nnx.Param)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(50):
            optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
    assert model.kernel.dtype == BF16
    np.testing.assert_allclose(np.asarray(model.kernel[...], np.float32).mean(), 0.99, atol=2e-3)


@every_link
def test_weight_decay_before_it_counts(link):
    """Of parameters without gradients: decay alone, 1e-4 a step, which nearest rounding would never show."""
    tx = gdx.chain(gdx.adamw(1e-2, weight_decay=1e-2), link)
    theta = jnp.ones(4096, BF16)
    found, _ = run(tx, theta, jnp.zeros((200, 4096)))
    np.testing.assert_allclose(found[-1].mean(), (1 - 1e-4) ** 200, atol=2e-3)


@every_link
def test_its_text_evaluates_to_it(link):
    assert eval(repr(link), vars(gdx)) == link
    assert eval(
        repr(gdx.chain(gdx.sgd(0.1, 0.9, accumulator_dtype=gdx.storage.SignedFourthRoot8(128)), link)), vars(gdx)
    )
