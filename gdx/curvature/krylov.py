"""Lanczos, on all numbers of a tree in one array: matfree's, made safe for what it divides by."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdx.curvature.operators import Operator
from gdx.extra import needs
from gdx.numerics import accurate


class Krylov(NamedTuple):
    """What Lanczos found from one start: the operator in the span of the start and its products.

    Attributes:
      values: of shape (size,): the Ritz values, ascending.
      coefficients: of shape (size, size): their vectors in the basis, in columns.
      basis: of shape (size, n).
      alive: of shape (size,): False from where the span was exhausted; the basis is of no use there.
      errors: of shape (size,): how far each Ritz pair is from an eigenpair.
    """

    values: jax.Array
    coefficients: jax.Array
    basis: jax.Array
    alive: jax.Array
    errors: jax.Array

    @property
    def smallest(self) -> jax.Array:
        """The index of the smallest Ritz value."""
        return jnp.argmin(jnp.where(self._counts, self.values, jnp.inf))

    @property
    def largest(self) -> jax.Array:
        """The index of the largest Ritz value."""
        return jnp.argmax(jnp.where(self._counts, self.values, -jnp.inf))

    @property
    def _counts(self) -> jax.Array:
        return jnp.sum(jnp.where(self.alive[:, None], self.coefficients**2, 0), axis=0) > 0.5

    def vectors(self, indices: jax.Array) -> jax.Array:
        """The Ritz vectors with these indices, of shape (indices, n), summed up row by row of the basis."""

        def add(total: jax.Array, row: tuple) -> tuple[jax.Array, None]:
            q, weights, alive = row
            return total + jnp.where(alive, weights[:, None] * q[None, :], 0), None  # a dead row may be NaN

        zeros = jnp.zeros((len(indices), self.basis.shape[1]), self.basis.dtype)
        return jax.lax.scan(add, zeros, (self.basis, self.coefficients[:, indices], self.alive))[0]


def lanczos(product: Callable[[jax.Array], jax.Array], start: jax.Array, size: int) -> Krylov:
    """Lanczos with full reorthogonalisation, that stops counting where the span of the start is exhausted."""
    with needs("curvature"):
        from matfree import decomp
    run = decomp.tridiag_sym(size, materialize=False, reortho="full", custom_vjp=False)
    first = start / jnp.linalg.norm(start)
    image = product(first)
    unit = near(image)  # matfree squares what a product is: in float32 nothing is left of 1e-20

    def in_units(vector: jax.Array) -> jax.Array:
        # the later vectors are orthogonal to the first, whose image is known
        return jax.lax.cond(jnp.vdot(vector, first) > 0.5, lambda _: image, product, vector) / unit

    basis, (diagonal, beside), residual, _ = run(in_units, start)
    coupling = jnp.append(beside, jnp.linalg.norm(residual))
    # matfree divides by the length of what is left: by 0, or noise, once the span is exhausted
    size_of_all = jnp.nanmax(jnp.abs(diagonal)) + jnp.nanmax(jnp.abs(coupling))
    goes_on = coupling > 10 * jnp.finfo(start.dtype).eps * size_of_all
    alive = jnp.cumprod(jnp.append(True, goes_on[:-1])).astype(bool)
    diagonal = jnp.where(alive, diagonal, diagonal[0])
    beside = jnp.where(alive[1:], beside, 0)
    values, coefficients = jnp.linalg.eigh(jnp.diag(diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1))
    errors = jnp.where(alive[-1] & goes_on[-1], coupling[-1], 0) * jnp.abs(coefficients[-1])
    return Krylov(values * unit, coefficients, basis, alive, errors * unit)


def measured(product: Callable[[jax.Array], jax.Array], vector: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The vector at length 1, its Rayleigh quotient, and how far the two are from an eigenpair."""
    vector = vector / jnp.linalg.norm(vector)
    image = product(vector)
    value, unit = jnp.vdot(vector, image), near(image)
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
    dtype = jnp.result_type(*parts)
    return jnp.concatenate([part.astype(dtype) for part in parts])


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
