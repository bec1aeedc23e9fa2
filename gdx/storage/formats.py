"""What a storage format is, where one is taken, and the one that rounds to bfloat16 stochastically."""

import dataclasses
import functools
import operator
import reprlib
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from gdx.fields import to_integer
from gdx.numerics import compute_dtype
from gdx.storage.dither import Dither


class Format:
    """How one moment is held between steps. Derive from it, as a frozen dataclass, to write your own.

    A format is a small value: optimizers hold it as a static field, print it, compare and hash it.
    `encode` and `decode` must be functions of arrays alone, traceable by JAX.

    Attributes:
      signed: whether it holds negative numbers, as first moments and velocities need.
      keeps_positive: whether no positive number becomes 0, as a second moment needs, for the step
        divides by its root.
      stochastic: whether `encode` draws from its dither.
      compensates: whether a step takes back at once what the error of rounding will add to later ones: worth it
        where that error is large. It needs a link that says how `lasting` its moments are.

    >>> import dataclasses, gdx, jax.numpy as jnp
    >>> @dataclasses.dataclass(frozen=True)
    ... class Half(gdx.storage.Format):
    ...     def encode(self, x, dither):
    ...         return x.astype(jnp.float16)
    ...     def decode(self, stored):
    ...         return stored.astype(jnp.float32)
    >>> tx = gdx.scale_by_momentum(0.9, accumulator_dtype=Half())
    >>> tx.init(jnp.zeros(3)).trace.dtype
    dtype('float16')
    """

    signed: ClassVar[bool] = True
    keeps_positive: ClassVar[bool] = False
    stochastic: ClassVar[bool] = False
    compensates: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for field in _fields(self):
            if field.type is int:
                value = to_integer(f"{type(self).__name__}: {field.name}", getattr(self, field.name))
                object.__setattr__(self, field.name, value)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether arrays of this shape are worth it; the others stay as they would be without a format."""
        return True

    def misfit(self, shape: tuple[int, ...]) -> str:
        """Why arrays of this shape do not fit, in words, for reports and warnings."""
        return f"{shape} does not fit {self}"

    def holds(self, moment: Any) -> bool:
        """Whether such a moment, as it is or stored, is stored in this format: it is real, and fits."""
        return not jnp.issubdtype(moment.dtype, jnp.complexfloating) and self.fits(moment.shape)

    def encode(self, x: jax.Array, dither: Dither) -> Any:
        """What is stored of a real array in at least float32: an array of the same shape, or a `Packed` one."""
        raise NotImplementedError(f"{type(self).__name__} defines no encode")

    def decode(self, stored: Any) -> jax.Array:
        """The array that was stored, in at least float32."""
        raise NotImplementedError(f"{type(self).__name__} defines no decode")

    def zeros(self, like: jax.Array) -> Any:
        """What is stored of zeros, shaped and sharded like this array."""
        return self.encode(jnp.zeros_like(like), Dither(np.uint32(0), np.uint32(0)))

    def _check_encoded(self, x: Any, dither: Any) -> None:
        """Raises unless they are a real array and, if it draws from one, a dither."""
        if not (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, np.floating)):
            raise TypeError(f"{self}: encode got {reprlib.repr(x)}; expected an array of real numbers")
        if self.stochastic and not isinstance(dither, Dither):
            raise TypeError(
                f"{self}: dither is {reprlib.repr(dither)}; expected gdx.storage.Dither(step, leaf), of two integers"
            )

    def __repr__(self) -> str:
        # the name by which users reach it
        room = "storage." if type(self).__module__.startswith("gdx.storage") else ""
        values = {field.name: getattr(self, field.name) for field in _fields(self)}
        shown = [f"{f.name}={values[f.name]!r}" for f in _fields(self) if values[f.name] != f.default]
        return f"{room}{type(self).__name__}({', '.join(shown)})"


def _fields(format: Format) -> tuple[Any, ...]:
    """Its fields, if it is a dataclass."""
    return dataclasses.fields(format) if dataclasses.is_dataclass(format) else ()


def to_storage(label: str, value: Any, *, second_moment: bool = False, expected: str = "") -> np.dtype | Format | None:
    """Converts the static field that says in which dtype or storage format a moment is kept.

    Args:
      label: what errors start with.
      value: a floating-point dtype, a format, or None.
      second_moment: whether the moment is never negative, and divided by its root.
      expected: what errors say is expected, where that is less than all of these.

    Raises:
      TypeError, ValueError: it is none of these, or would lose what the moment is for.

    >>> import gdx
    >>> gdx.storage.to_storage("trace", "bfloat16"), gdx.storage.to_storage("trace", gdx.storage.SignedFourthRoot8())
    (dtype(bfloat16), storage.SignedFourthRoot8())
    """
    if value is None:
        return None
    good = "StochasticBfloat16() or gdx.storage." + ("FourthRoot8()" if second_moment else "SignedFourthRoot8()")
    such = f"a floating-point dtype such as 'bfloat16', a format such as gdx.storage.{good}, or None"
    expected = f"expected {expected or such}"
    if isinstance(value, type) and issubclass(value, Format):
        raise TypeError(f"{label} is the class {value.__name__}; {expected}")
    if isinstance(value, Format):
        if type(value).__hash__ is None:
            raise TypeError(f"{label} is {value}, which has no hash; make the format a frozen dataclass")
        if second_moment and not value.keeps_positive:
            raise ValueError(f"{label} is {value}, which rounds small second moments to 0, the divisor; {expected}")
        if not (second_moment or value.signed):
            raise ValueError(f"{label} is {value}, which holds no negative numbers; {expected}")
        return value
    try:
        dtype = jnp.dtype(value)
    except TypeError:
        raise TypeError(f"{label} is {reprlib.repr(value)}; {expected}") from None
    if jnp.issubdtype(dtype, np.complexfloating):
        raise ValueError(f"{label} is {dtype.name!r}; {expected}; of what is complex, that of its parts")
    if not jnp.issubdtype(dtype, np.floating) or dtype.itemsize < 2:
        raise ValueError(f"{label} is {dtype.name!r}, in which a moment would be rounded away; {expected}")
    if second_moment and jnp.finfo(dtype).tiny > np.finfo(np.float32).tiny:
        raise ValueError(f"{label} is {dtype.name!r}, which rounds small second moments to 0, the divisor; {expected}")
    return dtype


def why_whole(format: Format, moment: Any) -> str:
    """Why a moment stays as it would be without this format; empty if it does not."""
    if format.holds(moment):
        return ""
    return "complex" if jnp.issubdtype(moment.dtype, np.complexfloating) else format.misfit(moment.shape)


def moment_like(p: jax.Array, dtype: Any = None, *, real: bool = False) -> Any:
    """Zeros shaped and sharded like a parameter.

    Args:
      p: the parameter.
      dtype: the moment's dtype or storage format; None for the parameter's dtype, but at least
        float32. Where a complex parameter needs a complex moment, the complex dtype of that
        precision; a format then holds none.
      real: whether the moment is real also where the parameter is complex.

    >>> import gdx, jax.numpy as jnp
    >>> gdx.storage.moment_like(jnp.ones(3, "bfloat16")).dtype
    dtype('float32')
    >>> gdx.storage.moment_like(jnp.ones((16, 512)), gdx.storage.FourthRoot8())
    Packed(codes=uint8[16,512], scales=float32[16,2], format=storage.FourthRoot8())
    """
    if isinstance(dtype, Format):
        moment = moment_like(p, real=real)
        return dtype.zeros(moment) if dtype.holds(moment) else moment
    if dtype is None:
        dtype = jnp.finfo(compute_dtype(p)).dtype
    if jnp.iscomplexobj(p) and not real:
        dtype = np.promote_types(dtype, np.complex64)
    return jnp.zeros_like(p, dtype=dtype)


@dataclasses.dataclass(frozen=True, repr=False)
class StochasticBfloat16(Format):
    r"""bfloat16, rounded up or down at random so that the expected value is the exact one.

    $$ P(\text{up}) = (x - \lfloor x \rfloor) / (\lceil x \rceil - \lfloor x \rfloor) $$

    with $\lfloor x \rfloor$ and $\lceil x \rceil$ the neighbours in bfloat16, to within $2^{-17}$. A mean
    that changes by less than half a unit in the last place per step then still moves on average,
    where rounding to nearest leaves it standing. What bfloat16 holds exactly, infinities and NaN stay
    as they are. A finite number beyond bfloat16's largest may become infinite, as to nearest.

    The slope is that of $x$ itself (straight through).

    Args:
      seed: of the random bits.

    Source: Gupta et al., Deep Learning with Limited Numerical Precision (2015), section 3.

    >>> import gdx, jax.numpy as jnp
    >>> x = jnp.full(10_000, 1 + 2**-9)  # a quarter of the way from 1 to the next bfloat16, 1 + 2^-7
    >>> stored = gdx.storage.StochasticBfloat16().encode(x, gdx.storage.Dither(1, 0)).astype(jnp.float32)
    >>> sorted(set(stored.tolist())), f"{jnp.mean(stored > 1):.2f}"
    ([1.0, 1.0078125], '0.25')
    """

    keeps_positive: ClassVar[bool] = True
    stochastic: ClassVar[bool] = True

    seed: int = 0

    def encode(self, x: jax.Array, dither: Dither) -> jax.Array:
        self._check_encoded(x, dither)
        # it ends in a conversion: from an integer of half the size XLA on CPU copies both moments
        return rounded_at_random(x.astype(jnp.float32), dither.bits(x.shape, self.seed)).astype(jnp.bfloat16)

    def decode(self, stored: jax.Array) -> jax.Array:
        return stored.astype(jnp.float32)

    def zeros(self, like: jax.Array) -> jax.Array:
        return jnp.zeros_like(like, jnp.bfloat16)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def rounded_at_random(x: jax.Array, bits: jax.Array, width: int = 16) -> jax.Array:
    """Each float32 without its last bits, so many, rounded up if random bits of that width in uint32 carry."""
    raw = jax.lax.bitcast_convert_type(x, jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((raw + bits) & jnp.uint32(2**32 - 2**width), jnp.float32)
    return jnp.where(jnp.isnan(x), x, rounded)  # an infinity has no bits for the sum to carry from


@rounded_at_random.defjvp
def _rounded_at_random_jvp(width: int, primals: tuple, tangents: tuple) -> tuple:
    return rounded_at_random(*primals, width), tangents[0]


@jax.custom_jvp
def with_slope_of(x: jax.Array, value: jax.Array) -> jax.Array:
    """A value whose slope is that of x, which it stands for."""
    return value


@with_slope_of.defjvp
def _with_slope_of_jvp(primals: tuple, tangents: tuple) -> tuple:
    return primals[1], tangents[0]


def straight_through(format: Format | None, exact: jax.Array, held: jax.Array) -> jax.Array:
    """A number as it is held, with the slope of the exact one; of a second moment, in units of either.

    What divides by its root is not linear in it: with the slope of a number that is held twice as large as it is, what
    cancels in the exact one, such as b2 in the first step, would not.
    """
    if format is None or format.signed:
        return with_slope_of(exact, held)
    ratio = jnp.where(exact > 0, held / jnp.where(exact > 0, exact, 1), 1)
    return with_slope_of(exact * jax.lax.stop_gradient(ratio), held)


@dataclasses.dataclass(frozen=True, repr=False)
class Around(Format):
    """Base of what holds numbers as another format does, in another shape or dtype."""

    format: Format

    signed = property(operator.attrgetter("format.signed"))
    keeps_positive = property(operator.attrgetter("format.keeps_positive"))
    stochastic = property(operator.attrgetter("format.stochastic"))
    compensates = property(operator.attrgetter("format.compensates"))


@dataclasses.dataclass(frozen=True, repr=False)
class Simulated(Around):
    r"""The same numbers as another format holds, but in float32: for slopes through a run.

    Codes are integers and carry no slope from one step to the next, so that JAX's derivatives of a run in 8 bits, in
    its learning rate or momentum say, are refused. A run with `Simulated(format)` makes the same steps, bit for bit,
    and has slopes: those of the exact numbers (straight through), which is what rounding at random has on average; of
    second moments relative to their size. In 4 bits, whose errors are large, that of `b2` is right in the first steps
    and a quarter off after 20. (In one program with gradients in bfloat16, which XLA may hold in float32, the bits can
    differ.)

    Cost: 4 bytes per number, and the time of the format.

    Args:
      format: a format such as `FourthRoot8`.

    Raises:
      TypeError: format is none.

    Source: Jacob et al., Quantization and training of neural networks (2018), section 3; Bengio et al., Estimating or
    propagating gradients through stochastic neurons (2013), for the slope.

    >>> import gdx, jax, jax.numpy as jnp
    >>> def final(momentum, format):
    ...     tx, params = gdx.momentum(0.1, momentum, format), jnp.linspace(0.1, 1, 4096)
    ...     state = tx.init(params)
    ...     for _ in range(3):
    ...         updates, state = tx.update(params, state)
    ...         params += updates
    ...     return jnp.mean(params)
    >>> packed = gdx.storage.SignedFourthRoot8()
    >>> bool(final(0.9, packed) == final(0.9, gdx.storage.Simulated(packed)))
    True
    >>> slopes = [jax.grad(final)(0.9, format) for format in (None, gdx.storage.Simulated(packed))]
    >>> [f"{slope:.3f}" for slope in slopes]
    ['-0.198', '-0.198']
    """

    def __post_init__(self) -> None:
        if not isinstance(self.format, Format):
            raise TypeError(
                f"Simulated: format is {reprlib.repr(self.format)}; expected a format such as gdx.storage.FourthRoot8()"
            )

    def fits(self, shape: tuple[int, ...]) -> bool:
        return self.format.fits(shape)

    def misfit(self, shape: tuple[int, ...]) -> str:
        return self.format.misfit(shape)

    def encode(self, x: jax.Array, dither: Dither) -> jax.Array:
        stored = self.format.encode(jax.lax.stop_gradient(x), dither)
        return straight_through(self.format, x.astype(jnp.float32), self.format.decode(stored))

    def decode(self, stored: jax.Array) -> jax.Array:
        return stored

    def zeros(self, like: jax.Array) -> jax.Array:
        return jnp.zeros_like(like, jnp.float32)
