"""Eight bits per number: codes on a root scale, relative to the largest in each block."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from gdx.numerics import uncontracted
from gdx.storage.dither import Dither
from gdx.storage.formats import Format


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Packed:
    """An array held as codes and scales: a pytree node of these two, to shard, donate and save like any arrays.

    Attributes:
      codes: integers, shaped like the array.
      scales: one float32 for each block of the last axis, in an array that is like `codes` in its other axes.
      format: what decodes it, part of the tree structure.
    """

    codes: Any
    scales: Any
    format: "Blocks"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def size(self) -> int:
        return self.codes.size

    @property
    def dtype(self) -> np.dtype:
        """The codes' dtype."""
        return self.codes.dtype

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def decode(self) -> jax.Array:
        """The array, in float32."""
        return self.format.decode(self)

    def __repr__(self) -> str:
        codes, scales = (
            f"{x.dtype}[{','.join(map(str, x.shape))}]" if hasattr(x, "dtype") else repr(x)
            for x in (self.codes, self.scales)
        )
        return f"Packed(codes={codes}, scales={scales}, format={self.format})"


jax.tree_util.register_dataclass(Packed, data_fields=["codes", "scales"], meta_fields=["format"])


@dataclasses.dataclass(frozen=True, repr=False)
class Blocks(Format):
    r"""Base of the formats that hold each number in 8 bits, relative to the largest of its block.

    A block is `block` neighbours along the last axis (the last one of a row may be shorter), so that
    codes and scales shard like the parameter as long as every shard's last axis is a multiple of it.
    With the default 256, a number takes 8.125 bits.

    Arrays of fewer than `minimum_size` elements, or with a last axis shorter than a block, are too
    small to gain and stay in float32; so do complex moments.

    A block with an infinity or NaN becomes NaN altogether, to be seen. A block whose largest is below
    1.2e-38, the smallest normal float32, becomes 0.

    The slope of the numbers decoded in a step is that of the exact ones (straight through); what was
    stored in earlier steps counts as constant.
    """

    code_dtype: ClassVar[Any] = np.int8

    block: int = 256
    minimum_size: int = 4096

    def __post_init__(self) -> None:
        for name, value in (("block", self.block), ("minimum_size", self.minimum_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{type(self).__name__}: {name} is {value!r}; expected an integer >= 1")

    def fits(self, shape: tuple[int, ...]) -> bool:
        return len(shape) > 0 and shape[-1] >= self.block and np.prod(shape, dtype=object) >= self.minimum_size

    def zeros(self, like: jax.Array) -> Packed:
        shape = (*like.shape[:-1], -(-like.shape[-1] // self.block))
        return Packed(
            jnp.zeros_like(like, self.code_dtype), jnp.zeros(shape, jnp.float32, device=_sharding(like, shape)), self
        )

    def encode(self, x: jax.Array, dither: Dither) -> Packed:
        x = x.astype(jnp.float32)
        blocks, scales = self._split(x), self._largest(x)
        scales = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 0, scales)
        codes = self.codes(blocks, jnp.where(scales > 0, scales, 1)[..., None], self._bits(x, dither))
        codes = self._join(codes.astype(self.code_dtype), x.shape)
        # a finite code times NaN, where an infinity times 0 would leave some of the block finite
        return Packed(codes, jnp.where(scales < jnp.inf, scales, jnp.nan), self)

    def decode(self, stored: Packed) -> jax.Array:
        codes = self._split(stored.codes).astype(jnp.float32)
        return self._join(self.values(codes) * stored.scales[..., None], stored.shape)

    def codes(self, x: jax.Array, scales: jax.Array, bits: Any) -> jax.Array:
        """The codes, in float32, of blocks of shape (..., block), whose largest are `scales`, of shape (..., 1)."""
        raise NotImplementedError(f"{type(self).__name__} defines no codes")

    def values(self, codes: jax.Array) -> jax.Array:
        """What float32 codes stand for in a block whose largest magnitude is 1."""
        raise NotImplementedError(f"{type(self).__name__} defines no values")

    def _bits(self, x: jax.Array, dither: Dither) -> Any:
        return self._split(dither.bits(x.shape, getattr(self, "seed", 0))) if self.stochastic else None

    def _largest(self, x: jax.Array) -> jax.Array:
        """The largest magnitude in each block, NaN if there is one."""
        # integers in the order of the magnitudes, NaN last, and blocks seen as matrices: three times as fast on CPUs
        ordered = jax.lax.bitcast_convert_type(abs(self._filled(x)), jnp.int32)
        matrices = ordered.reshape(*x.shape[:-1], -1, self.block // math.gcd(self.block, 16), math.gcd(self.block, 16))
        return jax.lax.bitcast_convert_type(jnp.max(matrices, (-2, -1)), jnp.float32)

    def _split(self, x: jax.Array) -> jax.Array:
        """The blocks of the last axis, the last one filled up with zeros."""
        return self._filled(x).reshape(*x.shape[:-1], -1, self.block)

    def _filled(self, x: jax.Array) -> jax.Array:
        """With zeros up to the end of the last block."""
        padding = -x.shape[-1] % self.block
        return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, padding)]) if padding else x

    def _join(self, blocks: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return blocks.reshape(*shape[:-1], -1)[..., : shape[-1]]


def _sharding(like: Any, shape: tuple[int, ...]) -> Any:
    """That of an array, for one with fewer columns: an axis that cannot be divided alike is not."""
    sharding = None if isinstance(like, jax.core.Tracer) else getattr(like, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return sharding if isinstance(sharding, SingleDeviceSharding) else None
    fitted = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, *[None] * (len(shape) - len(sharding.spec))))
    try:
        fitted.shard_shape(shape)
    except ValueError:
        fitted = NamedSharding(sharding.mesh, PartitionSpec(*fitted.spec[:-1]))
    return fitted


@dataclasses.dataclass(frozen=True, repr=False)
class SignedFourthRoot8(Blocks):
    r"""8 bits for a first moment or velocity: signed codes $k$ on a fourth-root scale, rounded to nearest.

    $$ x \approx \operatorname{sign}(k) \, (k / 127)^4 \, s, \qquad s = \max_{\text{block}} |x| $$

    The error is at most $s / 63$ where $|x|$ is near $s$, and in proportion to $|x|^{3/4}$ below: half of the distance
    of neighbours, which is 1 in $k / 4$. An adaptive step weighs small moments like large ones, and in the blocks of a
    real network they differ by orders of magnitude: on a square-root scale the error of its steps is several times as
    large there.

    Args:
      block: how many neighbours along the last axis share a scale.
      minimum_size: smaller arrays stay in float32.

    >>> import gdx, jax.numpy as jnp
    >>> format = gdx.storage.SignedFourthRoot8(block=4, minimum_size=1)
    >>> packed = format.encode(jnp.array([1.0, -0.25, 1e-3, 0.0]), None)
    >>> packed.codes.tolist(), packed.scales.tolist()
    ([127, -90, 23, 0], [1.0])
    """

    def codes(self, x: jax.Array, scales: jax.Array, bits: None) -> jax.Array:
        magnitudes = jnp.round(jnp.sqrt(jnp.sqrt(abs(x)) * (127**2 / jnp.sqrt(scales))))
        return jnp.where(x < 0, -magnitudes, magnitudes)

    def values(self, codes: jax.Array) -> jax.Array:
        square = codes * codes * jnp.float32(1 / 127**2)
        return jnp.sign(codes) * square * square


@dataclasses.dataclass(frozen=True, repr=False)
class FourthRoot8(Blocks):
    r"""8 bits for a second moment: codes $k$ on a fourth-root scale, rounded stochastically.

    $$ x \approx (k / 255)^4 \, s, \qquad s = \max_{\text{block}} x $$

    Rounded up or down at random so that the expected value is the exact one, but never from a
    positive number to 0, for the step divides by the root: below $2.4 \cdot 10^{-10} s$ it is held
    as that, which makes steps smaller. A scale of ten orders of magnitude leaves 1 in $k / 4$ as the
    distance of neighbours.

    Args:
      block: how many neighbours along the last axis share a scale.
      minimum_size: smaller arrays stay in float32.
      seed: of the random bits.

    >>> import gdx, jax.numpy as jnp
    >>> format = gdx.storage.FourthRoot8(block=4, minimum_size=1)
    >>> packed = format.encode(jnp.array([1.0, 1e-4, 1e-20, 0.0]), gdx.storage.Dither(1, 0))
    >>> packed.codes.tolist(), packed.scales.tolist()
    ([255, 26, 1, 0], [1.0])
    """

    code_dtype: ClassVar[Any] = np.uint8
    signed: ClassVar[bool] = False
    keeps_positive: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True

    seed: int = 0

    def codes(self, x: jax.Array, scales: jax.Array, bits: jax.Array) -> jax.Array:
        # where x would be the fourth power of a code, its root is that code's square
        root = uncontracted(jnp.sqrt(x) * (255**2 / jnp.sqrt(scales)))
        below = jnp.floor(jnp.sqrt(root))
        square, next_square = below * below, (below + 1) * (below + 1)
        chance = (root - square) * (root + square)
        gap = (next_square - square) * (next_square + square)
        up = (bits.astype(jnp.float32) + 0.5) * (gap * jnp.float32(2**-16)) < chance
        codes = jnp.minimum(below + up.astype(jnp.float32), 255)
        return jnp.maximum(codes, (x > 0).astype(jnp.float32))

    def values(self, codes: jax.Array) -> jax.Array:
        square = codes * codes * jnp.float32(1 / 255**2)
        return square * square
