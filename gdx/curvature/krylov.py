"""Lanczos, on all numbers of a tree in one array."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdx.curvature.operators import Operator
from gdx.numerics import accurate

dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)  # by default a GPU keeps 10 bits of a factor


class Krylov(NamedTuple):
    """What Lanczos found: the operator in an orthonormal basis of the start, its products, and those of other starts.

    Attributes:
      values: of shape (size,): the Ritz values, ascending.
      coefficients: of shape (size, size): their vectors in the basis, in columns.
      basis: of shape (size, n).
      errors: of shape (size,): how far each Ritz pair is from an eigenpair.
    """

    values: jax.Array
    coefficients: jax.Array
    basis: jax.Array
    errors: jax.Array

    def vectors(self, indices: Any) -> jax.Array:
        """The Ritz vectors with these indices, of shape (indices, n)."""
        return dot(self.coefficients[:, indices].T, self.basis)


def lanczos(product: Callable[[jax.Array], jax.Array], start: jax.Array, size: int, key: jax.Array) -> Krylov:
    """Lanczos with full reorthogonalisation; where the span is exhausted it goes on from a random vector.

    Source: Parlett, The Symmetric Eigenvalue Problem (1998), chapter 13.
    """

    def turn(carry: tuple, i: jax.Array) -> tuple[tuple, tuple]:
        basis, unit, largest, beside = carry
        image = product(basis[i])
        unit = jnp.where(i == 0, near(image), unit)
        diagonal = dot(basis[i], image / unit)
        rest = apart(image / unit - diagonal * basis[i] - beside * basis[i - 1], basis)  # row -1 is 0 at first
        length = jnp.linalg.norm(rest)
        largest = jnp.maximum(largest, jnp.abs(diagonal) + beside + length)
        exhausted = length <= 10 * jnp.finfo(start.dtype).eps * largest

        def other(_: jax.Array) -> jax.Array:
            return apart(jax.random.normal(jax.random.fold_in(key, i), start.shape, start.dtype), basis)

        rest = jax.lax.cond(exhausted, other, lambda rest: rest, rest)
        basis = basis.at[i + 1].set(rest / jnp.linalg.norm(rest), mode="drop")
        beside = jnp.where(exhausted, 0, length)
        return (basis, unit, largest, beside), (diagonal, beside)

    zero = jnp.zeros((), start.dtype)
    basis = jnp.zeros((size, *start.shape), start.dtype).at[0].set(start / jnp.linalg.norm(start))
    (basis, unit, *_), (diagonal, beside) = jax.lax.scan(turn, (basis, zero, zero, zero), jnp.arange(size))
    matrix = jnp.diag(diagonal) + jnp.diag(beside[:-1], 1) + jnp.diag(beside[:-1], -1)
    values, coefficients = jnp.linalg.eigh(matrix)
    return Krylov(values * unit, coefficients, basis, beside[-1] * jnp.abs(coefficients[-1]) * unit)


def apart(vector: jax.Array, basis: jax.Array) -> jax.Array:
    """What of a vector is orthogonal to a basis; if that is little, rounding left some of the rest in it: once more.

    Source: Parlett, chapter 6.9, "twice is enough".
    """
    once = vector - dot(dot(basis, vector), basis)
    is_little = jnp.linalg.norm(once) < 0.7 * jnp.linalg.norm(vector)
    return jax.lax.cond(is_little, lambda once: once - dot(dot(basis, once), basis), lambda once: once, once)


def measured(product: Callable[[jax.Array], jax.Array], vector: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The vector at length 1, its Rayleigh quotient, and how far the two are from an eigenpair."""
    vector = vector / jnp.linalg.norm(vector)
    image = product(vector)
    value, unit = dot(vector, image), near(image)
    return vector, value, jnp.linalg.norm((image - value * vector) / unit) * unit


def near(x: jax.Array) -> jax.Array:
    """A power of two near the largest number of an array: to divide by without rounding, where squares would be 0."""
    kind = jnp.finfo(x.dtype)
    exponent = jnp.frexp(jnp.max(jnp.abs(x)))[1]  # 0 for what is 0, infinite or NaN
    return jnp.ldexp(jnp.ones((), x.dtype), jnp.clip(exponent, kind.minexp, kind.maxexp - 2))


def to_vector(tree: Any) -> jax.Array:
    """All numbers of a tree in one real array, in at least float32; of complex leaves both parts."""
    leaves = [accurate(leaf).ravel() for leaf in jax.tree.leaves(tree)]
    parts = [part for x in leaves for part in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))]
    vector, begin = jnp.zeros(sum(part.size for part in parts), jnp.result_type(*parts)), 0
    for part in parts:
        # a fused jnp.concatenate asks for each number which leaf it is of, and takes longer than many a product
        vector = jax.lax.dynamic_update_slice(vector, part.astype(vector.dtype), (begin,))
        begin += part.size
    return vector


def from_vector(vector: jax.Array, like: Any) -> Any:
    """The tree that `to_vector` makes this array of; `like` has its structure and shapes."""
    leaves, structure = jax.tree.flatten(like)
    begin, found = 0, []
    for leaf in leaves:
        shape, size = np.shape(leaf), np.size(leaf)
        parts = 2 if jnp.iscomplexobj(leaf) else 1
        pieces = [vector[begin + i * size : begin + (i + 1) * size].reshape(shape) for i in range(parts)]
        found.append(pieces[0] if parts == 1 else jax.lax.complex(*pieces))
        begin += parts * size
    return jax.tree.unflatten(structure, found)


def on_vectors(operator: Operator) -> Callable[[jax.Array], jax.Array]:
    """The operator as a function of real arrays of shape (n,)."""
    return lambda vector: to_vector(operator(from_vector(vector, operator.params))).astype(vector.dtype)
