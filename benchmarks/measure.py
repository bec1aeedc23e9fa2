"""Interleaved timings and their ratios: the only figures that hold on a machine shared with other jobs."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Ratio(NamedTuple):
    """Median of the per-round ratios of two functions' times, with their quartiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


def interleaved(
    functions: Mapping[str, Callable[[], None]],
    rounds: int,
    setups: Mapping[str, Callable[[], object]] | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Seconds taken by each function in each round: all are called once in a round, in random order.

    Args:
      functions: what to time, by name; each must block until its work is done.
      rounds: how many rounds are timed, after one that is not.
      setups: what to call before each call of the function of that name, not timed.
      seed: of the order.
    """
    names, setups = list(functions), setups or {}
    order = np.random.default_rng(seed)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds + 1):
        for name in order.permutation(names):
            setups.get(name, lambda: None)()
            start = time.perf_counter()
            functions[name]()
            if i > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(times) for name, times in seconds.items()}


def ratio(seconds: Mapping[str, np.ndarray], name: str, baseline: str) -> Ratio:
    """How much longer than the baseline a function takes: each round gives one ratio."""
    low, median, high = np.quantile(seconds[name] / seconds[baseline], [0.25, 0.5, 0.75])
    return Ratio(float(median), float(low), float(high))


def came_out(what: str, most: float, found: Mapping[str, Ratio | float]) -> str:
    """A sentence: what was expected of these at most, and what came out."""
    values = {name: value.median if isinstance(value, Ratio) else value for name, value in found.items()}
    worst = max(values, key=lambda name: values[name])
    within = sum(value <= most for value in values.values())
    return (
        f"Expected: {what}, at most {most:g}. Came out: {min(values.values()):.3g} to {values[worst]:.3g}, the most in "
        f"{worst}; {within} of {len(values)} within."
    )


def calls_for(function: Callable[[], None], duration: float, most: int = 1000) -> int:
    """How many calls of a function take about this many seconds, so that short ones can be timed together."""
    function()
    start, calls = time.perf_counter(), 0
    while calls < most and time.perf_counter() - start < duration:
        function()
        calls += 1
    return calls


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A plain-text table: the first column aligned left, the others right."""
    lines = [list(map(str, header)), *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]

    def line(cells: Sequence[str]) -> str:
        return "  ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:]))]).rstrip()

    return "\n".join([line(lines[0]), line(["-" * width for width in widths]), *map(line, lines[1:])])
