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

from gdx.demo.problems import BATCH_SIZE, OPTIMIZERS, TRAINING_IMAGES

if TYPE_CHECKING:
    from rich.console import Console

interrupted = threading.Event()
"""Set by Ctrl-C: a command that keeps what there is looks at it between two of its steps."""

Update = Callable[[str, float, str], None]
DIVERGED = "diverged"
PAUSE = 5.0  # seconds between two lines of progress in a pipe
HYPERPARAMETERS = ("learning_rate", "momentum", "b1", "b2", "weight_decay")
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
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[text]}")
    bars = Progress(*columns, TimeElapsedColumn(), console=to, disable=not to.is_terminal)
    works = {name: bars.add_task(name, total=total, text="") for name in names}
    begun: dict[str, tuple[float, float]] = {}
    said = time.perf_counter()

    def update(name: str, done: float, text: str) -> None:
        nonlocal said
        now, has_diverged = time.perf_counter(), text == DIVERGED
        first, at = begun.setdefault(name, (done, now))
        if total > 1 and done > first and not has_diverged:
            text = f"{text}, {(done - first) / (now - at):.0f} steps/s"
        if not bars.disable:
            bars.update(works[name], completed=done, text=text)
        elif done >= total or has_diverged or now - said > PAUSE:
            said = now
            to.print(f"{name}: {f'step {done}' if total > 1 else f'{done:.0%}'}, {text}")

    with contextlib.nullcontext() if bars.disable else bars:
        yield update


def number(kind: str, value: Any) -> str:
    return f"{value:.1%}".replace("%", " %") if kind == "accuracy" else f"{value:.3g}"


def status(metrics: Mapping[str, Any]) -> str:
    if not math.isfinite(metrics["loss"]):
        return DIVERGED
    return ", ".join(f"{kind} {number(kind, value)}" for kind, value in metrics.items())


def table(
    to: "Console", headers: Iterable[str], rows: Iterable[Iterable[str]], title: str = "", caption: str = ""
) -> None:
    """Prints a table, whole: its headers are as narrow as their longest word, so that it fits 80 columns."""
    from rich import box
    from rich.table import Table

    shown = Table(title=title, caption=caption, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    shown.title_justify = shown.caption_justify = "left"
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


def picture(text: str) -> Path:
    """The type of an option that is a picture's file."""
    path = Path(text)
    if path.suffix.lower() not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"it is {text!r}; expected a file that ends in {', '.join(SUFFIXES)}")
    check_folder(path.parent)
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise argparse.ArgumentTypeError(f"it is {text!r}, which is no file that can be written; give another one")
    return path


def check_folder(path: Path, *, make: bool = False) -> None:
    """Raises unless files can be made there, in a new folder if asked for: permissions alone do not say so."""
    try:
        if make:
            path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        why = f"no file can be made in {str(path)!r} ({error.strerror}); give another folder"
        raise argparse.ArgumentTypeError(why) from None


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
    add = parser.add_argument
    if images:
        text = f"images per step, 1 to {images} (default: {BATCH_SIZE})"
        add("--batch-size", type=in_range(int, 1, images), metavar="N", help=text)
    default = None if isinstance(steps, str) else steps
    text = f"at least {least} (default: {steps})"
    add("--steps", type=in_range(int, least), default=default, metavar="N", help=text)
    seeds = in_range(int, 0, 2**32 - 1)
    add("--seed", type=seeds, default=0, metavar="N", help="of all that is random (default: 0)")
    if output:
        text = f"the picture, {', '.join(SUFFIXES)} (default: %(default)s)"
        add("--output", type=picture, default=output, metavar="FILE", help=text)


def check_batch_size(arguments: argparse.Namespace) -> None:
    if arguments.batch_size and arguments.data != "digits":
        raise ValueError(f"--batch-size does not apply to {arguments.data}, which has no data; use it with digits")
