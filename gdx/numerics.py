"""Arithmetic that rounds the same way in every program."""

import jax
import jax.numpy as jnp


def uncontracted(product: jax.Array) -> jax.Array:
    """A product that is rounded by itself, never as part of a fused multiply-add.

    In a sum of two products a compiler may fuse either, and chooses by the program around them:
    with this around one of them, a step has the same bits in every program. A product that
    overflows to infinity becomes NaN, to be seen.
    """
    # barriers and reduce_precision are removed before the compiler fuses
    return jnp.where(product < jnp.inf, product, jnp.nan) if jnp.isrealobj(product) else product
