"""What the commands share: Ctrl-C, progress, tables, pictures, and options."""

import argparse
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gdx.demo.problems import OPTIMIZERS

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

interrupted = threading.Event()
"""Set by Ctrl-C: a command that keeps what there is looks at it between two of its steps."""

HYPERPARAMETERS = ("learning_rate", "momentum", "b1", "b2", "weight_decay")
SUFFIXES = (".png", ".pdf", ".svg")


def console() -> "Console":
    """Where everything is printed."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def progress(to: "Console") -> "Progress":
    """A bar for each task, with its field `text`; in a pipe, how they end."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    texts = TextColumn("{task.description}"), BarColumn(None), TaskProgressColumn(), TextColumn("{task.fields[text]}")
    return Progress(*texts, TimeRemainingColumn(elapsed_when_finished=True), console=to)


def number(kind: str, value: Any) -> str:
    text = f"{value:.1%}".replace("%", " %") if kind == "accuracy" else f"{value:.3g}"
    return text if np.isfinite(value) else "diverged"


def status(metrics: Mapping[str, Any]) -> str:
    return ", ".join(f"{kind} {number(kind, value)}" for kind, value in metrics.items())


def table(to: "Console", headers: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Prints a table whose headers are as narrow as their longest word, so that it fits 80 columns."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    for i, header in enumerate(headers):
        words = header.replace("_", " ").replace(" ", "\n")
        shown.add_column(words, justify="right" if i else "left", no_wrap=True, vertical="bottom")
    for row in rows:
        shown.add_row(*row)
    to.width = max(to.width, 80)  # in a narrower terminal lines wrap, where rich would leave digits out
    to.print(shown)


def save(to: "Console", figure: Any, output: Path) -> None:
    figure.savefig(output, dpi=150)
    to.print(f"picture: {output}")


def positive(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """The type of an option that is a number above 0."""

    def number(text: str) -> Any:
        if not kind(text) > 0:
            raise argparse.ArgumentTypeError(f"it is {text}; expected more than 0")
        return kind(text)

    return number


def picture(text: str) -> Path:
    """The type of an option that is a picture's file; OSError where it cannot be written."""
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"it is {text!r}; expected a file that ends in {', '.join(SUFFIXES)}")
    with path.open("ab") as file:
        is_new = not file.tell()
    if is_new:
        path.unlink()
    return path


def add_hyperparameters(parser: argparse.ArgumentParser, kind: Callable[[str], Any], metavar: str) -> None:
    """Adds an option for each hyperparameter, with the optimizers that have it in its help."""
    known = OPTIMIZERS["digits"]
    for name in HYPERPARAMETERS:
        having = ", ".join(key for key, tx in known.items() if name in tx.hyperparams)
        add(parser, name.replace("_", "-"), kind, argparse.SUPPRESS, f"of {having}", metavar)


def hyperparameters(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those that are given."""
    return {name: value for name, value in vars(arguments).items() if name in HYPERPARAMETERS}


def add(
    parser: argparse.ArgumentParser, name: str, kind: Callable[[str], Any], default: Any, text: str, metavar: str = "N"
) -> None:
    parser.add_argument(f"--{name}", type=kind, default=default, help=text, metavar=metavar)
