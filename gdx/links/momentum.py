"""Momentum: heavy ball and Nesterov, with the learning rate outside of the velocity or inside."""

from typing import Any, ClassVar

import jax
import numpy as np
import optax

from gdx.compose import chain
from gdx.fields import Scalar, hyperparameter, static, to_bool
from gdx.leafwise import Leafwise
from gdx.links.descent import scale_by_learning_rate
from gdx.numerics import alike, uncontracted
from gdx.storage.formats import Format, moment_like, to_storage
from gdx.transform import Transform, value

identity = value(optax.identity)


class scale_by_momentum(Leafwise):
    r"""Accumulates a velocity: heavy ball, or Nesterov's accelerated gradient.

    $$ v_t = \mu v_{t-1} + g_t, \qquad
       u_t = \begin{cases} v_t & \text{heavy ball} \\ g_t + \mu v_t & \text{Nesterov} \end{cases} $$

    With Nesterov the parameters are the *look-ahead* point, where the gradient is taken. In the
    textbook's variables, $\theta$ and the same $v$ (times $-\eta$), they are $\theta + \mu v$.

    Range: the velocity of a float32 leaf is finite while gradients stay below (1 - momentum) 3.4e38.

    State: `optax.TraceState(trace)`, the velocity, shaped like the parameters; where a format rounds
    it at random, or under a schedule, `CountedState(count, TraceState(trace))`.

    Args:
      momentum: $\mu$ in [0, 1).
      nesterov: whether to look ahead.
      accumulator_dtype: dtype or storage format of the velocity; None keeps it in the parameter's dtype,
        but at least float32 (optax: in the parameter's dtype). In fewer bits than that, the
        direction is that of the velocity as it is stored, but for a format that `compensates`.

    Raises:
      ValueError: momentum is outside [0, 1), or accumulator_dtype is no floating-point dtype
        of 16 bits or more, or a format without negative numbers.

    Sources: Polyak, Some methods of speeding up the convergence of iteration methods (1964);
    Nesterov, A method of solving a convex programming problem with convergence rate O(1/k^2)
    (1983), in the form of Sutskever et al., On the importance of initialization and momentum in
    deep learning (2013), eq. 3-4.

    >>> import gdx, jax.numpy as jnp
    >>> tx = gdx.scale_by_momentum(0.5)
    >>> state = tx.init(jnp.zeros(1))
    >>> for _ in range(3):
    ...     updates, state = tx.update(jnp.ones(1), state)
    >>> updates.tolist()
    [1.75]
    """

    State: ClassVar = optax.TraceState
    elementwise: ClassVar[bool] = True

    momentum: Scalar = hyperparameter(default=0.9, minimum=0, below=1)
    nesterov: bool = static(default=False, convert=to_bool)
    accumulator_dtype: np.dtype | Format | None = static(default=None, convert=to_storage)

    @property
    def formats(self) -> tuple[Any]:
        return (self.accumulator_dtype,)

    def lasting(self, shared: tuple) -> tuple[Any]:
        return (1 / (1 - self.momentum),)

    def start(self, p: jax.Array) -> tuple[Any]:
        return (moment_like(p, self.accumulator_dtype),)

    def accumulate(self, shared: tuple, g: jax.Array, p: jax.Array | None, trace: jax.Array) -> tuple[jax.Array]:
        return (alike(self.momentum * trace) + uncontracted(g),)

    def direction(self, shared: tuple, g: jax.Array, p: jax.Array | None, trace: jax.Array) -> jax.Array:
        return uncontracted(g) + alike(self.momentum * trace) if self.nesterov else trace


@value
def sgd(
    learning_rate: Scalar,
    momentum: Scalar | None = None,
    nesterov: bool = False,
    accumulator_dtype: np.dtype | Format | None = None,
) -> Transform:
    r"""Stochastic gradient descent on mini-batches, with momentum in torch's and optax's form.

    $$ v_t = \mu v_{t-1} + g_t, \qquad \theta_{t+1} = \theta_t - \eta_t v_t $$

    The learning rate multiplies the accumulated velocity: lowering it shortens the whole step at
    once. In `momentum` and `nesterov` it multiplies each gradient as it enters. With Nesterov,
    $\theta_{t+1} = \theta_t - \eta_t (g_t + \mu v_t)$.

    Args:
      learning_rate: $\eta \ge 0$.
      momentum: $\mu$ in [0, 1); None for plain SGD, which keeps no state.
      nesterov: whether to look ahead; needs momentum.
      accumulator_dtype: dtype or storage format of the velocity; None for the parameter's, but at least float32.

    Raises:
      ValueError: a value is out of range, or nesterov is set without momentum.

    Sources: Robbins & Monro, A stochastic approximation method (1951); Sutskever et al. (2013).

    >>> import gdx
    >>> gdx.sgd(0.1, momentum=0.9).made
    chain(scale_by_momentum(), scale_by_learning_rate(learning_rate=0.1))
    """
    if momentum is None:
        if to_bool("nesterov", nesterov):
            raise ValueError("nesterov=True needs momentum; give it too, as in sgd(0.1, momentum=0.9, nesterov=True)")
        if to_storage("accumulator_dtype", accumulator_dtype) is not None:
            raise ValueError("accumulator_dtype is for the velocity, which only momentum keeps; give momentum too")
        return chain(identity(), scale_by_learning_rate(learning_rate))
    return chain(scale_by_momentum(momentum, nesterov, accumulator_dtype), scale_by_learning_rate(learning_rate))


@value
def momentum(
    learning_rate: Scalar, momentum: Scalar = 0.9, accumulator_dtype: np.dtype | Format | None = None
) -> Transform:
    r"""Momentum (heavy ball), with the learning rate inside the velocity.

    $$ v_t = \mu v_{t-1} - \eta_t g_t, \qquad \theta_{t+1} = \theta_t + v_t $$

    Equal to `sgd`, $v_t = \mu v_{t-1} + g_t$ and $\theta_{t+1} = \theta_t - \eta_t v_t$, for a
    constant rate. Under a schedule they differ: here a step already in the velocity keeps the rate
    it was made with, in `sgd` all of the velocity takes the new one.

    Args:
      learning_rate: $\eta \ge 0$.
      momentum: $\mu$ in [0, 1).
      accumulator_dtype: dtype or storage format of the velocity; None for the parameter's, but at least float32.

    Raises:
      ValueError: a value is out of range.

    Source: Polyak (1964), eq. 9; in this form Sutskever et al. (2013), eq. 1-2.

    >>> import gdx
    >>> gdx.momentum(0.1).made
    chain(scale_by_learning_rate(learning_rate=0.1), scale_by_momentum())
    """
    return chain(
        scale_by_learning_rate(learning_rate), scale_by_momentum(momentum, accumulator_dtype=accumulator_dtype)
    )


@value
def nesterov(
    learning_rate: Scalar, momentum: Scalar = 0.9, accumulator_dtype: np.dtype | Format | None = None
) -> Transform:
    r"""Nesterov's accelerated gradient, with the learning rate inside the velocity.

    $$ v_t = \mu v_{t-1} - \eta_t g_t, \qquad \theta_{t+1} = \theta_t + \mu v_t - \eta_t g_t,
       \qquad g_t = \nabla L(\theta_t) $$

    The parameters $\theta_t$ are the *look-ahead* point, where the gradient is taken. The textbook
    keeps $\phi_t$, evaluates the gradient at $\phi_t + \mu v_{t-1}$ and steps $\phi_{t+1} = \phi_t +
    v_t$: these are the same iterates, $\theta_t = \phi_t + \mu v_{t-1}$, for a constant momentum.

    Args:
      learning_rate: $\eta \ge 0$.
      momentum: $\mu$ in [0, 1).
      accumulator_dtype: dtype or storage format of the velocity; None for the parameter's, but at least float32.

    Raises:
      ValueError: a value is out of range.

    Sources: Nesterov (1983); in this form Sutskever et al. (2013), eq. 3-4, and Bengio et al.,
    Advances in optimizing recurrent networks (2013), eq. 6-7 for the look-ahead variables.

    >>> import gdx
    >>> gdx.nesterov(0.1).made
    chain(scale_by_learning_rate(learning_rate=0.1), scale_by_momentum(nesterov=True))
    """
    return chain(scale_by_learning_rate(learning_rate), scale_by_momentum(momentum, True, accumulator_dtype))
