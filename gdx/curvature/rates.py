"""What the edges of a spectrum say about learning rates: the best one, and the one beyond which training diverges."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gdx.arguments import number
from gdx.fields import is_concrete
from gdx.links.adam import adam, adamw
from gdx.links.descent import gradient_descent
from gdx.links.momentum import momentum, nesterov, sgd
from gdx.transform import Transform


class BestRate(NamedTuple):
    r"""The learning rate with the fastest contraction on a quadratic, as scalar arrays.

    Attributes:
      learning_rate: $\eta$.
      momentum: $\mu$; 0 for gradient descent.
      contraction: $\rho$: in the long run, each step multiplies the distance to the minimum by it.
      convex: whether the smallest eigenvalue is positive, as the formulas need.
    """

    learning_rate: jax.Array
    momentum: jax.Array
    contraction: jax.Array
    convex: jax.Array


def best_learning_rate(smallest: Any, largest: Any, optimizer: Callable[..., Transform] = gradient_descent) -> BestRate:
    r"""The best learning rate and momentum for a quadratic whose eigenvalues go from $\lambda_1$ to $\lambda_n$.

    With $\kappa = \lambda_n / \lambda_1$:

    | optimizer | learning rate $\eta$ | momentum $\mu$ | contraction $\rho$ |
    |---|---|---|---|
    | `gradient_descent` | $2 / (\lambda_1 + \lambda_n)$ | 0 | $(\kappa - 1) / (\kappa + 1)$ |
    | `momentum` | $4 / (\sqrt{\lambda_1} + \sqrt{\lambda_n})^2$ | $\rho^2$ | $(\sqrt\kappa - 1) / (\sqrt\kappa + 1)$ |
    | `nesterov`, $r = \sqrt{3 \kappa + 1}$ | $4 / (\lambda_1 + 3 \lambda_n)$ | $(r - 2) / (r + 2)$ | $1 - 2 / r$ |

    Both ends contract alike, and no eigenvalue between them slower. With momentum the distance is at first up to
    $k \rho^k$ after $k$ steps. A network's loss is a quadratic only near where the edges were taken, and
    these rates are best for a whole spectrum that stays there.

    Where $\lambda_1 \le 0$ there is no minimum to contract to, and none of the formulas holds ($2 / (\lambda_1 +
    \lambda_n)$ would diverge). For each optimizer there is returned, with `convex` False, $\eta = 1 / \lambda_n$,
    the rate at which gradient descent is certain to lower a loss of such curvature the most, $\mu = 0$,
    and $\rho = 1 - \lambda_1 / \lambda_n \ge 1$: along $\lambda_1$ the distance to the stationary point stays or grows.

    Args:
      smallest, largest: $\lambda_1$ and $\lambda_n$, as from `spectrum_edges`.
      optimizer: `gdx.gradient_descent`, `gdx.momentum` or `gdx.nesterov`.

    Raises:
      TypeError: optimizer is another one.
      ValueError: the largest is not positive, or less than the smallest. Traced, that gives NaN.

    Sources: Polyak (1964); Lessard, Recht & Packard, Analysis and Design of Optimization Algorithms via Integral
    Quadratic Constraints (2016), table 1.

    >>> import gdx
    >>> round(gdx.curvature.best_learning_rate(1.0, 9.0).contraction.item(), 3)
    0.8
    >>> best = gdx.curvature.best_learning_rate(1.0, 9.0, gdx.momentum)
    >>> tx = gdx.momentum(best.learning_rate, best.momentum)
    >>> best.learning_rate.item(), best.momentum.item(), best.contraction.item()
    (0.25, 0.25, 0.5)
    """
    if not any(optimizer is known for known in (gradient_descent, momentum, nesterov)):
        raise TypeError(
            f"best_learning_rate: optimizer is {optimizer!r}; expected gdx.gradient_descent, gdx.momentum or "
            f"gdx.nesterov"
        )
    number("best_learning_rate: smallest", smallest)
    number("best_learning_rate: largest", largest)
    dtype = jnp.promote_types(jnp.result_type(smallest, largest), jnp.result_type(float))
    low, high = (jnp.asarray(x, dtype) for x in (smallest, largest))
    if is_concrete(low) and is_concrete(high) and not (high > 0 and low <= high):
        raise ValueError(
            f"best_learning_rate: the eigenvalues go from {float(low):g} to {float(high):g}; expected smallest <= "
            f"largest and largest > 0: without a direction of positive curvature no learning rate is too large"
        )
    convex = low > 0
    bounded = jnp.where(convex, low, high)  # a value with which no formula is singular
    if optimizer is gradient_descent:
        rate, contraction = 2 / (bounded + high), (high - bounded) / (high + bounded)
        mu = jnp.zeros_like(rate)
    elif optimizer is momentum:
        a, b = jnp.sqrt(bounded), jnp.sqrt(high)
        rate, contraction = 4 / (a + b) ** 2, (b - a) / (b + a)
        mu = contraction**2
    else:
        root = jnp.sqrt(3 * high / bounded + 1)
        rate, mu, contraction = 4 / (bounded + 3 * high), (root - 2) / (root + 2), 1 - 2 / root
    is_spectrum = (high > 0) & (low <= high)

    def known(best: jax.Array, cautious: Any) -> jax.Array:
        return jnp.where(is_spectrum, jnp.where(convex, best, cautious), jnp.nan)

    rates = known(rate, 1 / high), known(mu, 0), known(contraction, 1 - low / high)
    return BestRate(*rates, convex & is_spectrum)


def stability_edge(tx: Transform) -> jax.Array:
    r"""The largest curvature at which an optimizer does not diverge, from its learning rate and momentum.

    | optimizer | edge |
    |---|---|
    | `gradient_descent`, `sgd` | $2 / \eta$ |
    | `momentum`, `sgd` with momentum | $2 (1 + \mu) / \eta$ |
    | `nesterov`, `sgd` with `nesterov` | $2 (1 + \mu) / ((1 + 2 \mu) \eta)$ |
    | `adam`, `adamw`, of `adam_preconditioned` | $2 (1 + \beta_1) / ((1 - \beta_1) \eta)$ |

    Adam's is $38 / \eta$ for $\beta_1 = 0.9$. On a quadratic an optimizer diverges along exactly the eigenvectors with
    a larger eigenvalue. A network trained in full batches goes there by itself: its sharpness rises to
    the edge, and then stays about it.

    Args:
      tx: one of these optimizers, with numbers for its learning rate and momentum. Decoupled weight decay is not
        counted; with Nesterov Adam's edge is divided by $1 + 2 \beta_1$.

    Raises:
      TypeError: tx is another optimizer, or one of these numbers is a schedule.

    Sources: Cohen et al., Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability (2021),
    section 2 and appendix B; Cohen et al., Adaptive Gradient Methods at the Edge of Stability (2022), section 2.

    >>> import gdx
    >>> gdx.curvature.stability_edge(gdx.adam(1e-3)).round().item()
    38000.0
    """
    name = "stability_edge"
    if type(tx) not in (gradient_descent, sgd, momentum, nesterov, adam, adamw):
        raise TypeError(f"{name}: tx is {tx!r}; expected an optimizer of gdx, such as gdx.sgd(0.1, momentum=0.9)")
    is_adam = type(tx) in (adam, adamw)
    mu = getattr(tx, "b1" if is_adam else "momentum", None)
    if callable(tx.learning_rate) or callable(mu):
        raise TypeError(f"{name}: tx is {tx!r}; replace its schedules by the numbers of one step: tx.replace(...)")
    rate, mu = (jnp.asarray(0.0 if x is None else x, float) for x in (tx.learning_rate, mu))
    edge = 2 * (1 + mu) / rate
    if is_adam:  # its first moment is a mean rather than a sum
        edge /= 1 - mu
    return edge / (1 + 2 * mu) if type(tx) is nesterov or getattr(tx, "nesterov", False) else edge
