"""Gradient descent: the step along the negative gradient."""

from typing import Any

import jax

from gdx.fields import Scalar, hyperparameter, static, to_bool
from gdx.leafwise import Leafwise
from gdx.numerics import alike
from gdx.transform import Transform, value


class scale_by_learning_rate(Leafwise):
    r"""Gradient descent's step: multiplies by the negative learning rate.

    $$ u_t = -\eta_t \, g_t $$

    Without state; under a schedule, `optax.ScaleByScheduleState(count)`.

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

    learning_rate: Scalar = hyperparameter(minimum=0, mend="to ascend, descend on the negative of the loss")
    flip_sign: bool = static(default=True, convert=to_bool, kw_only=True)

    def shared(self, count: Any) -> jax.Array:
        return -self.learning_rate if self.flip_sign else self.learning_rate

    def step(self, factor: jax.Array, g: jax.Array, p: jax.Array | None) -> tuple[jax.Array]:
        return (alike(factor * g),)


@value
def gradient_descent(learning_rate: Scalar) -> Transform:
    r"""Gradient descent.

    $$ \theta_{t+1} = \theta_t - \eta_t \nabla L(\theta_t) $$

    Args:
      learning_rate: $\eta \ge 0$.

    Raises:
      ValueError, TypeError: as `scale_by_learning_rate`.

    Source: Cauchy (1847).

    >>> import gdx, jax, optax, jax.numpy as jnp
    >>> tx, theta = gdx.gradient_descent(0.1), jnp.array([1.0])
    >>> updates, state = tx.update(jax.grad(lambda x: (x**2).sum())(theta), tx.init(theta))
    >>> optax.apply_updates(theta, updates).tolist()
    [0.800000011920929]
    """
    return scale_by_learning_rate(learning_rate)
