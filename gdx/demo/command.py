"""Trains with each optimizer of the gradient descent family, and compares them in a table and a picture."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import gdx
from gdx.demo import show
from gdx.demo.loop import Report, train
from gdx.demo.options import (
    HYPERPARAMETERS,
    add_common,
    add_hyperparameters,
    check_batch_size,
    check_output,
    check_seed,
    check_steps,
    either,
)
from gdx.demo.problems import OPTIMIZERS, STEPS, SURFACES, TRAINING_IMAGES, load

EXTRAS = ("demo",)
EXAMPLES = """\
examples:
  python -m gdx
  python -m gdx --optimizers sgd,adam --batch-size 32 --steps 500
  python -m gdx --optimizers adamw --learning-rate 3e-3 --weight-decay 0.5 --output adamw.png
  python -m gdx --data rosenbrock --momentum 0.95
"""


@dataclass(frozen=True)
class Plan:
    """The checked options: what is trained, how long, and where the picture goes."""

    data: str
    optimizers: dict[str, gdx.Transform]
    batch_size: int
    steps: int
    seed: int
    output: Path

    def batch_size_of(self, name: str) -> int:
        """Gradient descent takes all data in each step, and a function of the plane has none."""
        if self.data != "digits":
            return 0
        return TRAINING_IMAGES if name == "gradient_descent" else self.batch_size


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demo's options."""
    steps = ", ".join(f"{count} for {data}" for data, count in STEPS.items())
    add = parser.add_argument
    add("--data", choices=STEPS, default="digits", help="what is minimised (default: %(default)s)")
    names = ",".join(OPTIMIZERS["digits"])
    add("--optimizers", action="append", metavar="NAMES", help=f"comma separated, from {names} (default: all)")
    add_hyperparameters(parser, float, "X")
    add_common(parser, steps, "gdx-demo.png")


def plan(arguments: argparse.Namespace) -> Plan:
    """Checks the options.

    Raises:
      ValueError: an option is wrong; the message says what is allowed.
    """
    optimizers = _optimizers(arguments)
    steps = STEPS[arguments.data] if arguments.steps is None else arguments.steps
    check_steps(steps)
    check_seed(arguments.seed)
    batch_size = _batch_size(arguments, optimizers)
    return Plan(arguments.data, optimizers, batch_size, steps, arguments.seed, check_output(arguments.output))


def _optimizers(arguments: argparse.Namespace) -> dict[str, gdx.Transform]:
    known = OPTIMIZERS[arguments.data]
    names = [name.strip() for names in arguments.optimizers or [",".join(known)] for name in names.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"--optimizers has {name!r}; choose from {', '.join(known)}")
    chosen = {name: known[name] for name in names}
    for field in HYPERPARAMETERS:
        value = getattr(arguments, field)
        having = [name for name in chosen if field in chosen[name].hyperparams]
        if value is None:
            continue
        if not having:
            users = [name for name in known if field in known[name].hyperparams]
            raise ValueError(f"--{field.replace('_', '-')} applies to none of the optimizers; add {either(users)}")
        chosen |= {name: chosen[name].replace(**{field: value}) for name in having}
    return chosen


def _batch_size(arguments: argparse.Namespace, optimizers: dict[str, gdx.Transform]) -> int:
    if arguments.batch_size is not None and set(optimizers) == {"gradient_descent"}:
        raise ValueError("--batch-size does not apply to gradient_descent, which takes all data; add sgd")
    return check_batch_size(arguments.batch_size, arguments.data)


def run(plan: Plan) -> int:
    """Trains with each optimizer, prints the table and writes the picture; after Ctrl-C, of what there is.

    Returns:
      The exit code: 0, or 130 after Ctrl-C.
    """
    console = show.console()
    problem = load(plan.data)
    landscape = plan.data if plan.data in SURFACES else "quadratic"
    valley = load(landscape)
    runs: dict[str, list[Report]] = {name: [] for name in plan.optimizers}
    walks: dict[str, list[Report]] = runs if landscape == plan.data else {name: [] for name in runs}
    console.print(f"{problem.title}; {plan.steps} steps, seed {plan.seed}")
    interrupted = False
    try:
        with show.progress(console, list(runs), plan.steps) as update:
            for name, tx in plan.optimizers.items():
                batch_size = plan.batch_size_of(name)
                for report in train(problem, tx, steps=plan.steps, batch_size=batch_size, seed=plan.seed):
                    runs[name].append(report)
                    update(name, runs[name])
                if walks is not runs:
                    tx = OPTIMIZERS[landscape][name]
                    walks[name] += train(valley, tx, steps=STEPS[landscape], batch_size=0, seed=plan.seed)
    except KeyboardInterrupt:
        interrupted = True
    title = "interrupted; so far:" if interrupted else ""
    console.print(show.table(title, plan.optimizers, runs, plan.steps))
    show.picture(plan.output, (problem.title, valley.title), runs, SURFACES[landscape], walks)
    console.print(f"picture: {plan.output}", soft_wrap=True)
    return 130 if interrupted else 0
