"""Eight or four bits per number: codes relative to the largest in each block."""

import dataclasses
import functools
import math
import reprlib
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from gdx.compat import barrier
from gdx.fields import to_integer
from gdx.mesh import sharding_of_boxes, varying_alike
from gdx.storage.dither import Dither
from gdx.storage.formats import Around, Format


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Packed:
    """An array held as codes and scales: a pytree node of these two, to shard, donate and save like any arrays.

    Attributes:
      codes: integers, shaped like the array. Those of 4 bits lie two in a byte on every device, though `codes.nbytes`
        counts a byte for each.
      scales: one float32 for each block, in an array that is shorter than `codes` along the axes of the blocks; two
        such arrays, of rows and of columns, where each number has both (`axis=None`).
      format: what decodes it, part of the tree structure.

    >>> import gdx, jax.numpy as jnp
    >>> format = gdx.storage.SignedFourthRoot8(block=8, minimum_size=1)
    >>> packed = format.encode(jnp.array([8.0, -8.0, 0.0, 0.1]), gdx.storage.Dither(1, 0))
    >>> packed
    Packed(codes=int8[4], scales=float32[1], format=storage.SignedFourthRoot8(block=8, minimum_size=1))
    >>> packed.shape, packed.nbytes, f"{packed.decode()[3]:.2f}"
    ((4,), 8, '0.11')
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
        return sum(map(nbytes, jax.tree.leaves(self)))

    def __getitem__(self, index: Any) -> "Packed":
        if index is not ...:
            raise TypeError(f"a Packed array has no [{index}]; decode() it first")
        return self  # flax 0.11 reads what a variable holds by [...]

    def decode(self) -> jax.Array:
        """The array, in float32."""
        return self.format.decode(without_slope(self))

    def __repr__(self) -> str:
        return f"Packed(codes={_shown(self.codes)}, scales={_shown(self.scales)}, format={self.format})"


jax.tree_util.register_dataclass(Packed, data_fields=["codes", "scales"], meta_fields=["format"])


def _shown(x: Any) -> str:
    """An array by its dtype and shape."""
    if isinstance(x, tuple):
        return f"({', '.join(map(_shown, x))})"
    return f"{x.dtype}[{','.join(map(str, x.shape))}]" if hasattr(x, "dtype") else repr(x)


def nbytes(x: Any) -> int:
    """Bytes of an array on a device, where JAX counts a whole one for each integer of 4 bits."""
    return -(-x.size * x.dtype.itemsize // (2 if x.dtype in _HALVES else 1))


_HALVES = jnp.int4, jnp.uint4


def smallest(scales: Any) -> jax.Array:
    """The scale of each number, in a shape that broadcasts to all: the smaller one of its row's and its column's."""
    return functools.reduce(jnp.minimum, jax.tree.leaves(scales))


def is_packed(x: Any) -> bool:
    """Whether it is a packed array, for `is_leaf=`."""
    return isinstance(x, Packed)


@dataclasses.dataclass(frozen=True, repr=False)
class Blocks(Format):
    r"""Base of the formats that hold each number in few bits, relative to the largest of its block.

    A block is a box of at most `block` numbers, and at least a quarter of that: with 256, 8 bits become 8.125
    to 8.5. It has all of `axis` and of the axes before it until there are that many, and of the next one the
    longest part that divides it: 256 of 1024 columns, 250 of 1000, all 64 of (512, 8, 64), boxes of 16 x 3 x 3 in
    (128, 64, 3, 3). Where none does, it has as much as `block` allows, and the last block is shorter, at the price of a
    copy in each step. Codes and scales shard like the parameter as long as each shard holds whole blocks.

    With `block=None` a block is all of `axis`, however long it is: a whole row. On a TPU that is the fast layout, which
    moves 22 bytes per parameter in a step of AdamW, where parts of rows have to be torn out of its tiles (65); on a GPU
    both move 22 (`python -m benchmarks storage devices`).

    Arrays of fewer than `minimum_size` numbers, or with fewer than a quarter of `block` up to `axis`, are too small
    to gain and stay in float32; so do complex moments. `gdx.describe(tx, params)` lists them, and `init` warns
    if nothing is left.

    With `axis=None` too, nobody has to choose one: a number is relative to the largest of its row or to that of its
    column, whichever is smaller,

    $$ s_{ij} = \min(\max_j |x_{ij}|, \max_i |x_{ij}|). $$

    So rows and columns that are small altogether, such as units that hardly fire, are held as well as large ones: see
    `gdx.storage` for how much that gains. A row is as above, and a column has the axes before it, from the last one on
    until there are 64 numbers. Without as many there are rows only, and where a row would be the whole array, columns
    only, of its first axes. On a TPU that moves 22 bytes, too, but a GPU looks for the largest of rows and of columns
    one after the other: 28 to 40, and a CPU takes 1.3 to 1.4 times as long as for blocks. Where an array is split over
    devices, scales of what is cut are reduced over them in each step, 4 bytes for each row or column; inside
    `jax.shard_map` a device's part is an array of its own. A number takes up to 9 bits, 8.06 in matrices of 1024.

    A block with an infinity or NaN becomes NaN altogether, to be seen. A block whose largest is below
    1.2e-38, the smallest normal float32, becomes 0.

    A step's slope is that of the exact moments (straight through). Codes are integers and carry none to the next step,
    so what would need it there is refused with a TypeError: slopes through a run of several steps, or a scan of any, of
    whatever its moments depend on. `Simulated(format)` takes them.

    A format of your own gives `codes` and `values`; here of square roots:

    >>> import dataclasses, gdx, jax.numpy as jnp
    >>> @dataclasses.dataclass(frozen=True, repr=False)
    ... class SignedRoot8(gdx.storage.Blocks):
    ...     def codes(self, x, scales, bits):
    ...         return jnp.round(jnp.sign(x) * jnp.sqrt(abs(x) / scales) * 127)
    ...     def values(self, codes):
    ...         return codes * abs(codes) * jnp.float32(1 / 127**2)
    >>> gdx.momentum(0.1, accumulator_dtype=SignedRoot8()).init(jnp.zeros((32, 256)))[1].trace.nbytes
    8320
    """

    code_dtype: ClassVar[Any] = np.int8
    seed: ClassVar[int] = 0

    block: int | None = 256
    minimum_size: int = 4096
    axis: int | None = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block is not None:
            # with 2 numbers in a block each takes 3 bytes with the scale's, with 1 more than in float32
            block = to_integer(f"{type(self).__name__}: block", self.block, minimum=8)
            object.__setattr__(self, "block", block)
        to_integer(f"{type(self).__name__}: minimum_size", self.minimum_size, minimum=1)
        if self.axis is None and self.block is not None:
            raise ValueError(
                f"{type(self).__name__}: axis is None with block={self.block}; expected block=None, whole rows and "
                f"columns, or an axis along which blocks lie, such as -1"
            )
        if self.axis is not None:
            axis = to_integer(f"{type(self).__name__}: axis", self.axis)
            if axis >= 0:
                raise ValueError(f"{type(self).__name__}: axis is {axis}; expected -1, the last axis, or less, or None")
            object.__setattr__(self, "axis", axis)

    @property
    def least(self) -> int:
        """How many numbers a block has at least."""
        return 64 if self.block is None else self.block // 4

    def fits(self, shape: tuple[int, ...]) -> bool:
        return math.prod(shape) >= self.minimum_size and self.layout(shape) is not None

    def misfit(self, shape: tuple[int, ...]) -> str:
        size = math.prod(shape)
        if size < self.minimum_size:
            return f"{size:,} numbers, fewer than minimum_size={self.minimum_size}"
        return f"no block of {self.least} numbers up to axis={self.axis or -1} of {shape}"

    def zeros(self, like: jax.Array) -> Packed:
        scales = [
            jnp.zeros(layout.blocks, jnp.float32, device=sharding_of_boxes(like, layout.box))
            for layout in self.layouts(like.shape)
        ]
        codes, *scales = varying_alike([jnp.zeros_like(like, self.code_dtype), *scales])
        return Packed(codes, tuple(scales) if len(scales) == 2 else scales[0], self)

    def layouts(self, shape: tuple[int, ...]) -> list[Any]:
        """Where the blocks of an array of this shape are, and with `axis=None` the columns across its rows."""
        rows = self.layout(shape)
        if self.axis is not None or rows is None:
            return [rows] if rows else []
        if rows.axis > 0:
            columns = self._layout(shape, rows.axis)
            return [rows, columns] if columns else [rows]
        # a row is all there is: the first axes may have enough numbers without the others
        return [next(filter(None, (self._layout(shape, end) for end in range(1, len(shape) + 1))))]

    def layout(self, shape: tuple[int, ...]) -> Any:
        """Where the blocks along the axis, or the rows, are; None if there are not enough numbers for one."""
        return self._layout(shape, len(shape) + (self.axis or -1) + 1)

    def _layout(self, shape: tuple[int, ...], end: int) -> Any:
        inner = 1
        for axis in reversed(range(end)):
            if shape[axis] * inner >= self.least:
                most = shape[axis] if self.block is None else self.block // inner
                least = -(-self.least // inner)
                # parts that divide the axis need no copy, and shards of whole blocks have the same ones
                whole = (part for part in range(most, least - 1, -1) if shape[axis] % part == 0)
                return Layout(shape, axis, end, next(whole, most))
            inner *= shape[axis]
        return None

    def encode(self, x: jax.Array, dither: Dither) -> Packed:
        self._check_encoded(x, dither)
        layouts, x = self.layouts(x.shape), x.astype(jnp.float32)
        if not layouts:
            raise ValueError(f"{self}: encode got an array of shape {x.shape}: {self.misfit(x.shape)}")
        bits = dither.bits(x.shape, self.seed) if self.stochastic else None
        if len(layouts) == 2:
            return self.encode_blocks(x, tuple(layout.largest(x).reshape(layout.blocks) for layout in layouts), bits)
        (layout,) = layouts
        bits = None if bits is None else layout.split(bits)
        return layout.join(self.encode_blocks(layout.split(x), layout.largest(x), bits))

    def decode(self, stored: Packed) -> jax.Array:
        if not is_packed(stored):
            raise TypeError(f"{self}: decode got {reprlib.repr(stored)}; expected what encode returns, a Packed array")
        if isinstance(stored.scales, tuple):
            return self.decode_blocks(stored)
        (layout,) = self.layouts(stored.shape)
        return layout.join(self.decode_blocks(layout.split(stored)))

    def encode_blocks(self, x: jax.Array, largest: Any, bits: jax.Array | None) -> Packed:
        """As `encode`, of an array in blocks, whose largest magnitudes have length 1 where blocks lie.

        Or of a whole array with those of its blocks along and across.
        """
        scales = jax.tree.map(lambda s: jnp.where(s < jnp.finfo(jnp.float32).tiny, 0, s), largest)
        smaller = smallest(scales)
        codes = self.codes(x, jnp.where(smaller > 0, smaller, 1), bits)
        if self.code_dtype in _HALVES:
            # on CPUs a loop that ends in 4 bits takes three times as long: let it do nothing else
            fence = functools.partial(jax.lax.platform_dependent, cpu=barrier, default=lambda x: x)
            codes = fence(codes.astype(np.int8))
        # a finite code times NaN, where an infinity times 0 would leave some of the block finite
        scales = jax.tree.map(lambda s: _with_mark(jnp.where(s < jnp.inf, s, jnp.nan), x), scales)
        return Packed(codes.astype(self.code_dtype), scales, self)

    def decode_blocks(self, stored: Packed) -> jax.Array:
        """As `decode`, of what `encode_blocks` made."""
        return _rounded(self.values(stored.codes.astype(jnp.float32)) * smallest(stored.scales))

    def codes(self, x: jax.Array, scales: jax.Array, bits: Any) -> jax.Array:
        """The codes, in float32, of blocks whose largest magnitudes are `scales`, which broadcast to them."""
        raise NotImplementedError(f"{type(self).__name__} defines no codes")

    def values(self, codes: jax.Array) -> jax.Array:
        """What float32 codes stand for in a block whose largest magnitude is 1."""
        raise NotImplementedError(f"{type(self).__name__} defines no values")


@jax.custom_jvp
def _with_mark(scales: jax.Array, x: jax.Array) -> jax.Array:
    """The scales, with a slope of 0 where x has one: it marks codes that have lost theirs."""
    return scales


@functools.partial(_with_mark.defjvp, symbolic_zeros=True)
def _with_mark_jvp(primals: tuple, tangents: tuple) -> tuple:
    scales, slope = primals[0], tangents[1]
    if isinstance(slope, SymbolicZero):
        return scales, tangents[0]
    # made of x's slope: what is constant counts as none
    return scales, 0 * jax.lax.slice(slope, (0,) * scales.ndim, scales.shape)


def without_slope(stored: Packed) -> Packed:
    """A packed array as it is; an error if its numbers were to have a slope, which their codes have lost."""
    return dataclasses.replace(stored, scales=jax.tree.map(lambda s: _unmarked(stored.format, s), stored.scales))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _unmarked(format: Any, scales: jax.Array) -> jax.Array:
    return scales


@functools.partial(_unmarked.defjvp, symbolic_zeros=True)
def _unmarked_jvp(format: Any, primals: tuple, tangents: tuple) -> tuple:
    if not isinstance(tangents[0], SymbolicZero):
        raise TypeError(
            f"{format}: a slope was asked for through moments of an earlier step, whose codes are integers and have "
            f"none; for slopes through a run take storage.Simulated({format}), the same numbers in float32"
        )
    return primals[0], tangents[0]


def reassembled(tree: Any, format: Any) -> Any:
    """Moments with packed arrays where flax's `nnx.Optimizer` has made mappings of what is in them."""
    if not isinstance(format, Blocks):
        return tree

    def is_taken_apart(x: Any) -> bool:
        return isinstance(x, Mapping) and set(x) == {"codes", "scales"} and _dtype(x["codes"]) == format.code_dtype

    def packed(x: Any) -> Packed:
        scales = x["scales"]
        return Packed(x["codes"], tuple(scales.values()) if isinstance(scales, Mapping) else scales, format)

    return jax.tree.map(
        lambda x: packed(x) if is_taken_apart(x) else x,
        tree,
        is_leaf=lambda x: is_packed(x) or is_taken_apart(x),
    )


def _dtype(x: Any) -> Any:
    return None if is_packed(x) else getattr(x, "dtype", None)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where blocks are in arrays of one shape: in axes `axis` to `end`, seen as one.

    A block is `part` long along the first of them, and whole along the others.
    """

    shape: tuple[int, ...]
    axis: int
    end: int
    part: int

    @property
    def box(self) -> tuple[int, ...]:
        """How long a block is along each axis of the array."""
        inside = self.part, *self.shape[self.axis + 1 : self.end]
        return (1,) * self.axis + inside + (1,) * (len(self.shape) - self.end)

    @property
    def blocks(self) -> tuple[int, ...]:
        """How many there are along each axis."""
        return tuple(-(-length // part) for length, part in zip(self.shape, self.box))

    @property
    def block(self) -> int:
        """How many numbers a block has."""
        return math.prod(self.box)

    @property
    def missing(self) -> int:
        """What the last block lacks."""
        return -math.prod(self.shape[self.axis : self.end]) % self.block

    def seen(self, x: jax.Array, *axes: int) -> jax.Array:
        """An array with these axes in the place of its own."""
        return x.reshape(*self.shape[: self.axis], *axes, *self.shape[self.end :])

    def filled(self, x: jax.Array) -> jax.Array:
        """With one axis for all, and zeros up to the end of the last block."""
        x = self.seen(x, -1)
        return jnp.pad(x, [(0, self.missing if i == self.axis else 0) for i in range(x.ndim)]) if self.missing else x

    def split(self, x: Any) -> Any:
        """An array, or a packed one, with blocks along an axis, and the next one along each."""
        if is_packed(x):
            return Packed(self.split(x.codes), self.seen(x.scales, -1, 1), x.format)
        return self.seen(self.filled(x), -1, self.block)

    def largest(self, x: jax.Array) -> jax.Array:
        """The largest magnitude of each block, shaped as `split` shapes scales."""
        axis = self.axis + 1

        def reduced(x: jax.Array) -> jax.Array:
            # with blocks seen as matrices: three times as fast on CPUs
            wide = max(width for width in range(1, 17) if self.block % width == 0)
            found = _largest(self.seen(self.filled(x), -1, self.block // wide, wide), (axis, axis + 1))
            return jnp.expand_dims(found, axis)

        def halved(x: jax.Array) -> jax.Array:
            x = abs(self.split(x))
            while (length := x.shape[axis]) > 64:
                half = -(-length // 2)  # of an odd length both halves have the one in the middle
                both = (jax.lax.slice_in_dim(x, start, start + half, axis=axis) for start in (0, length - half))
                x = jnp.maximum(*both)
            return jnp.expand_dims(_largest(x, axis), axis)

        if self.end == x.ndim or self.block <= 64:
            return reduced(x)
        # in one loop over another axis than the last, CPUs take three times as long
        return jax.lax.platform_dependent(x, cpu=halved, default=reduced)

    def join(self, x: Any) -> Any:
        """What `split` took apart."""
        if is_packed(x):
            return Packed(self.join(x.codes), x.scales.reshape(self.blocks), x.format)
        length = math.prod(self.shape[self.axis : self.end])
        return jax.lax.slice_in_dim(self.seen(x, -1), 0, length, axis=self.axis).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class InBlocks(Around):
    """A format of blocks for arrays that are in blocks already."""

    format: Blocks
    axis: int

    def encode(self, x: jax.Array, dither: Dither) -> Packed:
        # a position in the flattened array is the same there
        bits = dither.bits(x.shape, self.format.seed) if self.format.stochastic else None
        x = x.astype(jnp.float32)
        return self.format.encode_blocks(x, jnp.expand_dims(_largest(x, self.axis + 1), self.axis + 1), bits)

    def decode(self, stored: Packed) -> jax.Array:
        return self.format.decode_blocks(stored)


def _largest(x: jax.Array, axes: int | tuple[int, ...]) -> jax.Array:
    """The largest magnitude along these axes, NaN if there is one."""
    # integers in the order of the magnitudes, NaN last: the maximum of floats is slow on CPUs
    return jax.lax.bitcast_convert_type(jnp.max(jax.lax.bitcast_convert_type(abs(x), jnp.int32), axes), jnp.float32)


@dataclasses.dataclass(frozen=True, repr=False)
class _FourthRoot8(Blocks):
    """Codes on a fourth-root scale, rounded stochastically."""

    stochastic: ClassVar[bool] = True
    top: ClassVar[int]

    seed: int = 0  # type: ignore[misc]

    def codes(self, x: jax.Array, scales: jax.Array, bits: jax.Array) -> jax.Array:
        # where |x| would be the fourth power of a code, its root is that code's square
        # of what is divided by a root a compiler makes another function, which on CPUs is not rounded alike in vectors
        # and in what is left beside them
        root = _rounded(jnp.sqrt(abs(x)) * (self.top**2 / _rounded(jnp.sqrt(scales))))
        below = jnp.floor(jnp.sqrt(root))
        # of the fourth powers: how far this one is above the last code's, and how far the next code's is
        square, step = below * below, below + below + 1
        chance = (root - square) * (root + square)
        gap = step * (square + square + step)
        # in (0, 1), made from its bits: conversions of integers are slow on CPUs
        uniform = jax.lax.bitcast_convert_type((bits << 7) | 0x3F800040, jnp.float32) - 1
        codes = jnp.minimum(jnp.where(uniform * gap < chance, below + 1, below), self.top)
        # below the first code, where one step to it could be of any length, nothing is left to chance
        codes = jnp.where(below < 1, (x > 0).astype(jnp.float32) if self.keeps_positive else 0, codes)
        return jnp.where(x < 0, -codes, codes) if self.signed else codes

    def values(self, codes: jax.Array) -> jax.Array:
        square = codes * codes * jnp.float32(1 / self.top**2)
        return jnp.sign(codes) * square * square if self.signed else square * square


@dataclasses.dataclass(frozen=True, repr=False)
class SignedFourthRoot8(_FourthRoot8):
    r"""8 bits for a first moment or velocity: signed codes $k$ on a fourth-root scale, rounded stochastically.

    $$ x \approx \operatorname{sign}(k) \, (k / 127)^4 \, s, \qquad s = \max_{\text{block}} |x| $$

    Rounded up or down at random so that the expected value is the exact one; below $3.8 \cdot 10^{-9} s$ it is 0.
    Neighbours differ by 1 in $k / 4$: rounded to nearest, a moment would stand still where it should move by less
    than half of that, and a parameter whose gradient has become zero would drift for ever. An adaptive step weighs
    small moments like large ones, and in the blocks of a real network they differ by orders of magnitude: on a
    square-root scale the error of its steps is several times as large there. Beside a second moment of another format
    than `FourthRoot8`, whose smallest code bounds them, steps of parameters with less than $10^{-7} s$ may be up to 16
    learning rates long.

    Slopes through several steps are refused: see `Blocks`, and `Simulated`.

    Args:
      block: how many neighbours share a scale, see `Blocks`; at least 8, so that in no shape is float32 smaller.
      minimum_size: smaller arrays stay in float32.
      axis: along which blocks lie. The error is smaller where neighbours are alike in size: see `gdx.storage` for how
        much. On GPUs a step with -2 moves three times as many bytes, and up to twice with `block=None`. None, with
        `block=None`, for the smaller scale of row and column, see `Blocks`.
      seed: of the random bits.

    Raises:
      TypeError: an argument is no integer.
      ValueError: block is below 8, minimum_size below 1, axis not negative, or axis None where block is not.

    >>> import gdx, jax.numpy as jnp
    >>> format = gdx.storage.SignedFourthRoot8(block=8, minimum_size=1)
    >>> packed = format.encode(jnp.array([1.0, -0.25, 1e-3, 0.0]), gdx.storage.Dither(1, 0))
    >>> packed.codes.tolist(), packed.scales.tolist()
    ([127, -90, 22, 0], [1.0])
    """

    code_dtype: ClassVar[Any] = np.int8
    top: ClassVar[int] = 127


@dataclasses.dataclass(frozen=True, repr=False)
class FourthRoot8(_FourthRoot8):
    r"""8 bits for a second moment: codes $k$ on a fourth-root scale, rounded stochastically.

    $$ x \approx (k / 255)^4 \, s, \qquad s = \max_{\text{block}} x $$

    Rounded up or down at random so that the expected value is the exact one, but never from a
    positive number to 0, for the step divides by the root: below $2.4 \cdot 10^{-10} s$ it is held
    as that, which makes steps smaller. A scale of ten orders of magnitude leaves 1 in $k / 4$ as the
    distance of neighbours. As the mean of $1 / \sqrt v$ is more than that of $v$ gives, steps are 10 to 70 %
    longer on average where gradients are $2 \cdot 10^{-5}$ to $2 \cdot 10^{-4}$ of the largest in their block.

    Args and errors are those of `SignedFourthRoot8`.

    >>> import gdx, jax.numpy as jnp
    >>> format = gdx.storage.FourthRoot8(block=8, minimum_size=1)
    >>> packed = format.encode(jnp.array([1.0, 1e-4, 1e-20, 0.0]), gdx.storage.Dither(1, 0))
    >>> packed.codes.tolist(), packed.scales.tolist()
    ([255, 26, 1, 0], [1.0])
    """

    code_dtype: ClassVar[Any] = np.uint8
    signed: ClassVar[bool] = False
    keeps_positive: ClassVar[bool] = True
    top: ClassVar[int] = 255


@dataclasses.dataclass(frozen=True, repr=False)
class SignedPowersOfTwo4(Blocks):
    r"""4 bits for a first moment or velocity: 0 and signed powers of two, rounded stochastically.

    $$ x \approx \operatorname{sign}(k) \, 2^{|k| - 7} s, \quad |k| = 1, \dots, 7, \qquad
       s = \max_{\text{block}} |x|, $$

    and 0 for $k = 0$. Rounded up or down at random so that the expected value is the exact one, below $2^{-6} s$
    too. Errors so large would add up in the parameters. So a step takes back at once what its own will add to later
    ones: with $\tilde m$ the moment as held, the direction is that of

    $$ \tilde m_t + \frac{m_t - \tilde m_t}{1 - \beta}, \qquad 1 + \beta + \beta^2 + \dots = \frac{1}{1 - \beta}, $$

    the second term times $1 - \beta^t$ in Adam, whose correction shrinks. In `scale_by_adam` and
    `scale_by_momentum`, and in a link of your own that gives `lasting`; elsewhere, as in an average of parameters, the
    error stays.

    Then parameters are off by some steps at any time, but not by more and more, and by nothing as the learning rate
    goes to 0. Where gradients in a block differ by orders of magnitude, steps of Adam with $\beta_1 = 0.9$ are
    1.4 learning rates long in the root mean square (in float32 0.23) and 40 at most, and parameters off by 15. These
    numbers grow as $1 / (1 - \beta)$: above 0.95, and where gradients are rarely other than 0, take 8 bits.

    Slopes are as in `SignedFourthRoot8`.

    Args:
      block, minimum_size, axis, seed: as in `SignedFourthRoot8`. With blocks of 128, a number takes 4.25 bits; in
        shapes where they are shorter, up to 5.

    Raises:
      TypeError, ValueError: as `SignedFourthRoot8`.

    >>> import gdx, jax.numpy as jnp
    >>> format = gdx.storage.SignedPowersOfTwo4(block=8, minimum_size=1)
    >>> packed = format.encode(jnp.array([1.0, -0.25, 0.125, 0.0]), gdx.storage.Dither(1, 0))
    >>> packed.codes.tolist(), packed.scales.tolist()
    ([7, -5, 4, 0], [1.0])
    """

    code_dtype: ClassVar[Any] = jnp.int4
    stochastic: ClassVar[bool] = True
    compensates: ClassVar[bool] = True

    block: int | None = 128
    seed: int = 0  # type: ignore[misc]

    def codes(self, x: jax.Array, scales: jax.Array, bits: jax.Array) -> jax.Array:
        relative = _relative(x, scales)
        # below the first code the neighbours are 0 and that
        first = (relative * 2.0**22 > bits.astype(jnp.float32)).astype(jnp.int32)
        codes = jnp.where(relative < 2.0**-6, first, _rounded_exponent(relative, bits) + 7)
        return jnp.where(x < 0, -codes, codes)

    def values(self, codes: jax.Array) -> jax.Array:
        return jnp.sign(codes) * _power_of_two(abs(codes) - 7)


@dataclasses.dataclass(frozen=True, repr=False)
class PowersOfTwo4(Blocks):
    r"""4 bits for a second moment: powers of two, rounded stochastically.

    $$ x \approx 2^{k - 7} s, \quad k = -8, \dots, 7, \qquad s = \max_{\text{block}} x $$

    Rounded up or down at random so that the expected value is the exact one; below $3.1 \cdot 10^{-5} s$, and at 0, it
    is held as that, which makes steps smaller. As $s$ is one of the numbers, a block whose gradients vanish decays
    exactly. Under Adam the held moment is a factor 2 off at times, and as the mean of $1 / \sqrt v$ is more than that
    of $v$ gives, steps are about 15 % longer on average.

    A chance is a multiple of $2^{-16}$: with `b2` above 0.9999 the moment decays at a rate that is some percent off
    where others in its block do not.

    Args and errors are those of `SignedPowersOfTwo4`.

    >>> import gdx, jax.numpy as jnp
    >>> format = gdx.storage.PowersOfTwo4(block=8, minimum_size=1)
    >>> packed = format.encode(jnp.array([1.0, 2.0**-10, 1e-20, 0.0]), gdx.storage.Dither(1, 0))
    >>> packed.codes.tolist(), packed.scales.tolist()
    ([7, -3, -8, -8], [1.0])
    """

    # not uint4, which checkpoints of Orbax do not hold
    code_dtype: ClassVar[Any] = jnp.int4
    signed: ClassVar[bool] = False
    keeps_positive: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True

    block: int | None = 128
    seed: int = 0  # type: ignore[misc]

    def codes(self, x: jax.Array, scales: jax.Array, bits: jax.Array) -> jax.Array:
        return _rounded_exponent(jnp.maximum(_relative(x, scales), 2.0**-15), bits) + 7

    def values(self, codes: jax.Array) -> jax.Array:
        return _power_of_two(codes - 7)


def _rounded(x: jax.Array) -> jax.Array:
    """What is finite or NaN as it is, but rounded, before a compiler makes it part of what comes next.

    Read once, where `gdx.uncontracted` reads it twice: a GPU would write it to memory in between.
    """
    return jnp.minimum(x, jnp.finfo(jnp.float32).max)


def _relative(x: jax.Array, scales: jax.Array) -> jax.Array:
    """Magnitudes over those scales."""
    # a compiler multiplies by the reciprocal, which for the largest scales would be subnormal
    less = jnp.where(scales > 1, 2.0**-32, 1.0)
    return (abs(x) * less) / (scales * less)


def _rounded_exponent(x: jax.Array, bits: jax.Array) -> jax.Array:
    """That of one of the two powers of two around each positive number, given 16 random bits."""
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32) + ((bits << 7) | 64)
    return (raw >> 23).astype(jnp.int32) - 127


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """Of a whole number in float32: exactly, which `exp2` is not."""
    return jax.lax.bitcast_convert_type((exponent.astype(jnp.int32) + 127) << 23, jnp.float32)
