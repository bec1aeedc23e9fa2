"""One checksum for one content: any change is seen, no mesh is."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdx.checkpoint import checksum
from gdx.compat import enable_x64

DTYPES = ["bool", "int4", "int8", "uint16", "int32", "float8_e4m3fn", "bfloat16", "float16", "float32", "complex64"]
WIDE = ["int64", "float64", "complex128"]


def some(dtype: str, shape=(8, 6)) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=shape) * 5
    return x.astype(jnp.dtype(dtype))


def formula(words: np.ndarray) -> str:
    """The docstring's formula in integers without bounds; words of shape (elements, words of each)."""

    def h(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    def total(k: int) -> int:
        salts = [h(0x9E3779B9 + 2 * j + k) for j in range(words.shape[1])]
        terms = [h(int(w) ^ h((i + salt) % 2**32)) for i, row in enumerate(words) for w, salt in zip(row, salts)]
        return sum(terms) % 2**32

    return f"{total(0):08x}{total(1):08x}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_the_formula(dtype):
    x = some(dtype)
    unsigned = {"bool": np.uint8, "complex64": np.uint32, "int4": None}.get(dtype, f"uint{8 * x.dtype.itemsize}")
    words = (x.astype(np.int8) & 15 if unsigned is None else x.view(unsigned)).reshape(x.size, -1)
    assert checksum(jnp.asarray(x)) == checksum(x) == formula(words)


@pytest.mark.parametrize("dtype", WIDE)
def test_64_bits_count_whole_with_and_without_x64(dtype):
    x = some(dtype)
    expected = formula(x.view(np.uint32).reshape(x.size, -1))
    assert checksum(x) == expected
    with enable_x64(True):
        assert checksum(jnp.asarray(x)) == checksum(x) == expected


@pytest.mark.parametrize("dtype", DTYPES + WIDE)
@hypothesis.given(data=st.data())
def test_sees_every_changed_bit(dtype, data):
    x = some(dtype)
    changed = x.copy()
    place = data.draw(st.integers(0, x.nbytes - 1))
    bit = data.draw(st.integers(0, {"bool": 0, "int4": 3}.get(dtype, 7)))
    changed.view(np.uint8).reshape(-1)[place] ^= np.uint8(1 << bit)
    ours, theirs = checksum(x), checksum(changed)
    assert ours[:8] != theirs[:8] and ours[8:] != theirs[8:]


def test_sees_what_a_plain_sum_does_not():
    x = np.arange(48, dtype=np.float32).reshape(8, 6)
    others = [x[::-1], x.T.reshape(8, 6), np.roll(x, 1), np.where(x == 0, -0.0, x).astype(np.float32)]
    assert len({checksum(x), *map(checksum, others)}) == 5


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("shape", [(8,), (2, 4), (4,), (2,), (1,)])
def test_no_mesh_changes_it(shape, kind):
    x = some("float32", (8, 24))
    names = ("a", "b")[: len(shape)]
    mesh = jax.make_mesh(
        shape, names, axis_types=(jax.sharding.AxisType[kind],) * len(shape), devices=jax.devices()[: np.prod(shape)]
    )
    for spec in (jax.P(*names), jax.P(names), jax.P(), jax.P(None, "a")):
        assert checksum(jax.device_put(x, jax.NamedSharding(mesh, spec))) == checksum(x)


def test_of_scalars_and_nothing():
    assert checksum(np.float32(1)) == checksum(jnp.float32(1)) != checksum(jnp.float32(2))
    assert checksum(np.zeros((0, 3))) == "0" * 16


@pytest.mark.parametrize("wrong", ["a", b"a", None, abs, {"w": 1.0}, ["a"], [1, [2, 3]], np.array(["a"])], ids=str)
def test_what_is_no_array_of_numbers(wrong):
    with pytest.raises(TypeError, match=r"checksum: x is .*; expected an array or a number"):
        checksum(wrong)


def test_what_has_no_value():
    with pytest.raises(TypeError, match=r"checksum: x is .*, which has no value while jax\.jit traces it"):
        jax.jit(checksum)(jnp.ones(3))
    gone = jnp.ones(3)
    gone.delete()
    with pytest.raises(ValueError, match="checksum: x was donated or deleted"):
        checksum(gone)


def test_a_key_has_that_of_its_data():
    assert checksum(jax.random.key(3)) == checksum(jax.random.key_data(jax.random.key(3)))
