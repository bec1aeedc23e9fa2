"""How large a gradient is and how far those of single examples scatter, estimated without bias."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdx.arguments import number
from gdx.checks import check_floating
from gdx.fields import is_concrete, is_real, refuse
from gdx.numerics import accurate, squared_norm
from gdx.trees import leading_axis


class Noise(NamedTuple):
    r"""How large the gradient is, and how far the gradients of single examples scatter around it.

    Both are unbiased estimates, so that the first can be negative where the gradient is lost in noise. They can have
    leading axes, of steps for instance.

    Attributes:
      squared_norm: $|G|^2$, the squared norm of the expected gradient.
      covariance_trace: $\operatorname{tr} \Sigma$, of the gradients of single examples.

    >>> import gdx, jax.numpy as jnp
    >>> noise = gdx.noise.Noise(squared_norm=jnp.array(2.0), covariance_trace=jnp.array(100.0))
    >>> float(noise.scale), float(noise.variance(10))
    (50.0, 10.0)
    """

    squared_norm: jax.Array
    covariance_trace: jax.Array

    @property
    def scale(self) -> jax.Array:
        r"""The (simple) noise scale $\operatorname{tr}\Sigma / |G|^2$, in examples.

        It is inf where $|G|^2$ is not positive, and NaN where there is no noise either.

        It predicts the critical batch size $B_c$: training with batches of $B$ takes $1 + B_c / B$ times the
        fewest steps and $1 + B / B_c$ times the fewest examples (McCandlish et al., eq. 2.9 and 2.11).
        """
        return jnp.asarray(self.covariance_trace) / jnp.maximum(self.squared_norm, 0)

    def variance(self, batch_size: Any, examples: Any = None) -> jax.Array:
        r"""$E|g_B - G|^2$ of batches of this size.

        Args:
          batch_size: $B$; it and examples may be traced.
          examples: $N$, if batches are drawn from so many without replacement: this is then the `Noise` of those,
            see `within`. None with replacement.

        Raises:
          ValueError: batch_size is less than 1, or larger than examples (of numbers that can be read here).
        """
        number("noise.Noise.variance: batch_size", batch_size)
        number("noise.Noise.variance: examples", examples, optional=True)
        concrete = is_concrete(batch_size) and is_concrete(examples)
        if concrete and not 1 <= batch_size <= (np.inf if examples is None else examples):
            most = "" if examples is None else f" and at most {examples}, the number of examples"
            raise ValueError(f"noise.Noise.variance: batch_size is {batch_size}; expected at least 1{most}")
        size, fraction = _number(batch_size, self.covariance_trace), 1.0
        if examples is not None:
            total = _number(examples, self.covariance_trace)
            larger = max if is_concrete(total) else jnp.maximum
            fraction = (total - size) / larger(total - 1, 1)
        return self.covariance_trace * (fraction / size)

    def within(self, examples: Any) -> "Noise":
        r"""The noise around the mean gradient of so many examples, rather than of all that there could be.

        Where batches (or the two batches that are compared, the small in the large) are drawn from $N$ examples without
        replacement, those are themselves a sample, whose mean gradient and covariance have

        $$ E|G_N|^2 = |G|^2 + \operatorname{tr}\Sigma / N, \qquad
           E \operatorname{tr}\Sigma_N = \operatorname{tr}\Sigma \, (N - 1) / N. $$

        It matters as soon as the noise scale is not far below $N$: at the end of training on little data.

        Args:
          examples: $N$; it may be traced.

        Raises:
          ValueError: examples is less than 1.
        """
        number("noise.Noise.within: examples", examples)
        if is_concrete(examples) and not examples >= 1:
            raise ValueError(f"noise.Noise.within: examples is {examples}; expected at least 1")
        share = 1 / _number(examples, self.covariance_trace)
        return Noise(self.squared_norm + self.covariance_trace * share, self.covariance_trace * (1 - share))


def _number(examples: Any, like: Any) -> Any:
    """A number of examples: Python's where it can be read, else in the dtype of what it divides."""
    return float(examples) if is_concrete(examples) else examples.astype(jnp.result_type(like))


def estimate(small: Any, big: Any, *, small_batch: Any, big_batch: Any) -> Noise:
    r"""The noise from the squared norms of gradients at two batch sizes:

    $$ |G|^2 \approx \frac{B |g_B|^2 - b |g_b|^2}{B - b}, \qquad
       \operatorname{tr}\Sigma \approx \frac{|g_b|^2 - |g_B|^2}{1/b - 1/B}. $$

    Unbiased for independent examples. Single estimates scatter widely: average both before taking their ratio, the
    scale, as `measure_noise` does.

    Args:
      small: $|g_b|^2$, best the mean over all small batches that the large one consists of.
      big: $|g_B|^2$.
      small_batch, big_batch: $b < B$, their sizes.

    Raises:
      ValueError: not 1 <= small_batch < big_batch, of numbers that can be read here.

    Source: McCandlish et al., An Empirical Model of Large-Batch Training (2018), appendix A.1.

    >>> import gdx
    >>> noise = gdx.noise.estimate(small=4.0, big=1.0, small_batch=2, big_batch=32)  # |g_B|^2 = 0.8 + 6.4 / B
    >>> round(noise.squared_norm.item(), 3), round(noise.covariance_trace.item(), 3), round(noise.scale.item(), 3)
    (0.8, 6.4, 8.0)
    """
    for name, size in (("small_batch", small_batch), ("big_batch", big_batch)):
        number(f"noise.estimate: {name}", size)
    for name, norm in (("small", small), ("big", big)):
        if not is_real(norm):
            refuse(f"noise.estimate: {name}", norm, "the squared norm of a gradient")
    if is_concrete(small_batch) and is_concrete(big_batch) and not 1 <= small_batch < big_batch:
        raise ValueError(
            f"noise.estimate: small_batch is {small_batch} and big_batch is {big_batch}; expected "
            f"1 <= small_batch < big_batch, such as the micro-batches of a batch"
        )
    dtype = jnp.result_type(float)
    small, big, b, ratio = (jnp.asarray(x, dtype) for x in (small, big, small_batch, big_batch / small_batch))
    # of the difference first, which is at least 0 for small batches that make up the large one
    excess = (small - big) / (ratio - 1)
    return Noise(big - excess, excess * b * ratio)


def of_gradients(gradients: Any, batch_size: Any = 1) -> Noise:
    r"""The noise from the gradients of micro-batches, or of single examples:

    $$ \operatorname{tr}\Sigma \approx \frac{b}{M - 1} \sum_{i=1}^M |g_i - \bar g|^2, \qquad
       |G|^2 \approx |\bar g|^2 - \frac{\operatorname{tr}\Sigma}{b M}, $$

    which is `estimate` for the $M$ micro-batches, without its cancellation.

    Args:
      gradients: a tree of arrays with a leading axis of $M$ micro-batches.
      batch_size: $b$, the number of examples in each; it may be traced.

    Raises:
      ValueError: there are fewer than 2, the leaves do not have one leading axis in common, or batch_size is
        less than 1.

    >>> import gdx, jax.numpy as jnp
    >>> gdx.noise.of_gradients({"w": jnp.array([[1.0, 0.0], [3.0, 0.0]])})
    Noise(squared_norm=Array(3., dtype=float32), covariance_trace=Array(2., dtype=float32))
    """
    count = leading_axis("noise.of_gradients:", gradients, "micro-batches")
    if count < 2:
        raise ValueError(f"noise.of_gradients: there is {count} gradient; expected at least 2 to see them scatter")
    check_floating("noise.of_gradients: the gradient", gradients)
    number("noise.of_gradients: batch_size", batch_size)
    if is_concrete(batch_size) and not batch_size >= 1:
        raise ValueError(f"noise.of_gradients: batch_size is {batch_size}; expected at least 1")
    wide = jax.tree.map(accurate, gradients)
    means = jax.tree.map(lambda g: jnp.mean(g, axis=0), wide)
    scatter = squared_norm(jax.tree.map(lambda g, mean: g - mean[None], wide, means))
    size = _number(batch_size, scatter)
    trace = scatter * (size / (count - 1))
    return Noise(squared_norm(means) - trace * (1 / (size * count)), trace)
