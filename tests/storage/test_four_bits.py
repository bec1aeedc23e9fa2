"""4 bits: powers of two, rounded at random without bias, and the error that does not add up."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdx
from gdx.storage import Dither, PowersOfTwo4, SignedPowersOfTwo4
from tests.contract.table import assert_same_bits
from tests.storage.test_blocks import FIRST, SIGMAS

MU, NU = SignedPowersOfTwo4(), PowersOfTwo4()
FOUR_BIT = {"mu_dtype": MU, "nu_dtype": NU}
SMALL = {"block": 8, "minimum_size": 1}


@pytest.mark.parametrize("format", [MU, NU])
def test_one_of_two_neighbours_without_bias(format):
    codes = np.arange(-7, 8) if format.signed else np.arange(16)
    grid = np.sign(codes) * 2.0 ** (abs(codes) - 7) if format.signed else 2.0 ** (codes - 15)
    x = np.geomspace(2.0**-15, 1, 128).astype(np.float32)
    x = x * (-1) ** np.arange(128) if format.signed else x
    draws = 20_000
    one = lambda t: format.encode(3 * jnp.asarray(x), Dither(t, jnp.uint32(0))).decode() / 3  # noqa: E731
    found = np.asarray(jax.jit(jax.vmap(one))(jnp.arange(1, draws + 1, dtype=jnp.uint32)), np.float64)
    assert np.abs(found[..., None] - grid).min(-1).max() < 1e-7
    above = np.searchsorted(grid, x)
    low, high = grid[np.maximum(above - 1, 0)], grid[above]
    assert np.all((found >= low - 1e-6) & (found <= high + 1e-6))
    sigma = np.sqrt(np.maximum((x - low) * (high - x), 0) / draws)
    assert np.all(abs(found.mean(0) - x) <= SIGMAS * sigma + (high - low) * 2.0**-16 + 1e-6 * abs(x))


@pytest.mark.parametrize("format", [SignedPowersOfTwo4(**SMALL), PowersOfTwo4(**SMALL)])
def test_magnitudes_and_what_is_not_finite(format):
    powers = np.array([1, 0.5, 0.25, 0.125, 2**-4, 2**-5, 2**-6, 1], np.float32)
    blocks = [powers * np.float32(scale) for scale in (2e-38, 1e-20, 1, 3e38)]
    bad = [np.where(np.arange(8) == 3, value, powers) for value in (np.inf, -np.inf, np.nan)]
    x = np.stack([*blocks, np.full(8, 1e-39), np.zeros(8), *bad]).astype(np.float32)
    found = np.asarray(format.encode(jnp.asarray(x), FIRST).decode())
    normal = abs(x[:4]) > 1.2e-38  # subnormal numbers count as 0
    np.testing.assert_allclose(found[:4][normal], x[:4][normal], rtol=1e-6)
    np.testing.assert_array_equal(found[4:6], 0)
    assert np.all(np.isnan(found[6:]))


def test_a_second_moment_is_never_0_and_does_not_drift():
    """10,000 steps without gradients: exactly where a whole block has none, on average beside one that has."""
    steps, b2 = 10_000, 0.999
    x = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, (64, 128)), jnp.float32)
    g = jnp.zeros_like(x).at[32:, 0].set(1)
    x = x.at[32:, 0].set(1)
    tx = gdx.scale_by_adam(b2=b2, nu_dtype=NU)
    start = NU.encode(x, FIRST)

    def step(state, _):
        state = tx.update(g, state)[1]
        return state, state.nu.decode()[32:, 1:].mean()

    state, means = jax.jit(lambda s: jax.lax.scan(step, s, None, steps))(tx.init(x)._replace(nu=start))
    found, before = np.asarray(state.nu.decode(), float), np.asarray(start.decode(), float)
    decay = float(np.float32(b2)) ** steps
    np.testing.assert_allclose(found[:32], before[:32] * decay, rtol=1e-3)
    assert found.min() > 0
    exact = before[32:, 1:].mean() * float(np.float32(b2)) ** np.arange(1, steps + 1)
    # of 4,000 numbers within a factor of 2 or so; the chance of a step down is a multiple of 2^-16
    for t in (1000, 2000, 4000):
        assert abs(means[t - 1] / exact[t - 1] - 1) < SIGMAS * np.sqrt(t * (1 - b2) / 4000) + 2.0**-17 / (1 - b2) * 2


def test_errors_do_not_add_up_in_the_parameters():
    @dataclasses.dataclass(frozen=True, repr=False)
    class Plain(SignedPowersOfTwo4):
        compensates: ClassVar[bool] = False

    noise = jnp.asarray(np.random.default_rng(0).standard_normal((800, 16, 256)), jnp.float32)

    def drift(link, **setting):
        def step(carry, g):
            state, off, kept = carry
            update, state = tx.update(g, state)
            right, kept = exact.update(g, kept)
            off = off + (update - right)
            return (state, off, kept), jnp.sqrt(jnp.mean(off**2))

        tx, exact = link(**setting), link()
        start = tx.init(noise[0]), jnp.zeros_like(noise[0]), exact.init(noise[0])
        return np.asarray(jax.jit(lambda x: jax.lax.scan(step, start, x)[1])(noise))

    for link, name in ((gdx.scale_by_momentum, "accumulator_dtype"), (gdx.scale_by_adam, "mu_dtype")):
        kept = drift(link, **{name: MU})
        assert kept[799] < 1.5 * kept[99], link
    plain = drift(gdx.scale_by_adam, mu_dtype=Plain())
    assert plain[799] > 2 * plain[99]
    assert plain[799] > 2.5 * kept[799]


def test_bytes_as_held_taken_and_donated():
    params = {"w": jnp.zeros((64, 512)), "b": jnp.zeros(64)}
    tx = gdx.adamw(1e-3, **FOUR_BIT)
    state, size = tx.init(params), 64 * 512
    held = sum(moment["w"].nbytes for moment in (state[0].mu, state[0].nu))
    assert held == 1.0625 * size
    assert gdx.describe(tx, params).nbytes == held + 2 * 4 * 64 + 4
    compiled = jax.jit(lambda p, s, g: tx.update(g, s, p), donate_argnums=1).lower(params, state, params).compile()
    memory = compiled.memory_analysis()
    others = (64 + 1) * 8
    assert held <= memory.alias_size_in_bytes <= held + others
    assert memory.argument_size_in_bytes <= held + others + 2 * 4 * (size + 64)
    np.testing.assert_array_equal(compiled(params, state, params)[0]["w"], 0)


def test_where_else_a_state_goes(tmp_path):
    """Checkpoints, conversion, and steps there, with the same bits."""
    params = {"w": jnp.ones((64, 128))}
    g = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32))}
    tx = gdx.adamw(1e-3, **FOUR_BIT)
    state = tx.update(g, tx.init(params), params)[1]
    with gdx.checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, tx, params, state)
        restored = checkpoints.restore(tx, params, tx.init(params))[2]
    assert_same_bits(restored, state)
    wide = gdx.storage.convert(state, gdx.adamw(1e-3).init(params))
    np.testing.assert_array_equal(wide[0].mu["w"], state[0].mu["w"].decode())
    assert_same_bits(gdx.storage.convert(wide, state), state)
