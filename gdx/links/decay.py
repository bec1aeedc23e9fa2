"""Weight decay that does not pass through the gradient."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import optax
from optax.transforms._adding import WeightDecaySchedule  # has no public name

from gdx.checks import require_params
from gdx.fields import Scalar, hyperparameter, static
from gdx.leafwise import Leafwise
from gdx.numerics import alike


class add_decoupled_weight_decay(Leafwise):
    r"""Adds a multiple of the parameters to the updates.

    $$ u_t = g_t + \lambda_t \, \theta_t $$

    Behind an adaptive link this is *decoupled* decay: it is not divided by the gradient's size, as
    the gradient of an L2 penalty would be. Put before the learning rate, it is multiplied by it.

    Without state; under a schedule optax's `WeightDecaySchedule(count)`, and with a mask in an `optax.MaskedState`, as
    in optax.

    Args:
      weight_decay: $\lambda \ge 0$.
      mask: which leaves decay: a tree of booleans that is a prefix of the parameters' tree, or a
        function of the parameters that returns one; None for all.

    Raises:
      ValueError: weight_decay is negative; update is called without parameters; the mask is not a
        prefix of the parameters' tree.
      TypeError: a leaf of the mask is not a boolean.

    Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization (2019), algorithm 2, line 12.

    >>> import gdx, jax.numpy as jnp
    >>> tx = gdx.add_decoupled_weight_decay(0.5, mask={"w": True, "b": False})
    >>> params, zeros = {"w": jnp.ones(2), "b": jnp.ones(1)}, {"w": jnp.zeros(2), "b": jnp.zeros(1)}
    >>> updates, state = tx.update(zeros, tx.init(params), params)
    >>> updates["w"].tolist(), updates["b"].tolist()
    ([0.5, 0.5], [0.0])
    """

    Counted: ClassVar = WeightDecaySchedule

    weight_decay: Scalar = hyperparameter(default=1e-4, minimum=0)
    mask: Any | Callable[[Any], Any] = static(default=None)

    def acts_on(self, params: optax.Params | None) -> Any:
        require_params(self, params)
        return super().acts_on(params)

    def step(self, shared: tuple, g: jax.Array, p: jax.Array) -> tuple[jax.Array]:
        return (g + alike(self.weight_decay * p),)
