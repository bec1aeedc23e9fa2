"""How a step around stored moments is evaluated: decoded, in blocks or whole, and encoded, as fast as XLA allows."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gdx.checks import check_returned
from gdx.compat import barrier
from gdx.mesh import types_of, untyped, varying_alike
from gdx.numerics import uncontracted
from gdx.storage.blocks import Blocks, InBlocks, Packed, is_packed, without_slope
from gdx.storage.dither import Dither
from gdx.storage.formats import Format, Simulated, straight_through


class Formula(Protocol):
    """What is asked of a link, a `gdx.Leafwise`: its formula for one leaf, and what may be done with it."""

    @property
    def formats(self) -> tuple[Any, ...]: ...
    @property
    def elementwise(self) -> bool: ...
    @property
    def rounds(self) -> bool: ...
    @property
    def in_two_parts(self) -> bool: ...

    step: Callable[..., tuple[jax.Array, ...]]
    accumulate: Callable[..., tuple[jax.Array, ...]]
    direction: Callable[..., jax.Array]
    lasting: Callable[..., tuple[Any, ...]]


def stepped(
    link: Formula, shared: Any, g: Any, p: Any, moments: Sequence[Any], dtype: np.dtype, count: Any, index: Any
) -> tuple[Any, ...]:
    """A link's update of one leaf and its new moments as they are stored, all computed in this dtype.

    The count of steps and the leaf's index are what random bits are made of; None where there are none.
    """
    dither = None if count is None else Dither(count.astype(jnp.uint32), index)
    pairs = itertools.zip_longest(link.formats, moments)
    formats = [format if isinstance(format, Format) and format.holds(moment) else None for format, moment in pairs]
    if not any(map(is_packed, moments)):
        return _step(link, shared, g, p, moments, formats, dtype, dither)
    g, p, moments = varying_alike((g, p, moments))
    types = types_of((g, *moments))
    # blocks may end inside the part of a device, which types cannot say
    step = untyped(functools.partial(_packed_step, formats, dtype), types[0].mesh, types)
    return step(link, shared, g, p, moments, dither)


def _packed_step(
    formats: Sequence[Any],
    dtype: np.dtype,
    link: Formula,
    shared: Any,
    g: Any,
    p: Any,
    moments: Sequence[Any],
    dither: Dither | None,
) -> tuple[Any, ...]:
    moments = [without_slope(moment) if is_packed(moment) else moment for moment in moments]
    layouts = {tuple(f.layouts(g.shape)) for f in formats if isinstance(f, Blocks)}
    # what simulates blocks has to see the array's shape
    is_free = link.elementwise and not any(isinstance(f, Simulated) for f in formats)
    layout = None
    if len(layouts) == 1 and is_free:
        layout, *across = layouts.pop()
    whole = functools.partial(_step, link, shared, g, p, moments, formats, dtype, dither)
    if layout is None or across or layout.missing:
        return whole()

    def blocks() -> tuple[Any, ...]:
        in_blocks = [InBlocks(f, layout.axis) if isinstance(f, Blocks) else f for f in formats]
        # or the compiler goes back to the whole array, and writes out each scale once for each number
        b_g, b_p, b_moments = barrier(_each(layout.split, (g, p, moments)))
        return _each(layout.join, _step(link, shared, b_g, b_p, b_moments, in_blocks, dtype, dither))

    return jax.lax.platform_dependent(cpu=whole, default=blocks)  # on CPUs it takes twice as long in blocks


def _each(function: Callable[[Any], Any], tree: Any) -> Any:
    """The function of each array or packed array of a tree."""
    return jax.tree.map(function, tree, is_leaf=is_packed)


def _step(
    link: Formula,
    shared: Any,
    g: Any,
    p: Any,
    moments: Sequence[Any],
    formats: Sequence[Any],
    dtype: np.dtype,
    dither: Dither | None,
) -> tuple[Any, ...]:
    real = jnp.finfo(dtype).dtype

    def cast(x: Any) -> Any:
        if x is None or x.dtype == dtype:
            return x
        return jax.lax.convert_element_type(x, dtype if jnp.iscomplexobj(x) else real)

    def decode(stored: Sequence[Any]) -> list[Any]:
        return [cast(x if format is None else format.decode(x)) for format, x in zip(formats, stored)]

    def encode(new: Sequence[Any]) -> list[Any]:
        return [
            x.astype(old.dtype) if format is None else format.encode(x, dither and dither._replace(field=field))
            for field, (x, old, format) in enumerate(zip(new, moments, formats, strict=True))
        ]

    def accumulate() -> tuple[jax.Array, ...]:
        held = decode(moments)
        new = link.accumulate(shared, cast(g), cast(p), *held)
        check_returned(link, "accumulate", new, held, "the new moments")
        return new

    # only a real hyperparameter and a complex leaf of its precision are left to promote
    with jax.numpy_dtype_promotion("standard"):
        is_few = any(format is not None or x.dtype.itemsize < 4 for format, x in zip(formats, moments))
        if is_few and link.in_two_parts:
            stored = _once(lambda: encode(accumulate()), list(moments), dither)
            exact, held = accumulate(), decode(stored)
            used = [_used(*of) for of in itertools.zip_longest(formats, exact, held, link.lasting(shared))]
            u = link.direction(shared, cast(g), cast(p), *used)
            check_returned(link, "direction", (u,), [g], "the update")
            return u, *stored
        held = decode(moments)
        returned = link.step(shared, cast(g), cast(p), *held, **{"dither": dither} if link.rounds else {})
        check_returned(link, "step", returned, [g, *held], "the update, and the new moments in the order of State")
        u, *new = returned
        return u, *encode(new)


def _used(format: Format | None, exact: jax.Array, held: jax.Array, lasting: Any) -> jax.Array:
    """What the direction is taken of, as it is held; with the slope of the exact moment."""
    if format is not None and format.compensates and lasting is not None:
        held = held + uncontracted((exact - held) * lasting)
    return straight_through(format, exact, held)


def _once(renew: Callable[[], list[Any]], old: list[Any], dither: Dither | None) -> list[Any]:
    """`renew()`, on CPUs worked out once: XLA would do it again there, for each element that reads the result."""

    def fenced() -> list[Any]:
        packed = [moment for moment in old if isinstance(moment, Packed)]
        if not packed:
            return jax.lax.optimization_barrier(renew())
        # around block scales it ignores the barrier, at 6 times the time; a condition, always true, it heeds
        if dither is None:
            scale = jax.tree.leaves(packed[0].scales)[0][(0,) * packed[0].ndim]
            true = jax.lax.bitcast_convert_type(scale, jnp.int32) != -1
        else:  # every device has the count, but only one of a mesh that scale
            true = dither.step != np.uint32(0xFFFFFFFF)
        return jax.lax.cond(true, renew, lambda: old)

    return jax.lax.platform_dependent(cpu=fenced, default=renew)
