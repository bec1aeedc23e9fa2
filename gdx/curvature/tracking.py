"""Sharpness while training: a few products every now and then, from where the last ones ended."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdx.arguments import check_key, of_kind
from gdx.checks import check_floating
from gdx.curvature.krylov import count_numbers, from_vector, lanczos, on_vectors, to_vector
from gdx.curvature.operators import Operator, check_operator, check_vector
from gdx.fields import to_integer
from gdx.mesh import on_any_mesh
from gdx.storage.dither import lowbias32, positions


class SharpnessState(NamedTuple):
    """The largest eigenvalue as it was last found, or several of them, in falling order.

    Attributes:
      value: scalar, or of shape (count,); 0 before the first update.
      error: of that shape: how far value and vector are from an eigenpair, as in `Edge`; infinite before the first
        update.
      vector: the eigenvector, a tree like the parameters; of several, orthonormal, with a leading axis of (count,).
      key: a random key.
    """

    value: jax.Array
    error: jax.Array
    vector: Any
    key: jax.Array


def init_sharpness(params: Any, key: jax.Array, count: int | None = None) -> SharpnessState:
    """A state that knows nothing yet: its vectors are random.

    Args:
      params: the parameters, a tree of floating-point arrays; only its shapes and dtypes matter.
      key: a random key.
      count: how many of the largest eigenvalues are to be followed, at least 1 and at most the number of parameters;
        by default one, without a leading axis.

    Raises:
      TypeError: a parameter is no floating-point array, count no integer.
      ValueError: there are no parameters, or count is out of range.

    >>> import gdx, jax, jax.numpy as jnp
    >>> state = gdx.curvature.init_sharpness({"w": jnp.ones((2, 3))}, jax.random.key(0))
    >>> state.value.item(), state.error.item(), round(jnp.linalg.norm(state.vector["w"]).item(), 3)
    (0.0, inf, 1.0)
    >>> gdx.curvature.init_sharpness({"w": jnp.ones((2, 3))}, jax.random.key(0), count=4).vector["w"].shape
    (4, 2, 3)
    """
    check_floating("init_sharpness: the parameter", params)
    check_key("init_sharpness: key", key)
    size = count_numbers(params)
    if size == 0:
        raise ValueError("init_sharpness: there are no parameters; expected at least one")
    if count is not None and not 1 <= to_integer("init_sharpness: count", count) <= size:
        raise ValueError(f"init_sharpness: count is {count}; expected 1 to {size}, the number of parameters")
    return _unknown(params, key, count)


def update_sharpness(state: SharpnessState, operator: Operator, *, products: int | None = None) -> SharpnessState:
    r"""Follows the largest eigenvalues to new parameters: Lanczos from the last eigenvectors.

    As the parameters move little between two updates, a few products do. No value is above the eigenvalue
    of its rank, and `error` says how close it is to some eigenvalue; the first few updates are those of a cold
    start. One per cent of noise in each start finds an eigenvector that overtakes those which are followed. Of
    eigenvalues that are equal or close each is followed, as there are as many starts. Where a product is infinite or
    NaN, so are value and error, and the next update goes on from the eigenvectors before it.

    A pure function, for `jax.jit`, `jax.lax.scan` and, every n-th step, `jax.lax.cond`. Memory: a vector like the
    parameters for each product, and a few more for each eigenvector.

    Args:
      state: from `init_sharpness` or the last update.
      operator: `Hessian` or `GaussNewton` at the present parameters, or it `adam_preconditioned`; a `Block`.
      products: products with a vector, by default 4 for each eigenvalue, and at least one more than there are of these;
        each costs two to three gradients.

    Raises:
      ValueError: products is too small, or the state's vector not shaped like the parameters; what the operator raises.
      TypeError: products is no integer, a parameter no floating-point array; what the operator raises.

    >>> import gdx, jax, jax.numpy as jnp
    >>> loss = lambda theta, batch: jnp.sum(jnp.arange(1.0, 9.0) * theta**4) / 12
    >>> state = gdx.curvature.init_sharpness(jnp.ones(8), jax.random.key(0))
    >>> for size in (1.0, 1.1, 1.2):
    ...     hessian = gdx.curvature.Hessian(loss, jnp.full(8, size), jnp.zeros(1))
    ...     state = gdx.curvature.update_sharpness(state, hessian)
    >>> round(state.value.item(), 1)  # 8 * 1.2^2
    11.5
    """
    check_operator("update_sharpness", operator)
    of_kind("update_sharpness: state", state, SharpnessState, "what init_sharpness or update_sharpness returned")
    shape = jnp.shape(state.value)
    like = jax.tree.map(lambda p: jax.ShapeDtypeStruct((*shape, *np.shape(p)), jnp.result_type(p)), operator.params)
    check_vector("update_sharpness: in the state,", like, state.vector)
    count = math.prod(shape)
    products = 4 * count if products is None else to_integer("update_sharpness: products", products)
    if products <= count:
        raise ValueError(f"update_sharpness: products is {products}; expected at least {count + 1}")
    return _followed(operator, state, products)


@functools.partial(jax.jit, static_argnums=2)
@on_any_mesh
def _unknown(params: Any, key: jax.Array, count: int | None) -> SharpnessState:
    like, shape = to_vector(params), () if count is None else (count,)
    # jax.jit drops arguments that are not read, and with them the mesh
    starts, _ = jax.lax.optimization_barrier((jax.random.normal(key, (*shape, *like.shape), like.dtype), like))
    vector = _to_trees(starts / jnp.linalg.norm(starts, axis=-1, keepdims=True), params)
    return SharpnessState(jnp.zeros(shape, like.dtype), jnp.full(shape, jnp.inf, like.dtype), vector, key)


@functools.partial(jax.jit, static_argnums=2)
@on_any_mesh
def _followed(operator: Operator, state: SharpnessState, products: int) -> SharpnessState:
    key, noise_key = jax.random.split(state.key)
    vectors = jax.vmap(to_vector)(state.vector) if state.value.ndim else to_vector(state.vector)
    # only its direction counts; normal numbers would cost as much as a gradient
    bits = lowbias32(positions(vectors.shape, jax.random.bits(noise_key, (), jnp.uint32)))
    noise = (bits >> 8).astype(vectors.dtype) - 2**23
    starts = vectors + 0.01 * noise / jnp.linalg.norm(noise, axis=-1, keepdims=True)
    starts = starts.reshape(-1, vectors.shape[-1])
    found = lanczos(on_vectors(operator), starts, min(products, starts.shape[-1]), noise_key)
    largest = -1 - jnp.arange(len(starts)).reshape(state.value.shape)
    values, errors, renewed = found.values[largest], found.errors[largest], found.vectors(largest)
    renewed = renewed / jnp.linalg.norm(renewed, axis=-1, keepdims=True)
    # what is NaN once is to be seen, and not to be gone on from
    is_good = jnp.isfinite(renewed).all() & jnp.isfinite(values).all()
    vectors, errors = jnp.where(is_good, renewed, vectors), jnp.where(is_good, errors, jnp.nan)
    return SharpnessState(values, errors, _to_trees(vectors, operator.params), key)


def _to_trees(vectors: jax.Array, like: Any) -> Any:
    """The tree of a vector, or of several with a leading axis."""
    return jax.vmap(lambda x: from_vector(x, like))(vectors) if vectors.ndim > 1 else from_vector(vectors, like)
