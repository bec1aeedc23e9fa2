"""Ready-made optimizers: each is a chain of links under its usual name."""

from collections.abc import Callable
from typing import Any

import numpy as np

from gdx.compose import Composed
from gdx.fields import Scalar, hyperparameter, static, to_bool
from gdx.links.adam import check_second_moment, scale_by_adam, to_second_moment
from gdx.links.decay import add_decoupled_weight_decay
from gdx.links.learning_rate import scale_by_learning_rate
from gdx.links.momentum import scale_by_momentum
from gdx.storage.formats import Format, to_storage
from gdx.transform import Transform


class gradient_descent(Composed):
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

    learning_rate: Scalar = hyperparameter(minimum=0)

    @property
    def links(self) -> tuple[Transform, ...]:
        return (scale_by_learning_rate(self.learning_rate),)


class sgd(Composed):
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
    >>> gdx.sgd(0.1, momentum=0.9).links
    (scale_by_momentum(), scale_by_learning_rate(learning_rate=0.1))
    """

    learning_rate: Scalar = hyperparameter(minimum=0)
    momentum: Scalar | None = hyperparameter(default=None, minimum=0, below=1, optional=True)
    nesterov: bool = static(default=False, convert=to_bool)
    accumulator_dtype: np.dtype | Format | None = static(default=None, convert=to_storage)

    def validate(self) -> None:
        if self.nesterov and self.momentum is None:
            raise ValueError(
                "sgd: nesterov=True needs momentum; give it too, as in sgd(0.1, momentum=0.9, nesterov=True)"
            )

    @property
    def links(self) -> tuple[Transform, ...]:
        descent = scale_by_learning_rate(self.learning_rate)
        if self.momentum is None:
            return (descent,)
        return scale_by_momentum(self.momentum, self.nesterov, self.accumulator_dtype), descent


class momentum(Composed):
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
    >>> gdx.momentum(0.1).links
    (scale_by_learning_rate(learning_rate=0.1), scale_by_momentum())
    """

    learning_rate: Scalar = hyperparameter(minimum=0)
    momentum: Scalar = hyperparameter(default=0.9, minimum=0, below=1)
    accumulator_dtype: np.dtype | Format | None = static(default=None, convert=to_storage)

    @property
    def links(self) -> tuple[Transform, ...]:
        velocity = scale_by_momentum(self.momentum, accumulator_dtype=self.accumulator_dtype)
        return scale_by_learning_rate(self.learning_rate), velocity


class nesterov(Composed):
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
    >>> gdx.nesterov(0.1).links
    (scale_by_learning_rate(learning_rate=0.1), scale_by_momentum(nesterov=True))
    """

    learning_rate: Scalar = hyperparameter(minimum=0)
    momentum: Scalar = hyperparameter(default=0.9, minimum=0, below=1)
    accumulator_dtype: np.dtype | Format | None = static(default=None, convert=to_storage)

    @property
    def links(self) -> tuple[Transform, ...]:
        return scale_by_learning_rate(self.learning_rate), scale_by_momentum(
            self.momentum, True, self.accumulator_dtype
        )


class adam(Composed):
    r"""Adam.

    $$ \theta_{t+1} = \theta_t - \eta_t \, \hat m_t / \left( \sqrt{\hat v_t + \bar\varepsilon} + \varepsilon \right) $$

    with the bias-corrected moments of `scale_by_adam`; $\varepsilon$ is outside the square root.

    Args:
      learning_rate: $\eta \ge 0$, about the length of a step in each parameter.
      b1, b2, eps, eps_root, mu_dtype, nesterov, nu_dtype: as in `scale_by_adam`.

    Raises:
      ValueError: a value is out of range.

    Source: Kingma & Ba (2014), algorithm 1; nesterov: Dozat (2016).

    >>> import gdx
    >>> gdx.adam(1e-3, b2=0.99).links
    (scale_by_adam(b2=0.99), scale_by_learning_rate(learning_rate=0.001))
    """

    learning_rate: Scalar = hyperparameter(minimum=0)
    b1: Scalar = hyperparameter(default=0.9, minimum=0, below=1)
    b2: Scalar = hyperparameter(default=0.999, minimum=0, below=1)
    eps: Scalar = hyperparameter(default=1e-8, minimum=0)
    eps_root: Scalar = hyperparameter(default=0.0, minimum=0)
    mu_dtype: np.dtype | Format | None = static(default=None, convert=to_storage)
    nesterov: bool = static(default=False, convert=to_bool, kw_only=True)
    nu_dtype: np.dtype | Format | None = static(default=None, convert=to_second_moment, kw_only=True)

    def validate(self) -> None:
        check_second_moment(self)

    @property
    def links(self) -> tuple[Transform, ...]:
        return _adam_direction(self), scale_by_learning_rate(self.learning_rate)


class adamw(Composed):
    r"""Adam with decoupled weight decay.

    $$ \theta_{t+1} = \theta_t - \eta_t \left( \hat m_t / \left( \sqrt{\hat v_t + \bar\varepsilon} + \varepsilon \right)
       + \lambda \theta_t \right) $$

    as in torch and optax, where the learning rate, scheduled or not, multiplies the decay. With a
    `schedule_multiplier` $s_t$, Loshchilov & Hutter's own form, in which the base rate does not:

    $$ \theta_{t+1} = \theta_t - s_t \left( \eta \, \hat m_t
       / \left( \sqrt{\hat v_t + \bar\varepsilon} + \varepsilon \right) + \lambda \theta_t \right) $$

    Args:
      learning_rate: $\eta \ge 0$, about the length of a step in each parameter.
      b1, b2, eps, eps_root, mu_dtype, nesterov, nu_dtype: as in `scale_by_adam`.
      weight_decay: $\lambda \ge 0$.
      mask: which leaves decay, as in `add_decoupled_weight_decay`.
      schedule_multiplier: $s \ge 0$, usually a schedule that starts from 1; None for torch's and
        optax's form.

    Raises:
      ValueError: a value is out of range, or update is called without parameters.

    Source: Loshchilov & Hutter, Decoupled Weight Decay Regularization (2019), algorithm 2.

    >>> import gdx
    >>> gdx.adamw(1e-3, weight_decay=0.1).links[1:]
    (add_decoupled_weight_decay(weight_decay=0.1), scale_by_learning_rate(learning_rate=0.001))
    """

    learning_rate: Scalar = hyperparameter(minimum=0)
    b1: Scalar = hyperparameter(default=0.9, minimum=0, below=1)
    b2: Scalar = hyperparameter(default=0.999, minimum=0, below=1)
    eps: Scalar = hyperparameter(default=1e-8, minimum=0)
    eps_root: Scalar = hyperparameter(default=0.0, minimum=0)
    mu_dtype: np.dtype | Format | None = static(default=None, convert=to_storage)
    weight_decay: Scalar = hyperparameter(default=1e-4, minimum=0)
    mask: Any | Callable[[Any], Any] = static(default=None)
    nesterov: bool = static(default=False, convert=to_bool, kw_only=True)
    schedule_multiplier: Scalar | None = hyperparameter(default=None, minimum=0, optional=True, kw_only=True)
    nu_dtype: np.dtype | Format | None = static(default=None, convert=to_second_moment, kw_only=True)

    def validate(self) -> None:
        check_second_moment(self)

    @property
    def links(self) -> tuple[Transform, ...]:
        direction = _adam_direction(self)
        decay = add_decoupled_weight_decay(self.weight_decay, self.mask)
        if self.schedule_multiplier is None:
            return direction, decay, scale_by_learning_rate(self.learning_rate)
        base_rate = scale_by_learning_rate(self.learning_rate, flip_sign=False)
        return direction, base_rate, decay, scale_by_learning_rate(self.schedule_multiplier)


def _adam_direction(tx: adam | adamw) -> scale_by_adam:
    return scale_by_adam(tx.b1, tx.b2, tx.eps, tx.eps_root, tx.mu_dtype, nesterov=tx.nesterov, nu_dtype=tx.nu_dtype)
