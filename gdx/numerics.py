"""Arithmetic that is wide enough, and rounds the same way in every program."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdx.compat import contracts_all
from gdx.fields import is_concrete


def uncontracted(product: jax.Array) -> jax.Array:
    """A product that is rounded by itself, never as part of a fused multiply-add.

    In a sum of two products a compiler may fuse one, and which one depends on the program around them. With this
    around the one, and `alike` around the other, the sum has the same bits in every program. A product that overflows
    to infinity becomes NaN, to be seen; a complex one is left as it is.

    >>> import gdx, jax, jax.numpy as jnp
    >>> x = jnp.float32(1 + 2**-12)  # its square, 1 + 2^-11 + 2^-24, is rounded to 1 + 2^-11
    >>> float(jax.jit(lambda x: gdx.uncontracted(x * x) - 1)(x) * 2**11)
    1.0
    """
    if not jnp.isrealobj(product):
        return product
    # barriers and reduce_precision are removed before the compiler fuses; this sum is not, since it makes NaN of
    # infinity, and however it is fused itself, adding zero rounds nothing
    return jax.lax.add(product, jax.lax.mul(product, product.dtype.type(0)))


def alike(product: jax.Array) -> jax.Array:
    """A product that is part of a fused multiply-add in every program, or in none: as the version of JAX has it.

    For the other product of a sum, beside `uncontracted`, and for a product that a later program adds to something.

    >>> import gdx, jax, jax.numpy as jnp
    >>> step = lambda rate, p: p - gdx.alike(rate * p)
    >>> rate, p = jnp.float32(0.1), jnp.linspace(0.0, 1.0, 1000, dtype="float32")
    >>> bool(jnp.all(jax.jit(step)(rate, p) == jax.jit(lambda p: step(rate, p))(p)))
    True
    """
    return product if contracts_all() else by_itself(product)


def by_itself(x: jax.Array) -> jax.Array:
    """A number as it is, infinities too, of which a compiler makes no part of what comes next.

    Of two factors that are constants it would make one, whose product is rounded another way.
    """
    if not isinstance(x, jax.core.Tracer) or not jnp.isrealobj(x):
        return x
    # infinity is its own magnitude, and what is no number is none, which no compiler makes use of
    return jax.lax.select(jax.lax.lt(x, x.dtype.type(np.inf)), x, jax.lax.abs(x))


def either(condition: jax.Array, this: Callable[[], Any], other: Callable[[], Any]) -> Any:
    """The one or the other: a selection would change how a compiler contracts the sums before and after it."""
    # outside of compiled functions `cond` would compile anew at each step
    if is_concrete(condition):
        return this() if condition else other()
    return jax.lax.cond(condition, this, other)


def compute_dtype(*arrays: Any) -> np.dtype:
    """The dtype to compute in: that of the arrays together, but at least float32."""
    dtype = np.dtype(np.float32)
    for x in arrays:
        # Python's floats have none
        other = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
        if other != dtype:
            dtype = np.promote_types(dtype, other)
    return dtype


def accurate(x: Any) -> jax.Array:
    """The array in at least float32."""
    return jnp.asarray(x, compute_dtype(x))


def squared_norm(tree: Any) -> jax.Array:
    """The sum of |x|^2, in at least float32, as the default float dtype."""
    total = jnp.zeros([], jnp.result_type(float))
    for x in map(accurate, jax.tree.leaves(tree)):
        total += jnp.sum(x.real**2 + x.imag**2 if jnp.iscomplexobj(x) else x * x).astype(total.dtype)
    return total


def norm(tree: Any, like: jax.Array) -> jax.Array:
    """The l2 norm, wherever it is representable: squares are taken in units near it, of this usual one or the largest.

    Units also keep the compiler from sharing squares with a second moment, for which it would write them all out.
    """
    leaves = [x for x in jax.tree.leaves(tree) if x.size]

    def in_units(unit: jax.Array) -> jax.Array:
        unit = jnp.maximum(unit, jnp.finfo(unit.dtype).tiny)
        scaled = (jnp.abs(accurate(x)) for x in leaves)
        return unit * jnp.sqrt(squared_norm([x * (1 / unit).astype(x.dtype) for x in scaled]))

    def in_largest() -> jax.Array:
        largest = (jnp.max(jnp.abs(accurate(x))).astype(like.dtype) for x in leaves)
        return in_units(jnp.max(jnp.stack([jnp.zeros_like(like), *largest])))

    usual = in_units(like)
    return jax.lax.cond((usual > 1e-15 * like) & (usual < 1e15 * like), lambda: usual, in_largest)
