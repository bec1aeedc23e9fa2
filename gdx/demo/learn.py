"""Learns learning rate, momentum and weight decay on digits, by the slope of the validation loss in each.

examples:
  python -m gdx learn
  python -m gdx learn --learning-rate 1 --momentum 0.95 --rounds 80
"""

import argparse
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gdx
from gdx import plot
from gdx.demo import terminal
from gdx.demo.problems import digits

VALIDATION = 288  # of the training images
META_RATE = 0.1


def optimizer(point: jax.Array) -> gdx.Transform:
    """SGD with momentum on a loss with an L2 penalty, at a point of the space that is descended: every one is valid."""
    rate, odds, decay = jnp.exp(point)
    return gdx.chain(gdx.add_decoupled_weight_decay(decay), gdx.sgd(rate, odds / (1 + odds)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    for name, start in {"learning-rate": 0.01, "momentum": 0.5, "weight-decay": 1e-3}.items():
        terminal.add(parser, name, terminal.positive(float), start, "to start from", "X")
    terminal.add(parser, "rounds", terminal.positive(int), 40, "steps of the hyperparameters")
    terminal.add(parser, "steps", terminal.positive(int), 200, "of each training run")
    terminal.add(parser, "output", terminal.picture, "gdx-learn.png", "the picture", "FILE")


def run(arguments: argparse.Namespace) -> int:
    """Learns the hyperparameters, prints where they started and where they are best, and writes the picture."""
    from matplotlib.figure import Figure

    rate, momentum, decay = arguments.learning_rate, arguments.momentum, arguments.weight_decay
    gdx.chain(gdx.add_decoupled_weight_decay(decay), gdx.sgd(rate, momentum))  # refuses what is wrong
    point = jnp.log(jnp.array([rate, momentum / (1 - momentum), decay]))
    console, rounds, whole = terminal.console(), arguments.rounds, digits()
    training, validation = (tuple(x[part] for x in whole.train) for part in np.s_[:-VALIDATION, -VALIDATION:])
    problem = dataclasses.replace(whole, train=training)
    start, batches = problem.start(jax.random.key(arguments.seed)), problem.batches(arguments.seed, arguments.steps)
    console.print(f"sgd on digits, {arguments.steps} steps, whose hyperparameters take {rounds} down a validation loss")

    def trained(tx: gdx.Transform) -> Any:
        return gdx.train(problem.loss_on, tx, start, batches, remat=True).params

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def validation_loss(point: jax.Array) -> tuple[jax.Array, jax.Array]:
        params = trained(optimizer(point))
        return problem.loss(params, validation), problem.evaluate(params)["accuracy"]

    names = [*optimizer(point).hyperparams, "validation loss", "test accuracy"]
    meta, is_finite = gdx.adam(META_RATE), True
    state, found, points = meta.init(point), list[list[float]](), list[jax.Array]()
    with terminal.progress(console) as bars:
        task = bars.add_task("learning", total=rounds, text="")
        while len(found) <= rounds and is_finite and not (found and terminal.interrupted.is_set()):
            (loss, accuracy), slope = validation_loss(point)
            points.append(point)
            found.append([float(x) for x in (*optimizer(point).hyperparams.values(), loss, accuracy)])
            bars.update(task, completed=len(found) - 1, text=f"validation loss {loss:.3g}")
            is_finite = bool(jnp.isfinite(jnp.append(slope, loss)).all())
            updates, state = meta.update(slope, state, point)
            point += updates
    if len(found) <= rounds:
        why = "the loss or a slope is not finite any more; start from a smaller learning rate"
        why = "interrupted" if terminal.interrupted.is_set() else why
        console.print(f"ended after {len(found) - 1} of {rounds} rounds: {why}")
    path = dict(zip(names, np.transpose(found)))
    losses = path["validation loss"]
    best = int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))
    shown = dict.fromkeys([0, best // 4, best // 2, best])
    rows = [[str(i), *(terminal.number(name.split()[-1], x[i]) for name, x in path.items())] for i in shown]
    terminal.table(console, ["round", *names], rows)
    if not terminal.interrupted.is_set():
        agreement = jax.jit(lambda tx: gdx.metasmoothness(trained, tx))(optimizer(points[best])).hyperparams
        said = ", ".join(f"{name.replace('_', ' ')} {x:.2f}" for name, x in agreement.items())
        console.print(f"metasmoothness at the best (1: trust its slopes, 0 and below: do not): {said}")
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    plot.loss_curves({"validation loss": losses}, left)
    plot.loss_curves({name.replace("_", " "): path[name] for name in names[:3]}, right)
    left.set_xlabel("round")
    right.set(xlabel="round", ylabel="value")
    terminal.save(console, figure, arguments.output)
    return 0
