"""What the demo shows: progress on a terminal or as lines, a table and a picture."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import gdx
from gdx import plot
from gdx.demo.loop import Report
from gdx.demo.problems import Surface
from gdx.extra import needs

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Runs = Mapping[str, list[Report]]
Update = Callable[[str, list[Report]], None]
QUANTITIES = ("loss", "accuracy", "distance")


def console() -> "Console":
    """Where everything is printed; without colours or movement unless it is a terminal."""
    with needs("demo"):
        from rich.console import Console
    is_terminal = sys.stdout.isatty()
    return Console(force_terminal=is_terminal, width=None if is_terminal else 100, highlight=False)


@contextlib.contextmanager
def progress(to: "Console", names: list[str], steps: int) -> Iterator[Update]:
    """Shows how runs advance: bars on a terminal, elsewhere a line as each run ends.

    Args:
      to: the console.
      names: the runs, in their order.
      steps: the last step of each.

    Yields:
      A function to call with a run's name and its reports so far.
    """
    if not to.is_terminal:
        yield lambda name, reports: _print_line(to, name, reports, steps)
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[status]}")
    with Progress(*columns, console=to, transient=True) as bars:
        tasks = {name: bars.add_task(name, total=steps, status="") for name in names}

        def update(name: str, reports: list[Report]) -> None:
            bars.update(tasks[name], completed=reports[-1].step, status=_status(reports))

        yield update


def _print_line(to: "Console", name: str, reports: list[Report], steps: int) -> None:
    if reports[-1].step == steps or reports[-1].diverged:
        to.print(f"{name}: step {reports[-1].step}, {_status(reports)}", soft_wrap=True)


def _status(reports: list[Report]) -> str:
    last = reports[-1]
    if last.diverged:
        return "diverged"
    values = [f"{name} {number(name, last.metrics[name])}" for name in QUANTITIES if name in last.metrics]
    seconds = last.seconds - reports[0].seconds  # the first report is the end of compiling
    return ", ".join([*values, f"{last.step / seconds:.0f} steps/s"] if seconds else values)


def number(name: str, value: float) -> str:
    return f"{100 * value:.1f} %" if name == "accuracy" else f"{value:.3g}"


def table(title: str, optimizers: Mapping[str, gdx.Transform], runs: Runs, steps: int) -> "Table":
    """The last report of each run.

    Args:
      title: what stands above the table.
      optimizers: the optimizer of each run.
      runs: the reports of each run, none of one that has not begun.
      steps: the last step of a run that was not interrupted.
    """
    from rich import box
    from rich.table import Table

    on_plane = any("distance" in report.metrics for reports in runs.values() for report in reports)
    headers = {"loss": "final loss" if on_plane else "final training loss", "accuracy": "test accuracy"}
    if on_plane:
        headers["distance"] = "distance to minimum"
    result = Table(title=title, title_justify="left", caption_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    result.add_column("optimizer", no_wrap=True)
    for header in ("learning rate", *headers.values(), "seconds"):
        result.add_column(header, justify="right")
    result.add_column("compilations", justify="right", no_wrap=True)
    for name, reports in runs.items():
        rate = f"{optimizers[name].hyperparams['learning_rate']:g}"
        if not reports:
            result.add_row(name, rate, *["-"] * (len(headers) + 2))
            continue
        last = reports[-1]
        values = [number(key, last.metrics[key]) if key in last.metrics else "-" for key in headers]
        if last.diverged:
            values = ["diverged", *["-"] * (len(headers) - 1)]
        stopped = last.step < steps and not last.diverged
        if stopped:
            result.caption = f"* stopped at step {last.step}"
        result.add_row(f"{name}{'*' * stopped}", rate, *values, f"{last.seconds:.1f}", str(last.compilations))
    return result


def picture(output: Path, titles: tuple[str, str], runs: Runs, surface: Surface, walks: Runs) -> None:
    """Writes the loss curves of all runs next to their walks down a function of the plane.

    Args:
      output: the file; its suffix decides the format.
      titles: what stands above the loss curves and above the walks.
      runs: the reports of each run.
      surface: the function of the plane.
      walks: the reports of the runs on it.
    """
    with needs("demo"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    begun = [(name, reports) for name, reports in runs.items() if reports]
    losses = {name: np.array([report.metrics["loss"] for report in reports]) for name, reports in begun}
    steps = {name: np.array([report.step for report in reports]) for name, reports in begun}
    plot.loss_curves(losses, left, steps=steps)
    left.set_title(titles[0])
    start = np.array([surface.start])
    points = {
        name: np.concatenate([start, *(report.points for report in reports if report.points is not None)])
        for name, reports in walks.items()
        if reports
    }
    plot.paths(surface.function, points, right, limits=surface.limits, minimum=surface.minimum, legend=False)
    right.set_title(titles[1])
    figure.savefig(output, dpi=150)
