"""bfloat16 rounded at random: unbiased, with the right variance, and exact where nothing is to be rounded."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from gdx.storage import Dither, Format, StochasticBfloat16

SIGMAS = 5.4
DRAWS = 20_000


def draws(x, format):
    """Many roundings of one array, as float64: shape (DRAWS, *x.shape)."""
    x = jnp.asarray(x, jnp.float32)
    one = lambda t: format.decode(format.encode(x, Dither(t, jnp.uint32(0))))  # noqa: E731
    return np.asarray(jax.jit(jax.vmap(one))(jnp.arange(1, DRAWS + 1, dtype=jnp.uint32)), np.float64)


VALUES = np.concatenate(
    [sign * np.geomspace(2e-38, 3e38, 40) * np.random.default_rng(0).uniform(1, 1.01, 40) / 1.02 for sign in (1, -1)]
).astype(np.float32)


def test_unbiased_with_the_variance_of_two_neighbours():
    found, x = draws(VALUES, StochasticBfloat16()), VALUES.astype(np.float64)
    low, high = found.min(0), found.max(0)
    gap = high - low
    assert np.all((low <= x) & (x <= high))
    assert all(len(np.unique(column)) <= 2 for column in found.T)
    up = (x - low) / np.where(gap > 0, gap, 1)
    # a mean of n draws has standard deviation gap * sqrt(up (1 - up) / n); chances are multiples of 2^-16
    sigma = gap * np.sqrt(up * (1 - up) / DRAWS)
    assert np.all(abs(found.mean(0) - x) <= SIGMAS * sigma + gap * 2.0**-16)
    np.testing.assert_allclose(found.var(0), gap**2 * up * (1 - up), rtol=0.1, atol=np.max(gap) * 1e-30)


def test_what_bfloat16_holds_stays():
    exact = np.array([0.0, -0.0, 1.0, -1.5, 2.0**-126, 3.3895314e38, np.inf, -np.inf, np.nan], np.float32)
    found = StochasticBfloat16().encode(jnp.asarray(exact), Dither(np.uint32(1), np.uint32(0)))
    assert np.asarray(found, np.float32).tobytes() == exact.tobytes()


def test_every_bfloat16_stays():
    raw = np.arange(2**16, dtype=np.uint16)
    values = jax.lax.bitcast_convert_type(jnp.asarray(raw), jnp.bfloat16)
    wide = values.astype(jnp.float32)
    found = StochasticBfloat16().encode(wide, Dither(np.uint32(1), np.uint32(0)))
    normal = np.isfinite(np.asarray(wide)) & (abs(np.asarray(wide)) >= 2.0**-126)
    np.testing.assert_array_equal(np.asarray(found)[normal], np.asarray(values)[normal])


def test_every_nan_stays_one():
    # the least and the largest payloads: random bits would make infinities of the ones, and carry from the others
    payloads = np.concatenate([np.arange(0x7F800001, 0x7F802000), np.arange(0x7FFFE000, 0x80000000)])
    raw = np.concatenate([payloads, payloads + 0x80000000]).astype(np.uint32)
    found = StochasticBfloat16().encode(jnp.asarray(raw.view(np.float32)), Dither(np.uint32(1), np.uint32(0)))
    assert np.all(np.isnan(np.asarray(found, np.float32)))


def test_subnormals_round_to_a_neighbour_or_zero():
    tiny = jnp.asarray(np.array([1e-45, 1e-40, -1e-39, 1e-38], np.float32))
    found = np.asarray(StochasticBfloat16().encode(tiny, Dither(np.uint32(1), np.uint32(0))), np.float32)
    # they may count as zero, as everywhere on CPUs and TPUs
    assert np.all(abs(found) <= 1.2e-38)
    assert np.all(found * np.asarray(tiny) >= 0)


def test_a_mean_follows_where_nearest_stands_still():
    g = jnp.full((64, 64), 0.01)
    start = jnp.ones((64, 64))
    for format, follows in ((StochasticBfloat16(), True), (jnp.dtype("bfloat16"), False)):
        tx = gdx.scale_by_adam(b2=0.98, nu_dtype=format)
        object.__setattr__(tx, "b2", np.float64(0.999))  # which gdx refuses for nearest
        state = tx.init(g)
        state = state._replace(nu=start.astype(state.nu.dtype))
        state, _ = jax.jit(lambda s: jax.lax.scan(lambda s, _: (tx.update(g, s)[1], None), s, None, 3000))(state)  # noqa: B023
        exact = 0.999**3000 + 1e-4 * (1 - 0.999**3000)
        mean = float(np.asarray(state.nu, np.float64).mean())
        assert (abs(mean / exact - 1) < 0.1) == follows


def test_moments_of_one_leaf_are_rounded_independently():
    """Of a gradient of ones both moments are the same number if b1 = b2."""
    tx = gdx.scale_by_adam(0.9, 0.9, mu_dtype=StochasticBfloat16(), nu_dtype=StochasticBfloat16())
    _, state = tx.update(jnp.ones(2**14), tx.init(jnp.ones(2**14)))
    ups = [np.asarray(moment) > 0.1 for moment in (state.mu, state.nu)]
    assert 0 < np.mean(ups[0]) < 1
    correlation = np.corrcoef(np.asarray(ups, float))[0, 1]
    assert abs(correlation) < SIGMAS / np.sqrt(2**14)


@dataclasses.dataclass(frozen=True)
class Halved(Format):
    """A format of a user's own: float16 of a half."""

    keeps_positive = True

    def encode(self, x, dither):
        return (x / 2).astype(jnp.float16)

    def decode(self, stored):
        return stored.astype(jnp.float32) * 2


def test_a_format_of_ones_own():
    tx = gdx.adam(0.1, mu_dtype=Halved(), nu_dtype=Halved())
    assert "Halved()" in repr(tx)
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    updates, state = tx.update({"w": jnp.array([1.0, 2.0, -4.0])}, state, params)
    np.testing.assert_allclose(state[0].mu["w"], np.array([0.05, 0.1, -0.2]), rtol=1e-3)
    np.testing.assert_allclose(updates["w"], np.array([-0.1, -0.1, 0.1]), rtol=2e-2)


def test_slopes_pass_through_the_rounding():
    def loss(tx):
        params = jnp.linspace(-1, 2, 8)
        state = tx.init(params)
        for _ in range(4):
            updates, state = tx.update(params, state, params)
            params = params + updates
        return jnp.sum(params**2)

    exact = jax.grad(loss)(gdx.adam(0.1, 0.8, 0.95))
    found = jax.grad(loss)(gdx.adam(0.1, 0.8, 0.95, mu_dtype=StochasticBfloat16(), nu_dtype=StochasticBfloat16()))
    np.testing.assert_allclose(jax.tree.leaves(found)[:3], jax.tree.leaves(exact)[:3], rtol=0.25)
    with pytest.raises(NotImplementedError, match="Format defines no encode"):
        Format().encode(jnp.ones(2), Dither(1, 0))


def test_a_seed_is_an_integer():
    assert StochasticBfloat16(np.int64(3)) == StochasticBfloat16(3)
    assert repr(StochasticBfloat16(np.int64(3))) == "storage.StochasticBfloat16(seed=3)"
    with pytest.raises(TypeError, match=r"StochasticBfloat16: seed is 1\.5; expected an integer"):
        StochasticBfloat16(seed=1.5)


def test_a_format_without_a_hash_is_refused():
    @dataclasses.dataclass
    class Thawed(Format):
        pass

    with pytest.raises(
        TypeError, match=r"mu_dtype is .*Thawed\(\), which has no hash; make the format a frozen dataclass"
    ):
        gdx.adam(0.1, mu_dtype=Thawed())


def test_random_rounding_brings_its_own_count():
    class velocity(gdx.Leafwise):
        State = optax.TraceState

        @property
        def formats(self):
            return (StochasticBfloat16(),)

        def start(self, p):
            return (jnp.zeros_like(p, jnp.bfloat16),)

        def step(self, shared, g, p, trace):
            return g, g

    tx, g = velocity(), jnp.full(64, 1.001)
    _, first = tx.update(g, tx.init(g))
    _, second = tx.update(g, first)
    assert isinstance(second, gdx.CountedState) and (first.count, second.count) == (1, 2)
    assert np.any(first.inner_state.trace != second.inner_state.trace)


ENCODING = [StochasticBfloat16(), gdx.storage.FourthRoot8(), gdx.storage.SignedFourthRoot8(block=8, minimum_size=1)]


@pytest.mark.parametrize("format", ENCODING, ids=repr)
@pytest.mark.parametrize(
    "wrong",
    ["a", None, 1.0, [1.0] * 4096, {"w": jnp.ones(4096)}, jnp.ones(4096, int), jnp.ones(4096, complex)],
    ids=str,
)
def test_what_is_no_real_array_is_not_encoded(format, wrong):
    with pytest.raises(TypeError, match=rf"{re.escape(repr(format))}: encode got .*; expected an array of real num"):
        format.encode(wrong, Dither(1, 0))


@pytest.mark.parametrize("format", ENCODING, ids=repr)
@pytest.mark.parametrize("wrong", [None, 1, "a", (1, 0), jax.random.key(0)])
def test_what_is_no_dither(format, wrong):
    with pytest.raises(TypeError, match=r"(?s)dither is .*; expected gdx\.storage\.Dither\(step, leaf\)"):
        format.encode(jnp.ones(4096), wrong)


@pytest.mark.parametrize(("format", "size"), [(ENCODING[1], 10), (ENCODING[1], 63), (ENCODING[2], 1)])
def test_an_array_too_small_for_a_block(format, size):
    with pytest.raises(ValueError, match=rf"encode got an array of shape \({size},\): .*(fewer than|no block of)"):
        format.encode(jnp.ones(size), Dither(1, 0))


@pytest.mark.parametrize("wrong", ["a", None, 1.0, jnp.ones(4096)], ids=str)
def test_what_was_not_encoded_in_blocks(wrong):
    with pytest.raises(TypeError, match=r"decode got .*; expected what encode returns, a Packed array"):
        ENCODING[1].decode(wrong)
