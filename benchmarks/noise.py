"""The gradient noise scale: what measuring it costs, and whether it is right.

Run `python -m benchmarks noise`, with `--picture FILE` for the scale over training, and `--quick` for a rough look;
the last table by `--tables critical`.

1. A training step with `measure_noise` in its chain against one without it, of equal micro-batches: the median of the
   ratios of interleaved timings, with their quartiles.
2. The noise scale on handwritten digits over training, from its definition, the gradients of all examples one by one,
   and as the link measures it from 8 micro-batches: over 200 batches at the same parameters, and on the way there.
3. The critical batch size on the digits and of a model of characters: the long way, the fewest steps to a loss over
   learning rates for each batch size, and by branches, `noise.critical_batch_size`.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdx
from benchmarks import fewbits
from benchmarks.measure import Ratio, calls_for, came_out, interleaved, ratio, table
from gdx import noise
from gdx.demo.problems import Problem, digits, network

STEPS, EVERY = 400, 40
BATCH, MICRO, RATE, DECAY = 128, 8, 0.1, 0.98
STILL = 200
COSTS = (((64, 128, 10), 64), ((64, 512, 512, 10), 512), ((64, 1024, 1024, 10), 512))


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


class Task(NamedTuple):
    """What the critical batch size is measured of.

    Attributes:
      loss: of parameters on the examples with these indices.
      start: the parameters to start from.
      total: how many examples there are.
      judged: the loss of parameters that has to come down to the target.
      optimizer: of a learning rate.
      sizes, rates, seeds, most: the long way tries each of them, until so many examples are seen.
      tried, keys: batch sizes and how many seeds of the branches.
      branches: learning rate at the smallest batch, factors and examples of each measurement by branches.
    """

    loss: Callable[[Any, jax.Array], jax.Array]
    start: Any
    total: int
    judged: Callable[[Any], jax.Array]
    target: float
    optimizer: Callable[[Any], gdx.Transform]
    sizes: tuple[int, ...]
    rates: np.ndarray
    seeds: int
    most: int
    tried: tuple[int, ...]
    keys: int
    branches: tuple[tuple[float, tuple[float, ...], int], ...]


RULE, AROUND = (1.0,), (0.5, 1.0, 2.0)


def digits_task() -> Task:
    problem, sizes = digits(), (4, 8, 16, 32, 64, 128, 256)
    return Task(
        loss=problem.loss_on,
        start=problem.start(jax.random.key(0)),
        total=len(problem.train[0]),
        judged=lambda params: problem.loss(params, problem.train),
        target=0.2,
        optimizer=gdx.sgd,
        sizes=sizes,
        rates=np.geomspace(0.05, 1.6, 11),
        seeds=3,
        most=60 * len(problem.train[0]),
        tried=sizes,
        keys=4,
        branches=(
            *((rate, AROUND, 2560) for rate in (0.05, 0.1, 0.2)),
            (0.1, RULE, 2560),
            (0.1, AROUND, 5120),
            (0.025, AROUND, 2560),
        ),
    )


def characters_task() -> Task:
    problem = fewbits.characters()
    train, test = (tuple(map(jnp.asarray, data)) for data in (problem.train, problem.test))
    return Task(
        loss=lambda params, examples: fewbits.loss(params, train[0][examples], train[1][examples]),
        start=fewbits.start(problem, jax.random.key(0)),
        total=len(train[0]),
        judged=lambda params: fewbits.loss(params, test[0][:1024], test[1][:1024]),
        target=2.3,
        optimizer=gdx.adam,
        sizes=(32, 64, 128, 256, 512, 1024, 2048),
        rates=np.geomspace(5e-4, 1.6e-2, 11),
        seeds=1,
        most=1 << 17,
        tried=(64, 256, 1024),
        keys=2,
        branches=((problem.rate, AROUND, 1 << 15), (problem.rate, RULE, 1 << 15)),
    )


def steps_to(task: Task, size: int, rates: jax.Array, key: jax.Array) -> jax.Array:
    """The steps to the target at each rate; inf where it takes too many examples or there is no loss left."""
    every = max(2, task.branches[0][2] // 20 // size)

    def steps(rate: jax.Array) -> jax.Array:
        tx = task.optimizer(rate)

        def more(carry: tuple) -> tuple:
            params, state, steps, _ = carry
            batches = noise.with_replacement(jax.random.fold_in(key, steps), task.total, size, every)
            params, state, *_ = gdx.train(task.loss, tx, params, batches, state=state)
            return params, state, steps + every, task.judged(params)

        def goes_on(carry: tuple) -> jax.Array:
            *_, steps, loss = carry
            return (loss > task.target) & (steps * size < task.most)  # a loss of NaN ends it

        carry = task.start, tx.init(task.start), jnp.int32(0), task.judged(task.start)
        *_, steps, loss = jax.lax.while_loop(goes_on, more, carry)
        return jnp.where(loss <= task.target, 1.0, jnp.inf) * steps

    return jax.lax.map(steps, rates)


def long_way(task: Task) -> tuple[str, float, float]:
    """The table, the critical batch size, and how many examples the runs that got there have seen."""
    rates, fewest, best, examples = jnp.asarray(task.rates, jnp.float32), [], [], 0.0
    for size in task.sizes:
        run = jax.jit(functools.partial(steps_to, task, size))
        steps = np.stack([np.asarray(run(rates, jax.random.key(seed)), float) for seed in range(task.seeds)])
        examples += steps[np.isfinite(steps)].sum() * size
        fewest.append(steps.mean(axis=0).min())
        best.append(task.rates[steps.mean(axis=0).argmin()])
    least, critical = fit(np.array(task.sizes), np.array(fewest))
    rows = [
        (size, f"{rate:.2g}", f"{steps:.0f}", f"{least * (1 + critical / size):.0f}", f"{steps * size:.0f}")
        for size, rate, steps in zip(task.sizes, best, fewest)
    ]
    return table(("batch", "best rate", "steps", "of the fit", "examples"), rows), critical, examples


def fit(sizes: np.ndarray, steps: np.ndarray) -> tuple[float, float]:
    """The fewest steps and the critical batch size of S = S_min (1 + B_c / B), least squares of the logarithm."""
    candidates = np.geomspace(1, 1e5, 2000)
    rest = np.log(steps) - np.log1p(candidates[:, None] / sizes)
    best = int(np.argmin(rest.var(axis=1)))
    return float(np.exp(rest[best].mean())), float(candidates[best])


def critical_tables() -> str:
    """Both ways on both problems, and what was expected of them."""
    text, rows, off, cost = list[str](), list[tuple[str, ...]](), {}, {}
    for name, make in TASKS.items():
        task, begin = make(), time.perf_counter()
        of_sizes, critical, seen = long_way(task)
        seconds = f"{time.perf_counter() - begin:.0f}"
        text += [f"{name}, the long way to a loss of {task.target}; rates: {len(task.rates)}, seeds: {task.seeds}"]
        text += [of_sizes]
        rows.append((f"{name}, the long way", "", f"{critical:.0f}", "", "", f"{seen / 1e3:.0f}k", seconds))
        for rate, factors, examples in task.branches:
            begin = time.perf_counter()
            found = noise.critical_batch_size(
                *(task.loss, task.optimizer(rate), task.start, task.total, task.tried),
                examples=examples,
                keys=jax.random.split(jax.random.key(1), task.keys),
                factors=factors,
            )
            seconds = f"{time.perf_counter() - begin:.0f}"
            trained = (len(task.tried) + 1) * len(factors) * task.keys * examples
            rule = ", rule alone" if factors == RULE else ""
            label = f"{name}, {task.keys} seeds of {examples}, rate {rate:g}{rule}"
            interval, ratio_to_it = f"{found.low:.0f} to {found.high:.0f}", found.batch_size / critical
            best = " ".join(f"{factor:g}" for factor in found.factors)
            size, share = f"{found.batch_size:.0f}", f"{ratio_to_it:.2f}"
            rows.append((label, best, size, interval, share, f"{trained / 1e3:.0f}k", seconds))
            off[label], cost[label] = max(ratio_to_it, 1 / ratio_to_it), trained / seen
    header = ("", "best factors", "critical", "between", "of the long way's", "examples", "seconds")
    text += [table(header, rows), CHOSEN, came_out("times away from the long way", 1.5, off)]
    text += [came_out("of the examples of the long way's runs that got there", 0.2, cost)]
    return "\n\n".join(text)


CHOSEN = """A branch has about twice the examples that the long way takes with small batches, so that both look at the
same loss. The last two rows of the digits are other choices: twice as many, and a rate so low that the largest factor
is best at the smallest batch."""
TASKS: dict[str, Callable[[], Task]] = {"digits": digits_task, "characters": characters_task}


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
    parser.add_argument("--tables", choices=("scale", "critical"), default="scale", help="which")
    args = parser.parse_args()
    if args.tables == "critical":
        print(critical_tables())
        return
    print(costs_table(8 if args.quick else 30), end="\n\n")
    problem = digits()
    found = history(problem)
    print(history_table(found))
    if args.picture:
        picture(found, len(problem.train[0]), args.picture)
        print(f"picture: {args.picture}")
