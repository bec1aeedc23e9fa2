"""What Lanczos finds out about an operator: the edges of its spectrum, the spectrum's density, its trace."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdx.arguments import check_function, check_key, number
from gdx.curvature.krylov import (
    Kept,
    apart,
    count_numbers,
    dot,
    from_vector,
    lanczos,
    measured,
    near,
    on_vectors,
    to_vector,
)
from gdx.curvature.operators import Operator, check_operator
from gdx.fields import is_concrete, is_real, refuse, to_integer
from gdx.mesh import on_any_mesh

Progress = Callable[[float], None]
"""Called after each product with the fraction of the largest number of products that is done, in (0, 1]."""


class Edge(NamedTuple):
    r"""An eigenvalue at the edge of a spectrum.

    Attributes:
      value: $\lambda$, a scalar array.
      vector: $v$, a tree like the parameters with $\|v\| = 1$.
      error: $\|A v - \lambda v\|$: an eigenvalue is at most so far from `value`, and in general much closer, by
        about `error` squared over the distance to the next one.
    """

    value: jax.Array
    vector: Any
    error: jax.Array


class Edges(NamedTuple):
    """The two ends of a spectrum.

    Attributes:
      smallest: the smallest eigenvalue, which is negative where there is a direction of negative curvature.
      largest: the largest eigenvalue: of a Hessian, the sharpness.
      converged: bool, whether both errors are at most the tolerance times the larger absolute value.
      products: how many products with a vector it took.
    """

    smallest: Edge
    largest: Edge
    converged: jax.Array
    products: jax.Array


def spectrum_edges(
    operator: Operator,
    key: jax.Array,
    *,
    krylov_size: int = 32,
    rounds: int = 10,
    tolerance: float = 1e-3,
    progress: Progress | None = None,
) -> Edges:
    r"""The smallest and the largest eigenvalue with their eigenvectors, by restarted Lanczos.

    The first round takes `krylov_size` products from a random vector, reorthogonalised in full, and has the extreme
    eigenpairs $(\lambda, v)$ of the operator in their span; where that is exhausted, as by few distinct eigenvalues, it
    goes on from a random vector. It ends once

    $$ \|A v - \lambda v\| \le \text{tolerance} \cdot \max(|\lambda_\min|, |\lambda_\max|) $$

    for both, or after `rounds`; else another begins with the two vectors, some next to them, and where their products
    lead: thick restarts. The criterion is relative to the
    whole spectrum: a $\lambda_\min$ near 0, with many others near 0, is only that exact, and is found better with
    a smaller `tolerance`. Two last products measure the errors that are returned. A random start misses
    an edge only where it is orthogonal to it to within rounding.

    A pure function, also under `jax.jit`; outside of it, the program is compiled once for each set of shapes,
    functions and options, and the result is checked. Memory: about 1.25 `krylov_size` + 6 vectors like the
    parameters, however many rounds, and that of one product. Parameters and data may be sharded over a mesh, but each
    device holds these vectors whole. Where axes of the mesh are explicit, the loss runs with automatic ones: one that
    states shardings goes in as
    `jax.sharding.explicit_axes(loss, in_sharding=(specs of params, specs of a batch))`.

    Args:
      operator: `Hessian`, `GaussNewton`, or one of them `Preconditioned`.
      key: a random key, for the first start.
      krylov_size: products in the first round, at least 3, of which later ones save about a quarter; no more are made
        than there are parameters.
      rounds: the most rounds, at least 1.
      tolerance: relative error, positive; in float32 little is gained below 1e-5.
      progress: called after each product.

    Raises:
      ValueError: an option is out of range, or there are no parameters; outside of jit, where it is seen, the loss or a
        product is infinite or NaN; what the operator raises.
      TypeError: krylov_size or rounds is no integer, a parameter no floating-point array; what the operator raises.

    Sources: Lanczos (1950); Saad, Numerical Methods for Large Eigenvalue Problems (2011), chapters 6 and 7; Wu & Simon,
    Thick-restart Lanczos method for large symmetric eigenvalue problems (2000).

    >>> import gdx, jax, jax.numpy as jnp
    >>> bowl = lambda theta, batch: 0.5 * jnp.sum(jnp.arange(1.0, 101.0) * theta**2)
    >>> hessian = gdx.curvature.Hessian(bowl, jnp.ones(100), batches=jnp.zeros(1))
    >>> edges = gdx.curvature.spectrum_edges(hessian, jax.random.key(0))
    >>> round(edges.smallest.value.item(), 2), round(edges.largest.value.item(), 1), edges.converged.item()
    (1.0, 100.0, True)
    """
    name = "spectrum_edges"
    size = _check_size(name, operator, key, krylov_size, progress, least=3)
    _check_count(name, "rounds", rounds)
    tolerance = number(f"{name}: tolerance", tolerance, "a positive number, such as 1e-3", above=0)
    meter = None if progress is None else Meter(progress, size, rounds, _number_kept(size, 2, 1))
    edges = _edges(operator, key, size, rounds, tolerance, meter)
    _check_finite(name, operator, (edges.smallest.value, edges.largest.value))
    return edges


class Eigenpairs(NamedTuple):
    r"""The largest eigenvalues of an operator, in falling order.

    Attributes:
      values: $\lambda_1 \ge \lambda_2 \ge \dots$, of shape (count,).
      vectors: their eigenvectors, orthonormal: a tree like the parameters, with a leading axis of (count,).
      errors: $\|A v_i - \lambda_i v_i\|$, of shape (count,): what it bounds is said in `Edge`.
      converged: bool, whether all errors are at most the tolerance times the largest absolute value among these.
      products: how many products with a vector it took.
    """

    values: jax.Array
    vectors: Any
    errors: jax.Array
    converged: jax.Array
    products: jax.Array


def largest_eigenpairs(
    operator: Operator,
    key: jax.Array,
    count: int,
    *,
    krylov_size: int | None = None,
    rounds: int = 10,
    tolerance: float = 1e-3,
    progress: Progress | None = None,
) -> Eigenpairs:
    r"""The `count` largest eigenvalues with their eigenvectors, repeated and close ones too, by restarted band Lanczos.

    As `spectrum_edges`, but from `count` random starts together. Of a repeated eigenvalue one start has one vector,
    and so many have as many as are asked for. What `spectrum_edges` says of restarts, jit and meshes
    is true here too; memory: about 1.25 `krylov_size` + 2 `count` + 6 vectors like the parameters.

    Once it has converged, the values are the largest ones to within the tolerance, unless the random starts all miss an
    eigenvector. The eigenvectors of values that are closer than their errors mix. What is small against the
    absolute largest eigenvalue, as the top of a negative spectrum may be, or lies among many others, takes more rounds.

    Args:
      operator, key, rounds, tolerance, progress: as in `spectrum_edges`.
      count: how many, at least 1, and no more than there are parameters.
      krylov_size: products in the first round, at least twice the count, by default 64 or, if that is more, 4 for each
        pair; no more are made than there are parameters.

    Raises:
      ValueError, TypeError: as `spectrum_edges`; count is out of range, or krylov_size less than twice that.

    Sources: Ruhe, Implementation aspects of band Lanczos algorithms (1979); Wu & Simon, Thick-restart Lanczos method
    for large symmetric eigenvalue problems (2000).

    >>> import gdx, jax, jax.numpy as jnp
    >>> bowl = lambda theta, batch: 0.5 * jnp.sum(jnp.arange(1.0, 101.0) * theta**2)
    >>> hessian = gdx.curvature.Hessian(bowl, jnp.ones(100), batches=jnp.zeros(1))
    >>> top = gdx.curvature.largest_eigenpairs(hessian, jax.random.key(0), 3)
    >>> top.values.round(1).tolist(), top.vectors.shape
    ([100.0, 99.0, 98.0], (3, 100))
    """
    name = "largest_eigenpairs"
    check_operator(name, operator)
    _check_count(name, "count", count)
    n = count_numbers(operator.params)
    size = _check_size(name, operator, key, max(64, 4 * count) if krylov_size is None else krylov_size, progress)
    _check_count(name, "rounds", rounds)
    tolerance = number(f"{name}: tolerance", tolerance, "a positive number, such as 1e-3", above=0)
    if count > n:
        raise ValueError(f"{name}: count is {count}; expected at most {n}, the number of parameters")
    if size < min(n, 2 * count):
        raise ValueError(f"{name}: krylov_size is {size}; expected at least {2 * count}, twice the count")
    meter = None if progress is None else Meter(progress, size, rounds, _number_kept(size, count, count))
    found = _largest(operator, key, size, rounds, tolerance, count, meter)
    _check_finite(name, operator, found.values)
    return found


class Density(NamedTuple):
    r"""The distribution of eigenvalues, by Gauss quadrature: sums of point masses, one row for each probe.

    Attributes:
      nodes: of shape (probes, krylov_size), or (probes, parameters) if those are fewer: where the masses are.
      weights: of that shape: the masses, in each row with the sum 1.
    """

    nodes: jax.Array
    weights: jax.Array

    def at(self, points: Any, width: Any) -> tuple[jax.Array, jax.Array]:
        r"""The density smoothed with a Gaussian, $\rho(x) = \sum_i w_i \, N(x; \theta_i, \text{width}^2)$.

        Args:
          points: of shape (points,).
          width: the Gaussian's standard deviation, in the unit of the eigenvalues.

        Returns:
          The mean over the probes and its standard error (NaN for one probe), each of shape (points,).
        """
        number("Density.at: width", width, "a positive number", above=0)
        if not is_real(points) or np.ndim(points) != 1 or not np.size(points):
            refuse("Density.at: points", points, "real numbers, (points,), at least one")
        points, width = (jnp.asarray(x, self.nodes.dtype) for x in (points, width))

        def of_probe(nodes: jax.Array, weights: jax.Array) -> jax.Array:
            heights = jax.scipy.stats.norm.pdf((points[:, None] - nodes[None, :]) / width)
            return heights @ weights / width

        return _mean_and_error(jax.vmap(of_probe)(self.nodes, self.weights))


def spectral_density(
    operator: Operator, key: jax.Array, *, krylov_size: int = 64, probes: int = 8, progress: Progress | None = None
) -> Density:
    r"""The density of eigenvalues by stochastic Lanczos quadrature.

    From a random vector $z$ of signs, Lanczos gives the Gauss quadrature of the measure that has the mass
    $(z^\top v_i)^2 / n$ at each eigenvalue $\lambda_i$; its mean is the density $\frac{1}{n} \sum_i
    \delta(\lambda - \lambda_i)$. Each row is exact for polynomials of a degree below 2 `krylov_size` against
    its own measure; how much the rows differ is the error, which `Density.at` returns.

    Args:
      operator: as in `spectrum_edges`, and so are memory, jit and meshes.
      key: a random key.
      krylov_size: products for each probe, at least 2; no more are made than there are parameters.
      probes: how many random vectors, one after the other, at least 1.
      progress: called after each product.

    Raises:
      ValueError, TypeError: as `spectrum_edges`.

    Sources: Golub & Meurant, Matrices, Moments and Quadrature (2010); Ghorbani et al., An Investigation into Neural
    Net Optimization via Hessian Eigenvalue Density (2019).

    >>> import gdx, jax, jax.numpy as jnp
    >>> steep = jnp.where(jnp.arange(100) < 30, 10.0, 1.0)
    >>> hessian = gdx.curvature.Hessian(lambda theta, batch: 0.5 * jnp.sum(steep * theta**2), steep, jnp.zeros(1))
    >>> density = gdx.curvature.spectral_density(hessian, jax.random.key(0), probes=32)
    >>> bool(jnp.mean(jnp.sum(jnp.where(density.nodes > 5, density.weights, 0.0), axis=1)).round(1) == 0.3)
    True
    """
    name = "spectral_density"
    size = _check_size(name, operator, key, krylov_size, progress)
    _check_count(name, "probes", probes)
    density = _density(operator, key, size, probes, None if progress is None else Meter(progress, size, probes))
    _check_finite(name, operator, density.nodes)
    return density


class Trace(NamedTuple):
    """An estimate of a trace.

    Attributes:
      value: scalar.
      error: the standard error of it, NaN for one sample.
    """

    value: jax.Array
    error: jax.Array


def trace(
    operator: Operator, key: jax.Array, *, samples: int = 32, rank: int = 0, progress: Progress | None = None
) -> Trace:
    r"""The trace by Hutchinson's estimator, unbiased: the mean of $z^\top A z$ over random vectors $z$ of signs.

    Its variance is $\frac{2}{m} \sum_{i \ne j} A_{ij}^2$ for $m$ samples, 0 for a diagonal matrix. Most of that is
    often in few directions. With a `rank` these are taken exactly, and only the rest is sampled (Hutch++): of the
    orthonormal $Q$ that spans the product of $A$ with so many random vectors, it is

    $$ \mathrm{tr}(Q^\top A Q) + \frac{1}{m} \sum_{j=1}^m w_j^\top A w_j, \qquad w_j = (I - Q Q^\top) z_j $$

    For as many products in all, rank = samples pays where the spectrum falls off, as that of a network does, and costs
    three times the variance where it is flat.

    Args:
      operator: as in `spectrum_edges`, and so are jit and meshes; the memory is for `rank` vectors and a few.
      key: a random key.
      samples: how many vectors and products, at least 1.
      rank: how many directions are taken exactly, at 2 products for each; at least 0, and no more than there are
        parameters are used.
      progress: called after each product.

    Raises:
      ValueError, TypeError: as `spectrum_edges`.

    Sources: Hutchinson, A stochastic estimator of the trace of the influence matrix (1989); Meyer et al., Hutch++
    (2021).

    >>> import gdx, jax, jax.numpy as jnp
    >>> hessian = gdx.curvature.Hessian(lambda theta, batch: jnp.sum(theta**2), jnp.ones(5), jnp.zeros(1))
    >>> gdx.curvature.trace(hessian, jax.random.key(0)).value.item()
    10.0
    """
    wanted = to_integer("trace: rank", rank, minimum=0)
    rank = min(wanted, _check_size("trace", operator, key, max(wanted, 2), progress))
    _check_count("trace", "samples", samples)
    found = _trace(operator, key, samples, rank, None if progress is None else Meter(progress, 1, samples + 2 * rank))
    _check_finite("trace", operator, found.value)
    return found


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
@on_any_mesh
def _edges(
    operator: Operator, key: jax.Array, size: int, rounds: int, tolerance: float, meter: "Meter | None"
) -> Edges:
    which = tuple(-1 - i // 2 if i % 2 else i // 2 for i in range(_number_kept(size, 2, 1)))
    (smallest, largest), converged, products = _pairs(operator, key, size, rounds, tolerance, which, 2, 1, meter)
    return Edges(smallest, largest, converged, products)


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6))
@on_any_mesh
def _largest(
    operator: Operator, key: jax.Array, size: int, rounds: int, tolerance: float, count: int, meter: "Meter | None"
) -> Eigenpairs:
    which = tuple(-1 - i for i in range(_number_kept(size, count, count)))
    pairs, *others = _pairs(operator, key, size, rounds, tolerance, which, count, count, meter)
    return Eigenpairs(*jax.tree.map(lambda *x: jnp.stack(x), *pairs), *others)


def _number_kept(size: int, count: int, width: int) -> int:
    """How many Ritz pairs a later round begins with: those asked for, and some next to them, which hasten it."""
    return count + max(0, size - count - width) // 4


def _pairs(
    operator: Operator,
    key: jax.Array,
    size: int,
    rounds: int,
    tolerance: float,
    which: tuple[int, ...],
    count: int,
    width: int,
    meter: "Meter | None",
) -> tuple[list[Edge], jax.Array, jax.Array]:
    """From so many starts, the first pairs of those with these places among the Ritz values, all of which are kept.

    Returns the pairs, whether they converged, and the number of products.
    """
    product, like = on_vectors(operator), to_vector(operator.params)
    held, dtype = len(which), like.dtype

    def small(values: jax.Array, errors: jax.Array) -> jax.Array:
        return jnp.all(errors[:count] <= tolerance * jnp.max(jnp.abs(values[:count])))

    def goes_on(carry: tuple) -> jax.Array:
        number, kept, errors, _ = carry
        return (number < rounds) & ~small(kept.values, errors) & ~jnp.any(jnp.isnan(kept.values))

    def turn(carry: tuple) -> tuple:
        number, kept, _, starts = carry
        found = lanczos(_metered(product, meter, number), starts, size, jax.random.fold_in(key, number), kept)
        beyond, chosen = found.basis[size:], jnp.array(which)
        kept = Kept(jnp.int32(held), found.values[chosen], found.vectors(chosen))
        return number + 1, kept, found.errors[chosen], jnp.zeros_like(starts).at[: len(beyond)].set(beyond)

    nothing = Kept(jnp.int32(0), jnp.zeros(held, dtype), jnp.zeros((held, *like.shape), dtype))
    starts = jax.random.normal(key, (width, *like.shape), dtype)
    begin = jnp.int32(0), nothing, jnp.full(held, jnp.inf, dtype), starts
    number, kept, *_ = jax.lax.while_loop(goes_on, turn, begin)
    vectors, values, errors = jax.lax.map(functools.partial(measured, product), kept.vectors[:count])
    if meter is not None:
        jax.debug.callback(meter.end, values)
    pairs = [Edge(values[i], from_vector(vectors[i], operator.params), errors[i]) for i in range(count)]
    return pairs, small(values, errors), size + (number - 1) * max(size - held, 0) + count


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
@on_any_mesh
def _density(operator: Operator, key: jax.Array, size: int, probes: int, meter: "Meter | None") -> Density:
    product = on_vectors(operator)

    def probe(inputs: tuple) -> Density:
        number, key = inputs
        found = lanczos(_metered(product, meter, number), _signs(key, operator)[None], size, key)
        return Density(found.values, found.coefficients[0] ** 2)

    return jax.lax.map(probe, (jnp.arange(probes), jax.random.split(key, probes)))


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
@on_any_mesh
def _trace(operator: Operator, key: jax.Array, samples: int, rank: int, meter: "Meter | None") -> Trace:
    product = on_vectors(operator)

    def image(inputs: tuple) -> jax.Array:
        number, key = inputs
        return _metered(product, meter, number)(_signs(key, operator))

    def quotient(inputs: tuple) -> jax.Array:
        number, vector = inputs
        return dot(vector, _metered(product, meter, number)(vector))

    def sample(inputs: tuple) -> jax.Array:
        number, key = inputs
        z = _signs(key, operator)
        return quotient((number, z if rank == 0 else apart(z, basis)))

    numbers, exact = jnp.arange(samples + 2 * rank), jnp.zeros(())
    if rank:
        first = jax.random.split(jax.random.fold_in(key, 0), rank)
        basis = jnp.linalg.qr(jax.lax.map(image, (numbers[:rank], first)).T)[0].T
        exact = jnp.sum(jax.lax.map(quotient, (numbers[rank : 2 * rank], basis)))
    value, error = _mean_and_error(jax.lax.map(sample, (numbers[2 * rank :], jax.random.split(key, samples))))
    return Trace(value + exact.astype(value.dtype), error)


@dataclasses.dataclass(unsafe_hash=True)
class Meter:
    """Counts products on the host, in rounds of one length, later ones less `kept`; equal ones share a program."""

    progress: Progress
    length: int
    rounds: int
    kept: int = 0
    number: int = dataclasses.field(default=0, compare=False)
    within: int = dataclasses.field(default=0, compare=False)

    def tick(self, number: Any, _: Any) -> None:
        if int(number) != self.number or self.within == self.length:
            self.number, self.within = int(number), 0
        self.within += 1
        done = self.within + self.number * (self.length - self.kept) + (self.kept if self.number else 0)
        self.progress(done / (self.rounds * (self.length - self.kept) + self.kept))

    def end(self, _: Any) -> None:
        if self.number + 1 < self.rounds:
            self.progress(1.0)


def _metered(product: Callable, meter: Meter | None, number: jax.Array) -> Callable[[jax.Array], jax.Array]:
    if meter is None:
        return product

    def counted(vector: jax.Array) -> jax.Array:
        image = product(vector)
        jax.debug.callback(meter.tick, number, image[0])
        return image

    return counted


def _signs(key: jax.Array, operator: Operator) -> jax.Array:
    """A random sign for each parameter."""
    like = to_vector(operator.params)
    return jax.random.rademacher(key, like.shape, like.dtype)


def _mean_and_error(samples: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The mean over the first axis and its standard error."""
    count, unit = len(samples), near(samples)
    error = jnp.std(samples / unit, axis=0, ddof=1) * unit / np.array(np.sqrt(count), samples.dtype)
    return jnp.mean(samples, axis=0), error if count > 1 else jnp.full_like(error, jnp.nan)


def _check_size(
    name: str, operator: Operator, key: jax.Array, krylov_size: int, progress: Progress | None, least: int = 2
) -> int:
    """The number of products in a round, once the operator has parameters."""
    check_operator(name, operator)
    check_key(f"{name}: key", key)
    if progress is not None:
        check_function(f"{name}: progress", progress, "the fraction that is done")
    number = count_numbers(operator.params)
    if number == 0:
        raise ValueError(f"{name}: the operator has no parameters; expected at least one")
    if to_integer(f"{name}: krylov_size", krylov_size) < least:
        raise ValueError(f"{name}: krylov_size is {krylov_size}; expected at least {least}")
    return min(krylov_size, number)


def _check_count(name: str, what: str, count: int) -> None:
    if to_integer(f"{name}: {what}", count) < 1:
        raise ValueError(f"{name}: {what} is {count}; expected at least 1")


def _check_finite(name: str, operator: Operator, values: Any) -> None:
    """Raises where a loss, or what was found from its products, is infinite or NaN."""
    if not all(is_concrete(x) for x in jax.tree.leaves((operator, values))):
        return
    losses = np.asarray(operator.losses())
    if not np.isfinite(losses).all():
        bad = int(np.argmin(np.isfinite(losses)))
        raise ValueError(
            f"{name}: {type(operator).__name__}: the loss is {losses[bad]} on batch {bad}; expected parameters and "
            f"data where it is finite"
        )
    if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(values)):
        raise ValueError(
            f"{name}: {type(operator).__name__} times a vector is infinite or NaN, although the loss is finite: it has "
            f"no finite second derivative here, as a square root or a norm has none at 0; add a small constant inside "
            f"it (the corners of relu do no harm)"
        )
