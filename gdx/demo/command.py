"""Trains with each optimizer of the gradient descent family, and compares them in a table and a picture."""

import argparse
import math
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

import gdx
from gdx import plot
from gdx.demo import terminal
from gdx.demo.problems import OPTIMIZERS, STEPS, SURFACES, TRAINING_IMAGES, Problem, Surface, load, stacked

EXTRAS = ("demo",)
KEEPS = True
EXAMPLES = """\
examples:
  python -m gdx
  python -m gdx --optimizers sgd,adam --batch-size 32 --steps 500
  python -m gdx --optimizers adamw --learning-rate 3e-3 --weight-decay 0.5 --output adamw.png
  python -m gdx --data rosenbrock --momentum 0.95
"""


class Report(NamedTuple):
    """Where a run is after some steps, and how often the steps have been compiled for it."""

    step: int
    params: Any
    metrics: dict[str, Any]
    seconds: float
    compilations: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    known = list(OPTIMIZERS["digits"])
    text = f"comma separated, from {','.join(known)} (default: all)"
    parser.add_argument("--data", choices=STEPS, default="digits", help="what is minimised (default: %(default)s)")
    parser.add_argument("--optimizers", action="extend", type=terminal.several(known), metavar="NAMES", help=text)
    terminal.add_hyperparameters(parser, float, "X")
    terminal.add_common(parser, ", ".join(f"{count} for {data}" for data, count in STEPS.items()), "gdx-demo.png")


def check(arguments: argparse.Namespace) -> None:
    terminal.check_batch_size(arguments)
    known = OPTIMIZERS[arguments.data]
    chosen = {name: known[name] for name in arguments.optimizers or known}
    if arguments.batch_size and list(chosen) == ["gradient_descent"]:
        raise ValueError("--batch-size does not apply to gradient_descent, which takes all data; add sgd")
    for field, value in terminal.hyperparameters(arguments).items():
        having = {name: tx.replace(**{field: value}) for name, tx in chosen.items() if field in tx.hyperparams}
        if not having:
            users = ", ".join(name for name in known if field in known[name].hyperparams)
            raise ValueError(f"--{field.replace('_', '-')} applies to none of the optimizers; add one of {users}")
        chosen |= having
    arguments.optimizers = chosen
    arguments.steps = arguments.steps or STEPS[arguments.data]


def train(problem: Problem, tx: gdx.Transform, steps: int, batch_size: int | None, seed: int) -> Iterator[Report]:
    """Reports the start, then every few steps until the last, a divergence or Ctrl-C; every step on the plane."""
    begin, compilations = time.perf_counter(), 0

    @jax.jit
    def advance(*arguments: Any) -> Any:
        nonlocal compilations
        compilations += 1  # runs only while JAX traces, once for each compilation
        return problem.advance(*arguments)

    params = problem.start(jax.random.key(seed))
    state, found = tx.init(params), problem.evaluate(params)
    stream = problem.batches(seed, batch_size)
    # calls of one length, for one program
    length = next(n for n in range(max(steps // 60, 1), 0, -1) if steps % n == 0) if problem.train else 1
    for step in range(0, steps + 1, length):
        if step:
            params, state, found = advance(tx, params, state, stacked(stream, length))
        metrics = {kind: np.asarray(value) for kind, value in found.items()}
        yield Report(step, params, metrics, time.perf_counter() - begin, compilations)
        if not math.isfinite(metrics["loss"]) or terminal.interrupted.is_set():
            return


def run(arguments: argparse.Namespace) -> int:
    """Trains with each optimizer, prints the table and writes the picture; after Ctrl-C, of what there is."""
    console, steps, seed = terminal.console(), arguments.steps, arguments.seed
    problem = load(arguments.data)
    landscape = arguments.data if arguments.data in SURFACES else "quadratic"
    valley = load(landscape)
    runs: dict[str, list[Report]] = {name: [] for name in arguments.optimizers}
    walks = {name: [] for name in runs} if problem.train else runs
    console.print(f"{problem.title}; {steps} steps, seed {seed}")
    with terminal.progress(console, steps, *runs) as update:
        for name, tx in arguments.optimizers.items():
            if terminal.interrupted.is_set():
                break
            # gradient descent takes all data in each step
            size = TRAINING_IMAGES if name == "gradient_descent" else arguments.batch_size
            for report in train(problem, tx, steps, size, seed):
                runs[name].append(report)
                if report.step:
                    update(name, report.step, terminal.status(report.metrics))
            if problem.train:
                walks[name] = list(train(valley, OPTIMIZERS[landscape][name], STEPS[landscape], None, seed))
    _print_table(console, problem, arguments, runs)
    terminal.save(console, _picture(SURFACES[landscape], (problem, valley), runs, walks), arguments.output)
    return 130 if terminal.interrupted.is_set() else 0


def _print_table(console: Any, problem: Problem, arguments: argparse.Namespace, runs: dict[str, list[Report]]) -> None:
    """The last report of each run."""
    headers, rows, caption = [*problem.headers, "seconds", "compilations"], [], ""
    for name, reports in runs.items():
        rate, cells = arguments.optimizers[name].hyperparams["learning_rate"], ["-"] * len(headers)
        if reports:
            step, _, metrics, seconds, compilations = reports[-1]
            diverged = not math.isfinite(metrics["loss"])
            cells = [terminal.DIVERGED if diverged else terminal.number(*metric) for metric in metrics.items()]
            cells += [f"{seconds:.1f}", str(compilations)]
            if step < arguments.steps and not diverged:
                name, caption = f"{name}*", f"* stopped at step {step}"
        rows.append([name, f"{rate:g}", *cells])
    title = "interrupted; so far:" if terminal.interrupted.is_set() else ""
    terminal.table(console, ["optimizer", "learning rate", *headers], rows, title, caption)


def _picture(surface: Surface, problems: tuple[Problem, Problem], runs: Any, walks: Any) -> Any:
    """The loss curves of all runs next to their walks down a function of the plane."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    losses = {name: [report.metrics["loss"] for report in reports] for name, reports in runs.items() if reports}
    plot.loss_curves(losses, left, steps={name: [report.step for report in runs[name]] for name in losses})
    points = {name: [report.params for report in reports] for name, reports in walks.items() if reports}
    plot.paths(surface.function, points, right, limits=surface.limits, minimum=surface.minimum, legend=False)
    left.set(title=problems[0].title, ylabel=problems[0].headers[0])
    right.set_title(problems[1].title)
    return figure
