"""Options that several commands have, and what is allowed for them."""

import argparse
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import gdx
from gdx.demo.problems import BATCH_SIZE, OPTIMIZERS, TRAINING_IMAGES

HYPERPARAMETERS = ("learning_rate", "momentum", "b1", "b2", "weight_decay")
SUFFIXES = (".png", ".pdf", ".svg")


def add_hyperparameters(parser: argparse.ArgumentParser, kind: Callable[[str], Any], metavar: str) -> None:
    """Adds an option for each hyperparameter, with the optimizers that have it in its help."""
    for name in HYPERPARAMETERS:
        having = [key for key, tx in OPTIMIZERS["digits"].items() if name in tx.hyperparams]
        users = "all" if len(having) == len(OPTIMIZERS["digits"]) else ", ".join(having)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=f"of {users}")


def optimizer_with(data: str, name: str, given: Iterable[str]) -> gdx.Transform:
    """The optimizer of this name for a problem.

    Raises:
      ValueError: there is none, or it lacks a hyperparameter that is given.
    """
    known = OPTIMIZERS[data]
    if name not in known:
        raise ValueError(f"--optimizer is {name!r}; choose from {', '.join(known)}")
    for field in given:
        if field not in known[name].hyperparams:
            users = [key for key in known if field in known[key].hyperparams]
            option = f"--{field.replace('_', '-')}"
            raise ValueError(f"{option} does not apply to {name}; choose --optimizer {either(users)}")
    return known[name]


def add_common(parser: argparse.ArgumentParser, steps: str, output: str) -> None:
    """Adds the options of a training run.

    Args:
      parser: where they are added.
      steps: the default number of steps, as text.
      output: the default name of the picture.
    """
    add = parser.add_argument
    add("--batch-size", type=int, metavar="N", help=f"images per step, 1 to {TRAINING_IMAGES} (default: {BATCH_SIZE})")
    add("--steps", type=int, metavar="N", help=f"at least 1 (default: {steps})")
    add("--seed", type=int, default=0, metavar="N", help="of the initial parameters and the batches (default: 0)")
    add_output(parser, output)


def add_output(parser: argparse.ArgumentParser, output: str) -> None:
    """Adds the option of where the picture goes, with its default."""
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(output),
        metavar="FILE",
        help=f"the picture, {either(SUFFIXES)} (default: %(default)s)",
    )


def check_steps(steps: int) -> int:
    if steps < 1:
        raise ValueError(f"--steps is {steps}; expected at least 1")
    return steps


def check_seed(seed: int) -> int:
    if not 0 <= seed < 2**32:
        raise ValueError(f"--seed is {seed}; expected 0 to {2**32 - 1}")
    return seed


def check_batch_size(size: int | None, data: str) -> int:
    """The batch size, or the default one."""
    if size is None:
        return BATCH_SIZE
    if data != "digits":
        raise ValueError(f"--batch-size does not apply to {data}, which has no data; use it with digits")
    if not 1 <= size <= TRAINING_IMAGES:
        raise ValueError(f"--batch-size is {size}; expected 1 to {TRAINING_IMAGES}, the number of training images")
    return size


def check_output(output: Path) -> Path:
    if output.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--output is {str(output)!r}; expected a file that ends in {either(SUFFIXES)}")
    if not output.parent.is_dir():
        raise ValueError(f"--output is {str(output)!r}, but there is no folder {str(output.parent)!r}; create it first")
    if output.is_dir() or not os.access(output if output.exists() else output.parent, os.W_OK):
        raise ValueError(f"--output is {str(output)!r}, which cannot be written; expected a file in a writable folder")
    return output


def either(names: list[str] | tuple[str, ...]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last
