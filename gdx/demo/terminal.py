"""What the commands share: Ctrl-C, progress and tables in a terminal or a pipe, pictures, and options."""

import argparse
import contextlib
import math
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gdx.demo.problems import BATCH_SIZE, OPTIMIZERS, TRAINING_IMAGES

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

interrupted = threading.Event()
"""Set by Ctrl-C: a command that keeps what there is looks at it between two of its steps."""

Update = Callable[[str, float, str], None]
DIVERGED = "diverged"
PAUSE = 5.0  # seconds between two lines of progress in a pipe
HYPERPARAMETERS = ("learning_rate", "momentum", "b1", "b2", "weight_decay")
KINDS = ("loss", "accuracy", "distance")  # of metrics, in the order in which they are shown
SUFFIXES = (".png", ".pdf", ".svg")


def console() -> "Console":
    """Where everything is printed; without colours or movement unless it is a terminal."""
    from rich.console import Console

    is_terminal = sys.stdout.isatty()
    return Console(force_terminal=is_terminal, width=None if is_terminal else 80, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def progress(to: "Console", total: float, *names: str) -> Iterator[Update]:
    """Shows how works advance to a number of steps, or to 1: bars in a terminal, now and then a line in a pipe.

    Yields:
      A function to call with a work's name, how far it is and a text on it, which gets the steps in a second since the
      first call: what came before is compiling.
    """
    begun: dict[str, tuple[float, float]] = {}
    said = time.perf_counter()

    def with_rate(name: str, done: float, text: str) -> str:
        now = time.perf_counter()
        first, at = begun.setdefault(name, (done, now))
        has_rate = total > 1 and done > first and text != DIVERGED
        return f"{text}, {(done - first) / (now - at):.0f} steps/s" if has_rate else text

    def line(name: str, done: float, text: str) -> None:
        nonlocal said
        shown = with_rate(name, done, text)
        if done >= total or text == DIVERGED or time.perf_counter() - said > PAUSE:
            said = time.perf_counter()
            to.print(f"{name}: {f'step {done}' if total > 1 else f'{done:.0%}'}, {shown}")

    if not to.is_terminal:
        yield line
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[text]}")
    with Progress(*columns, TimeElapsedColumn(), console=to) as bars:
        tasks = {name: bars.add_task(name, total=total, text="") for name in names}
        yield lambda name, done, text: bars.update(tasks[name], completed=done, text=with_rate(name, done, text))


def ordered(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A problem's metrics, as numbers or arrays on the host, in order."""
    return {kind: np.asarray(metrics[kind], float) for kind in KINDS if kind in metrics}


def headers(metrics: Iterable[str]) -> list[str]:
    """What stands above them in a table."""
    titles = {"accuracy": "test accuracy", "distance": "distance to minimum"}
    return [titles.get(kind, "training loss" if "accuracy" in metrics else kind) for kind in metrics]


def number(kind: str, value: Any) -> str:
    return f"{value:.1%}".replace("%", " %") if kind == "accuracy" else f"{value:.3g}"


def status(metrics: Mapping[str, Any]) -> str:
    if not math.isfinite(metrics["loss"]):
        return DIVERGED
    return ", ".join(f"{kind} {number(kind, value)}" for kind, value in ordered(metrics).items())


def show(to: "Console", table: "Table") -> None:
    """Prints a table, whole: in a narrow terminal its lines wrap, where rich would leave digits out."""
    to.width = max(to.width, 80)
    to.print(table)


def table(headers: Iterable[str], rows: Iterable[Iterable[str]], title: str = "", caption: str = "") -> "Table":
    """A table whose headers are as narrow as their longest word, so that it fits 80 columns."""
    from rich import box
    from rich.table import Table

    left: Any = {"title_justify": "left", "caption_justify": "left"}
    look: Any = {"box": box.SIMPLE_HEAD, "padding": (0, 1, 0, 0), "pad_edge": False}
    result = Table(title=title, caption=caption, **look, **left)
    for i, header in enumerate(headers):
        words = header.replace("_", " ").replace(" ", "\n")
        result.add_column(words, justify="right" if i else "left", no_wrap=True, vertical="bottom")
    for row in rows:
        result.add_row(*row)
    return result


def save(to: "Console", figure: Any, output: Path) -> None:
    figure.savefig(output, dpi=150)
    to.print(f"picture: {output}")


def in_range(kind: Callable[[str], Any], least: float, most: float = math.inf) -> Callable[[str], Any]:
    """The type of an option that is a number in [least, most]."""

    def convert(text: str) -> Any:
        value = kind(text)
        if not least <= value <= most:
            allowed = f"at least {least:g}" if most == math.inf else f"{least:.12g} to {most:.12g}"
            raise argparse.ArgumentTypeError(f"it is {value}; expected {allowed}")
        return value

    convert.__name__ = kind.__name__  # argparse names it where the text is none
    return convert


def several(choices: Iterable[str]) -> Callable[[str], list[str]]:
    """The type of an option that is a list of names."""

    def convert(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"it has {name!r}; choose from {', '.join(choices)}")
        return names

    return convert


def check_folder(path: Path, *, make: bool = False) -> None:
    """Raises unless files can be made there, in a new folder if asked for: permissions alone do not say so."""
    try:
        if make:
            path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ValueError(f"no file can be made in {str(path)!r} ({error.strerror}); give another folder") from None


def add_hyperparameters(parser: argparse.ArgumentParser, kind: Callable[[str], Any], metavar: str) -> None:
    """Adds an option for each hyperparameter, with the optimizers that have it in its help."""
    known = OPTIMIZERS["digits"]
    for name in HYPERPARAMETERS:
        having = [key for key, tx in known.items() if name in tx.hyperparams]
        users = "all" if len(having) == len(known) else ", ".join(having)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=f"of {users}")


def hyperparameters(arguments: argparse.Namespace) -> dict[str, Any]:
    """Those that are given."""
    return {name: value for name in HYPERPARAMETERS if (value := getattr(arguments, name)) is not None}


def add_common(
    parser: argparse.ArgumentParser, steps: Any, output: str = "", *, images: int = TRAINING_IMAGES, least: int = 1
) -> None:
    """Adds the options of a run: of at least so many steps, in batches of at most so many images (0 for no batches)."""
    add, seeds = parser.add_argument, in_range(int, 0, 2**32 - 1)
    if images:
        text = f"images per step, 1 to {images} (default: {BATCH_SIZE})"
        add("--batch-size", type=in_range(int, 1, images), metavar="N", help=text)
    default = None if isinstance(steps, str) else steps
    text = f"at least {least} (default: {steps})"
    add("--steps", type=in_range(int, least), default=default, metavar="N", help=text)
    add("--seed", type=seeds, default=0, metavar="N", help="of all that is random (default: 0)")
    if output:
        text = f"the picture, {', '.join(SUFFIXES)} (default: {output})"
        add("--output", type=Path, default=Path(output), metavar="FILE", help=text)


def check_batch_size(arguments: argparse.Namespace) -> None:
    if arguments.batch_size and arguments.data != "digits":
        raise ValueError(f"--batch-size does not apply to {arguments.data}, which has no data; use it with digits")


def check_output(output: Path) -> None:
    if output.suffix.lower() not in SUFFIXES:
        raise ValueError(f"--output is {str(output)!r}; expected a file that ends in {', '.join(SUFFIXES)}")
    check_folder(output.parent)
    if output.exists() and not (output.is_file() and os.access(output, os.W_OK)):
        raise ValueError(f"--output is {str(output)!r}, which is no file that can be written; give another one")
