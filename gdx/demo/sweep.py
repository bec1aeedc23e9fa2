"""Trains with many values of an optimizer's hyperparameters in one compiled program, and shows which are best.

VALUES are some, as A,B,C, or a range, LOW:HIGH:POINTS, whose points lie at equal ratios where HIGH is
at least ten times LOW, and at equal distances otherwise.

examples:
  python -m gdx sweep
  python -m gdx sweep --optimizer sgd --learning-rate 1e-3:1:12 --momentum 0:0.99:8
  python -m gdx sweep --learning-rate 1e-4:1e-1:16 --weight-decay 1e-2:10:8 --steps 1000 --output decay.png
  python -m gdx sweep --data rosenbrock --optimizer nesterov --learning-rate 1e-5:1e-2:64
"""

import argparse
import math
import time

import jax
import numpy as np

import gdx
from gdx import plot
from gdx.demo import terminal
from gdx.demo.problems import OPTIMIZERS, STEPS, load

MOST = 4096  # points in all: making so many optimizers takes some seconds
BEST = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", choices=STEPS, default="digits", help="what is minimised")
    parser.add_argument("--optimizer", choices=OPTIMIZERS["digits"], default="adamw", help="of the family")
    terminal.add_hyperparameters(parser, values, "VALUES")
    parser.set_defaults(learning_rate="1e-4:1:16")
    terminal.add(parser, "steps", terminal.positive(int), 300, "of each training run")
    terminal.add(parser, "output", terminal.picture, "gdx-sweep.png", "the picture", "FILE")


def values(text: str) -> list[float]:
    """The numbers that an option stands for.

    >>> values("0.1"), values("1,2,1"), values("0.001:0.1:3"), values("0:1:3")
    ([0.1], [1.0, 2.0], [0.001, 0.01, 0.1], [0.0, 0.5, 1.0])
    """
    try:
        if ":" not in text:
            return list(dict.fromkeys(map(float, text.split(","))))
        low, high, points = (kind(part) for kind, part in zip((float, float, int), text.split(":"), strict=True))
        if not low < high < math.inf or not 1 < points <= MOST:
            raise ValueError
    except ValueError:
        wanted = f"neither A,B,C nor LOW:HIGH:POINTS, with LOW < HIGH and 2 to {MOST} points"
        raise argparse.ArgumentTypeError(f"{text!r} is {wanted}") from None
    spaced = np.geomspace if 0 < 10 * low <= high else np.linspace
    return [float(f"{x:.12g}") for x in spaced(low, high, points)]  # rounded: 0.01 where that is meant


def run(arguments: argparse.Namespace) -> int:
    """Trains with every point of the grid, prints the table of the best and writes the picture."""
    from matplotlib.figure import Figure

    given, name, steps, seed = terminal.hyperparameters(arguments), arguments.optimizer, arguments.steps, arguments.seed
    points = math.prod(map(len, given.values()))
    if not 1 < points <= MOST:
        raise ValueError(f"there are {points} points; expected 2 to {MOST}, as in --learning-rate 1e-4:1:16")
    optimizers = gdx.grid(OPTIMIZERS[arguments.data][name].replace, **given)
    console, problem, labels = terminal.console(), load(arguments.data), gdx.labels(optimizers)
    start, batches = problem.start(jax.random.key(seed)), problem.batches(seed, steps)
    console.print(f"{problem.title}; {name}, {points} points, {steps} steps, seed {seed}")
    begin = time.perf_counter()
    with terminal.progress(console) as bars:
        task = bars.add_task(name, total=1, text="")

        def told(done: float, least: float, lost: int) -> None:
            bars.update(task, completed=done, text=f"least loss {least:.3g}, {lost} diverged")

        result = gdx.sweep(problem.loss_on, optimizers, start, batches, evaluate=problem.evaluate, progress=told)
        final, diverged = jax.device_get((result.final, result.diverged))
        jax.effects_barrier()
    ranking = result.ranking(final["loss"])
    rows = [
        [str(rank), *(f"{x:.4g}" for x in labels[i].values()), *(terminal.number(k, v[i]) for k, v in final.items())]
        for rank, i in enumerate(ranking[:BEST], start=1)
    ]
    terminal.table(console, ["rank", *labels[0], *problem.headers], rows)
    seconds = time.perf_counter() - begin
    console.print(f"{diverged.sum()} of {points} points diverged; {seconds:.1f} s in one program, compiled once")
    figure = Figure(figsize=(8, 5.4), layout="constrained")
    score = np.where(diverged, np.nan, final["loss"])
    axes = plot.sweep(labels, score, figure.subplots(), name=problem.headers[0])
    axes.set_title(f"{name} after {steps} steps; {problem.title}", fontsize="medium")
    terminal.save(console, figure, arguments.output)
    return 0 if ranking else 1
