"""Small networks, and their dense Hessians: what the products and spectra are measured against."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree


def data(batches: int = 3, size: int = 8, dtype: type = np.float64) -> tuple[jax.Array, jax.Array]:
    random = np.random.default_rng(0)
    inputs = random.standard_normal((batches, size, 5)).astype(dtype)
    return jnp.asarray(inputs), jnp.asarray(np.sin(inputs[..., :2] + inputs[..., 2:4]).astype(dtype))


def start(dtype: type = np.float64) -> dict:
    random = np.random.default_rng(1)
    return {
        "first": {"w": jnp.asarray(random.standard_normal((5, 6)), dtype), "b": jnp.zeros(6, dtype)},
        "last": (jnp.asarray(random.standard_normal((6, 2)), dtype), None, jnp.asarray(0.1, dtype)),
    }


def outputs(params, batch):
    hidden = jnp.tanh(batch[0] @ params["first"]["w"] + params["first"]["b"][None, :])
    return hidden @ params["last"][0] + params["last"][2]


def squares(outputs, batch):
    return jnp.mean((outputs - batch[1]) ** 2)


def loss(params, batch):
    return squares(outputs(params, batch), batch)


def mean_loss(params, batches):
    return jnp.mean(jax.vmap(lambda batch: loss(params, batch))(batches))


def dense(loss, params, batches):
    """The Hessian of the mean loss as a matrix."""
    vector, back = ravel_pytree(params)

    def mean(v):
        return jnp.mean(jax.vmap(lambda batch: loss(back(v), batch))(batches))

    return np.asarray(jax.hessian(mean)(vector))


def vector(params, seed: int = 0):
    flat, back = ravel_pytree(params)
    return back(jnp.asarray(np.random.default_rng(seed).standard_normal(flat.shape), flat.dtype))
