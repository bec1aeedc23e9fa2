"""Random bits: uniform and independent over elements, steps, leaves, fields and seeds, to what the sample can show."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from gdx.storage import Dither

SIZE = 2**18
# a standard normal number is beyond it once in 15 million; there are some hundred of them here
SIGMAS = 5.4


def bits(step=1, leaf=0, field=0, seed=0, shape=(SIZE,)):
    return np.asarray(Dither(np.uint32(step), np.uint32(leaf), field).bits(shape, seed), float)


STREAMS = {
    "first": bits(),
    "next step": bits(step=2),
    "a later step": bits(step=1000),
    "next leaf": bits(leaf=1),
    "a later leaf": bits(leaf=500),
    "other field": bits(field=1),
    "third field": bits(field=2),
    "other seed": bits(seed=1),
}


def assert_correlations_vanish(a, b):
    """Each sample correlation of independent numbers has standard deviation 1 / sqrt(n)."""
    a, b = (a - a.mean()) / a.std(), (b - b.mean()) / b.std()
    assert abs(np.mean(a * b)) < SIGMAS / np.sqrt(len(a))


@pytest.mark.parametrize("name", STREAMS)
def test_uniform(name):
    found = STREAMS[name]
    assert found.min() >= 0
    assert found.max() < 2**16
    # of 2^16 equally likely values: mean 2^15 - 1/2, variance 2^32 / 12, that of the variance 2^64 / 180
    assert abs(found.mean() - (2**15 - 0.5)) < SIGMAS * np.sqrt(2**32 / 12 / SIZE)
    assert abs(found.var() - 2**32 / 12) < SIGMAS * np.sqrt(2**64 / 180 / SIZE)
    # each of the 16 bits is set half of the time
    each = (found.astype(int)[:, None] >> np.arange(16)) & 1
    assert np.max(abs(each.mean(0) - 0.5)) < SIGMAS * 0.5 / np.sqrt(SIZE)
    # 256 cells: chi squared has mean 255 and variance 510
    counts = np.bincount(found.astype(int) >> 8, minlength=256)
    assert abs(np.sum((counts - SIZE / 256) ** 2) / (SIZE / 256) - 255) < SIGMAS * np.sqrt(2 * 255)


@pytest.mark.parametrize("pair", list(itertools.combinations(STREAMS, 2)), ids=" and ".join)
def test_independent(pair):
    assert_correlations_vanish(*(STREAMS[name] for name in pair))


@pytest.mark.parametrize("distance", [1, 2, 3, 8, 256, 4096, 65536])
def test_neighbours_are_independent(distance):
    first = STREAMS["first"]
    assert_correlations_vanish(first[:-distance], first[distance:])


def test_one_element_over_many_steps():
    found = np.asarray(jax.vmap(lambda t: Dither(t, jnp.uint32(3)).bits((2,), 0))(jnp.arange(1, SIZE + 1)), float)
    assert abs(found.mean() - (2**15 - 0.5)) < SIGMAS * np.sqrt(2**32 / 12 / found.size)
    assert_correlations_vanish(found[:-1, 0], found[1:, 0])
    assert_correlations_vanish(found[:, 0], found[:, 1])


def test_places_are_those_in_the_flattened_array():
    np.testing.assert_array_equal(bits(shape=(4, 6, 8)), bits(shape=(192,)).reshape(4, 6, 8))


def test_the_bits_do_not_depend_on_the_sharding():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    for spec in (PartitionSpec("a", "b"), PartitionSpec(("b", "a")), PartitionSpec(None, "b")):
        made = jax.jit(
            lambda: Dither(np.uint32(1), np.uint32(0)).bits((16, 8), 0), out_shardings=NamedSharding(mesh, spec)
        )()
        np.testing.assert_array_equal(made, bits(shape=(16, 8)))
