"""The step along the negative gradient."""

from typing import Any

import jax

from gdx.fields import Scalar, hyperparameter, static, to_bool
from gdx.leafwise import Leafwise
from gdx.numerics import alike


class scale_by_learning_rate(Leafwise):
    r"""Gradient descent's step: multiplies by the negative learning rate.

    $$ u_t = -\eta_t \, g_t $$

    Computed in at least float32 and returned in the gradient's dtype. Without state.

    Args:
      learning_rate: $\eta \ge 0$.
      flip_sign: whether the rate is negated, to descend; False to multiply by the rate itself.

    Raises:
      ValueError: the learning rate is negative, NaN, infinite, or no scalar.
      TypeError: it is no real number.

    Source: Cauchy, Méthode générale pour la résolution des systèmes d'équations simultanées (1847).

    >>> import gdx, jax.numpy as jnp
    >>> tx = gdx.scale_by_learning_rate(0.5)
    >>> updates, state = tx.update(jnp.array([1.0, -2.0]), tx.init(jnp.zeros(2)))
    >>> updates.tolist()
    [-0.5, 1.0]
    """

    learning_rate: Scalar = hyperparameter(minimum=0)
    flip_sign: bool = static(default=True, convert=to_bool, kw_only=True)

    def shared(self, count: Any) -> jax.Array:
        return -self.learning_rate if self.flip_sign else self.learning_rate

    def step(self, factor: jax.Array, g: jax.Array, p: jax.Array | None) -> tuple[jax.Array]:
        return (alike(factor * g),)
