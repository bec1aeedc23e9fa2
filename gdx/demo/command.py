"""Trains with each optimizer of the gradient descent family, and compares them in a table and a picture.

examples:
  python -m gdx
  python -m gdx --optimizers sgd adam --batch-size 32 --steps 500
  python -m gdx --optimizers adamw --learning-rate 3e-3 --weight-decay 0.5 --output adamw.png
  python -m gdx --data rosenbrock --momentum 0.95
"""

import argparse
import functools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

import gdx
from gdx import plot
from gdx.demo import terminal
from gdx.demo.problems import BATCH_SIZE, OPTIMIZERS, STEPS, SURFACES, Metrics, Problem, load


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = list(OPTIMIZERS["digits"])
    parser.add_argument("--data", choices=STEPS, default="digits", help="what is minimised")
    parser.add_argument("--optimizers", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    terminal.add_hyperparameters(parser, float, "X")
    terminal.add(parser, "batch-size", terminal.positive(int), BATCH_SIZE, "images per step; gradient_descent: all")
    text = f"(default: {', '.join(f'{count} for {data}' for data, count in STEPS.items())})"
    terminal.add(parser, "steps", terminal.positive(int), argparse.SUPPRESS, text)
    terminal.add(parser, "output", terminal.picture, "gdx-demo.png", "the picture", "FILE")


def chosen(arguments: argparse.Namespace) -> dict[str, gdx.Transform]:
    """The optimizers, each with those of the given hyperparameters that it has."""
    optimizers = {name: OPTIMIZERS[arguments.data][name] for name in arguments.optimizers}
    for field, value in terminal.hyperparameters(arguments).items():
        having = [name for name, tx in optimizers.items() if field in tx.hyperparams]
        for name in having or optimizers:  # where none has it, replace says so
            optimizers[name] = optimizers[name].replace(**{field: value})
    return optimizers


def train(problem: Problem, tx: gdx.Transform, steps: int, size: int, seed: int) -> Iterator[tuple[int, Any, Metrics]]:
    """Step, parameters and metrics: at the start and then 60 times, or at every step on the plane.

    Ends where the loss is not finite, or at Ctrl-C.
    """
    advance, evaluate = jax.jit(functools.partial(gdx.train, problem.loss_on)), jax.jit(problem.evaluate)
    step, params = 0, problem.start(jax.random.key(seed))
    state, metrics = tx.init(params), evaluate(params)
    yield step, params, metrics
    for chunk in np.array_split(problem.batches(seed, steps, size), min(steps, 60) if problem.train else steps):
        params, state, *_ = advance(tx, params, chunk, state=state)
        step, metrics = step + len(chunk), evaluate(params)
        yield step, params, metrics
        if terminal.interrupted.is_set() or not np.isfinite(metrics["loss"]):
            return


def run(arguments: argparse.Namespace) -> int:
    """Trains with each optimizer, prints the table and writes the picture; after Ctrl-C, of what there is."""
    from matplotlib.figure import Figure

    console, optimizers, data, seed = terminal.console(), chosen(arguments), arguments.data, arguments.seed
    problem, steps = load(data), getattr(arguments, "steps", STEPS[data])
    plane = data if data in SURFACES else "quadratic"
    surface, valley = SURFACES[plane], load(plane)
    console.print(f"{problem.title}; {steps} steps, seed {seed}")
    rows: list[list[str]] = []
    at, walks, curves = (dict[str, Any]() for _ in range(3))
    with terminal.progress(console) as bars:
        for name, tx in optimizers.items():
            if terminal.interrupted.is_set():
                break
            reports, task = [], bars.add_task(name, total=steps, text="")
            # gradient descent takes all data in each step
            size = len(problem.train[0]) if name == "gradient_descent" and problem.train else arguments.batch_size
            for step, params, metrics in train(problem, tx, steps, size, seed):
                reports.append((step, params, metrics["loss"]))
                bars.update(task, completed=step, text=terminal.status(metrics))
            cells = [terminal.number(*metric) for metric in metrics.items()]
            rows.append([name, f"{tx.hyperparams['learning_rate']:g}", *cells, f"{bars.tasks[-1].elapsed:.1f}"])
            at[name], walks[name], curves[name] = zip(*reports)
            if problem.train:
                walks[name] = [p for _, p, _ in train(valley, OPTIMIZERS[plane][name], STEPS[plane], size, seed)]
    if terminal.interrupted.is_set():
        console.print(f"interrupted at step {step} of {rows[-1][0]}" if rows else "interrupted before the first step")
    terminal.table(console, ["optimizer", "learning rate", *problem.headers, "seconds"], rows)
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot.loss_curves(curves, left, steps=at)
    plot.paths(surface.function, walks, right, limits=surface.limits, minimum=surface.minimum, legend=False)
    left.set(title=problem.title, ylabel=problem.headers[0])
    right.set_title(valley.title)
    terminal.save(console, figure, arguments.output)
    return 0
