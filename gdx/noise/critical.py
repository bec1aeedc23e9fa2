"""The critical batch size, measured: branches of one run at several batch sizes, in one program."""

import functools
import itertools
import math
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx.arguments import check_function, check_not_traced, number
from gdx.fields import is_key, is_number, refuse, text, to_integer, uncalled
from gdx.noise.batches import epochs, examples_in
from gdx.population import mean_and_error, stack
from gdx.progress import Progress
from gdx.sweeping import OfSeed, no_results, sweep_of
from gdx.training import Loss
from gdx.transform import Transform, value
from gdx.values import held_as


class CriticalBatchSize(NamedTuple):
    """What branches of a run at several batch sizes have shown.

    Attributes:
      batch_size: the critical one: where `excess` gets above 0, on a straight line over the logarithm of the batch
        size; the largest of those tried where it does not.
      low: the largest of those tried up to which excess is below 0 with two errors added; else the smallest.
      high: the smallest of those tried where it is above 0 with two errors taken off; inf where none is.
      batch_sizes: those tried, of shape (sizes,).
      factors: of shape (sizes,): which of the factors of the learning rate was best.
      losses: of shape (sizes, seeds): with the best factor, the mean over the last quarter of the examples.
      allowed: of shape (sizes, seeds): the largest loss that is allowed there.
      excess: of shape (sizes,): the mean over the seeds of how far the loss is above it; inf where all diverged.
      error: of shape (sizes,): the standard error of that mean, of differences seed by seed; NaN where excess is inf.
      diverged: of shape (sizes, factors): whether a seed did.
    """

    batch_size: float
    low: float
    high: float
    batch_sizes: np.ndarray
    factors: np.ndarray
    losses: np.ndarray
    allowed: np.ndarray
    excess: np.ndarray
    error: np.ndarray
    diverged: np.ndarray


def critical_batch_size(
    loss: Loss,
    tx: Transform,
    params: OfSeed,
    data: Any,
    batch_sizes: Sequence[int],
    *,
    examples: int,
    keys: Any,
    exponent: float | None = None,
    factors: Sequence[float] = (0.5, 1.0, 2.0),
    tolerance: float | None = None,
    model_state: OfSeed = None,
    chunk_size: int | None = None,
    progress: Progress | bool = False,
) -> CriticalBatchSize:
    r"""Measures the critical batch size: by branches of a run that see the same examples in batches of several sizes.

    Each branch starts from `params` with a new state, and trains on the same examples in the same order, in batches of
    $B_k = k B_1$ with the learning rate $f k^a \eta$, where $f$ is the best of a few factors. Its loss $L_k$ is the
    mean over the last quarter of the examples. The critical batch size is the largest up to which

    $$ L_k \le L_{1/2}, \qquad \text{or with a tolerance} \qquad L_k \le \min_{j \le k} L_j + \epsilon, $$

    and between two that were tried, where a straight line gets there. $L_{1/2}$ is that of one more branch, with the
    smallest batches, which makes no more steps after half of the examples. (After 7/16, to be exact: $L_k$ is a mean
    over a quarter of the examples, and a quarter that ends at half has its middle there.) So by default it is the batch
    size that takes twice the examples of small batches, which is what McCandlish et al. call critical. With a small
    tolerance it is the largest batch that loses nothing (Merrill et al. take 0.01).

    That is measured, for this optimizer and these parameters. `Noise.scale` is cheap and a prediction: where curvature
    limits the rate of large batches, not noise, it is far off (on the digits 14 to 31 times). What it predicts is the
    long way of tuning the rate of each batch size until a loss is reached; of that result, this was within 1.5 times
    at a tenth to a quarter of the examples (`python -m benchmarks noise --tables critical`).

    All branches are members of one `gdx.sweep`: each takes gradients of $B_1$ examples at a time, and a step with the
    mean of every $k$ of them, by `optax.MultiSteps`. So it costs sizes times factors times seeds times examples
    gradients, and memory for so many copies of the parameters, of the state and of a gradient (`chunk_size` bounds
    how many there are at a time).

    Limits: the loss is taken before the step that it makes, so that a large batch is behind by half of it. States begin
    anew. Where the factor that was best at the smallest batch is the first or the last, its rate was not found: try
    others.

    Args:
      loss: the mean loss of parameters on examples, as in `gdx.train`; its batch is their indices, int32 of shape
        (B_1,).
      tx: an optimizer of gdx's, with about the best learning rate for the smallest batch.
      params: where the run is, as in `gdx.sweep`: the same for all seeds, or made by a function of a key.
      data: a tree of arrays with a leading axis of examples, or the number of examples: as in `epochs`.
      batch_sizes: at least two, ascending, each a multiple of the first: such as (8, 16, 32, 64).
      examples: $N$, how many each branch is trained on, in shuffled epochs: a multiple of every batch size, and at
        least 4 of the largest.
      keys: a random key for each seed, at least two: of the order of the examples.
      exponent: $a$; None for 1/2 where the optimizer has a `b2`, as Adam and its kin, and 1 where not, as SGD.
      factors: $f$, above 0, ascending: (1.0,) for the rule alone.
      tolerance: $\epsilon$, in units of the loss, above 0; None as above.
      model_state, chunk_size, progress: as in `gdx.sweep`.

    Raises:
      TypeError: loss is no function of so many arguments; tx is none of gdx's; a number is none; keys are no random
        keys; it is called in a compiled function; as `gdx.sweep`.
      ValueError: batch sizes or factors are not as said; there are more examples in a batch than in data; examples is
        no such multiple; there are less than two keys; tx has no learning_rate, or one that is a schedule or an array;
        tolerance is not above 0; or, after training, the smallest batches diverged, or gained nothing in the second
        half, so that no tolerance follows.

    Sources: branches, and how their rates are scaled: Merrill et al., Critical Batch Size Revisited (2025), section 3.
    Twice the examples: McCandlish et al., An Empirical Model of Large-Batch Training (2018), eq. 2.11. Exponent 1/2:
    Malladi et al., On the SDEs and Scaling Rules for Adaptive Gradient Algorithms (2022).

    >>> import gdx, jax, jax.numpy as jnp
    >>> data, curvature = jax.random.normal(jax.random.key(0), (2048, 9)), jnp.geomspace(1, 100, 9)
    >>> def loss(theta, examples):  # the mean loss on the examples with these indices
    ...     return jnp.mean((theta[None] - gdx.noise.take(data, examples)) ** 2 @ curvature)
    >>> found = gdx.noise.critical_batch_size(
    ...     loss, gdx.sgd(2e-3), jnp.full(9, 3.0), data, (1, 2, 4, 8, 16), examples=512,
    ...     keys=jax.random.split(jax.random.key(1), 4))
    >>> found.low <= found.batch_size <= found.high, found.excess.shape
    (True, (5,))
    """
    name = "noise.critical_batch_size"
    check_not_traced(
        name, (tx, params, data, batch_sizes, examples, keys, exponent, factors, tolerance, model_state, chunk_size)
    )
    between = () if model_state is None else ("the model_state",)
    check_function(f"{name}: loss", loss, "the parameters", *between, "indices of examples")
    total = examples_in(f"{name}:", data)
    sizes, examples = _check_sizes(name, batch_sizes, examples, total)
    if not (is_key(keys) and np.ndim(keys) == 1):
        refuse(f"{name}: keys", keys, "random keys, such as jax.random.split(jax.random.key(0), 3) for three seeds")
    if len(keys) < 2:
        raise ValueError(f"{name}: there is {len(keys)} key; expected at least 2, to see how results scatter")
    number(f"{name}: tolerance", tolerance, "a number above 0, in units of the loss", above=0, optional=True)
    factors = _check_factors(name, factors)
    rates = _rates(name, tx)
    if exponent is None:
        exponent = 0.5 if held_as(tx, "b2") else 1.0
    expected = "a finite number, such as 1 for a rate in proportion to the batch size"
    if not math.isfinite(number(f"{name}: exponent", exponent, expected)):
        refuse(f"{name}: exponent", exponent, expected, ValueError)

    def member(size: int, factor: float, share: float = 1.0) -> Transform:
        by = factor * (size / sizes[0]) ** exponent
        scaled = tx.replace(**{name: rate * by for name, rate in rates.items()})
        return _accumulated(scaled, size // sizes[0], round(share * examples / size))

    branches = [(size, 1.0) for size in sizes] + [(sizes[0], 7 / 16)] * (tolerance is None)
    members = stack(member(size, factor, share) for size, share in branches for factor in factors)
    batches = _batches(total, sizes[0], examples)
    around: dict[str, Any] = {"model_state": model_state, "chunk_size": chunk_size, "progress": progress}
    swept, done = sweep_of(name, loss, members, params, batches, keys=keys, evaluate=no_results, **around)
    if done < 1:
        raise KeyboardInterrupt(f"{name}: interrupted after {done:.3g} of the steps, which show nothing")
    check_not_traced(name, swept.losses)  # the loss may have closed over what is traced
    steps = swept.losses.shape[-1]
    losses = np.asarray(swept.losses[..., steps - steps // 4 :], float).mean(axis=-1)
    losses = losses.reshape(len(branches), len(factors), len(keys))
    return _found(name, np.array(sizes), np.array(factors), losses, tolerance)


@value
def _accumulated(tx: optax.GradientTransformation, number: float, steps: float) -> Any:
    """So many steps of the transform, each with the mean of this number of gradients, and then none."""

    def until_next(step: Any) -> jax.Array:
        return jnp.where(step < jnp.asarray(steps), jnp.asarray(number), 2**30).astype(jnp.int32)

    return optax.MultiSteps(tx, until_next, accumulator_dtype=jnp.result_type(float))


# the same function again finds the program that was compiled with it
@functools.lru_cache(maxsize=64)
def _batches(total: int, size: int, examples: int) -> Callable[[jax.Array], jax.Array]:
    number, steps = -(-examples // (total // size * size)), examples // size
    return lambda key: epochs(key, total, size, number)[:steps]


def _found(
    name: str, sizes: np.ndarray, factors: np.ndarray, losses: np.ndarray, tolerance: float | None
) -> CriticalBatchSize:
    """The result, of losses of shape (branches, factors, seeds), one for each size and one stopped if no tolerance."""
    diverged = ~np.isfinite(losses).all(axis=-1)
    means = np.where(diverged, np.inf, np.where(diverged[..., None], 0, losses).mean(axis=-1))
    best, lowest = means.argmin(axis=1), means.min(axis=1)
    losses, number = losses[np.arange(len(losses)), best], len(sizes)
    if not np.isfinite(lowest[0]):
        raise ValueError(f"{name}: batches of {sizes[0]} diverged with every factor; expected a lower learning rate")
    if tolerance is None:
        allowed = losses[[number] * number]
        if not lowest[0] < lowest[number]:
            raise ValueError(
                f"{name}: batches of {sizes[0]} gained nothing from the second half of the examples, so that no batch "
                f"can be told to take twice as many; expected more examples, or tolerance=..., in units of the loss"
            )
    else:
        allowed = losses[[lowest[: i + 1].argmin() for i in range(number)]] + tolerance
    losses = losses[:number]
    excess, error = np.full(number, np.inf), np.full(number, np.nan)
    found = np.isfinite(lowest[:number])
    excess[found], error[found] = mean_and_error((losses - allowed)[found])
    low = _first(~(excess + 2 * error <= 0)) - 1
    high = _first(~(np.where(found, excess - 2 * error, np.inf) <= 0))
    return CriticalBatchSize(
        _crossing(sizes, excess),
        float(sizes[max(low, 0)]),
        float(sizes[high]) if high < number else math.inf,
        *(sizes, factors[best[:number]], losses, allowed, excess, error, diverged[:number]),
    )


def _first(where: np.ndarray) -> int:
    """The first place where it is so; their number if it is nowhere."""
    return int(np.append(where, True).argmax())


def _crossing(sizes: np.ndarray, excess: np.ndarray) -> float:
    """The batch size at which the excess, below 0 at the first, gets above it; the last where it does not."""
    i = _first(~(excess <= 0))
    if i == len(sizes):
        return float(sizes[-1])
    share = excess[i - 1] / (excess[i - 1] - excess[i])
    return float(sizes[i - 1] * (sizes[i] / sizes[i - 1]) ** share)


def _check_sizes(name: str, batch_sizes: Any, examples: Any, total: int) -> tuple[list[int], int]:
    """The batch sizes and the number of examples, checked."""
    expected = "at least two batch sizes, ascending, each a multiple of the first, such as (8, 16, 32, 64)"
    sizes = [
        to_integer(f"{name}: batch_sizes[{i}]", size, minimum=1)
        for i, size in enumerate(_listed(f"{name}: batch_sizes", batch_sizes, expected))
    ]
    if len(sizes) < 2 or any(b <= a or b % sizes[0] for a, b in itertools.pairwise(sizes)):
        raise ValueError(f"{name}: batch_sizes is {sizes}; expected {expected}")
    if sizes[-1] > total:
        raise ValueError(f"{name}: batch_sizes has {sizes[-1]}, more than the data's {total} examples")
    examples, common = to_integer(f"{name}: examples", examples), math.lcm(*sizes)
    least = -(-4 * sizes[-1] // common) * common
    if examples < least or examples % common:
        raise ValueError(
            f"{name}: examples is {examples}; expected a multiple of {common}, so that they are whole batches of every "
            f"size, and at least {least}, for 4 steps of the largest: such as "
            f"{max(least, round(examples / common) * common)}"
        )
    return sizes, examples


def _check_factors(name: str, factors: Any) -> list[float]:
    expected = "numbers above 0, ascending, such as (0.5, 1.0, 2.0)"
    found = [
        number(f"{name}: factors[{i}]", factor, "a number above 0", above=0)
        for i, factor in enumerate(_listed(f"{name}: factors", factors, expected))
    ]
    if not found or any(b <= a for a, b in itertools.pairwise(found)):
        raise ValueError(f"{name}: factors is {found}; expected {expected}")
    return found


def _listed(label: str, values: Any, expected: str) -> Sequence[Any]:
    values = np.asarray(values) if isinstance(values, jax.Array) else values
    is_list = isinstance(values, list | tuple | range) or (isinstance(values, np.ndarray) and values.ndim == 1)
    return values if is_list else refuse(label, values, expected)


def _rates(name: str, tx: Any) -> dict[str, float]:
    """The learning rates by name."""
    if not isinstance(tx, Transform):
        raise TypeError(
            f"{name}: tx is {reprlib.repr(tx)}; expected one of gdx's optimizers, such as gdx.sgd(0.1) or "
            f"gdx.value(optax.lion)(1e-4){uncalled(tx)}"
        )
    found = held_as(tx, "learning_rate")
    if not found or not all(map(is_number, found.values())):
        shown = ", ".join(f"{name}={text(x)}" for name, x in found.items()) or "no learning_rate"
        raise ValueError(
            f"{name}: tx, {tx!r}, has {shown}; expected a number, which is multiplied for larger batches: no schedule, "
            f"which they would go through at another pace, and no batch of optimizers"
        )
    return {name: float(rate) for name, rate in found.items()}
