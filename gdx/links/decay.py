"""Weight decay that does not pass through the gradient."""

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import numpy as np
import optax
from optax.transforms._adding import WeightDecaySchedule  # has no public name

from gdx.checks import require_params
from gdx.fields import Scalar, hyperparameter, static
from gdx.leafwise import Leafwise
from gdx.numerics import alike
from gdx.trees import paths


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

    @property
    def is_masked(self) -> bool:
        return self.mask is not None

    def acts_on(self, params: optax.Params | None) -> Any:
        require_params(self, params)
        if self.mask is None:
            return True
        mask = self.mask(params) if _is_function(self.mask) else self.mask
        for path, leaf in zip(paths(mask), jax.tree.leaves(mask)):
            if not isinstance(leaf, bool | np.bool_):
                raise TypeError(
                    f"{type(self).__name__}: the mask at {path} is {leaf!r}, expected True (decays) or False"
                )
        try:
            return jax.tree.broadcast(jax.tree.map(bool, mask), params)
        except ValueError as error:
            raise ValueError(
                f"{type(self).__name__}: the mask has leaves at {_listed(mask)}, the parameters at {_listed(params)}; "
                f"expected one boolean for each parameter or for a whole subtree, or a function of the parameters"
            ) from error

    def step(self, shared: tuple, g: jax.Array, p: jax.Array) -> tuple[jax.Array]:
        return (g + alike(self.weight_decay * p),)


def _is_function(mask: Any) -> bool:
    """Whether a mask is a function of the parameters: a module that can be called may be a tree of booleans."""
    leaves = jax.tree.leaves(mask)
    return bool(leaves) and all(map(callable, leaves))


def _listed(tree: Any) -> str:
    listed = list(paths(tree))
    return ", ".join([*listed[:5], "..."] if len(listed) > 5 else listed) or "no path"
