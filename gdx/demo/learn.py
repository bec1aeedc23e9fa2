"""Learns learning rate, momentum and weight decay on digits, by the slope of the validation loss in each."""

import argparse
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdx
from gdx import plot
from gdx.demo import show
from gdx.demo.loop import batches
from gdx.demo.options import add_common, check_batch_size, check_output, check_seed, check_steps
from gdx.demo.problems import TRAINING_IMAGES, digits
from gdx.extra import needs

EXTRAS = ("demo",)
EXAMPLES = """\
examples:
  python -m gdx learn
  python -m gdx learn --learning-rate 1 --momentum 0.95 --rounds 80
"""
STEPS = 200
VALIDATION_IMAGES = 288  # of the training images; the steps train on the others
META_RATE = 0.1


@dataclass(frozen=True)
class Plan:
    """The checked options: where the hyperparameters start, and how long they are trained."""

    start: gdx.Transform
    rounds: int
    batch_size: int
    steps: int
    seed: int
    output: Path


def optimizer(learning_rate: Any, momentum: Any, weight_decay: Any) -> gdx.Transform:
    """SGD with momentum on a loss with an L2 penalty: the optimizer whose hyperparameters are learnt."""
    return gdx.chain(gdx.add_decoupled_weight_decay(weight_decay), gdx.sgd(learning_rate, momentum))


def from_point(point: dict[str, jax.Array]) -> gdx.Transform:
    """The optimizer at a point of the space that is descended, in which every point is valid."""
    return optimizer(jnp.exp(point["learning_rate"]), jax.nn.sigmoid(point["momentum"]), jnp.exp(point["weight_decay"]))


def to_point(tx: gdx.Transform) -> dict[str, jax.Array]:
    """The point of an optimizer."""
    values = tx.hyperparams
    momentum = values["momentum"]
    return {
        "learning_rate": jnp.log(jnp.float32(values["learning_rate"])),
        "momentum": jnp.log(jnp.float32(momentum / (1 - momentum))),
        "weight_decay": jnp.log(jnp.float32(values["weight_decay"])),
    }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add = parser.add_argument
    add("--learning-rate", type=float, default=0.01, metavar="X", help="to start from (default: %(default)s)")
    add("--momentum", type=float, default=0.5, metavar="X", help="to start from (default: %(default)s)")
    add("--weight-decay", type=float, default=1e-3, metavar="X", help="to start from (default: %(default)s)")
    add("--rounds", type=int, default=40, metavar="N", help="steps of the hyperparameters (default: %(default)s)")
    add_common(parser, str(STEPS), "gdx-learn.png")


def plan(arguments: argparse.Namespace) -> Plan:
    """Checks the options.

    Raises:
      ValueError: an option is wrong; the message says what is allowed.
    """
    given = {name: getattr(arguments, name) for name in ("learning_rate", "momentum", "weight_decay")}
    for name, value in given.items():
        if value == 0:
            raise ValueError(f"--{name.replace('_', '-')} is 0; expected more, for its logarithm is what is learnt")
    if arguments.rounds < 1:
        raise ValueError(f"--rounds is {arguments.rounds}; expected at least 1")
    batch_size = check_batch_size(arguments.batch_size, "digits")
    if batch_size > TRAINING_IMAGES - VALIDATION_IMAGES:
        raise ValueError(
            f"--batch-size is {batch_size}; expected 1 to {TRAINING_IMAGES - VALIDATION_IMAGES}, the training images "
            f"that are not kept for validation"
        )
    return Plan(
        optimizer(**given),
        arguments.rounds,
        batch_size,
        check_steps(STEPS if arguments.steps is None else arguments.steps),
        check_seed(arguments.seed),
        check_output(arguments.output),
    )


def learn(plan: Plan) -> tuple[list[dict[str, float]], dict[str, list[float]]]:
    """Descends the validation loss with respect to the hyperparameters.

    Returns:
      The hyperparameters of each round, the start first, and what was measured with them: the
      validation loss after the last training step, and the test accuracy. It ends where a loss or slope is not finite.
    """
    problem = digits()
    kept = TRAINING_IMAGES - VALIDATION_IMAGES
    validation = jax.tree.map(lambda column: column[kept:], problem.train)
    stream = batches(kept, plan.batch_size, np.random.default_rng(plan.seed))
    examples = np.stack(list(itertools.islice(stream, plan.steps)))
    start = problem.start(jax.random.key(plan.seed))

    def validation_loss(point: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        params = gdx.train(problem.loss_on, from_point(point), start, examples, remat=True).params
        return problem.loss(params, validation), problem.evaluate(params)["accuracy"]

    slopes = jax.jit(jax.value_and_grad(validation_loss, has_aux=True))
    point, meta = to_point(plan.start), gdx.adam(META_RATE)
    state = meta.init(point)
    path, measured = [], {"validation loss": [], "test accuracy": []}  # type: ignore[var-annotated]
    for _ in range(plan.rounds + 1):
        (loss, accuracy), gradient = slopes(point)
        path.append({name: float(value) for name, value in from_point(point).hyperparams.items()})
        measured["validation loss"].append(float(loss))
        measured["test accuracy"].append(float(accuracy))
        if not all(map(np.isfinite, [loss, *gradient.values()])):
            break
        updates, state = meta.update(gradient, state, point)
        point = optax.apply_updates(point, updates)
    return path, measured


def run(plan: Plan) -> int:
    """Learns the hyperparameters, prints where they started and where they are best, and writes the picture.

    Returns:
      The exit code: 0.

    Raises:
      MissingExtra: the demo extra is not installed.
    """
    with needs("demo"):
        from matplotlib.figure import Figure
        from rich import box
        from rich.table import Table
    console = show.console()
    console.print(
        f"sgd on digits, {plan.steps} steps; its hyperparameters take {plan.rounds} steps down the validation loss"
    )
    path, measured = learn(plan)
    losses = measured["validation loss"]
    if len(losses) <= plan.rounds:
        console.print(
            f"ended after {len(losses) - 1} of {plan.rounds} rounds: the loss or a slope is not finite any more; start "
            f"from a smaller learning rate"
        )
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for header in ("round", *path[0], *measured):
        table.add_column(header.replace("_", " "), justify="right")
    best = int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))
    for i in dict.fromkeys([0, best // 4, best // 2, best]):
        accuracy = show.number("accuracy", measured["test accuracy"][i])
        table.add_row(str(i), *(f"{value:.3g}" for value in path[i].values()), f"{losses[i]:.3g}", accuracy)
    console.print(table)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot.loss_curves({"validation loss": losses}, left)
    plot.loss_curves({name.replace("_", " "): [p[name] for p in path] for name in path[0]}, right)
    left.set_xlabel("round")
    right.set_xlabel("round")
    right.set_ylabel("value")
    figure.savefig(plan.output, dpi=150)
    console.print(f"picture: {plan.output}", soft_wrap=True)
    return 0
