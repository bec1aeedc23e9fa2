"""The gradient noise scale: what measuring it costs, whether it is right, and whether it predicts the critical batch size.

Run `python -m benchmarks.noise`, with `--picture FILE` for the noise scale over training, and `--quick` for a rough look.

1. A training step with `measure_noise` in its chain against one without it, of equal micro-batches: the median of the
   ratios of interleaved timings, with their quartiles.
2. The noise scale on handwritten digits over training, as the link measures it from 8 micro-batches and from its
   definition, the gradients of all examples one by one.
3. The fewest steps to a training loss for each batch size, over learning rates, against their theory.
"""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdx
from benchmarks.measure import calls_for, interleaved, ratio, table
from gdx import noise
from gdx.demo.problems import Problem, cross_entropy, digits, network

STEPS, EVERY = 600, 60
BATCH, MICRO, RATE, DECAY = 64, 8, 0.1, 0.95
COSTS = {"digits": (128, 64), "digits, large batch": (128, 512), "wide": (2048, 512)}
TARGET = 0.2
SIZES, RATES = (4, 8, 16, 32, 64, 128, 256), np.geomspace(0.05, 1.6, 11)


def micro_batched(loss: Callable, number: int) -> Callable:
    """Loss and gradient by micro-batches, and nothing else: what `noise.value_and_grad` adds a norm to."""
    mean = optax.microbatching.AccumulationType.MEAN

    def value_and_grad(params: Any, batch: jax.Array) -> Any:
        on_one = functools.partial(jax.value_and_grad(loss), params)
        return optax.microbatching.microbatch(on_one, 0, len(batch) // number, (mean, mean))(batch)

    return value_and_grad


def steps_of(problem: Problem, hidden: int, batch_size: int, way: str) -> Callable[[], None]:
    """Some training steps in one call, of a network this wide."""
    params = network(jax.random.key(0), (64, hidden, 10))
    batches = noise.epochs(jax.random.key(1), problem.train, batch_size, 4)
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


def costs(rounds: int) -> list[Sequence[object]]:
    """The rows of the first table."""
    problem, rows = digits(), []
    for name, (hidden, batch_size) in COSTS.items():
        ways = {way: steps_of(problem, hidden, batch_size, way) for way in ("whole batch", "micro-batches", "measured")}
        calls = calls_for(ways["micro-batches"], duration=0.05)

        def repeated(way: str, ways: dict = ways, calls: int = calls) -> None:
            for _ in range(calls):
                ways[way]()

        seconds = interleaved({way: functools.partial(repeated, way) for way in ways}, rounds)
        with_link, micro = ratio(seconds, "measured", "micro-batches"), ratio(seconds, "micro-batches", "whole batch")
        rows.append((f"{name}: 64-{hidden}-10", batch_size, batch_size // MICRO, with_link, "<= 1.05", micro))
    return rows


class History(NamedTuple):
    """What was measured over training.

    Attributes:
      losses: the training loss on all examples, at every look.
      link, direct: the `Noise` there, as the link has it and from its definition.
    """

    losses: jax.Array
    link: noise.Noise
    direct: noise.Noise


def history(problem: Problem, steps: int) -> History:
    """Trains, and looks every few steps."""
    images, labels = problem.train
    params = problem.start(jax.random.key(0))
    value_and_grad = noise.value_and_grad(problem.loss_on, MICRO)
    tx = gdx.chain(noise.measure_noise(DECAY), gdx.sgd(RATE))
    batches = noise.epochs(jax.random.key(1), problem.train, BATCH, -(-steps * BATCH // len(images)) + 1)[:steps]

    def step(carry: tuple, batch: jax.Array) -> Any:
        params, state = carry
        (_, micro_batches), gradients = value_and_grad(params, batch)
        updates, state = tx.update(gradients, state, params, micro_batches=micro_batches)
        return (optax.apply_updates(params, updates), state), None

    def look(carry: tuple, batches: jax.Array) -> Any:
        carry, _ = jax.lax.scan(step, carry, batches)
        params, state = carry
        each = jax.lax.map(
            lambda example: jax.grad(problem.loss_on)(params, example[None]), jnp.arange(len(images)), batch_size=64
        )
        direct = noise.of_gradients(each).within(len(images))
        return carry, History(cross_entropy(params, problem.train), optax.tree.get(state, "noise"), direct)

    found = jax.jit(lambda carry: jax.lax.scan(look, carry, batches.reshape(-1, EVERY, BATCH))[1])
    history = found((params, tx.init(params)))
    return history._replace(link=history.link.within(len(images)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def steps_to(problem: Problem, batch_size: int, rates: jax.Array, key: jax.Array) -> jax.Array:
    """The steps until the training loss is at most the target, at each rate; inf where it takes too many examples."""
    every = max(2, 128 // batch_size)
    most = 60 * len(problem.train[0]) // batch_size

    def steps(rate: jax.Array) -> jax.Array:
        start = problem.start(jax.random.key(0))

        def more(carry: tuple) -> tuple:
            params, steps, _ = carry
            batches = noise.with_replacement(jax.random.fold_in(key, steps), problem.train, batch_size, every)
            params = gdx.train(problem.loss_on, gdx.sgd(rate), params, batches).params
            return params, steps + every, problem.loss(params, problem.train)

        carry = start, jnp.int32(0), problem.loss(start, problem.train)
        _, steps, loss = jax.lax.while_loop(lambda carry: (carry[2] > TARGET) & (carry[1] < most), more, carry)
        return jnp.where(loss <= TARGET, steps.astype(jnp.float32), jnp.inf)

    return jax.lax.map(steps, rates)


def fewest_steps(problem: Problem, seeds: int) -> list[tuple[int, float, float]]:
    """For each batch size, the fewest steps over rates (mean over seeds) and the rate that makes them."""
    found = []
    for size in SIZES:
        steps = np.stack(
            [steps_to(problem, size, jnp.asarray(RATES, jnp.float32), jax.random.key(s)) for s in range(seeds)]
        )
        mean = steps.mean(axis=0)
        found.append((size, float(mean.min()), float(RATES[mean.argmin()])))
    return found


def fit(sizes: np.ndarray, steps: np.ndarray) -> tuple[float, float]:
    """The fewest steps and the critical batch size of S = S_min (1 + B_c / B), least squares of the logarithm."""
    candidates = np.geomspace(1, 1e4, 2000)
    excess = np.log1p(candidates[:, None] / sizes)
    rest = np.log(steps) - excess
    best = int(np.argmin(rest.var(axis=1)))
    return float(np.exp(rest[best].mean())), float(candidates[best])


def main() -> None:
    """Prints the tables, and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", metavar="FILE", help="where to write the noise scale over training")
    parser.add_argument("--quick", action="store_true", help="few rounds, one seed")
    args = parser.parse_args()
    header = ("network", "batch", "micro-batch", "with link / without", "target", "micro-batches / whole batch")
    print(table(header, costs(8 if args.quick else 30)), end="\n\n")

    problem = digits()
    found = jax.tree.map(np.asarray, history(problem, STEPS))
    steps = np.arange(EVERY, STEPS + 1, EVERY)
    link, direct = np.asarray(found.link.scale), np.asarray(found.direct.scale)
    columns = zip(steps, found.losses, link, direct)
    header = ("step", "training loss", "noise scale, by the link", "by its definition", "link / definition")
    print(
        table(header, [(s, f"{a:.3f}", f"{b:.0f}", f"{c:.0f}", f"{b / c:.2f}") for s, a, b, c in columns]), end="\n\n"
    )

    best = fewest_steps(problem, 1 if args.quick else 3)
    sizes, fewest, _ = map(np.array, zip(*best))
    least, critical = fit(sizes, fewest)
    header = ("batch", "best rate", "steps", "of the fit", "examples")
    rows = [(b, f"{rate:.2g}", f"{s:.0f}", f"{least * (1 + critical / b):.0f}", f"{s * b:.0f}") for b, s, rate in best]
    print(table(header, rows))
    print(f"critical batch size of the fit: {critical:.0f}")
    if args.picture:
        from matplotlib.figure import Figure

        from gdx import plot

        figure = Figure(figsize=(7, 4.5), layout="constrained")
        scales = {f"{MICRO} micro-batches of {BATCH // MICRO}": link, "each example by itself": direct}
        at = dict.fromkeys(scales, steps)
        plot.noise_scale(scales, figure.subplots(), steps=at, batch_size=BATCH, examples=len(problem.train[0]))
        figure.savefig(args.picture, dpi=150)
        print(f"picture: {args.picture}")


if __name__ == "__main__":
    main()
