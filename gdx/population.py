"""Many optimizers in one value: a batch is an optimizer whose hyperparameters have a leading axis of members."""

import itertools
import operator
import reprlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from gdx.fields import is_real, text, uncalled
from gdx.schedules import Schedule
from gdx.transform import Transform
from gdx.values import names_of, on_every_device, size_of, stacked


def stack(optimizers: Iterable[Transform]) -> Transform:
    """One batched optimizer from single ones: each hyperparameter becomes an array of shape (members,).

    A batch is a pytree with a leading axis, for `jax.vmap`, `jax.lax.map`, `gdx.sweep` or a device
    mesh; its own `init` and `update` need one of those around them. Numbers stay float64 on the host.

    Args:
      optimizers: at least one; alike but for the values of their hyperparameters (schedules too,
        if they are values, as those of `gdx.schedules`).

    Raises:
      ValueError: there is none, one is a batch itself, or they differ in more than numbers, which would be several
        programs.
      TypeError: optimizers is no iterable, or one is no gdx transform.

    >>> import gdx, jax, jax.numpy as jnp
    >>> batch = gdx.stack([gdx.sgd(0.1), gdx.sgd(0.2)])
    >>> jax.vmap(lambda tx: tx.update(jnp.ones(()), tx.init(jnp.ones(())))[0])(batch).tolist()
    [-0.10000000149011612, -0.20000000298023224]
    """
    if isinstance(optimizers, Transform) or not isinstance(optimizers, Iterable):
        raise TypeError(
            f"stack: optimizers is {reprlib.repr(optimizers)}; expected a list, such as [gdx.sgd(0.1), gdx.sgd(0.2)]"
        )
    members = list(optimizers)
    if not members:
        raise ValueError("stack: got no optimizers; expected at least one, such as [gdx.sgd(0.1), gdx.sgd(0.2)]")
    for i, member in enumerate(members):
        if not isinstance(member, Transform):
            raise TypeError(
                f"stack: optimizer {i} is {reprlib.repr(member)}; expected one of gdx's, such as gdx.sgd(0.1) or "
                f"gdx.value(optax.lion)(0.1){uncalled(member)}"
            )
        if size := size_of(member):
            raise ValueError(
                f"stack: optimizer {i}, {member!r}, is a batch of {size}; expected single optimizers, as those of a "
                f"batch are: gdx.stack([*gdx.unstack(batch), gdx.sgd(0.1)])"
            )
        structure: Any = jax.tree.structure(member)
        if structure != jax.tree.structure(members[0]):
            raise ValueError(
                f"stack: optimizer {i} is {member!r}, another program than optimizer 0, {members[0]!r}"
                f"{_unlike(member, members[0])}; stack those that differ in numbers only, and take those of "
                f"gdx.schedules where schedules differ in numbers"
            )
        if list(map(np.shape, jax.tree.leaves(member))) != list(map(np.shape, jax.tree.leaves(members[0]))):
            raise ValueError(
                f"stack: optimizer {i}, {member!r}, has other shapes than optimizer 0, {members[0]!r}; "
                f"stack single optimizers"
            )

    return stacked(members)


def _unlike(tx: Transform, other: Transform) -> str:
    """Functions in which two optimizers differ that print alike."""
    ours, theirs = names_of(tx), names_of(other)
    found = [
        name
        for name, each in ours.items()
        if callable(each.value)
        and name in theirs
        and each.value != theirs[name].value
        and text(each.value) == text(theirs[name].value)
    ]
    return f": {', '.join(found)} is a function that was made anew for each, so define it once" if found else ""


def unstack(batch: Transform) -> list[Transform]:
    """The single optimizers of a batch, in order.

    Raises:
      TypeError: it is no optimizer of gdx's.
      ValueError: it is no batch.

    >>> import gdx
    >>> gdx.unstack(gdx.grid(gdx.sgd, learning_rate=[0.1, 0.2]))[1]
    sgd(learning_rate=0.2)
    """
    size = members_of(batch, "unstack")
    whole = jax.tree.map(on_every_device, batch)
    return [jax.tree.map(operator.itemgetter(i), whole) for i in range(size)]


def grid(make: Callable[..., Transform], /, **settings: Any) -> Transform:
    """The batch of optimizers for every combination of the given values, the last one varying fastest.

    Args:
      make: makes an optimizer from keywords, such as `gdx.adamw`.
      **settings: a list, tuple, range or one-dimensional array of numbers (or of schedules that are values) is
        an axis of the grid; anything else is the same in every member.

    Raises:
      ValueError: an axis is empty, or a value is out of range, or the members are different programs.
      TypeError: make is no function, such as an optimizer that is made already, or does not take these keywords; the
        numbers of an axis are in something else, such as a set or a generator.

    >>> import gdx
    >>> batch = gdx.grid(gdx.adamw, learning_rate=[1e-3, 1e-2], weight_decay=[0.0, 0.1], b2=0.99)
    >>> gdx.labels(batch)[1]
    {'learning_rate': 0.001, 'weight_decay': 0.1}
    """
    if not callable(make) or isinstance(make, Schedule):
        raise TypeError(
            f"grid: make is {reprlib.repr(make)}; expected what makes an optimizer, and its arguments by name, as in "
            f"gdx.grid(gdx.adamw, learning_rate=[1e-3, 1e-2])"
        )
    axes = {
        name: value if isinstance(value, list | tuple) else np.asarray(value)
        for name, value in settings.items()
        if _is_axis(value)
    }
    for name, value in settings.items():
        if name not in axes and _is_other_axis(value):
            raise TypeError(
                f"grid: {name} is {reprlib.repr(value)}; expected its values in a list or an array, as in "
                f"{name}=[0.1, 0.2]"
            )
    for name, values in axes.items():
        if not len(values):
            raise ValueError(f"grid: {name} is empty; expected at least one value")
    points = [dict(zip(axes, point)) for point in itertools.product(*axes.values())]
    return stack(make(**{**settings, **point}) for point in points)


def to_scores(label: str, score: Any, shape: tuple[int, ...], each: str) -> np.ndarray:
    """A score as float64, checked to be one real number for each of these.

    Raises:
      TypeError: it is no real numbers.
      ValueError: it has another shape.
    """
    if not is_real(score):
        raise TypeError(f"{label}: score is {reprlib.repr(score)}; expected real numbers, one for each {each}")
    array = np.asarray(score)
    if array.shape != shape:
        raise ValueError(f"{label}: score has shape {array.shape}; expected {shape}, one number for each {each}")
    return array.astype(float)


def mean_and_error(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each row of scores the mean and its standard error, which is NaN where there is one score."""
    count = scores.shape[1]
    error = scores.std(axis=1, ddof=1) / np.sqrt(count) if count > 1 else np.full(len(scores), np.nan)
    return scores.mean(axis=1), error


def labels(batch: Transform) -> list[dict[str, float]]:
    """What tells the members of a batch apart: for each, the hyperparameters that are not the same in all.

    Raises:
      TypeError: it is no optimizer of gdx's.
      ValueError: it is no batch.

    >>> import gdx
    >>> gdx.labels(gdx.stack([gdx.adam(0.1), gdx.adam(0.1, b1=0.8)]))
    [{'b1': 0.9}, {'b1': 0.8}]
    """
    size = members_of(batch, "labels")
    columns = {name: np.asarray(leaf) for name, leaf in batch.hyperparams.items() if isinstance(leaf, _ARRAYS)}
    varying = {name: column.tolist() for name, column in columns.items() if np.any(column != column[0])}
    return [{name: column[i] for name, column in varying.items()} for i in range(size)]


def members_of(batch: Transform, label: str = "") -> int:
    """How many members a batch has; the label is that of what was called.

    Raises:
      TypeError: it is no optimizer of gdx's.
      ValueError: it is no batch.
    """
    if not isinstance(batch, Transform):
        raise TypeError(
            f"{label}: batch is {reprlib.repr(batch)}; expected a batch of gdx's optimizers, as gdx.stack or gdx.grid "
            f"makes it"
        )
    start = f"{label}: " if label else ""
    named = jax.tree_util.tree_leaves_with_path(batch)
    sizes = {np.shape(leaf)[:1] for _, leaf in named}
    for path, leaf in named:
        if np.ndim(leaf) != 1 or len(sizes) > 1:
            raise ValueError(
                f"{start}{type(batch).__name__}{jax.tree_util.keystr(path)} has shape {np.shape(leaf)}; expected a "
                f"batch, in which every hyperparameter has shape (members,). Make one with gdx.stack or gdx.grid"
            )
    if not named:
        raise ValueError(f"{start}{batch!r} has no hyperparameters to tell members apart")
    return sizes.pop()[0]


_ARRAYS = (np.ndarray, jax.Array)


def _is_axis(value: Any) -> bool:
    if isinstance(value, _ARRAYS):
        return value.ndim == 1 and value.dtype != bool
    return isinstance(value, list | tuple | range) and all(map(_is_point, value))


def _is_other_axis(value: Any) -> bool:
    """Whether it is numbers in no order, or one that is used up by reading it."""
    is_numbers = isinstance(value, Collection) and not isinstance(value, Mapping | np.ndarray | jax.Array)
    return isinstance(value, Iterator) or (is_numbers and len(value) > 0 and all(map(_is_point, value)))


def _is_point(value: Any) -> bool:
    return isinstance(value, int | float | np.number | jax.Array | Schedule) and not isinstance(value, bool)
