"""The gradient noise scale: what measuring it costs, and whether it is right.

Run `python -m benchmarks noise`, with `--picture FILE` for the scale over training, and `--quick` for a rough look.

1. A training step with `measure_noise` in its chain against one without it, of equal micro-batches: the median of the
   ratios of interleaved timings, with their quartiles.
2. The noise scale on handwritten digits over training, from its definition, the gradients of all examples one by one,
   and as the link measures it from 8 micro-batches: over 200 batches at the same parameters, and on the way there.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdx
from benchmarks.measure import Ratio, calls_for, came_out, interleaved, ratio, table
from gdx import noise
from gdx.demo.problems import Problem, digits, network

STEPS, EVERY = 400, 40
BATCH, MICRO, RATE, DECAY = 128, 8, 0.1, 0.98
STILL = 200
COSTS = (((64, 128, 10), 64), ((64, 512, 512, 10), 512), ((64, 1024, 1024, 10), 512))
TARGET = 0.2
SIZES, RATES = (4, 8, 16, 32, 64, 128, 256), np.geomspace(0.05, 1.6, 11)


def micro_batched(loss: Callable, number: int) -> Callable:
    """Loss and gradient by micro-batches, and nothing else: what `noise.value_and_grad` adds a norm to."""
    mean = optax.microbatching.AccumulationType.MEAN

    def value_and_grad(params: Any, batch: jax.Array) -> Any:
        on_one = functools.partial(jax.value_and_grad(loss), params)
        return optax.microbatching.microbatch(on_one, 0, len(batch) // number, (mean, mean))(batch)

    return value_and_grad


def steps_of(problem: Problem, widths: tuple[int, ...], batch_size: int, way: str) -> Callable[[], None]:
    """Some training steps in one call, of a network with these widths."""
    params = network(jax.random.key(0), widths)
    batches = noise.epochs(jax.random.key(1), problem.train, batch_size, 20)
    tx: gdx.Transform = gdx.adamw(1e-3)
    measured = noise.value_and_grad(problem.loss_on, MICRO)
    plain = jax.value_and_grad(problem.loss_on) if way == "whole batch" else micro_batched(problem.loss_on, MICRO)
    if way == "measured":
        tx = gdx.chain(noise.measure_noise(), tx)

    def step(carry: tuple, batch: jax.Array) -> Any:
        params, state = carry
        if way == "measured":
            (value, micro_batches), gradients = measured(params, batch)
            updates, state = tx.update(gradients, state, params, micro_batches=micro_batches)
        else:
            value, gradients = plain(params, batch)
            updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), value

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, batches))
    carry = params, tx.init(params)
    return lambda: jax.block_until_ready(run(carry)[1])


def costs(rounds: int) -> list[tuple[str, int, int, Ratio, Ratio]]:
    """The rows of the first table."""
    problem = digits()
    rows: list[tuple[str, int, int, Ratio, Ratio]] = []
    for widths, batch_size in COSTS:
        ways = {way: steps_of(problem, widths, batch_size, way) for way in ("whole batch", "micro-batches", "measured")}
        calls = calls_for(ways["micro-batches"], duration=0.05)

        def repeated(way: str, ways: dict = ways, calls: int = calls) -> None:
            for _ in range(calls):
                ways[way]()

        seconds = interleaved({way: functools.partial(repeated, way) for way in ways}, rounds)
        with_link, micro = ratio(seconds, "measured", "micro-batches"), ratio(seconds, "micro-batches", "whole batch")
        rows.append(("-".join(map(str, widths)), batch_size, batch_size // MICRO, with_link, micro))
    return rows


class History(NamedTuple):
    """What was measured over training, before every so many steps.

    Attributes:
      losses: the training loss on all examples, of shape (looks,).
      direct: the `Noise` from its definition.
      still: the mean of the link's estimates over batches at the same parameters.
      moving: the link's averages in training after each step, of shape (looks, steps between them).
    """

    losses: jax.Array
    direct: noise.Noise
    still: noise.Noise
    moving: noise.Noise


def history(problem: Problem) -> History:
    """Trains, and looks every few steps."""
    size = len(problem.train[0])
    value_and_grad = noise.value_and_grad(problem.loss_on, MICRO)
    link, sgd = noise.measure_noise(DECAY), gdx.sgd(RATE)
    mean = noise.measure_noise(1 - 1e-4)

    def drawn(key: jax.Array, steps: int) -> jax.Array:
        return noise.epochs(key, size, BATCH, -(-steps // (size // BATCH)))[:steps]

    def measured(carry: tuple, batch: jax.Array, link: gdx.Transform, tx: gdx.Transform) -> Any:
        params, state = carry
        tx = gdx.chain(link, tx)
        (_, micro_batches), gradients = value_and_grad(params, batch)
        updates, state = tx.update(gradients, state, params, micro_batches=micro_batches)
        return (optax.apply_updates(params, updates), state), state[0].noise

    def look(carry: tuple, key: jax.Array) -> Any:
        params, _ = carry
        still_key, moving_key = jax.random.split(key)
        still = functools.partial(measured, link=mean, tx=gdx.sgd(0.0))
        start = params, gdx.chain(mean, gdx.sgd(0.0)).init(params)
        averages = jax.lax.scan(still, start, drawn(still_key, STILL))[1]
        each = jax.lax.map(lambda i: jax.grad(problem.loss_on)(params, i[None]), jnp.arange(size), batch_size=64)
        moving = functools.partial(measured, link=link, tx=sgd)
        carry, on_the_way = jax.lax.scan(moving, carry, drawn(moving_key, EVERY))
        last = jax.tree.map(lambda x: x[-1], averages)
        loss = problem.loss(params, problem.train)
        return carry, History(loss, *(n.within(size) for n in (noise.of_gradients(each), last, on_the_way)))

    params = problem.start(jax.random.key(0))
    carry = params, gdx.chain(link, sgd).init(params)
    keys = jax.random.split(jax.random.key(1), STEPS // EVERY + 1)
    return jax.tree.map(np.asarray, jax.jit(lambda carry: jax.lax.scan(look, carry, keys)[1])(carry))


def costs_table(rounds: int) -> str:
    header = ("network", "batch", "micro-batch", "with link / without", "micro-batches / whole batch")
    found = costs(rounds)
    return f"{table(header, found)}\n\n{came_out('a step with the link', 1.05, {row[0]: row[3] for row in found})}"


def history_table(found: History) -> str:
    on_the_way = ["-", *(f"{scale:.0f}" for scale in np.asarray(found.moving.scale)[:-1, -1])]
    columns = (found.losses, *found.direct, np.asarray(found.direct.scale), np.asarray(found.still.scale))
    forms = ("{:.3f}", "{:.2g}", "{:.3g}", "{:.0f}", "{:.0f}")
    rows = [
        (at, *(form.format(x) for form, x in zip(forms, values)), last)
        for at, *values, last in zip(range(0, STEPS + 1, EVERY), *columns, on_the_way)
    ]
    header = ("step", "training loss", "|G|^2", "tr Sigma", "scale", "by the link, standing", "by the link, moving")
    return table(header, rows)


def picture(found: History, examples: int, path: str) -> None:
    """Writes the noise scale over training."""
    from matplotlib.figure import Figure

    from gdx import plot

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    link, direct = f"link, {MICRO} micro-batches of {BATCH // MICRO}", "every example by itself"
    scales = {link: np.asarray(found.moving.scale)[:-1].ravel(), direct: np.asarray(found.direct.scale)}
    steps = {link: np.arange(1, STEPS + 1), direct: np.arange(0, STEPS + 1, EVERY)}
    plot.noise_scale(scales, figure.subplots(), steps=steps, batch_size=BATCH, examples=examples)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Prints the tables, and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", metavar="FILE", help="where to write the noise scale over training")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    args = parser.parse_args()
    print(costs_table(8 if args.quick else 30), end="\n\n")
    problem = digits()
    found = history(problem)
    print(history_table(found))
    if args.picture:
        picture(found, len(problem.train[0]), args.picture)
        print(f"picture: {args.picture}")
