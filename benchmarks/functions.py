"""How many functions a step runs through: an optimizer is made, its state too, and one update is traced.

Run `python -m benchmarks functions`. Counted once each are the functions of a package that Python enters, those without
a name (lambdas, and comprehensions where they are functions) apart; not those that dataclasses generate.
"""

import collections
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gdx
from benchmarks.measure import came_out, table

PACKAGES = {"gdx": Path(gdx.__file__).parent, "optax": Path(optax.__file__).parent}
OPTIMIZERS = {
    "gradient descent": (lambda: gdx.gradient_descent(0.1), lambda: optax.sgd(0.1)),
    "SGD with momentum": (lambda: gdx.sgd(0.1, 0.9), lambda: optax.sgd(0.1, 0.9)),
    "AdamW": (lambda: gdx.adamw(1e-3), lambda: optax.adamw(1e-3)),
    "AdamW, 8 bits": (
        lambda: gdx.adamw(1e-3, mu_dtype=gdx.storage.SignedFourthRoot8(), nu_dtype=gdx.storage.FourthRoot8()),
        None,
    ),
    "AdamW of optax, as a value": (lambda: gdx.value(optax.adamw)(1e-3), None),
}


@contextmanager
def entered(folder: Path) -> Iterator[set[tuple[str, str, int]]]:
    """The functions in the files of this folder that are entered in here: file, name and first line of each."""
    found = set[tuple[str, str, int]]()

    def note(frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(folder)) and code.co_name != "<module>":
            found.add((str(Path(code.co_filename).relative_to(folder)), code.co_name, code.co_firstlineno))

    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)


def of_a_step(make: Callable[[], Any], folder: Path) -> set[tuple[str, str, int]]:
    """The functions that a step of two leaves runs through."""
    params = {"w": jnp.ones((64, 256)), "b": jnp.ones(4)}
    jax.clear_caches()
    with entered(folder) as found:
        tx = make()
        jax.jit(tx.update).trace(params, tx.init(params), params)
    return found


def named(functions: set[tuple[str, str, int]]) -> set[tuple[str, str, int]]:
    return {function for function in functions if not function[1].startswith("<")}


def main() -> None:
    found, rows = {}, []
    for name, (ours, theirs) in OPTIMIZERS.items():
        found[name] = of_a_step(ours, PACKAGES["gdx"])
        there = None if theirs is None else of_a_step(theirs, PACKAGES["optax"])
        cells = [f"{len(named(of))} and {len(of) - len(named(of))}" if of else "" for of in (found[name], there)]
        rows.append((name, *cells))
    print("Functions that a step runs through, with a name and without\n")
    print(table(("", "gdx", "optax"), rows))
    step = named(found["AdamW"])
    files = collections.Counter(file for file, *_ in step)
    print("\nThose of gdx's AdamW, by file:", ", ".join(f"{file} {count}" for file, count in files.most_common()))
    print("\n" + came_out("functions with a name, AdamW", 50, {"gdx": float(len(step))}))


if __name__ == "__main__":
    main()
