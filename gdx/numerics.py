"""Arithmetic that is wide enough, and rounds the same way in every program."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def uncontracted(product: jax.Array) -> jax.Array:
    """A product that is rounded by itself, never as part of a fused multiply-add.

    In a sum of two products a compiler may fuse either, and chooses by the program around them:
    with this around one of them, a step has the same bits in every program. A product that
    overflows to infinity becomes NaN, to be seen.
    """
    # barriers and reduce_precision are removed before the compiler fuses
    return jnp.where(product < jnp.inf, product, jnp.nan) if jnp.isrealobj(product) else product


def compute_dtype(*arrays: Any) -> np.dtype:
    """The dtype to compute in: that of the arrays together, but at least float32."""
    return functools.reduce(np.promote_types, (jnp.result_type(x) for x in arrays), np.dtype(np.float32))


def accurate(x: Any) -> jax.Array:
    """The array in at least float32."""
    return jnp.asarray(x, compute_dtype(x))
