"""Random bits for rounding, computed where they are used: no key to carry and no array to store."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Dither(NamedTuple):
    r"""The random bits of one array in one step: a hash of the seed, step, leaf and position in the array.

    Element $i$ of leaf $l$ in step $t$ with seed $s$ gets $h(i + h(t + h(l + h(s))))$, with $h$
    the integer hash lowbias32. The position is that in the whole array: under `jax.jit` the bits do not
    depend on how it is sharded. (Inside `jax.shard_map` an array is its shard, and positions are local.)
    Places count modulo $2^{32}$.

    Attributes:
      step: uint32 scalar, the number of the step.
      leaf: uint32 scalar, which leaf of the tree.
      field: which moment of the leaf; the first two share one hash, of which each has one half.

    Source: lowbias32 is Wellons, Prospecting for hash functions (2018).

    >>> import gdx, jax.numpy as jnp
    >>> gdx.storage.Dither(jnp.uint32(1), jnp.uint32(0)).bits((4,), seed=0).tolist()
    [18805, 29670, 58256, 22051]
    """

    step: jax.Array | np.uint32
    leaf: jax.Array | np.uint32
    field: int = 0

    def bits(self, shape: tuple[int, ...], seed: int) -> jax.Array:
        """16 random bits for each element, as uint32 below 2^16."""
        key = lowbias32(jnp.uint32((seed + 0x9E3779B9 * (self.field // 2)) % 2**32))
        for number in (self.leaf, self.step):
            key = lowbias32(key + jnp.asarray(number, jnp.uint32))
        hashed = lowbias32(positions(shape, key))
        return hashed >> 16 if self.field % 2 else hashed & 0xFFFF


def positions(shape: tuple[int, ...], first: Any = 0) -> jax.Array:
    """The position of each element in the flattened array, counted from `first`, modulo 2^32."""
    positions, stride = jnp.full(shape, first, jnp.uint32), math.prod(shape)
    for axis, size in enumerate(shape):  # the last one last: all before it is one number for a whole row
        stride //= max(size, 1)
        positions += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
    return positions


def lowbias32(x: jax.Array) -> jax.Array:
    """The hash of each uint32: a bijection."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
