"""Learns learning rate, momentum and weight decay on digits, by the slope of the validation loss in each."""

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdx
from gdx import plot
from gdx.demo import terminal
from gdx.demo.problems import TRAINING_IMAGES, digits, stacked

EXTRAS = ("demo",)
KEEPS = True
EXAMPLES = """\
examples:
  python -m gdx learn
  python -m gdx learn --learning-rate 1 --momentum 0.95 --rounds 80
"""
KEPT = TRAINING_IMAGES - 288  # training images; the others are for validation
META_RATE = 0.1


def optimizer(learning_rate: Any, momentum: Any, weight_decay: Any) -> gdx.Transform:
    """SGD with momentum on a loss with an L2 penalty: the optimizer whose hyperparameters are learnt."""
    return gdx.chain(gdx.add_decoupled_weight_decay(weight_decay), gdx.sgd(learning_rate, momentum))


def from_point(point: dict[str, jax.Array]) -> gdx.Transform:
    """The optimizer at a point of the space that is descended, in which every point is valid."""
    return optimizer(jnp.exp(point["learning_rate"]), jax.nn.sigmoid(point["momentum"]), jnp.exp(point["weight_decay"]))


def to_point(tx: gdx.Transform) -> dict[str, jax.Array]:
    """The point of an optimizer."""
    values = {name: jnp.float32(value) for name, value in tx.hyperparams.items()}
    return {name: jax.scipy.special.logit(x) if name == "momentum" else jnp.log(x) for name, x in values.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    positive = terminal.in_range(float, 1e-9)  # logarithms are learnt
    for name, start in {"learning-rate": 0.01, "momentum": 0.5, "weight-decay": 1e-3}.items():
        text = "to start from (default: %(default)s)"
        parser.add_argument(f"--{name}", type=positive, default=start, metavar="X", help=text)
    rounds = "steps of the hyperparameters (default: %(default)s)"
    parser.add_argument("--rounds", type=terminal.in_range(int, 1), default=40, metavar="N", help=rounds)
    terminal.add_common(parser, 200, "gdx-learn.png", images=KEPT)


def check(arguments: argparse.Namespace) -> None:
    arguments.start = optimizer(arguments.learning_rate, arguments.momentum, arguments.weight_decay)


def learn(arguments: argparse.Namespace) -> Iterator[tuple[dict[str, float], float, float]]:
    """Descends the validation loss with respect to the hyperparameters, until a loss or slope is not finite.

    Yields:
      The hyperparameters of each round, the start first, the validation loss after the last step, the test accuracy.
    """
    whole = digits()
    training, validation = (tuple(x[part] for x in whole.train) for part in (slice(KEPT), slice(KEPT, None)))
    problem = dataclasses.replace(whole, train=training)
    examples = stacked(problem.batches(arguments.seed, arguments.batch_size), arguments.steps)
    start = problem.start(jax.random.key(arguments.seed))

    def validation_loss(point: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        params = gdx.train(problem.loss_on, from_point(point), start, examples, remat=True).params
        return problem.loss(params, validation), problem.evaluate(params)["accuracy"]

    slopes = jax.jit(jax.value_and_grad(validation_loss, has_aux=True))
    point, meta = to_point(arguments.start), gdx.adam(META_RATE)
    state = meta.init(point)
    while True:
        (loss, accuracy), gradient = slopes(point)
        values = {name: float(value) for name, value in from_point(point).hyperparams.items()}
        yield values, float(loss), float(accuracy)
        if not all(map(np.isfinite, [loss, *gradient.values()])):
            return
        updates, state = meta.update(gradient, state, point)
        point = optax.apply_updates(point, updates)


def run(arguments: argparse.Namespace) -> int:
    """Learns the hyperparameters, prints where they started and where they are best, and writes the picture."""
    from matplotlib.figure import Figure

    console, rounds = terminal.console(), arguments.rounds
    console.print(f"sgd on digits, {arguments.steps} steps, whose hyperparameters take {rounds} down a validation loss")
    found: list[tuple[dict[str, float], float, float]] = []
    with terminal.progress(console, rounds, "learning") as update:
        for measured in itertools.islice(learn(arguments), rounds + 1):
            update("learning", len(found), f"validation loss {measured[1]:.3g}")
            found.append(measured)
            if terminal.interrupted.is_set():
                break
    path, losses, accuracies = zip(*found)
    if len(found) <= rounds:
        why = "the loss or a slope is not finite any more; start from a smaller learning rate"
        why = "interrupted" if terminal.interrupted.is_set() else why
        console.print(f"ended after {len(found) - 1} of {rounds} rounds: {why}")
    best = int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))
    rows = [
        [str(i), *(f"{x:.3g}" for x in (*path[i].values(), losses[i])), terminal.number("accuracy", accuracies[i])]
        for i in dict.fromkeys([0, best // 4, best // 2, best])
    ]
    terminal.table(console, ["round", *path[0], "validation loss", "test accuracy"], rows)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot.loss_curves({"validation loss": losses}, left)
    plot.loss_curves({name.replace("_", " "): [values[name] for values in path] for name in path[0]}, right)
    left.set_xlabel("round")
    right.set(xlabel="round", ylabel="value")
    terminal.save(console, figure, arguments.output)
    return 130 if terminal.interrupted.is_set() else 0
