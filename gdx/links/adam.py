"""Adam and AdamW: steps of about one learning rate per parameter, whatever the scale of the gradient."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx.compose import chain
from gdx.fields import Scalar, hyperparameter, is_concrete, static, text, to_bool, to_scalar
from gdx.leafwise import Leafwise
from gdx.links.decay import add_decoupled_weight_decay
from gdx.links.descent import scale_by_learning_rate
from gdx.numerics import alike, uncontracted
from gdx.storage.formats import Format, moment_like, to_storage
from gdx.transform import Transform, value

to_second_moment = functools.partial(to_storage, second_moment=True)


class _Shared(NamedTuple):
    """Weights of the new gradient in the moments, what takes the moments (and g) to their corrected means, and how many
    steps what is in the first moment lasts, in the corrected mean of this one."""

    w1: jax.Array
    w2: jax.Array
    from_mu: jax.Array
    from_g: jax.Array | None
    from_nu: jax.Array
    eps: jax.Array
    lasting: jax.Array


class scale_by_adam(Leafwise):
    r"""Adam: divides the mean of past gradients by the root of their mean square.

    $$ \begin{aligned}
       m_t &= \beta_1 m_{t-1} + (1 - \beta_1) g_t, & \hat m_t &= m_t / (1 - \beta_1^t), \\
       v_t &= \beta_2 v_{t-1} + (1 - \beta_2) |g_t|^2, & \hat v_t &= v_t / (1 - \beta_2^t), \\
       u_t &= \hat m_t / \left( \sqrt{\hat v_t + \bar\varepsilon} + \varepsilon \right)
       \end{aligned} $$

    With Nesterov, $\hat m_t = \beta_1 m_t / (1 - \beta_1^{t+1}) + (1 - \beta_1) g_t / (1 - \beta_1^t)$.

    State: `optax.ScaleByAdamState(count, mu, nu)`: the int32 step count $t$, the first moment
    shaped like the parameters, and the second, real also for complex parameters.

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
        direction is that of the moment as it is stored, but for a format that `compensates`.
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
        dtype = self.nu_dtype
        is_slow = callable(self.b2) or (is_concrete(self.b2) and bool(np.any(np.asarray(self.b2) >= 0.99)))
        if isinstance(dtype, np.dtype) and dtype.itemsize < 4 and is_slow:
            raise ValueError(
                f"scale_by_adam: nu_dtype is {dtype.name!r} with b2 = {text(self.b2)}: rounded to nearest, the "
                f"second moment stands still when it should shrink by {1 - 0.99:.0%} or less in a step. Round it "
                f"stochastically, nu_dtype=gdx.storage.StochasticBfloat16(), or take b2 below 0.99"
            )

    @property
    def formats(self) -> tuple[Any, Any]:
        return self.mu_dtype, self.nu_dtype

    def lasting(self, shared: _Shared) -> tuple[Any, Any]:
        return shared.lasting, None

    def start(self, p: jax.Array) -> tuple[Any, Any]:
        return moment_like(p, self.mu_dtype), moment_like(p, self.nu_dtype, real=True)

    def shared(self, count: jax.Array) -> _Shared:
        # in one array: the compiler writes log1p and expm1 out at length, and once for each call
        b, steps = [self.b1, self.b2], [0, 0]
        if self.nesterov:
            b, steps = [*b, self.b1], [*steps, 1]
        past_mu, past_nu, *next_mu = _correction(jnp.stack(b), count + jnp.asarray(steps, count.dtype))
        # reciprocals, to be multiplied: the compiler rewrites a division by a scalar case by case; each a kernel of its
        # own, where an item of an array would be taken out anew in the kernel of each leaf
        from_mu, from_g = 1 / past_mu, None
        if self.nesterov:
            from_mu, from_g = self.b1 / next_mu[0], (1 - self.b1) * from_mu
        # with eps = 0, a gradient that is still zero makes no step rather than 0 / 0
        eps = jnp.maximum(self.eps, jnp.finfo(self.eps.dtype).tiny)
        return _Shared(1 - self.b1, 1 - self.b2, from_mu, from_g, 1 / past_nu, eps, past_mu * (1 / (1 - self.b1)))

    def accumulate(
        self, shared: _Shared, g: jax.Array, p: jax.Array | None, mu: jax.Array, nu: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        mu = alike(self.b1 * mu) + uncontracted(shared.w1 * g)
        nu = alike(self.b2 * nu) + uncontracted(shared.w2 * _square(g))
        return mu, nu

    def direction(self, shared: _Shared, g: jax.Array, p: jax.Array | None, mu: jax.Array, nu: jax.Array) -> jax.Array:
        mu_hat = shared.from_mu * mu
        if shared.from_g is not None:
            mu_hat = alike(mu_hat) + uncontracted(shared.from_g * g)
        return mu_hat / (_sqrt(alike(shared.from_nu * nu) + self.eps_root) + shared.eps)


def _square(x: jax.Array) -> jax.Array:
    """|x|^2, real also where x is complex."""
    return x.real * x.real + x.imag * x.imag if jnp.iscomplexobj(x) else x * x


@jax.custom_jvp
def _sqrt(x: jax.Array) -> jax.Array:
    """The square root, with derivative 0 at 0: there the second moment does not depend on b2."""
    return jax.lax.sqrt(x)


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


@value
def adam(
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: np.dtype | Format | None = None,
    *,
    nesterov: bool = False,
    nu_dtype: np.dtype | Format | None = None,
) -> Transform:
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
    >>> gdx.adam(1e-3, b2=0.99).made
    chain(scale_by_adam(b2=0.99), scale_by_learning_rate(learning_rate=0.001))
    """
    return chain(
        scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, nu_dtype=nu_dtype),
        scale_by_learning_rate(learning_rate),
    )


@value
def adamw(
    learning_rate: Scalar,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    eps_root: Scalar = 0.0,
    mu_dtype: np.dtype | Format | None = None,
    weight_decay: Scalar = 1e-4,
    mask: Any | Callable[[Any], Any] = None,
    *,
    nesterov: bool = False,
    schedule_multiplier: Scalar | None = None,
    nu_dtype: np.dtype | Format | None = None,
) -> Transform:
    r"""Adam with decoupled weight decay.

    $$ \theta_{t+1} = \theta_t - \eta_t
       \left( \hat m_t / \left( \sqrt{\hat v_t + \bar\varepsilon} + \varepsilon \right) + \lambda \theta_t \right) $$

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
    >>> gdx.adamw(1e-3, weight_decay=0.1).made.transforms[1:]
    (add_decoupled_weight_decay(weight_decay=0.1), scale_by_learning_rate(learning_rate=0.001))
    """
    direction = scale_by_adam(b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov, nu_dtype=nu_dtype)
    decay = add_decoupled_weight_decay(weight_decay, mask)
    if schedule_multiplier is None:
        return chain(direction, decay, scale_by_learning_rate(learning_rate))
    to_scalar("schedule_multiplier", schedule_multiplier, minimum=0)  # the link would call it a learning rate
    base_rate = scale_by_learning_rate(learning_rate, flip_sign=False)
    return chain(direction, base_rate, decay, scale_by_learning_rate(schedule_multiplier))
