"""Six examples and a small loss, of which every batch can be tried."""

import jax
import jax.numpy as jnp
import numpy as np

from gdx.compat import enable_x64

N = 6
random = np.random.default_rng(0)
INPUTS, TARGETS = random.standard_normal((N, 3)), random.standard_normal(N)
PARAMS = {"w": random.standard_normal(3), "b": np.array(0.3)}


def losses(params, examples):
    inputs, targets = (jnp.asarray(column)[examples] for column in (INPUTS, TARGETS))
    return (jnp.tanh(inputs @ jnp.asarray(params["w"])) + jnp.asarray(params["b"]) - targets) ** 2


def loss(params, examples):
    return jnp.mean(losses(params, examples))


def weighted_loss(params, batch):
    return jnp.average(losses(params, batch.examples), weights=jnp.asarray(batch.weights, float))


def flat(gradients):
    return np.concatenate([np.asarray(g).reshape(len(gradients["b"]), -1) for g in jax.tree.leaves(gradients)], axis=1)


def moments():
    """Gradient and trace of the covariance of the single examples, in float64 and by numpy."""
    with enable_x64(True):
        each = flat(jax.vmap(jax.grad(loss), (None, 0))(PARAMS, jnp.arange(N)[:, None]))
    return each.mean(axis=0), float(np.sum(each.var(axis=0)))


G, TRACE = moments()

RAGGED = {"x": np.zeros((5, 2)), "y": np.zeros(4)}
