"""Adam: steps of about one learning rate per parameter, whatever the scale of the gradient."""

import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx.fields import Scalar, hyperparameter, is_concrete, static, text, to_bool
from gdx.leafwise import Leafwise, moment_like
from gdx.numerics import alike, uncontracted
from gdx.storage.formats import Format, to_storage

to_second_moment = functools.partial(to_storage, second_moment=True)


def check_second_moment(tx: Any) -> None:
    """Raises where the second moment of an Adam would be rounded to nearest in a way that stops it from following."""
    nearest = isinstance(tx.nu_dtype, np.dtype) and tx.nu_dtype.itemsize < 4
    if nearest and (callable(tx.b2) or (is_concrete(tx.b2) and np.any(np.asarray(tx.b2) >= 0.99))):
        raise ValueError(
            f"{type(tx).__name__}: nu_dtype is {tx.nu_dtype.name!r} with b2 = {text(tx.b2)}: rounded to nearest, the "
            f"second moment stands still when it should shrink by {1 - 0.99:.0%} or less in a step. Round it "
            f"stochastically, nu_dtype=gdx.storage.StochasticBfloat16(), or take b2 below 0.99"
        )


class _Shared(NamedTuple):
    """Weights of the new gradient in the moments, and what takes the moments (and g) to their corrected means."""

    w1: jax.Array
    w2: jax.Array
    from_mu: jax.Array
    from_g: jax.Array | None
    from_nu: jax.Array
    eps: jax.Array


class scale_by_adam(Leafwise):
    r"""Adam: divides the mean of past gradients by the root of their mean square.

    $$ \begin{aligned}
       m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, & \hat m_t &= m_t / (1 - \beta_1^t), \\
       v_t &= \beta_2 v_{t-1} + (1 - \beta_2) |g_t|^2, & \hat v_t &= v_t / (1 - \beta_2^t), \\
       u_t &= \hat m_t / \left( \sqrt{\hat v_t + \bar\varepsilon} + \varepsilon \right)
       \end{aligned} $$

    With Nesterov, $\hat m_t = \beta_1 m_t / (1 - \beta_1^{t+1}) + (1 - \beta_1) g_t / (1 - \beta_1^t)$.

    State: `optax.ScaleByAdamState(count, mu, nu)`: the int32 step count $t$, the first moment
    shaped like the parameters, and the second, real also for complex parameters. Computed in at
    least float32; updates are returned in the gradient's dtype.

    Range: computed in float32, gradients up to 1.8e19, beyond which the square overflows and the
    step is NaN, to be seen. Below 1e-19 the square vanishes and eps alone divides, which matters
    only for eps < 1e-15.

    Args:
      b1: $\beta_1$ in [0, 1), the decay of the first moment. The correction uses the current
        $\beta$ where it is scheduled, as optax and torch do.
      b2: $\beta_2$ in [0, 1), the decay of the second moment.
      eps: $\varepsilon \ge 0$, outside the square root. With 0, a parameter whose gradient was always zero
        makes no step, and slopes with respect to the hyperparameters are NaN there.
      eps_root: $\bar\varepsilon \ge 0$, inside it.
      mu_dtype: dtype or storage format of the first moment; None keeps it in the parameter's dtype,
        but at least float32 (optax: in the parameter's dtype). In fewer bits than that, the
        direction is that of the moment as it is stored.
      nesterov: whether the first moment looks ahead.
      nu_dtype: the same for the second moment, for which see `gdx.storage`: rounded to nearest, it
        stands still once gradients shrink.

    Raises:
      ValueError: b1 or b2 is outside [0, 1), also once rounded to float32; eps or eps_root is
        negative; mu_dtype or nu_dtype is no floating-point dtype of 16 bits or more, or no format for
        that moment; nu_dtype is float16, or bfloat16 where b2 >= 0.99 or is a schedule.

    Sources: Kingma & Ba, Adam: A Method for Stochastic Optimization (2014), algorithm 1; Dozat,
    Incorporating Nesterov Momentum into Adam (2016), algorithm 2 as optax and torch read it.

    >>> import gdx, jax.numpy as jnp
    >>> tx = gdx.scale_by_adam()
    >>> updates, state = tx.update(jnp.array([1e-3, -50.0]), tx.init(jnp.zeros(2)))
    >>> updates.round(3).tolist()
    [1.0, -1.0]
    """

    State: ClassVar = optax.ScaleByAdamState
    elementwise: ClassVar[bool] = True

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
    def formats(self) -> tuple[Any, Any]:
        return self.mu_dtype, self.nu_dtype

    def start(self, p: jax.Array) -> tuple[Any, Any]:
        return moment_like(p, self.mu_dtype), moment_like(p, self.nu_dtype, real=True)

    def shared(self, count: jax.Array) -> _Shared:
        # reciprocals, to be multiplied: the compiler rewrites a division by a scalar case by case
        from_mu, from_g = 1 / _correction(self.b1, count), None
        if self.nesterov:
            from_mu, from_g = self.b1 / _correction(self.b1, count + 1), (1 - self.b1) * from_mu
        # with eps = 0, a gradient that is still zero makes no step rather than 0 / 0
        eps = jnp.maximum(self.eps, jnp.finfo(self.eps.dtype).tiny)
        return _Shared(1 - self.b1, 1 - self.b2, from_mu, from_g, 1 / _correction(self.b2, count), eps)

    def accumulate(
        self, shared: _Shared, g: jax.Array, p: jax.Array | None, mu: jax.Array, nu: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        mu = alike(self.b1 * mu) + uncontracted(shared.w1 * g)
        nu = alike(self.b2 * nu) + uncontracted(shared.w2 * _square(g))
        return mu, nu

    def direction(self, shared: _Shared, g: jax.Array, p: jax.Array | None, mu: jax.Array, nu: jax.Array) -> jax.Array:
        mu_hat = mu * shared.from_mu
        if shared.from_g is not None:
            mu_hat = alike(mu_hat) + uncontracted(g * shared.from_g)
        return mu_hat / (_sqrt(alike(nu * shared.from_nu) + self.eps_root) + shared.eps)


def _square(x: jax.Array) -> jax.Array:
    """|x|^2, real also where x is complex."""
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


@jax.custom_jvp
def _sqrt(x: jax.Array) -> jax.Array:
    """The square root, with derivative 0 at 0: there the second moment does not depend on b2."""
    return jnp.sqrt(x)


@_sqrt.defjvp
def _sqrt_jvp(primals: tuple, tangents: tuple) -> tuple:
    (x,) = primals
    positive = x > 0
    slope = jnp.where(positive, 0.5 / _sqrt(jnp.where(positive, x, 1)), 0)
    return _sqrt(x), tangents[0] * slope


@jax.custom_jvp
def _correction(b: jax.Array, t: jax.Array) -> jax.Array:
    """1 - b^t without cancellation, from the same rounded b as the weight 1 - b."""
    # adding 0 * t keeps a constant b from being worked on at compile time, which rounds log1p differently
    return -jnp.expm1(t * jnp.log1p(b - 1 + 0 * t))


@_correction.defjvp
def _correction_jvp(primals: tuple, tangents: tuple) -> tuple:
    b, t = primals
    # through log1p the derivative at b = 0 would be 0 * inf; the step count is not differentiated
    return _correction(b, t), -t * b ** (t - 1) * tangents[0]
