"""Trains with many values of an optimizer's hyperparameters in one compiled program, and shows which are best."""

import argparse
import math
import re
import time

import jax
import numpy as np

import gdx
from gdx import plot
from gdx.demo import terminal
from gdx.demo.problems import OPTIMIZERS, SURFACES, load, stacked

EXTRAS = ("demo",)
KEEPS = False
EXAMPLES = """\
values: one number, several as A,B,C, or a range as LOW:HIGH or LOW:HIGH:POINTS, whose points lie
at equal ratios where HIGH is at least ten times LOW, and at equal distances otherwise; end it with
:log or :linear to choose.

examples:
  python -m gdx sweep
  python -m gdx sweep --optimizer sgd --learning-rate 1e-3:1:12 --momentum 0:0.99:8
  python -m gdx sweep --learning-rate 1e-4:1e-1:16 --weight-decay 1e-2:10:8 --steps 1000 --output decay.png
  python -m gdx sweep --data rosenbrock --optimizer nesterov --learning-rate 1e-5:1e-2:64
"""
RANGE = re.compile(r"([^:]+):([^:]+)(?::(\d+))?(?::(log|linear))?")
POINTS = 12
MOST = 4096  # points in all: making so many optimizers takes some seconds
BEST = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, data = parser.add_argument, ["digits", *SURFACES]
    add("--data", choices=data, default="digits", help="what is minimised (default: %(default)s)")
    add("--optimizer", choices=OPTIMIZERS["digits"], default="adamw", help="(default: %(default)s)")
    terminal.add_hyperparameters(parser, values, "VALUES")
    size = "points trained at the same time, to bound memory (default: all)"
    add("--chunk-size", type=terminal.in_range(int, 1), metavar="N", help=size)
    terminal.add_common(parser, 300, "gdx-sweep.png")


def values(text: str) -> list[float]:
    """The numbers that an option stands for.

    >>> values("0.1"), values("1,2"), values("0.001:0.1:3"), values("0:1:3")
    ([0.1], [1.0, 2.0], [0.001, 0.01, 0.1], [0.0, 0.5, 1.0])
    """
    try:
        if not (found := RANGE.fullmatch(text)):
            return [float(number) for number in text.split(",")]
        low, high, points, spacing = float(found[1]), float(found[2]), int(found[3] or POINTS), found[4]
        is_log = spacing == "log" or (not spacing and 0 < 10 * low <= high)
        if not low < high < math.inf or not 2 <= points <= MOST or (is_log and low <= 0):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of X, A,B,C, LOW:HIGH, LOW:HIGH:POINTS and LOW:HIGH:POINTS:log or :linear, "
            f"with LOW < HIGH, 2 to {MOST} points and LOW > 0 for log"
        ) from None
    # rounded, so that a table shows 0.01 where that is meant
    return [float(f"{x:.12g}") for x in (np.geomspace if is_log else np.linspace)(low, high, points)]


def check(arguments: argparse.Namespace) -> None:
    terminal.check_batch_size(arguments)
    given = {name: list(dict.fromkeys(points)) for name, points in terminal.hyperparameters(arguments).items()}
    if not any(len(points) > 1 for points in given.values()):
        if "learning_rate" in given:
            raise ValueError("each option has one value; give one of them several, as in --learning-rate 1e-4:1:16")
        given["learning_rate"] = values("1e-4:1:16")
    points = math.prod(map(len, given.values()))
    if points > MOST:
        raise ValueError(f"the options give {points} points; expected at most {MOST}: give fewer values")
    arguments.optimizers = gdx.grid(OPTIMIZERS[arguments.data][arguments.optimizer].replace, **given)


def run(arguments: argparse.Namespace) -> int:
    """Trains with every point of the grid, prints the table of the best and writes the picture."""
    from matplotlib.figure import Figure

    console, name, steps = terminal.console(), arguments.optimizer, arguments.steps
    labels = gdx.labels(arguments.optimizers)
    problem = load(arguments.data)
    console.print(f"{problem.title}; {name}, {len(labels)} points, {steps} steps, seed {arguments.seed}")
    optimizers, devices = arguments.optimizers, jax.device_count()
    if devices > 1 and len(labels) % devices == 0:
        mesh = jax.make_mesh((devices,), ("members",), axis_types=(jax.sharding.AxisType.Auto,))
        optimizers = jax.device_put(optimizers, jax.NamedSharding(mesh, jax.P("members")))
    begin = time.perf_counter()
    with terminal.progress(console, 1, name) as update:
        result = gdx.sweep(
            problem.loss_on,
            optimizers,
            problem.start(jax.random.key(arguments.seed)),
            stacked(problem.batches(arguments.seed, arguments.batch_size), steps),
            evaluate=problem.evaluate,
            chunk_size=arguments.chunk_size,
            progress=lambda done, least, lost: update(name, done, f"least loss {least:.3g}, {lost} diverged"),
        )
        jax.block_until_ready(result.losses)
        jax.effects_barrier()
    seconds, diverged = time.perf_counter() - begin, np.asarray(result.diverged)
    final = jax.device_get(result.final)
    ranking = result.ranking(final["loss"])
    rows = [
        [str(rank), *(f"{x:.4g}" for x in labels[i].values())]
        + [terminal.number(kind, values[i]) for kind, values in final.items()]
        for rank, i in enumerate(ranking[:BEST], start=1)
    ]
    terminal.table(console, ["rank", *labels[0], *problem.headers], rows)
    console.print(f"{diverged.sum()} of {len(labels)} points diverged; {seconds:.1f} s in one program, compiled once")
    figure = Figure(figsize=(8, 5.4), layout="constrained")
    score = np.where(diverged, np.nan, final["loss"])
    axes = plot.sweep(labels, score, figure.subplots(), name=problem.headers[0])
    axes.set_title(f"{name} after {steps} steps; {problem.title}", fontsize="medium")
    terminal.save(console, figure, arguments.output)
    return 0 if ranking else 1
