"""Trains with many values of an optimizer's hyperparameters in one compiled program, and shows which are best."""

import argparse
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

import gdx
from gdx import plot
from gdx.demo import show
from gdx.demo.loop import batches
from gdx.demo.options import (
    HYPERPARAMETERS,
    add_common,
    add_hyperparameters,
    check_batch_size,
    check_output,
    check_seed,
    check_steps,
    either,
    optimizer_with,
)
from gdx.demo.problems import OPTIMIZERS, SURFACES, load
from gdx.extra import needs

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

EXTRAS = ("demo",)
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
POINTS = 12
STEPS = 300
BEST = 10


@dataclass(frozen=True)
class Plan:
    """The checked options: the optimizers, how long they train on what, and where the picture goes."""

    data: str
    name: str
    optimizers: gdx.Transform
    batch_size: int
    steps: int
    seed: int
    chunk_size: int | None
    output: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the sweep's options."""
    add = parser.add_argument
    add("--data", choices=["digits", *SURFACES], default="digits", help="what is minimised (default: %(default)s)")
    names = list(OPTIMIZERS["digits"])
    add("--optimizer", metavar="NAME", default="adamw", help=f"{either(names)} (default: %(default)s)")
    add_hyperparameters(parser, values, "VALUES")
    add("--chunk-size", type=int, metavar="N", help="points trained at the same time, to bound memory (default: all)")
    add_common(parser, str(STEPS), "gdx-sweep.png")


def values(text: str) -> list[float]:
    """The numbers that an option stands for.

    Raises:
      argparse.ArgumentTypeError: it is none of the forms.

    >>> values("0.1"), values("1,2"), values("0.001:0.1:3"), values("0:1:3")
    ([0.1], [1.0, 2.0], [0.001, 0.01, 0.1], [0.0, 0.5, 1.0])
    """
    try:
        if ":" not in text:
            return [float(number) for number in text.split(",")]
        low, high, *rest = text.split(":")
        spacing = rest.pop() if rest and rest[-1] in ("log", "linear") else ""
        start, end, points = float(low), float(high), int(rest.pop(0)) if rest else POINTS
        is_log = spacing == "log" or (not spacing and 0 < 10 * start <= end)
        if rest or not start < end or points < 2 or (is_log and start <= 0):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of X, A,B,C, LOW:HIGH, LOW:HIGH:POINTS and LOW:HIGH:POINTS:log or :linear, "
            f"with LOW < HIGH, at least 2 points and LOW > 0 for log"
        ) from None
    # rounded, so that a table shows 0.01 where that is meant
    return [float(f"{x:.12g}") for x in (np.geomspace if is_log else np.linspace)(start, end, points)]


def plan(arguments: argparse.Namespace) -> Plan:
    """Checks the options.

    Raises:
      ValueError: an option is wrong; the message says what is allowed.
    """
    given = {name: getattr(arguments, name) for name in HYPERPARAMETERS if getattr(arguments, name) is not None}
    tx = optimizer_with(arguments.data, arguments.optimizer, given)
    given = {name: list(dict.fromkeys(points)) for name, points in given.items()}
    if not any(len(points) > 1 for points in given.values()):
        if "learning_rate" in given:
            raise ValueError("each option has one value; give one of them several, as in --learning-rate 1e-4:1:16")
        given["learning_rate"] = values("1e-4:1:16")
    optimizers = gdx.grid(lambda **point: tx.replace(**point), **given)
    if arguments.chunk_size is not None and arguments.chunk_size < 1:
        raise ValueError(f"--chunk-size is {arguments.chunk_size}; expected at least 1")
    batch_size = check_batch_size(arguments.batch_size, arguments.data)
    return Plan(
        arguments.data,
        arguments.optimizer,
        optimizers,
        batch_size if arguments.data == "digits" else 0,
        check_steps(STEPS if arguments.steps is None else arguments.steps),
        check_seed(arguments.seed),
        arguments.chunk_size,
        check_output(arguments.output),
    )


def run(plan: Plan) -> int:
    """Trains with every point of the grid, prints the table of the best and writes the picture.

    Returns:
      The exit code: 0; 1 where every point diverged.

    Raises:
      MissingExtra: the demo extra is not installed.
    """
    with needs("demo"):
        from matplotlib.figure import Figure
    console = show.console()
    problem = load(plan.data)
    count = len(gdx.labels(plan.optimizers))
    console.print(f"{problem.title}; {plan.name}, {count} points, {plan.steps} steps, seed {plan.seed}")
    size = len(problem.train[0]) if problem.train else 0
    stream = batches(size, plan.batch_size, np.random.default_rng(plan.seed))
    examples = np.stack(list(itertools.islice(stream, plan.steps)))
    begin = time.perf_counter()
    with _progress(console) as progress:
        result = gdx.sweep(
            problem.loss_on,
            _over_devices(plan.optimizers, count),
            problem.start(jax.random.key(plan.seed)),
            examples,
            evaluate=problem.evaluate,
            chunk_size=plan.chunk_size,
            progress=progress,
        )
        jax.block_until_ready(result.losses)
        jax.effects_barrier()
    seconds = time.perf_counter() - begin
    ranking = result.ranking(result.final["loss"])
    console.print(_table(result, ranking))
    diverged = int(np.sum(result.diverged))
    console.print(f"{diverged} of {count} points diverged; {seconds:.1f} seconds in one program, compiled once")
    figure = Figure(figsize=(8, 5.4), layout="constrained")
    axes = plot.sweep(result.labels, np.where(result.diverged, np.nan, result.final["loss"]), figure.subplots())
    axes.set_title(f"{plan.name} after {plan.steps} steps; {problem.title}", fontsize="medium")
    figure.savefig(plan.output, dpi=150)
    console.print(f"picture: {plan.output}", soft_wrap=True)
    return 0 if ranking else 1


def _over_devices(optimizers: gdx.Transform, count: int) -> gdx.Transform:
    """The batch, spread over all devices where they can share it equally."""
    if jax.device_count() == 1 or count % jax.device_count():
        return optimizers
    mesh = jax.make_mesh((jax.device_count(),), ("members",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.device_put(optimizers, jax.NamedSharding(mesh, jax.P("members")))


@contextmanager
def _progress(to: "Console") -> Iterator[gdx.training.Progress]:
    """Shows how far the program is: a bar on a terminal, elsewhere a line for each quarter."""
    if not to.is_terminal:
        following = 0.25

        def line(done: float, least: float, diverged: int) -> None:
            nonlocal following
            if done >= following:
                to.print(f"{done:.0%}: least loss {least:.3g}, {diverged} diverged")
                following += 0.25

        yield line
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.percentage:.0f} %")
    with Progress(*columns, TimeElapsedColumn(), console=to, transient=True) as bars:
        task = bars.add_task("compiling", total=1.0)

        def bar(done: float, least: float, diverged: int) -> None:
            bars.update(task, completed=done, description=f"least loss {least:.3g}, {diverged} diverged")

        yield bar


def _table(result: gdx.Sweep, ranking: list[int]) -> "Table":
    """The best points, and one row for all that diverged."""
    from rich import box
    from rich.table import Table

    labels, final = result.labels, {name: np.asarray(value, float) for name, value in result.final.items()}
    headers = {"loss": "final loss", "accuracy": "test accuracy", "distance": "distance to minimum"}
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("rank", justify="right")
    for header in (*labels[0], *(headers[name] for name in headers if name in final)):
        table.add_column(header.replace("_", " "), justify="right")
    for rank, member in enumerate(ranking[:BEST], start=1):
        point: list[Any] = [f"{value:.4g}" for value in labels[member].values()]
        table.add_row(str(rank), *point, *(show.number(name, final[name][member]) for name in headers if name in final))
    return table
