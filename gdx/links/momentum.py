"""Momentum: heavy ball and Nesterov."""

from typing import Any, ClassVar, NamedTuple

import jax
import numpy as np
import optax

from gdx.fields import Scalar, hyperparameter, static, to_bool
from gdx.leafwise import Leafwise, moment_like
from gdx.numerics import alike, uncontracted
from gdx.storage.formats import Format, to_storage


class CountedTraceState(NamedTuple):
    """`optax.TraceState` with the number of updates so far, for a velocity that is rounded at random.

    Attributes:
      count: int32 scalar.
      trace: the velocity.
    """

    count: jax.Array  # type: ignore[assignment]
    trace: Any


class scale_by_momentum(Leafwise):
    r"""Accumulates a velocity: heavy ball, or Nesterov's accelerated gradient.

    $$ v_t = \mu v_{t-1} + g_t, \qquad
       u_t = \begin{cases} v_t & \text{heavy ball} \\ g_t + \mu v_t & \text{Nesterov} \end{cases} $$

    With Nesterov the parameters are the *look-ahead* point, where the gradient is taken. In the
    textbook's variables, $\theta$ and the same $v$ (times $-\eta$), they are $\theta + \mu v$.

    Range: the velocity of a float32 leaf is finite while gradients stay below (1 - momentum) 3.4e38.

    State: `optax.TraceState(trace)`, the velocity, shaped like the parameters; where a format rounds
    it at random, `CountedTraceState(count, trace)`. Computed in at least float32; updates are
    returned in the gradient's dtype.

    Args:
      momentum: $\mu$ in [0, 1).
      nesterov: whether to look ahead.
      accumulator_dtype: dtype or storage format of the velocity; None keeps it in the parameter's dtype,
        but at least float32 (optax: in the parameter's dtype). In fewer bits than that, the
        direction is that of the velocity as it is stored.

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

    elementwise: ClassVar[bool] = True

    momentum: Scalar = hyperparameter(default=0.9, minimum=0, below=1)
    nesterov: bool = static(default=False, convert=to_bool)
    accumulator_dtype: np.dtype | Format | None = static(default=None, convert=to_storage)

    @property
    def State(self) -> Any:
        return CountedTraceState if getattr(self.accumulator_dtype, "stochastic", False) else optax.TraceState

    @property
    def formats(self) -> tuple[Any]:
        return (self.accumulator_dtype,)

    def start(self, p: jax.Array) -> tuple[Any]:
        return (moment_like(p, self.accumulator_dtype),)

    def accumulate(self, shared: tuple, g: jax.Array, p: jax.Array | None, trace: jax.Array) -> tuple[jax.Array]:
        return (alike(self.momentum * trace) + uncontracted(g),)

    def direction(self, shared: tuple, g: jax.Array, p: jax.Array | None, trace: jax.Array) -> jax.Array:
        return uncontracted(g) + alike(self.momentum * trace) if self.nesterov else trace
