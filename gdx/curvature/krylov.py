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
    """What Lanczos found: the operator in an orthonormal basis of the starts, its products, and those of other starts.

    Attributes:
      values: of shape (size,): the Ritz values, ascending.
      coefficients: of shape (rows, size): their vectors in the basis, in columns; 0 beyond row `size`.
      basis: of shape (rows, n) with rows = min(size + width, n); beyond row `size`, where products lead.
      errors: of shape (size,): how far each Ritz pair is from an eigenpair.
    """

    values: jax.Array
    coefficients: jax.Array
    basis: jax.Array
    errors: jax.Array

    def vectors(self, indices: Any) -> jax.Array:
        """The Ritz vectors with these indices, with an axis more."""
        return dot(jnp.moveaxis(self.coefficients[:, indices], 0, -1), self.basis)


class Kept(NamedTuple):
    """Ritz pairs of an earlier Lanczos, to begin with: what products lead out of them is in the span of the starts.

    Attributes:
      begin: how many of them there are, 0 or all.
      values: of shape (kept,), 0 where there are none.
      vectors: of shape (kept, n), orthonormal, or 0.
    """

    begin: jax.Array
    values: jax.Array
    vectors: jax.Array


def lanczos(
    product: Callable[[jax.Array], jax.Array], starts: jax.Array, size: int, key: jax.Array, kept: Kept | None = None
) -> Krylov:
    """Lanczos from several starts, (width, n), reorthogonalised in full; `size` - `kept` products, one at a time.

    Each product lengthens the basis by what of it is new, `width` rows below its factor (a band matrix rather than a
    tridiagonal one). Where nothing is, as the span is exhausted, it goes on from a random vector.

    Sources: Parlett, The Symmetric Eigenvalue Problem (1998), chapter 13; Ruhe, Implementation aspects of band Lanczos
    algorithms (1979); Wu & Simon, Thick-restart Lanczos method (2000).
    """
    (width, n), dtype, eps = starts.shape, starts.dtype, jnp.finfo(starts.dtype).eps
    nothing = Kept(jnp.int32(0), jnp.zeros(0, dtype), jnp.zeros((0, n), dtype))
    begin, known, vectors = nothing if kept is None else kept
    rows = min(size + width, n)
    near_by = min(2 * width, rows)

    def longer(basis: jax.Array, vector: jax.Array, i: jax.Array, length: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The basis with what of a vector is new as row i, and the coefficients of the vector, of this length."""
        coefficients, rest = split(vector, basis)
        left = jnp.linalg.norm(rest)
        exhausted = left <= 10 * eps * length

        def other(_: jax.Array) -> jax.Array:
            return apart(jax.random.normal(jax.random.fold_in(key, i), (n,), dtype), basis)

        rest = jax.lax.cond(exhausted, other, lambda rest: rest, rest)
        basis = basis.at[i].set(rest / jnp.linalg.norm(rest), mode="drop")
        return basis, coefficients.at[i].set(jnp.where(exhausted, 0, left), mode="drop")

    def begun(i: jax.Array, basis: jax.Array) -> jax.Array:
        return longer(basis, starts[i], begin + i, jnp.linalg.norm(starts[i]))[0]

    def turn(i: jax.Array, carry: tuple) -> tuple:
        basis, matrix, unit, largest = carry
        image = product(basis[i])
        unit = jnp.where(i == begin, jnp.maximum(unit, near(image)), unit)
        image = image / unit
        largest = jnp.maximum(largest, jnp.linalg.norm(image))
        # the band first: what is left is little changed by the whole basis, which then need be read but once
        first = jnp.clip(i - width, 0, rows - near_by)
        band = jax.lax.dynamic_slice_in_dim(basis, first, near_by)
        within = dot(band, image)
        basis, row = longer(basis, image - dot(within, band), i + width, largest)
        within = jax.lax.dynamic_update_slice(jnp.zeros_like(row), within, (first,))
        return basis, matrix.at[i].set(row + within), unit, largest

    # where there is nothing before the starts, the rest of the basis is not read, which is all zeros
    begin_with = jnp.zeros((rows if len(known) else min(width, rows), n), dtype).at[: len(known)].set(vectors[:rows])
    begin_with = jax.lax.fori_loop(jnp.int32(0), jnp.int32(width), begun, begin_with)
    basis = jnp.zeros((rows, n), dtype).at[: len(begin_with)].set(begin_with)
    unit = jnp.where(begin > 0, near(known), 0) if len(known) else jnp.zeros((), dtype)
    carry = basis, jnp.zeros((size, rows), dtype), unit, jnp.zeros((), dtype)
    basis, matrix, unit, _ = jax.lax.fori_loop(begin, jnp.int32(size), turn, carry)
    inside = jnp.tril(matrix[:, :size])
    inside = (
        inside + jnp.tril(inside, -1).T + jnp.diag(jnp.zeros(size, dtype).at[: len(known)].set(known[:size] / unit))
    )
    values, coefficients = jnp.linalg.eigh(inside)
    errors = jnp.linalg.norm(dot(matrix[:, size:].T, coefficients), axis=0)
    return Krylov(values * unit, jnp.zeros((rows, size), dtype).at[:size].set(coefficients), basis, errors * unit)


def apart(vector: jax.Array, basis: jax.Array) -> jax.Array:
    """What of a vector is orthogonal to a basis."""
    return split(vector, basis)[1]


def split(vector: jax.Array, basis: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The coefficients of a vector in a basis, and the rest; if that is little, some of the basis is in it: once more.

    Source: Parlett, chapter 6.9, "twice is enough".
    """

    def once(vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        coefficients = dot(basis, vector)
        return coefficients, vector - dot(coefficients, basis)

    def again(found: tuple) -> tuple[jax.Array, jax.Array]:
        more, rest = once(found[1])
        return found[0] + more, rest

    found = once(vector)
    is_little = jnp.linalg.norm(found[1]) < 0.7 * jnp.linalg.norm(vector)
    return jax.lax.cond(is_little, again, lambda found: found, found)


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


def count_numbers(tree: Any) -> int:
    """How many numbers `to_vector` makes of a tree."""
    return sum(np.size(x) * (2 if jnp.iscomplexobj(x) else 1) for x in jax.tree.leaves(tree))


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
