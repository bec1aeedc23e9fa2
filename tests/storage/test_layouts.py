"""Where blocks of 8 bits lie in arrays of any shape, what that costs, and what says that a leaf stays whole."""

import functools
import math
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gdx
from benchmarks.models import TREES
from gdx.storage import Dither, FourthRoot8, Packed, SignedFourthRoot8
from tests.contract.table import assert_same_bits
from tests.sharded import both_kinds

EIGHT_BIT = {"mu_dtype": SignedFourthRoot8(), "nu_dtype": FourthRoot8()}

shapes = st.lists(st.integers(1, 9) | st.sampled_from([12, 16, 17, 60, 64, 97, 300]), max_size=5).map(tuple)
shapes = shapes.filter(lambda shape: math.prod(shape) <= 100_000)
formats = st.builds(
    SignedFourthRoot8,
    block=st.integers(8, 300) | st.none(),
    minimum_size=st.just(1),
    axis=st.sampled_from([-1, -1, -2, -3]),
)


def block_numbers(layout):
    """Which block each number is in, by the boxes alone."""
    axes = [np.arange(length) // part for length, part in zip(layout.shape, layout.box)]
    return np.ravel_multi_index(np.meshgrid(*axes, indexing="ij"), layout.blocks)


@hypothesis.given(shapes, formats)
def test_every_number_is_in_one_block_of_the_right_size(shape, format):
    layout, most, least = format.layout(shape), format.block or math.inf, (format.block or 256) // 4
    assert format.fits(shape) == (layout is not None)
    if layout is None:
        assert math.prod(shape[: len(shape) + format.axis + 1]) < least or len(shape) < -format.axis
        return
    packed = jax.eval_shape(format.zeros, jax.ShapeDtypeStruct(shape, "float32"))
    assert sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(packed)) < 4 * math.prod(shape)
    numbers = block_numbers(layout)
    assert least <= layout.block <= most
    sizes = np.bincount(numbers.ravel(), minlength=math.prod(layout.blocks))
    assert np.all((sizes > 0) & (sizes <= layout.block))
    whole = all(length % part == 0 for length, part in zip(shape, layout.box))
    assert np.all(sizes == layout.block) == whole == (layout.missing == 0)
    # along axes in front and behind, and of those between all but the first, nothing is cut
    longer = [axis for axis, part in enumerate(layout.box) if part > 1]
    assert all(layout.box[axis] == shape[axis] for axis in longer[1:])
    assert all(axis <= len(shape) + format.axis for axis in longer)
    # as split and joined, blocks are those of the boxes
    split = np.asarray(layout.split(jnp.asarray(numbers, jnp.int32) + 1))
    rows = np.moveaxis(split, layout.axis + 1, -1).reshape(-1, layout.block)
    assert all(len(set(row) - {0}) == 1 for row in rows)
    assert len(rows) == len(sizes)


@hypothesis.given(shapes, formats)
def test_joined_is_what_was_split(shape, format):
    layout = format.layout(shape)
    if layout is not None:
        codes = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
        scales = np.arange(math.prod(layout.blocks), dtype=np.float32).reshape(layout.blocks)
        packed = Packed(jnp.asarray(codes), jnp.asarray(scales), format)
        assert_same_bits(layout.join(layout.split(packed)), packed)


@functools.partial(jax.jit, static_argnums=0)
def through(format, x, seed):
    """What an array is encoded to, what that is decoded to, and zeros: in one program for each shape."""
    packed = format.encode(x, Dither(seed, np.uint32(0)))
    return packed, packed.decode(), format.zeros(x)


@hypothesis.given(shapes, formats, st.integers(0, 9))
def test_what_is_decoded_is_a_code_away_at_most(shape, format, seed):
    layout = format.layout(shape)
    if layout is None:
        return
    x = np.random.default_rng(seed).standard_normal(shape).astype(np.float32) ** 3
    packed, decoded, fresh = through(format, x, np.uint32(seed))
    numbers = block_numbers(layout)
    largest = np.zeros(math.prod(layout.blocks), np.float32)
    np.maximum.at(largest, numbers.ravel(), abs(x).ravel())
    assert packed.codes.shape == shape
    np.testing.assert_array_equal(packed.scales, largest.reshape(layout.blocks))
    found, exact = (np.sign(a) * (abs(a) / largest[numbers]) ** 0.25 for a in (np.asarray(decoded), x))
    assert np.all(abs(found - exact) <= 1.001 / 127)
    assert (fresh.codes.shape, fresh.scales.shape) == (packed.codes.shape, packed.scales.shape)


@hypothesis.given(shapes, formats, st.integers(1, 8))
def test_a_part_of_whole_blocks_has_the_same_ones(shape, format, count):
    """So that a device's part of an array can be decoded by itself."""
    layout = format.layout(shape)
    if layout is not None and shape[layout.axis] % (count * layout.part) == 0:
        part = [length // count if axis == layout.axis else length for axis, length in enumerate(shape)]
        assert format.layout(tuple(part)).box == layout.box


@pytest.mark.parametrize(
    ("shape", "axis", "box"),
    [
        ((300, 1000), -1, (1, 1000)),
        ((300, 1000), -2, (300, 1)),
        ((512, 8, 64), -1, (1, 1, 64)),
        ((512, 8, 40), -1, (1, 8, 40)),  # a row of 40 is too short
        ((128, 64, 3, 3), -1, (1, 64, 3, 3)),
        ((7, 9), -1, None),
    ],
)
def test_whole_rows(shape, axis, box):
    layout = SignedFourthRoot8(block=None, minimum_size=1, axis=axis).layout(shape)
    assert box == (layout and layout.box)


@pytest.mark.parametrize(
    ("shape", "axis", "box"),
    [
        ((512, 8, 64), -1, (1, 1, 64)),  # projections of attention
        ((8, 64, 512), -1, (1, 1, 256)),
        ((3, 3, 64, 128), -1, (1, 1, 1, 128)),  # convolutions, in the layout of flax
        ((7, 7, 3, 64), -1, (1, 1, 1, 64)),
        ((128, 64, 3, 3), -1, (1, 16, 3, 3)),  # and of equinox
        ((64, 3, 7, 7), -1, (1, 3, 7, 7)),
        ((256, 64, 1, 1), -1, (1, 64, 1, 1)),
        ((1024, 5, 7), -1, (4, 5, 7)),
        ((4096,), -1, (256,)),
        ((64, 1024), -1, (1, 256)),
        ((64, 1000), -1, (1, 250)),
        ((64, 257), -1, (1, 256)),  # a prime: the last block is shorter
        ((101, 5, 7), -1, (7, 5, 7)),
        ((512, 8, 64), -2, (32, 8, 1)),
        ((1024, 512), -2, (256, 1)),
    ],
)
def test_boxes_of_real_shapes(shape, axis, box):
    assert SignedFourthRoot8(axis=axis).layout(shape).box == box


@pytest.mark.parametrize("name", TREES)
def test_bytes_per_parameter_of_real_models(name):
    tree = [jax.ShapeDtypeStruct(shape, "float32") for shape in TREES[name]]
    found = gdx.describe(gdx.adamw(1e-3, **EIGHT_BIT), tree)
    assert found.nbytes_per_parameter <= 2.13
    state = jax.eval_shape(gdx.adamw(1e-3, **EIGHT_BIT).init, tree)
    assert found.nbytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert found.parameters == sum(x.size for x in tree)
    # what stays whole is small, and listed
    kept = [x.size for x in jax.tree.leaves(state) if x.dtype == np.float32 and x.shape in TREES[name] and x.size > 1]
    assert max(kept, default=0) < 4096
    assert len(found.whole) == len(kept)


# one leaf for each kind of block, with 8 devices to be split over, and of them a moment by rows and columns
MERGED = {"heads": (64, 8, 64), "convolution": (64, 64, 4, 3), "first": (64, 3, 7, 7), "padded": (97, 61)}


def some_steps(tx, params, state, gradients):
    step = jax.jit(
        lambda params, state, g: (lambda u, s: (optax.apply_updates(params, u), s))(*tx.update(g, state, params))
    )
    for g in gradients:
        params, state = step(params, state, g)
    return params, state


@both_kinds
@pytest.mark.parametrize(
    "specs", [{}, {"convolution": P(None, None, "b")}, {"heads": P("a", None, "b"), "first": P("b")}]
)
@pytest.mark.parametrize("splits", [False, True], ids=["as parameters", "shard_state"])
def test_merged_axes_on_a_mesh_have_the_bits_of_one_device(kind, specs, splits):
    """Parameters may be split along any axis of a block, too."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(kind,) * 2)
    random = [np.random.default_rng(seed) for seed in range(4)]
    trees = [{k: jnp.asarray(r.standard_normal(s).astype(np.float32)) for k, s in MERGED.items()} for r in random]
    whole = {name: specs.get(name, P()) for name in MERGED}
    placed = [{k: jax.device_put(x, NamedSharding(mesh, whole[k])) for k, x in tree.items()} for tree in trees]
    tx = gdx.adamw(1e-2, mu_dtype=SignedFourthRoot8(), nu_dtype=FourthRoot8(block=None, axis=None))
    expected = some_steps(tx, trees[0], tx.init(trees[0]), trees[1:])
    if splits:
        tx = gdx.sharding.shard_state(tx, mesh, "a", specs=whole)
    state = tx.init(placed[0])
    assert all(isinstance(moment, Packed) for moment in state[0].mu.values())
    assert_same_bits(some_steps(tx, placed[0], state, placed[1:]), expected)


def test_moments_are_split_between_blocks_only():
    mesh = AbstractMesh((4,), ("data",))
    cases = {
        (6, 64, 3, 3): (P(None, "data"), P(None, "data")),  # boxes of 16 along the second axis
        (6, 48, 3, 3): (P(), P()),  # of which 12 would be part of one
        (6, 63, 4, 4): (P(), P()),  # a merged axis is whole in every block
        (8, 63, 4, 4): (P("data"), P("data")),
    }
    for shape, specs in cases.items():
        p = jax.ShapeDtypeStruct(shape, "float32")
        formats = {name: type(format)(minimum_size=1) for name, format in EIGHT_BIT.items()}
        found = gdx.sharding.state_shardings(gdx.adam(0.1, **formats), p, mesh)[0].nu
        assert (found.codes.spec, found.scales.spec) == specs


def test_nothing_in_few_bits_is_said_at_init():
    params = {"w": jnp.ones((16, 33)), "b": jnp.ones(33)}
    words = re.escape(
        "scale_by_adam: no leaf fits state.mu in storage.SignedFourthRoot8() or state.nu in storage.FourthRoot8(), so "
        "all stay whole. The largest, at ['w'], has the shape (16, 33): 528 numbers, fewer than minimum_size=4096. "
    )
    for tx in (gdx.adamw(0.1, **EIGHT_BIT), optax.chain(optax.clip(1.0), gdx.scale_by_adam(**EIGHT_BIT))):
        for init in (tx.init, jax.jit(tx.init)):
            with pytest.warns(UserWarning, match=words) as caught:
                init(params)
            assert len(caught) == 1
    turned = SignedFourthRoot8(axis=-2)
    words = r"scale_by_momentum: no leaf fits state\.trace.*no block of 64 numbers up to axis=-2 of \(2, 4096\)"
    with pytest.warns(UserWarning, match=words):
        gdx.sgd(0.1, 0.9, accumulator_dtype=turned).init(jnp.ones((2, 4096)))
    with pytest.warns(UserWarning, match=r"the root, has the shape \(64, 256\): complex"):
        gdx.sgd(0.1, 0.9, accumulator_dtype=turned).init(jnp.ones((64, 256), "complex64"))


def test_nothing_is_said_where_something_is_held_or_asked_for():
    """Warnings are errors here."""
    small = {"w": jnp.ones((16, 33))}
    gdx.adamw(0.1, **EIGHT_BIT).init({**small, "large": jnp.ones((64, 64))})
    gdx.adamw(0.1, **EIGHT_BIT).init({})
    gdx.adamw(0.1, mu_dtype="bfloat16", nu_dtype=gdx.storage.StochasticBfloat16()).init(small)
    gdx.describe(gdx.adamw(0.1, **EIGHT_BIT), small)
