"""Sharpness while training: a few products every now and then, from where the last ones ended."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gdx.arguments import check_key, of_kind
from gdx.checks import check_floating
from gdx.curvature.krylov import from_vector, lanczos, on_vectors, to_vector
from gdx.curvature.operators import Operator, check_operator, check_vector
from gdx.fields import to_integer
from gdx.mesh import on_any_mesh


class SharpnessState(NamedTuple):
    """The largest eigenvalue as it was last found.

    Attributes:
      value: scalar; 0 before the first update.
      error: how far value and vector are from an eigenpair, as in `Edge`; infinite before the first update.
      vector: the eigenvector, a tree like the parameters.
      key: a random key.
    """

    value: jax.Array
    error: jax.Array
    vector: Any
    key: jax.Array


def init_sharpness(params: Any, key: jax.Array) -> SharpnessState:
    """A state that knows nothing yet: its vector is random.

    Args:
      params: the parameters, a tree of floating-point arrays; only its shapes and dtypes matter.
      key: a random key.

    >>> import gdx, jax, jax.numpy as jnp
    >>> state = gdx.curvature.init_sharpness({"w": jnp.ones((2, 3))}, jax.random.key(0))
    >>> state.value.item(), state.error.item(), round(jnp.linalg.norm(state.vector["w"]).item(), 3)
    (0.0, inf, 1.0)
    """
    check_floating("init_sharpness: the parameter", params)
    check_key("init_sharpness: key", key)
    if not jax.tree.leaves(params):
        raise ValueError("init_sharpness: there are no parameters; expected at least one")
    return _unknown(params, key)


def update_sharpness(state: SharpnessState, operator: Operator, *, products: int = 4) -> SharpnessState:
    r"""Follows the largest eigenvalue to new parameters: Lanczos from the last eigenvector.

    As the parameters move little between two updates, a few products do. The value is never above the
    largest eigenvalue, and `error` says how close it is to some eigenvalue; the first few updates are those of a cold
    start. One per cent of noise in each start finds an eigenvector that overtakes the one which is followed.

    A pure function, for `jax.jit`, `jax.lax.scan` and, every n-th step, `jax.lax.cond`. Memory: a vector like the
    parameters for each product, and a few more.

    Args:
      state: from `init_sharpness` or the last update.
      operator: `Hessian` or `GaussNewton` at the present parameters, or it `adam_preconditioned`.
      products: products with a vector, at least 2; each costs two to three gradients.

    Raises:
      ValueError: products is less than 2, or the state's vector not shaped like the parameters; what the operator
        raises.
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
    if to_integer("update_sharpness: products", products) < 2:
        raise ValueError(f"update_sharpness: products is {products}; expected at least 2")
    check_operator("update_sharpness", operator)
    of_kind("update_sharpness: state", state, SharpnessState, "what init_sharpness or update_sharpness returned")
    check_vector("update_sharpness: in the state,", operator.params, state.vector)
    return _followed(operator, state, products)


@jax.jit
@on_any_mesh
def _unknown(params: Any, key: jax.Array) -> SharpnessState:
    like = to_vector(params)
    # jax.jit drops arguments that are not read, and with them the mesh
    vector, _ = jax.lax.optimization_barrier((jax.random.normal(key, like.shape, like.dtype), like))
    vector = from_vector(vector / jnp.linalg.norm(vector), params)
    return SharpnessState(jnp.zeros((), like.dtype), jnp.full((), jnp.inf, like.dtype), vector, key)


@functools.partial(jax.jit, static_argnums=2)
@on_any_mesh
def _followed(operator: Operator, state: SharpnessState, products: int) -> SharpnessState:
    key, noise_key = jax.random.split(state.key)
    vector = to_vector(state.vector)
    noise = jax.random.normal(noise_key, vector.shape, vector.dtype)
    start = vector + 0.01 * noise / jnp.linalg.norm(noise)
    found = lanczos(on_vectors(operator), start, min(products, len(start)), noise_key)
    (vector,) = found.vectors(jnp.array([-1]))
    vector = from_vector(vector / jnp.linalg.norm(vector), operator.params)
    return SharpnessState(found.values[-1], found.errors[-1], vector, key)
