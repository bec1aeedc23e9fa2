"""What pictures take: each function has its arguments checked here before it draws anything."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gdx.arguments import of_kind
from gdx.fields import is_real, refuse


def numbers(label: str, value: Any, expected: str, *shapes: tuple[int | None, ...]) -> np.ndarray:
    """Real numbers as float64, in one of these shapes, in which None is any length."""
    if not is_real(value):
        refuse(label, value, f"real numbers, {expected}")
    array = np.asarray(value).astype(float)
    if not any(_fits(array, shape) for shape in shapes):
        raise ValueError(f"{label} has shape {array.shape}; expected {expected}")
    return array


def ascending(label: str, value: Any, expected: str, *shape: int | None) -> Any:
    """Finite numbers in this shape, of which those in a row ascend: two or more."""
    found = np.asarray(value).astype(float) if is_real(value) else np.zeros(())
    is_right = _fits(found, shape) and np.all(np.isfinite(found)) and np.all(np.diff(found) > 0)
    return found if is_right and found.size > 1 else refuse(label, value, expected, ValueError)


def _fits(array: np.ndarray, shape: tuple[int | None, ...]) -> bool:
    return len(shape) == array.ndim and all(n in (None, size) for n, size in zip(shape, array.shape))


def by_name(label: str, given: Any, each: str) -> Mapping[str, Any]:
    """A dictionary of what there is one of for each name."""
    return of_kind(label, given, Mapping, f"a dictionary: {each}, by name")


def curves(
    label: str, argument: str, runs: Any, steps: Any, what: str, *shapes: tuple[int | None, ...]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The steps and the values of each run, by its name; the steps from 0 where none are given."""
    found = {}
    for name, given in by_name(f"{label}: {argument}", runs, f"the {what} at each step").items():
        values = numbers(f"{label}: {name}", given, f"one {what} for each step", *shapes)
        at = np.arange(values.size)
        if steps is not None:
            if name not in by_name(f"{label}: steps", steps, f"the step of each {what}"):
                raise ValueError(f"{label}: steps has no {name!r}; expected the step of each {what}, by the same names")
            at = numbers(f"{label}: steps of {name}", steps[name], f"{values.shape}, one for each {what}", values.shape)
        found[name] = np.atleast_1d(at), np.atleast_1d(values)
    return found
