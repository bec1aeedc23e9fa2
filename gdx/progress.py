"""How far a run is: told from inside of compiled programs, and shown as a bar."""

import contextlib
import contextvars
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from gdx.arguments import check_function

Progress = Callable[[float, float, int], None]
"""Called now and then with the fraction of the work that is done, in (0, 1], and of the members now at work the
least loss and how many of their losses are infinite or NaN."""


def steps_between(total: int) -> int:
    """How many steps lie between two reports, of which there are about 100."""
    return max(round(total / 100), 1)


class Bar:
    """A bar by rich where that is installed, else a line that is written again and again."""

    def __init__(self) -> None:
        self._rich: Any = None

    def __call__(self, done: float, least: float, diverged: int) -> None:
        text = f"loss {least:.4g}" + (f", {diverged} diverged" if diverged else "")
        try:
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
        except ImportError:
            sys.stderr.write(f"\r{done:4.0%}  {text:30}" + "\n" * (done >= 1))
            return
        if self._rich is None:
            columns = BarColumn(), TaskProgressColumn(), TextColumn("{task.description}"), TimeRemainingColumn()
            self._rich = Progress(*columns)
            self._rich.add_task(text, total=1.0)
            self._rich.start()
        self._rich.update(self._rich.task_ids[0], completed=done, description=text)
        if done >= 1:
            self.close()

    def close(self) -> None:
        """Leaves the bar as it is, and makes place for another."""
        if self._rich is not None:
            self._rich.stop()
            self._rich = None


# one for all: compiled programs are found by the functions in them
BAR = Bar()


def to_progress(label: str, progress: Any) -> Progress | None:
    """The function that tells it, if any."""
    if progress is None or progress is False:
        return None
    if progress is True:
        return BAR
    check_function(label, progress, "the fraction that is done", "the least loss", "how many diverged")
    return progress


@contextlib.contextmanager
def shown(progress: Progress) -> Iterator[None]:
    """Around a run, after which no bar stays open."""
    try:
        yield
    finally:
        if progress is BAR:
            BAR.close()


_SILENT = contextvars.ContextVar("silent", default=False)


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Steps that are traced here report nothing."""
    before = _SILENT.set(True)
    try:
        yield
    finally:
        _SILENT.reset(before)


def say_interrupted(name: str, done: float) -> None:
    """Warns where a run has ended before all was done."""
    if done < 1:
        warnings.warn(f"{name}: interrupted after {done:.3g} of the steps; what they made is returned", stacklevel=3)


def reporting(
    step: Callable[[Any, Any], Any],
    progress: Progress,
    total: int,
    before: Any = 0,
    is_copy: Any = False,
    lanes: int = 0,
) -> Callable[[Any, Any], Any]:
    """The step, that calls `progress` about 100 times in all, and once for all lanes of `vmap` but copies.

    `lanes` is inside how many `vmap`s it is.
    """
    every = steps_between(total)

    def call(done: Any, least: Any, diverged: Any) -> None:
        progress(float(done) / total, float(least), int(diverged))

    def report(done: jax.Array, least: jax.Array, diverged: jax.Array) -> tuple:
        jax.debug.callback(call, done, least, diverged)
        return ()

    for _ in range(lanes):
        report = _once_for_all(report)

    def told(done: jax.Array, loss: jax.Array) -> tuple:
        finite = jnp.isfinite(loss)
        return report(done, jnp.where(finite, loss, jnp.inf), jnp.where(finite | is_copy, 0, 1))

    def reporting_step(carry: Any, inputs: Any) -> Any:
        carry, out = step(carry, inputs)
        if _SILENT.get():
            return carry, out
        done = before + inputs[0]
        jax.lax.cond((done % every == 0) | (done == total), told, lambda *_: (), done, out[0])
        return carry, out

    return reporting_step


def _once_for_all(report: Callable[..., tuple]) -> Callable[..., tuple]:
    """A report of one lane of `vmap`, that is made once for all of them."""

    @jax.custom_batching.custom_vmap
    def once(done: jax.Array, least: jax.Array, diverged: jax.Array) -> tuple:
        return ()

    @once.def_vmap
    def for_all(size: int, batched: Any, done: jax.Array, least: jax.Array, diverged: jax.Array) -> tuple:
        return report(done, jnp.min(least), jnp.sum(diverged)), ()

    return once
