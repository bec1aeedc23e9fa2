"""The optimizers again, from their papers, in extended precision: what gdx is measured against.

The formulas are written for any kind of number. With `exact` numbers (80-bit floats) they give the
true trajectory; with `Rounded` numbers they also carry a bound of what rounding every operation to
float32 can do to it (running error analysis: Higham, Accuracy and Stability of Numerical
Algorithms, section 3.3), which is what a float32 trajectory is held to.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

UNIT = 2.0**-24  # float32 unit roundoff
TINY = 2.0**-126  # results below it may be flushed to zero


def exact(x: Any) -> Any:
    return np.asarray(x, np.longdouble)


class Rounded:
    """A value and a bound of the error that it has when every operation was rounded to float32."""

    def __init__(self, value: Any, error: Any = 0.0):
        self.value, self.error = exact(value), exact(error)

    @staticmethod
    def of(x: Any) -> "Rounded":
        return x if isinstance(x, Rounded) else Rounded(x)

    @staticmethod
    def after(value: Any, error: Any, units: float = 1) -> "Rounded":
        return Rounded(value, error + units * UNIT * (abs(value) + error) + TINY)

    def __add__(self, other: Any) -> "Rounded":
        other = Rounded.of(other)
        return Rounded.after(self.value + other.value, self.error + other.error)

    def __neg__(self) -> "Rounded":
        return Rounded(-self.value, self.error)

    def __sub__(self, other: Any) -> "Rounded":
        return self + -Rounded.of(other)

    def __rsub__(self, other: Any) -> "Rounded":
        return Rounded.of(other) - self

    def __mul__(self, other: Any) -> "Rounded":
        other = Rounded.of(other)
        error = abs(self.value) * other.error + abs(other.value) * self.error + self.error * other.error
        return Rounded.after(self.value * other.value, error)

    def __truediv__(self, other: Any) -> "Rounded":
        other = Rounded.of(other)
        quotient, least = self.value / other.value, abs(other.value) - other.error
        with np.errstate(divide="ignore", invalid="ignore"):
            error = np.where(least > 0, (self.error + abs(quotient) * other.error) / least, np.inf)
        return Rounded.after(quotient, error)

    def __rtruediv__(self, other: Any) -> "Rounded":
        return Rounded.of(other) / self

    __radd__, __rmul__ = __add__, __mul__


def sqrt(x: Any) -> Any:
    if not isinstance(x, Rounded):
        return np.sqrt(x)
    root = np.sqrt(x.value)
    below = root - np.sqrt(np.maximum(x.value - x.error, 0))
    return Rounded.after(root, np.maximum(np.sqrt(x.value + x.error) - root, below))


def correction(b: Any, t: int) -> Any:
    """1 - b^t, which gdx computes through expm1 and log1p to within 8 units."""
    if not isinstance(b, Rounded):
        return 1 - b**t
    return Rounded.after(1 - b.value**t, 0, units=8)


def square(g: Any) -> Any:
    """|g|^2."""
    return g.real**2 + g.imag**2 if np.iscomplexobj(g) else g * g


def at(hyperparameter: Any, t: int, kind: Callable) -> Any:
    """A hyperparameter in step t = 1, 2, ...: schedules count from 0."""
    return kind(hyperparameter(t - 1) if callable(hyperparameter) else hyperparameter)


def trajectory(step: Callable, theta: Any, gradients: Any, kind: Callable = exact, **hyperparameters: Any) -> Iterator:
    """The parameters after each step of an optimizer on given gradients."""
    theta, memory = kind(theta), {}
    for t, g in enumerate(gradients, start=1):
        now = {
            name: h if isinstance(h, bool) else at(h, t, kind) for name, h in hyperparameters.items() if h is not None
        }
        theta = theta + step(t, kind(g), theta, memory, **now)
        yield theta


def gradient_descent(t: int, g: Any, theta: Any, memory: dict, *, learning_rate: Any) -> Any:
    """Cauchy 1847."""
    return -(learning_rate * g)


def sgd(
    t: int, g: Any, theta: Any, memory: dict, *, learning_rate: Any, momentum: Any = None, nesterov: bool = False
) -> Any:
    """Sutskever et al. 2013 with the rate outside of the velocity, as torch documents it."""
    if momentum is None:
        return -(learning_rate * g)
    v = memory["v"] = g if t == 1 else momentum * memory["v"] + g
    return -(learning_rate * (g + momentum * v if nesterov else v))


def momentum(t: int, g: Any, theta: Any, memory: dict, *, learning_rate: Any, momentum: Any) -> Any:
    """Sutskever et al. 2013, eq. 1-2."""
    v = memory["v"] = -(learning_rate * g) if t == 1 else momentum * memory["v"] - learning_rate * g
    return v


def nesterov(t: int, g: Any, theta: Any, memory: dict, *, learning_rate: Any, momentum: Any) -> Any:
    """Bengio et al. 2013, eq. 6-7: the gradient is taken where the parameters are."""
    v = memory["v"] = -(learning_rate * g) if t == 1 else momentum * memory["v"] - learning_rate * g
    return momentum * v - learning_rate * g


def adam(t: int, g: Any, theta: Any, memory: dict, *, learning_rate: Any, **moments: Any) -> Any:
    """Kingma & Ba 2014, algorithm 1; Dozat 2016 for nesterov."""
    return -(learning_rate * adam_direction(t, g, memory, **moments))


def adam_direction(
    t: int, g: Any, memory: dict, *, b1: Any, b2: Any, eps: Any, eps_root: Any = 0.0, nesterov: bool = False
) -> Any:
    m = memory["m"] = b1 * memory.get("m", 0 * g) + (1 - b1) * g
    v = memory["v"] = b2 * memory.get("v", 0 * square(g)) + (1 - b2) * square(g)
    m_hat = m / correction(b1, t)
    if nesterov:
        m_hat = b1 * m / correction(b1, t + 1) + (1 - b1) * g / correction(b1, t)
    return m_hat / (sqrt(v / correction(b2, t) + eps_root) + eps)


def adamw(
    t: int,
    g: Any,
    theta: Any,
    memory: dict,
    *,
    learning_rate: Any,
    weight_decay: Any,
    schedule_multiplier: Any = None,
    **moments: Any,
) -> Any:
    """Loshchilov & Hutter 2019, algorithm 2; without the multiplier as torch documents AdamW."""
    direction = adam_direction(t, g, memory, **moments)
    if schedule_multiplier is None:
        return -(learning_rate * (direction + weight_decay * theta))
    return -(schedule_multiplier * (learning_rate * direction + weight_decay * theta))


def gradients(steps: int, seed: int = 0) -> np.ndarray:
    """Gradients of every kind, one per column: shape (steps, 8)."""
    t = np.arange(steps)
    random = np.random.default_rng(seed).standard_normal(steps)
    return np.stack(
        [
            np.zeros(steps),
            np.ones(steps),
            (-1.0) ** t,
            np.where(t % 97 == 13, 1e6, 1e-2 * random),
            np.full(steps, 1e-25),
            1e-9 * random,
            1e6 * random,
            random,
        ],
        axis=1,
    )
