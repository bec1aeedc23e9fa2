"""Range tests: which learning rates train, by a short run of each."""

import math
import reprlib
from typing import Any, NamedTuple

import numpy as np

from gdx.arguments import check_not_traced
from gdx.fields import is_number, text, to_integer
from gdx.population import stack
from gdx.progress import Progress
from gdx.sweeping import no_results, sweep_of
from gdx.training import Loss, check_call
from gdx.transform import Transform
from gdx.values import held_as


class RangeTest(NamedTuple):
    """Loss against learning rate after a few steps.

    Attributes:
      learning_rates: of shape (points,), ascending.
      losses: of shape (points,): the mean loss of the last tenth of the steps; inf where the run diverged.
      start: the loss before the first step.
      edge: the rate from which on training fails: the geometric mean of the last rate that ends below
        `start` and the next, of those from the best rate upwards; inf if none fails.
      suggested: the rate with the least loss.
    """

    learning_rates: np.ndarray
    losses: np.ndarray
    start: float
    edge: float
    suggested: float


def range_test(
    loss: Loss,
    tx: Transform,
    params: Any,
    batches: Any,
    *,
    low: float = 1e-5,
    high: float = 10.0,
    points: int = 48,
    chunk_size: int | None = None,
    model_state: Any = None,
    progress: Progress | bool = False,
) -> RangeTest:
    """Finds the learning rates that train: one short run for each, all in one program.

    Smith's test raises the rate during one run, so that each rate meets parameters that the ones before
    have made. Here every rate starts from `params`, which costs no more where runs share a program.
    The best rate of a short run is an upper estimate for a long one, which ends with smaller steps. Ctrl-C
    ends it with KeyboardInterrupt, and with `progress` soon: a test that is not done suggests nothing.

    Args:
      loss, params, batches, model_state, chunk_size, progress: as in `gdx.sweep`; a few dozen steps do.
      tx: the optimizer, whose `learning_rate` is replaced. Of several learning rates the largest is meant, and the
        others keep their ratios to it.
      low, high: the smallest and the largest rate; the others lie between them at equal ratios.
      points: how many rates are tried, at least 2.

    Raises:
      TypeError: tx is none of gdx's; points is no integer; it is called in a compiled function; as `gdx.train`.
      ValueError: tx is a batch, or has no hyperparameter called learning_rate, or several of which
        one is no number, or all are 0; low and high are not numbers with 0 < low < high;
        points is less than 2; the loss is not finite at the start; no rate ends below the loss that it started from.

    Source: Smith, Cyclical Learning Rates for Training Neural Networks (2017), section 3.3.

    >>> import gdx, jax.numpy as jnp
    >>> bowl = lambda theta, batch: 2 * jnp.sum(theta**2)  # its curvature is 4, so that 0.25 is best and 0.5 the edge
    >>> found = gdx.range_test(bowl, gdx.gradient_descent(0.1), jnp.ones(2), jnp.zeros((20, 1)), points=99)
    >>> 0.24 < found.suggested < 0.26, 0.45 < found.edge < 0.55
    (True, True)
    """
    check_not_traced("range_test", (tx, params, batches, low, high, points, model_state))
    check_call("range_test", loss, tx, params, batches, model_state)
    if not isinstance(tx, Transform):
        raise TypeError(f"range_test: tx is {reprlib.repr(tx)}; expected one of gdx's optimizers, such as gdx.sgd(0.1)")
    if not (is_number(low) and is_number(high) and 0 < low < high < math.inf):
        raise ValueError(f"range_test: low is {low!r} and high is {high!r}; expected numbers, 0 < low < high")
    rates = np.geomspace(low, high, to_integer("range_test: points", points, minimum=2))
    ratios = _ratios(tx)
    batch = stack(tx.replace(**{name: ratio * rate for name, ratio in ratios.items()}) for rate in rates)
    around = {"model_state": model_state, "chunk_size": chunk_size, "progress": progress}
    result, done = sweep_of("range_test", loss, batch, params, batches, evaluate=no_results, **around)
    if done < 1:
        raise KeyboardInterrupt(f"range_test: interrupted after {done:.3g} of the steps, which suggest nothing")
    check_not_traced("range_test", result.losses)  # the loss may have closed over what is traced
    history = np.asarray(result.losses, float)
    start = float(history[0, 0])
    if not math.isfinite(start):
        raise ValueError(
            f"range_test: the loss is {start} at the start, before any step; expected params and batches where it is "
            f"finite"
        )
    losses = np.where(result.diverged, np.inf, history[:, -max(history.shape[1] // 10, 1) :].mean(axis=1))
    best = int(np.argmin(losses))
    if not losses[best] < start:
        raise ValueError(
            f"range_test: no learning rate from {low:g} to {high:g} ends below the loss of the start, {start:g}; "
            f"try others, or give batches of more steps"
        )
    fails = np.flatnonzero(~(losses[best:] < start))
    edge = math.sqrt(rates[best + fails[0] - 1] * rates[best + fails[0]]) if len(fails) else math.inf
    return RangeTest(rates, losses, start, edge, float(rates[best]))


def _ratios(tx: Transform) -> dict[str, float]:
    """Each learning rate's ratio to the largest, by name."""
    found = held_as(tx, "learning_rate")
    shown = ", ".join(f"{name}={text(x)}" for name, x in found.items())
    if not found:
        raise ValueError(
            f"range_test: {tx!r} has no learning_rate to try; give it one, as in "
            f"gdx.chain(tx, gdx.scale_by_learning_rate(0.1))"
        )
    if any(map(np.ndim, found.values())):
        raise ValueError(f"range_test: tx is a batch, of {shown}; expected one optimizer, as in gdx.unstack(tx)[0]")
    if len(found) == 1:
        return dict.fromkeys(found, 1.0)
    if not all(map(is_number, found.values())) or not any(found.values()):
        raise ValueError(
            f"range_test: tx has {shown}; expected numbers, not all 0, to keep their ratios to the largest"
        )
    return {name: x / max(found.values()) for name, x in found.items()}
