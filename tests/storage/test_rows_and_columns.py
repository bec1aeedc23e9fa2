"""Numbers relative to the smaller scale of row and column: bounded, and exact where both differ in size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdx
from gdx.storage import FourthRoot8, PowersOfTwo4, SignedFourthRoot8, SignedPowersOfTwo4, Simulated
from tests.contract.table import assert_same_bits
from tests.storage.test_blocks import FIRST, SIGMAS

BOTH = {"block": None, "axis": None}
MU, NU = SignedFourthRoot8(**BOTH), FourthRoot8(**BOTH)


@pytest.mark.parametrize(
    ("shape", "boxes"),
    [
        ((96, 80), [(1, 80), (96, 1)]),
        ((64, 8, 72), [(1, 1, 72), (64, 8, 1)]),  # heads
        ((32, 96, 80), [(1, 1, 80), (1, 96, 1)]),  # layers
        ((3, 3, 65, 64), [(1, 1, 1, 64), (1, 1, 65, 1)]),  # a convolution, in the layout of flax
        ((80, 16, 3, 3), [(1, 16, 3, 3), (80, 1, 1, 1)]),  # and of equinox
        ((4096,), [(4096,)]),
        ((63, 80), [(1, 80)]),  # too few rows for columns
        ((97, 61), [(97, 1)]),  # and the other way round
        ((16, 33), [(16, 33)]),
        ((7, 9), []),
    ],
)
def test_rows_and_columns_of_real_shapes(shape, boxes):
    format = SignedFourthRoot8(**BOTH, minimum_size=1)
    assert [layout.box for layout in format.layouts(shape)] == boxes
    assert format.fits(shape) == bool(boxes)
    if boxes:
        packed = jax.eval_shape(format.zeros, jax.ShapeDtypeStruct(shape, "float32"))
        assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(packed)) <= 9 / 8 * np.prod(shape)


@pytest.mark.parametrize(("shape", "axes"), [((64, 8, 72), [(2,), (0, 1)]), ((97, 61), [(0,)])])
def test_against_the_formula(shape, axes):
    """In float64."""
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32) ** 3
    packed, decoded = jax.jit(lambda x: (MU.encode(x, FIRST), MU.encode(x, FIRST).decode()))(x)
    scales = [abs(x.astype(float)).max(of, keepdims=True) for of in axes]
    for found, expected in zip(jax.tree.leaves(packed.scales), scales, strict=True):
        np.testing.assert_array_equal(found, expected.astype(np.float32))
    smaller = functools.reduce(np.minimum, scales)
    found, exact = (np.sign(a) * (abs(a) / smaller) ** 0.25 for a in (np.asarray(decoded, float), x.astype(float)))
    assert np.all(abs(found) <= 1 + 1e-6)
    assert np.all(abs(found - exact) <= 1.001 / 127)


def test_rows_and_columns_of_any_size():
    """Of numbers that differ by five orders of magnitude from row to row, and from column to column."""
    random = np.random.default_rng(0)
    rows, columns = 10.0 ** random.uniform(-5, 0, (2, 96))
    x = random.uniform(0.2, 1, (96, 96)) * np.minimum(rows[:, None], columns)
    kinds = {
        SignedFourthRoot8: (0.02, 3),
        FourthRoot8: (0.01, 3),
        SignedPowersOfTwo4: (0.3, 2),
        PowersOfTwo4: (0.3, 1.2),
    }

    @jax.jit
    def decoded(x):
        return [[kind(block=None, axis=way).encode(x, FIRST).decode() for way in (None, -1, -2)] for kind in kinds]

    for (most, factor), found in zip(kinds.values(), decoded(jnp.asarray(x, jnp.float32))):
        both, *others = (np.sqrt(np.mean((np.asarray(y, float) / x - 1) ** 2)) for y in found)
        assert both < most
        assert min(others) > factor * both


def test_what_is_not_finite_makes_its_row_and_column_nan():
    x = np.ones((3, 64, 64), np.float32)
    x[:, 3, 5] = np.inf, -np.inf, np.nan
    x[:, 9], x[:, :, 9] = 1e-39, 0  # less than a scale can be
    found = np.asarray(jax.jit(lambda x: MU.encode(x, FIRST).decode())(x))
    hit = np.zeros((3, 64, 64), bool)
    hit[:, 3], hit[:, :, 5] = True, True
    np.testing.assert_array_equal(np.isnan(found), hit)
    np.testing.assert_array_equal(found[~hit], np.where(x < 1, 0, x)[~hit])


def test_without_gradients_nothing_drifts_or_becomes_0_and_where_a_state_goes(tmp_path):
    """10,000 steps, in a matrix without any, and in columns that one row keeps up."""
    steps, b2 = 10_000, 0.999
    x = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, (2, 64, 64)), jnp.float32).at[1, 0].set(0.05)
    g = jnp.zeros_like(x).at[1, 0].set(np.sqrt(0.05))
    tx = gdx.scale_by_adam(b2=b2, nu_dtype=NU)
    start = NU.encode(x, FIRST)

    def step(state, _):
        state = tx.update(g, state)[1]
        return state, state.nu.decode()[:, 1:].mean((1, 2))

    state, means = jax.jit(lambda s: jax.lax.scan(step, s, None, steps))(tx.init(x)._replace(nu=start))
    assert state.nu.decode().min() > 0
    exact = np.asarray(start.decode())[:, 1:].mean((1, 2)) * (float(np.float32(b2)) ** np.arange(1, steps + 1))[:, None]
    # of 4,000 numbers, each a fifth off at most; the chance of a step down is a multiple of 2^-16
    for t in (1000, 3000, 5000):
        off = means[t - 1] / exact[t - 1] - 1
        assert np.all(abs(off) < SIGMAS * 0.2 * np.sqrt(t * (1 - b2) / 4000) + 2.0**-16 / (1 - b2))

    with gdx.checkpoint.Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(1, tx, x, state)
        assert_same_bits(checkpoints.restore(tx, x, tx.init(x))[2], state)
    wide = gdx.storage.convert(state, gdx.scale_by_adam(b2=b2).init(x))
    np.testing.assert_array_equal(wide.nu, state.nu.decode())
    rows = gdx.scale_by_adam(b2=b2, nu_dtype=FourthRoot8(block=None))
    with pytest.raises(TypeError, match=r"state\.nu at .*Packed\(codes=.*not how storage\..*convert"):
        rows.update(g, state)
    assert gdx.storage.convert(state, rows.init(x)).nu.scales.shape == (2, 64, 1)


def test_slopes_are_refused_or_simulated():
    x = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, (64, 66)), jnp.float32)

    def total(momentum, format):
        tx = gdx.momentum(0.1, momentum, accumulator_dtype=format)
        updates, _ = tx.update(x, tx.update(x, tx.init(x))[1])
        return jnp.sum(updates)

    with pytest.raises(TypeError, match=r"take storage\.Simulated\(storage\..*axis=None"):
        jax.grad(total)(0.9, MU)
    value, slope = jax.jit(jax.value_and_grad(lambda momentum: total(momentum, Simulated(MU))))(0.9)
    np.testing.assert_array_equal(value, jax.jit(total, static_argnums=1)(0.9, MU))
    np.testing.assert_allclose(slope, -0.1 * x.sum(), rtol=1e-2)  # of what is held
