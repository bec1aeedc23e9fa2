"""The training loop: chunks of steps in one compiled function whose argument is the optimizer."""

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import gdx
from gdx.demo.problems import Arrays, Problem

REPORTS = 60
LONGEST_CHUNK = 100  # also what a Ctrl-C has to wait for


class Report(NamedTuple):
    """Where a run is after some steps.

    Attributes:
      step: the number of steps taken.
      metrics: the loss, with the test accuracy or the distance to the minimum.
      seconds: since the run began, compiling included.
      compilations: how many times the steps have been compiled for this run.
      points: the parameters after each step since the last report, of a problem without data.
    """

    step: int
    metrics: dict[str, float]
    seconds: float
    compilations: int
    points: np.ndarray | None

    @property
    def diverged(self) -> bool:
        return not math.isfinite(self.metrics["loss"])


def train(problem: Problem, tx: gdx.Transform, *, steps: int, batch_size: int, seed: int) -> Iterator[Report]:
    """Trains from the start, and reports the start, then every few steps until the last or a divergence.

    Args:
      problem: what is minimised.
      tx: the optimizer.
      steps: how many steps are taken.
      batch_size: examples in a batch; 0 for a problem without data.
      seed: decides the initial parameters and the batches.
    """
    begin = time.perf_counter()
    traces: Counter[str] = Counter()
    advance = compiled_steps(problem, traces)
    params = problem.start(jax.random.key(seed))
    carry: Any = (params, tx.init(params))
    size = len(problem.train[0]) if problem.train else 0
    stream = batches(size, batch_size, np.random.default_rng(seed))
    length = min(max(steps // REPORTS, 1), LONGEST_CHUNK)

    # the first call takes no step: it compiles, and evaluates the start
    for done in itertools.chain([0], range(length, steps + length, length)):
        active = np.arange(done - length, done) < steps if done else np.zeros(length, bool)
        chunk = np.stack(list(itertools.islice(stream, length))) if done else np.zeros((length, batch_size), np.int32)
        carry, metrics, points = advance(tx, carry, problem.train, problem.test, chunk, active)
        report = Report(
            step=min(done, steps),
            metrics={name: float(value) for name, value in metrics.items()},
            seconds=time.perf_counter() - begin,
            compilations=traces[type(tx).__name__],
            points=None if problem.train else np.asarray(points)[active],
        )
        yield report
        if report.diverged:
            return


def compiled_steps(problem: Problem, traces: Counter[str]) -> Callable[..., Any]:
    """A chunk of steps as one compiled function; each compilation of it is counted in `traces`.

    The optimizer is an argument, so its hyperparameters change without compiling again. Steps that
    are not active are skipped: the last chunk fits the same program as the others.
    """

    @jax.jit
    def advance(tx: gdx.Transform, carry: tuple, train: Arrays, test: Arrays, chunk: Any, active: Any) -> tuple:
        traces[type(tx).__name__] += 1  # runs only while JAX traces, once for each compilation

        def take(carry: tuple, examples: jax.Array) -> tuple:
            params, state = carry
            batch = jax.tree.map(lambda column: column[examples], train)
            gradients = jax.grad(problem.loss)(params, batch)
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        def step(carry: Any, inputs: Any) -> tuple[Any, Any]:
            examples, is_active = inputs
            carry = jax.lax.cond(is_active, take, lambda carry, examples: carry, carry, examples)
            return carry, (None if train else carry[0])

        carry, points = jax.lax.scan(step, carry, (chunk, active))
        return carry, problem.metrics(carry[0], train, test), points

    return advance


def batches(size: int, batch_size: int, generator: np.random.Generator) -> Iterator[np.ndarray]:
    """Endless passes over the examples, newly shuffled each; a pass drops what does not fill a batch."""
    while True:
        order = generator.permutation(size).astype(np.int32)
        for start in range(0, size - batch_size + 1, max(batch_size, 1)):
            yield order[start : start + batch_size]
