"""The noise scale while training: from micro-batches, by a link that changes nothing."""

import functools
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx.arguments import check_function
from gdx.checks import check_floating, check_state
from gdx.fields import Scalar, hyperparameter, to_integer
from gdx.noise.batches import Batches
from gdx.noise.estimates import Noise, estimate
from gdx.numerics import accurate, squared_norm
from gdx.training import Loss
from gdx.transform import Transform
from gdx.trees import leading_axis


class MicroBatches(NamedTuple):
    """What `measure_noise` is told about the micro-batches that a gradient is the mean of.

    Attributes:
      squared_norm: the mean of the squared norms of their gradients.
      size: how many examples each of them has; where weights make them unequal, how many on average.
      number: how many there are, at least 2.
    """

    squared_norm: jax.Array
    size: Any
    number: Any


def value_and_grad(loss: Loss, number: int) -> Callable[[Any, Any], tuple[tuple[jax.Array, MicroBatches], Any]]:
    """As `jax.value_and_grad`, one micro-batch after the other, and what `measure_noise` needs beside it.

    The batch is split into micro-batches by `optax.microbatching`, so that the memory is that of one. Their mean
    is the gradient of the batch, for a loss that is a mean over examples.

    Where the batch is `Batches`, as `padded_epochs` gives them, and the loss the mean with their weights, each
    micro-batch counts by the sum of its weights: value and gradient are those of the batch, and the noise is
    measured without bias, from the micro-batches that have an example (NaN, which `measure_noise` leaves out, if
    that is only one). Weights anywhere else in a batch are not seen: there each micro-batch counts alike.

    Args:
      loss: the mean loss of parameters on a batch, a real scalar.
      number: how many micro-batches, at least 2.

    Returns:
      A function of the parameters and a batch, a tree of arrays with a leading axis of examples (their indices
      for instance), that returns `((value, micro_batches), gradients)`.

    Raises:
      ValueError: number is less than 2, or does not divide the batch, or the batch has no one axis of examples.
      TypeError: number is no integer.

    >>> import gdx, jax.numpy as jnp
    >>> value_and_grad = gdx.noise.value_and_grad(lambda theta, x: jnp.mean((theta - x) ** 2), number=2)
    >>> (value, micro_batches), gradient = value_and_grad(jnp.zeros(()), jnp.array([1.0, 3.0, 1.0, 3.0]))
    >>> value.item(), gradient.item(), micro_batches.squared_norm.item()  # of -2 and -6: every second example each
    (5.0, -4.0, 20.0)
    """
    check_function("noise.value_and_grad: loss", loss, "the parameters", "a batch")
    if to_integer("noise.value_and_grad: number", number) < 2:
        raise ValueError(f"noise.value_and_grad: number is {number}; expected at least 2 micro-batches to compare")

    def wrapped(params: Any, batch: Any) -> tuple[tuple[jax.Array, MicroBatches], Any]:
        check_floating("noise.value_and_grad: the parameter", params)
        size = leading_axis("noise.value_and_grad:", batch, "examples")
        if not size or size % number:
            raise ValueError(
                f"noise.value_and_grad: a batch of {size} examples does not split into {number} micro-batches; "
                f"expected a positive multiple of {number}"
            )

        def on_one(part: Any) -> tuple[Any, jax.Array]:
            value, gradients = jax.value_and_grad(loss)(params, part)
            # behind a condition, or XLA on CPUs works the gradients out twice
            nothing = jnp.full([], jnp.nan, jnp.result_type(float))
            small = jax.lax.cond(jnp.isfinite(value), squared_norm, lambda _: nothing, gradients)
            found = value, gradients, small
            if not isinstance(part, Batches):
                return found, jnp.ones([])
            share = jnp.sum(part.weights, dtype=float) * number / jnp.sum(batch.weights, dtype=float)
            return jax.tree.map(functools.partial(_times, share), found), (share > 0).astype(share.dtype)

        totals, filled = optax.microbatching.microbatch(on_one, 0, size // number)(batch)
        value, gradients, small = jax.tree.map(lambda x: x / np.array(number, x.dtype), totals)
        if not isinstance(batch, Batches):
            return (value, MicroBatches(small, size // number, number)), gradients
        # one alone has none to be compared with
        known, mean_size = filled > 1, jnp.sum(batch.weights, dtype=float) / filled
        several = jnp.where(known, small, jnp.nan), jnp.where(known, mean_size, 1), jnp.where(known, filled, 2)
        return (value, MicroBatches(*several)), gradients

    return wrapped


def _times(share: jax.Array, mean: jax.Array) -> jax.Array:
    wide = accurate(mean)
    # the mean of no examples is NaN
    return jnp.where(share > 0, share.astype(wide.dtype) * wide, 0).astype(mean.dtype)


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
      ValueError: decay is outside [0, 1), or update is called with fewer than 2 micro-batches or empty ones.
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

    def init_tree(self, params: optax.Params) -> NoiseState:
        dtype = jnp.result_type(float)
        return NoiseState(jnp.zeros([], jnp.int32), Noise(jnp.zeros([], dtype), jnp.zeros([], dtype)))

    def update_tree(
        self, updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, NoiseState]:
        check_state(self, state, NoiseState)
        micro_batches = _micro_batches(extra_args)
        if micro_batches is None:
            return updates, state
        small, size, number = micro_batches
        found = estimate(small, squared_norm(updates), small_batch=size, big_batch=size * number)
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
