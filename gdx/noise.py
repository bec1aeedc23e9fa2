"""Mini-batches and the noise of their gradients: how it falls with the batch size, and how large a batch is worth it.

With $g_i$ the gradient of example $i$, $G = E[g_i]$ and $\\Sigma = \\operatorname{Cov}[g_i]$, the gradient of a
mini-batch of $B$ examples is an unbiased estimate of $G$ with

$$ E|g_B - G|^2 = \\frac{\\operatorname{tr}\\Sigma}{B} \\quad\\text{(with replacement)}, \\qquad
   \\frac{\\operatorname{tr}\\Sigma}{B} \\, \\frac{N - B}{N - 1} \\quad\\text{(without, from $N$ examples)}. $$

The noise scale $\\operatorname{tr}\\Sigma / |G|^2$ is the batch size at which noise and gradient are equally large.
"""

import functools
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx.checks import check_state
from gdx.fields import Scalar, hyperparameter, is_concrete
from gdx.leafwise import compute_dtype
from gdx.training import Loss
from gdx.transform import Transform


class Batches(NamedTuple):
    """Batches of which some are filled up.

    Attributes:
      examples: int32 of shape (steps, batch_size): the indices of the examples in each batch.
      weights: float32 of the same shape: 1, and 0 where an index only fills the batch up.
    """

    examples: jax.Array
    weights: jax.Array


def epochs(key: jax.Array, data: Any, batch_size: int, number: int = 1) -> jax.Array:
    """Batches of shuffled epochs: sampling without replacement. What is left over of an epoch is dropped.

    Each epoch of $N$ examples has $\\lfloor N / B \\rfloor$ batches, and is shuffled anew, so that what
    is dropped differs from one to the next. Sizes are static: it can be called in `jax.jit`, for one epoch at a time
    in `jax.lax.scan`, and under `jax.vmap` with many keys.

    Args:
      key: a random key; the same key gives the same batches.
      data: a tree of arrays with a leading axis of examples in common, or the number of examples.
      batch_size: $B$, the number of examples in a batch.
      number: how many epochs.

    Returns:
      int32 of shape (number * (N // batch_size), batch_size): indices of examples, as `gdx.train` takes them.

    Raises:
      ValueError: batch_size is not in 1 to N, or number is less than 1, or the leaves of data differ in length.
      TypeError: one of them is no integer.

    >>> import gdx, jax
    >>> batches = gdx.noise.epochs(jax.random.key(0), 10, batch_size=3, number=2)
    >>> batches.shape, len(set(batches[:3].ravel().tolist()))
    ((6, 3), 9)
    """
    size = _check_sizes("epochs", data, batch_size, number=number)
    steps = size // batch_size
    return _permutations(key, size, number)[:, : steps * batch_size].reshape(number * steps, batch_size)


def padded_epochs(key: jax.Array, data: Any, batch_size: int, number: int = 1) -> Batches:
    r"""Batches of shuffled epochs in which every example occurs: the last one of an epoch is filled up.

    What fills it up repeats an example with weight 0, so take the weighted mean of the examples' losses,
    `jnp.average(losses, weights=weights)`. Its gradient is that of the $r = N \bmod B$ examples left over:
    unbiased, and as noisy as a batch of $r$ is.

    Args:
      key, data, batch_size, number: as in `epochs`.

    Returns:
      `Batches(examples, weights)` of ceil(N / batch_size) steps for each epoch.

    Raises:
      ValueError, TypeError: as in `epochs`.

    >>> import gdx, jax, jax.numpy as jnp
    >>> data = jnp.arange(10.0)
    >>> def loss(theta, batch):
    ...     return jnp.average((theta - data[batch.examples]) ** 2, weights=batch.weights)
    >>> batches = gdx.noise.padded_epochs(jax.random.key(0), data, batch_size=4, number=20)
    >>> batches.weights[2].tolist()
    [1.0, 1.0, 0.0, 0.0]
    >>> gdx.train(loss, gdx.sgd(0.1), jnp.zeros(()), batches).losses.shape
    (60,)
    """
    size = _check_sizes("padded_epochs", data, batch_size, number=number)
    steps = -(-size // batch_size)
    filled = jnp.concatenate([jnp.arange(size), jnp.zeros(steps * batch_size - size, int)])
    examples = _permutations(key, size, number)[:, filled].reshape(number * steps, batch_size)
    weights = (jnp.arange(steps * batch_size) < size).astype(jnp.float32).reshape(steps, batch_size)
    return Batches(examples, jnp.tile(weights, (number, 1)))


def with_replacement(key: jax.Array, data: Any, batch_size: int, steps: int = 1) -> jax.Array:
    """Batches whose examples are all drawn independently.

    Args:
      key, data, batch_size: as in `epochs`. A batch larger than the data is refused here too: it
        would cost more than the exact gradient.
      steps: how many batches.

    Returns:
      int32 of shape (steps, batch_size): indices of examples.

    Raises:
      ValueError, TypeError: as in `epochs`.

    In a scan, of which every step has a key of its own:

    >>> import gdx, jax, jax.numpy as jnp
    >>> data = jnp.arange(10.0)
    >>> def loss(theta, key):
    ...     examples = gdx.noise.with_replacement(key, data, batch_size=4)[0]
    ...     return jnp.mean((theta - gdx.noise.take(data, examples)) ** 2)
    >>> keys = jax.random.split(jax.random.key(0), 50)
    >>> gdx.train(loss, gdx.sgd(0.1), jnp.zeros(()), keys).losses.shape
    (50,)
    """
    size = _check_sizes("with_replacement", data, batch_size, steps=steps)
    return jax.random.randint(key, (steps, batch_size), 0, size, jnp.int32)


def take(data: Any, examples: jax.Array) -> Any:
    """The examples with these indices, of every leaf.

    Raises:
      ValueError: the leaves of data do not have one leading axis in common.
      IndexError: an index that can be read here is out of range (JAX itself would take the nearest example).

    >>> import gdx, jax.numpy as jnp
    >>> images, labels = gdx.noise.take((jnp.zeros((9, 8, 8)), jnp.arange(9)), jnp.array([2, 7]))
    >>> images.shape, labels.tolist()
    ((2, 8, 8), [2, 7])
    """
    size = _examples_in("take", data)
    if is_concrete(examples) and np.size(examples) and not 0 <= np.min(examples) <= np.max(examples) < size:
        raise IndexError(
            f"noise.take: examples are {np.min(examples)} to {np.max(examples)}; expected 0 to {size - 1}, the indices "
            f"of the data's {size} examples"
        )
    return jax.tree.map(lambda column: column[examples], data)


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
        r"""The (simple) noise scale $\operatorname{tr}\Sigma / |G|^2$, in examples; inf where $|G|^2$ is not positive.

        It predicts the critical batch size $B_c$: training with batches of $B$ takes $1 + B_c / B$ times the
        fewest steps and $1 + B / B_c$ times the fewest examples (McCandlish et al., eq. 2.9 and 2.11).
        """
        return jnp.asarray(self.covariance_trace) / jnp.maximum(self.squared_norm, 0)

    def variance(self, batch_size: int, examples: int | None = None) -> jax.Array:
        r"""$E|g_B - G|^2$ of batches of this size.

        Args:
          batch_size: $B$.
          examples: $N$, if batches are drawn from so many without replacement: this is then the `Noise` of those,
            see `within`. None with replacement.

        Raises:
          ValueError: batch_size is less than 1, or larger than examples.
        """
        if batch_size < 1 or (examples is not None and batch_size > examples):
            most = "" if examples is None else f" and at most {examples}, the number of examples"
            raise ValueError(f"noise.Noise.variance: batch_size is {batch_size}; expected at least 1{most}")
        fraction = 1.0 if examples is None else (examples - batch_size) / max(examples - 1, 1)
        return self.covariance_trace * (fraction / batch_size)

    def within(self, examples: int) -> "Noise":
        r"""The noise around the mean gradient of so many examples, rather than of all that there could be.

        Where batches (or the two batches that are compared, the small in the large) are drawn from $N$ examples without
        replacement, those are themselves a sample, whose mean gradient and covariance have

        $$ E|G_N|^2 = |G|^2 + \operatorname{tr}\Sigma / N, \qquad
           E \operatorname{tr}\Sigma_N = \operatorname{tr}\Sigma \, (N - 1) / N. $$

        It matters as soon as the noise scale is not far below $N$: at the end of training on little data.
        """
        share = 1 / examples
        return Noise(self.squared_norm + self.covariance_trace * share, self.covariance_trace * (1 - share))


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
      ValueError: not 1 <= small_batch < big_batch.

    Source: McCandlish et al., An Empirical Model of Large-Batch Training (2018), appendix A.1.

    >>> import gdx
    >>> noise = gdx.noise.estimate(small=4.0, big=1.0, small_batch=2, big_batch=32)  # |g_B|^2 = 0.8 + 6.4 / B
    >>> round(noise.squared_norm.item(), 3), round(noise.covariance_trace.item(), 3), round(noise.scale.item(), 3)
    (0.8, 6.4, 8.0)
    """
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


def of_gradients(gradients: Any, batch_size: int = 1) -> Noise:
    r"""The noise from the gradients of micro-batches, or of single examples:

    $$ \operatorname{tr}\Sigma \approx \frac{b}{M - 1} \sum_{i=1}^M |g_i - \bar g|^2, \qquad
       |G|^2 \approx |\bar g|^2 - \frac{\operatorname{tr}\Sigma}{b M}, $$

    which is `estimate` for the $M$ micro-batches, without its cancellation.

    Args:
      gradients: a tree of arrays with a leading axis of $M$ micro-batches.
      batch_size: $b$, the number of examples in each.

    Raises:
      ValueError: there are fewer than 2, the leaves do not have one leading axis in common, or batch_size is
        less than 1.

    >>> import gdx, jax.numpy as jnp
    >>> gdx.noise.of_gradients({"w": jnp.array([[1.0, 0.0], [3.0, 0.0]])})
    Noise(squared_norm=Array(3., dtype=float32), covariance_trace=Array(2., dtype=float32))
    """
    number = _examples_in("of_gradients", gradients, "micro-batches")
    if number < 2:
        raise ValueError(f"noise.of_gradients: there is {number} gradient; expected at least 2 to see them scatter")
    if batch_size < 1:
        raise ValueError(f"noise.of_gradients: batch_size is {batch_size}; expected at least 1")
    wide = jax.tree.map(lambda g: g.astype(compute_dtype(g)), gradients)
    means = jax.tree.map(lambda g: jnp.mean(g, axis=0), wide)
    scatter = _squared_norm(jax.tree.map(lambda g, mean: g - mean[None], wide, means))
    trace = scatter * (batch_size / (number - 1))
    return Noise(_squared_norm(means) - trace * (1 / (batch_size * number)), trace)


class MicroBatches(NamedTuple):
    """What `measure_noise` is told about the micro-batches that a gradient is the mean of.

    Attributes:
      squared_norm: the mean of the squared norms of their gradients.
      size: how many examples each of them has.
      number: how many there are, at least 2.
    """

    squared_norm: jax.Array
    size: Any
    number: Any


def value_and_grad(loss: Loss, number: int) -> Callable[[Any, Any], tuple[tuple[jax.Array, MicroBatches], Any]]:
    """As `jax.value_and_grad`, one micro-batch after the other, and what `measure_noise` needs beside it.

    The batch is split into micro-batches by `optax.microbatching`, so that the memory is that of one. Their mean
    is the gradient of the batch, for a loss that is a mean over examples.

    Args:
      loss: the mean loss of parameters on a batch, a real scalar.
      number: how many micro-batches, at least 2.

    Returns:
      A function of the parameters and a batch, a tree of arrays with a leading axis of examples (their indices
      for instance), that returns `((value, micro_batches), gradients)`.

    Raises:
      ValueError: number is less than 2, or does not divide the batch.
      TypeError: number is no integer.

    >>> import gdx, jax.numpy as jnp
    >>> value_and_grad = gdx.noise.value_and_grad(lambda theta, x: jnp.mean((theta - x) ** 2), number=2)
    >>> (value, micro_batches), gradient = value_and_grad(jnp.zeros(()), jnp.array([1.0, 3.0, 1.0, 3.0]))
    >>> value.item(), gradient.item(), micro_batches.squared_norm.item()  # of -2 and -6: every second example each
    (5.0, -4.0, 20.0)
    """
    _check_whole("value_and_grad", "number", number)
    if number < 2:
        raise ValueError(f"noise.value_and_grad: number is {number}; expected at least 2 micro-batches to compare")

    def wrapped(params: Any, batch: Any) -> tuple[tuple[jax.Array, MicroBatches], Any]:
        size = _examples_in("value_and_grad", batch)
        if not size or size % number:
            raise ValueError(
                f"noise.value_and_grad: a batch of {size} examples does not split into {number} micro-batches; "
                f"expected a positive multiple of {number}"
            )

        def on_one(part: Any) -> tuple[jax.Array, Any, jax.Array]:
            value, gradients = jax.value_and_grad(loss)(params, part)
            return value, gradients, _squared_norm(gradients)

        mean = optax.microbatching.AccumulationType.MEAN
        split = optax.microbatching.microbatch(on_one, 0, size // number, (mean, mean, mean))
        value, gradients, squared_norm = split(batch)
        return (value, MicroBatches(squared_norm, size // number, number)), gradients

    return wrapped


class NoiseState(NamedTuple):
    """State of `measure_noise`.

    Attributes:
      measured: int32 scalar, how many steps were measured.
      noise: the averages over them, 0 before the first.
    """

    measured: jax.Array
    noise: Noise


class measure_noise(Transform):
    r"""Measures the noise scale during training. The updates pass unchanged.

    The first link of a chain, where the updates are the gradient $g_B$ of the whole batch. Its `update` takes
    what the gradients of the micro-batches were as a keyword, `micro_batches=`, makes the estimates of `estimate` and
    averages each of them: after $n$ measured steps, with weights that fall by `decay` from each to the one before,

    $$ m_n = m_{n-1} + w_n (x_n - m_{n-1}), \qquad w_n = \frac{1 - \beta}{1 - \beta^n}. $$

    Where `micro_batches` is None nothing is measured, so that it can be done in every tenth step only; a step whose
    norms are not finite is left out. `value_and_grad` gives the keyword. It is just as well
    `MicroBatches(lax.pmean(squared norm of the device's gradient), batch of a device, devices)` where each device
    has a part of the batch, and under `optax.MultiSteps` it is the mean so far,
    `mean += (squared norm - mean) / (state.mini_step + 1)`, passed to every mini-step.

    State: `NoiseState(measured, noise)`, three scalars, the numbers in the default float dtype. `optax.tree.get(state,
    "noise").scale` reads the noise scale out of the state of any chain.

    Args:
      decay: $\beta$ in [0, 1); the averages span about $1 / (1 - \beta)$ steps.

    Raises:
      ValueError: decay is outside [0, 1).
      TypeError: update is called without micro_batches, or they are no `MicroBatches`.

    Source: McCandlish et al., An Empirical Model of Large-Batch Training (2018), appendix A.1.

    >>> import gdx, jax, jax.numpy as jnp, optax
    >>> data = jax.random.normal(jax.random.key(0), (512, 3))  # |G|^2 is about 12, the trace of Sigma 12
    >>> value_and_grad = gdx.noise.value_and_grad(lambda theta, i: jnp.mean((theta[None] - data[i]) ** 2) * 3, number=4)
    >>> tx = gdx.chain(gdx.noise.measure_noise(), gdx.sgd(0.0))
    >>> def step(carry, batch):
    ...     theta, state = carry
    ...     (loss, micro_batches), gradients = value_and_grad(theta, batch)
    ...     updates, state = tx.update(gradients, state, theta, micro_batches=micro_batches)
    ...     return (optax.apply_updates(theta, updates), state), loss
    >>> batches = gdx.noise.epochs(jax.random.key(1), data, batch_size=32, number=10)
    >>> (theta, state), losses = jax.lax.scan(step, (jnp.ones(3), tx.init(jnp.ones(3))), batches)
    >>> bool(0.8 < optax.tree.get(state, "noise").scale < 1.2)
    True
    """

    decay: Scalar = hyperparameter(default=0.99, minimum=0, below=1)

    def init(self, params: optax.Params) -> NoiseState:
        dtype = jnp.result_type(float)
        return NoiseState(jnp.zeros([], jnp.int32), Noise(jnp.zeros([], dtype), jnp.zeros([], dtype)))

    def update(
        self, updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, NoiseState]:
        check_state(self, state, NoiseState)
        micro_batches = _micro_batches(extra_args)
        if micro_batches is None:
            return updates, state
        squared_norm, size, number = micro_batches
        found = estimate(squared_norm, _squared_norm(updates), small_batch=size, big_batch=size * number)
        finite = jnp.isfinite(found.squared_norm) & jnp.isfinite(found.covariance_trace)
        measured = jnp.where(finite, optax.safe_increment(state.measured), state.measured)
        n = jnp.maximum(measured, 1).astype(found.squared_norm.dtype)
        weight = (1 - self.decay) / -jnp.expm1(n * jnp.log1p(self.decay - 1))
        averaged = (jnp.where(finite, m + weight * (x - m), m) for m, x in zip(state.noise, found))
        return updates, NoiseState(measured, Noise(*averaged))

    def __repr__(self) -> str:
        return f"noise.{super().__repr__()}"


def _micro_batches(extra_args: dict[str, Any]) -> MicroBatches | None:
    given = extra_args.get("micro_batches", ())
    if given is not None and not isinstance(given, MicroBatches):
        said = "got none" if given == () else f"micro_batches is {reprlib.repr(given)}"
        raise TypeError(
            f"measure_noise: {said}; expected update(gradients, state, params, micro_batches=...) with what "
            f"gdx.noise.value_and_grad returns beside the loss, or None in a step that is not to be measured"
        )
    return given


def _squared_norm(tree: Any) -> jax.Array:
    """The sum of |x|^2, in at least float32, as the default float dtype."""
    total = jnp.zeros([], jnp.result_type(float))
    for leaf in map(jnp.asarray, jax.tree.leaves(tree)):
        wide = leaf.astype(compute_dtype(leaf))
        total += jnp.sum(wide.real**2 + wide.imag**2 if jnp.iscomplexobj(wide) else wide * wide).astype(total.dtype)
    return total


@functools.partial(jax.jit, static_argnums=(1, 2))
def _permutations(key: jax.Array, size: int, number: int) -> jax.Array:
    order = jnp.arange(size, dtype=jnp.int32)
    return jax.vmap(lambda key: jax.random.permutation(key, order))(jax.random.split(key, number))


def _check_sizes(name: str, data: Any, batch_size: int, **counts: int) -> int:
    """The number of examples; raises unless batches of this size can be drawn from them."""
    size = data if isinstance(data, int | np.integer) and not isinstance(data, bool) else _examples_in(name, data)
    for label, value in {"batch_size": batch_size, **counts}.items():
        _check_whole(name, label, value)
        if value < 1:
            raise ValueError(f"noise.{name}: {label} is {value}; expected at least 1")
    if size < 1:
        raise ValueError(f"noise.{name}: data has {size} examples; expected at least 1")
    if batch_size > size:
        raise ValueError(
            f"noise.{name}: batch_size is {batch_size}, more than the data's {size} examples; expected 1 to {size}"
        )
    return int(size)


def _check_whole(name: str, label: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"noise.{name}: {label} is {reprlib.repr(value)}; expected an integer")


def _examples_in(name: str, data: Any, axis: str = "examples") -> int:
    """The length of the leading axis that the leaves of data have in common."""
    shapes = {
        jax.tree_util.keystr(path) or "the root": np.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(data)
    }
    lengths = {shape[:1] for shape in shapes.values()}
    if len(lengths) != 1 or lengths == {()}:
        listed = ", ".join(f"{path} has shape {shape}" for path, shape in list(shapes.items())[:5])
        raise ValueError(
            f"noise.{name}: {listed or 'there are no arrays'}; expected arrays with a leading axis of {axis}, of one "
            f"length"
        )
    return lengths.pop()[0]
