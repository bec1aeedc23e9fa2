"""Training with many optimizers in one compiled program: sweeps, over seeds too, halving, and range tests."""

import functools
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdx.arguments import check_function
from gdx.fields import is_key, is_number, text, to_integer
from gdx.mesh import types_of, untyped
from gdx.modules import Parts, is_equinox, is_nnx, take_apart
from gdx.population import labels, mean_and_error, members_of, stack, to_scores
from gdx.progress import Progress, reporting, to_progress
from gdx.surroundings import Surroundings
from gdx.training import Loss, arguments_of, arrays_of, check_call, steps_of, training_step
from gdx.transform import Transform
from gdx.values import names_of


class Sweep(NamedTuple):
    """What became of each member of a batch of optimizers.

    With keys every array has an axis of seeds behind that of members.

    Attributes:
      optimizers: the batch.
      losses: of shape (members, steps): the loss on each batch of data, before the step that it makes; NaN for the
        steps that a member did not make.
      final: what `evaluate` made of each member's last parameters, with a leading axis of members.
      steps: int32, of shape (members,): how many each made: fewer than there are for what was dropped by halving.
      aux: what the loss returned beside the loss, with leading axes of members and steps; None where it is the loss
        alone. Zeros for the steps that were not made.
    """

    optimizers: Transform
    losses: jax.Array
    final: Any
    steps: jax.Array
    aux: Any = None

    @property
    def diverged(self) -> jax.Array:
        """Of shape (members,), or (members, seeds): whether the last loss or a number in final is infinite or NaN."""
        axes = self.losses.ndim - 1
        last = (self.steps - 1).reshape(-1, *[1] * axes)
        finite = jnp.isfinite(jnp.take_along_axis(self.losses, last, axis=-1)[..., 0])
        for leaf in jax.tree.leaves(self.final):
            finite &= jnp.all(jnp.isfinite(leaf), axis=tuple(range(axes, leaf.ndim)))
        return ~finite

    @property
    def labels(self) -> list[dict[str, float]]:
        """What tells the members apart, as `gdx.labels`."""
        return labels(self.optimizers)

    def mean(self, score: Any, name: str = "mean") -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard error of a score over the seeds, of shape (members,); NaN where one diverged.

        Args:
          score: of shape (members, seeds), such as `sweep.final["loss"]`; of shape (members,) without keys, where the
            error is NaN.
          name: what an error starts with.

        Raises:
          TypeError: score is no real numbers.
          ValueError: score has another shape.
        """
        shape = self.losses.shape[:-1]
        each = "member, as in" if len(shape) == 1 else "member and seed, as in"
        each += f" sweep.losses[{', '.join([':'] * len(shape))}, -1]"
        score = np.where(self.diverged, np.nan, to_scores(name, score, shape, each))
        return mean_and_error(score.reshape(len(self.losses), -1))

    def ranking(self, score: Any) -> list[int]:
        """The members from the least mean score to the largest, without those that diverged or that halving dropped.

        Args:
          score: of shape (members,), such as `sweep.final["loss"]`; with keys (members, seeds).

        Raises:
          TypeError: score is no real numbers.
          ValueError: score has another shape.
        """
        means, _ = self.mean(score, "ranking")
        means = np.where(self.steps < self.losses.shape[-1], np.nan, means)
        return [int(i) for i in np.argsort(means, stable=True) if np.isfinite(means[i])]


Start = Any
"""Parameters or a module, or a function of a random key that makes them."""


@dataclass(frozen=True)
class _Plan:
    """What a program of a sweep is found by: its functions, what they use, and what no array can say.

    Attributes:
      made: the function of a key that makes it, by the name of what is not given as arrays.
    """

    loss: Loss
    evaluate: Callable[..., Any] | None
    progress: Progress | None
    made: tuple[tuple[str, Callable[[Any], Any]], ...]
    around: Surroundings
    parts: Parts
    size: int
    halve: int


def sweep(
    loss: Loss,
    optimizers: Transform,
    params: Start,
    batches: Any,
    *,
    model_state: Any = None,
    keys: Any = None,
    evaluate: Callable[..., Any] | None = None,
    halve: int = 0,
    chunk_size: int | None = None,
    progress: Progress | bool = False,
) -> Sweep:
    r"""Trains with every member of a batch of optimizers, from the same start on the same data, in one program.

    The program is compiled once for each loss, evaluate, progress and set of shapes: define those functions once, and
    another grid of as many points compiles nothing. What they use of the code around them is constant in it: another
    value there compiles anew, but one that changes deep inside of an object is not seen. Pass it in batches. A member
    that diverges becomes infinite or NaN and touches no other. Where the batch is sharded over a mesh along its axis
    of members, so is all of the work.

    Seeds: with `keys`, each member is trained once for each of them. Then params, model_state and batches may be
    functions of a key, which make the start and the order of the data of that seed; what is no function is the same for
    all. Every result has an axis of seeds behind that of members; `Sweep.mean` has the mean and its error.

    Halving: of many members most are soon seen to be worse. With `halve=h` the steps are cut into $h + 1$ equal parts,
    and after each but the last the half of the members with the larger mean loss in the second half of that part is
    dropped. In all that takes about $2 / (h + 1)$ of the steps: with `halve=7` a quarter. It keeps the parameters and
    states of all members that are left at the end of a part, also where chunk_size bounds the rest. The best of 256 on
    handwritten digits, from three seeds, was the best of all with 0.25 of the steps and 0.27 of the time (`python -m
    benchmarks sweep`).

    Args:
      loss: the loss of parameters on one batch of data, a real scalar, or with aux and model_state as in `gdx.train`.
      optimizers: a batch, from `gdx.stack` or `gdx.grid`.
      params: the parameters that every member starts from, or a module, as in `gdx.train`; or a function of a key.
      batches: a tree of arrays with a leading axis of steps, the same for all members; see `gdx.train`. Or a function
        of a key.
      model_state: as in `gdx.train`, or a function of a key.
      keys: random keys, such as `jax.random.split(jax.random.key(0), 3)` for three seeds; None for one run of each.
      evaluate: what to keep of a member's final parameters, a function of them (and the model_state, if there is one);
        None for all of them (of a module, what is trained).
      halve: how many times the worse half is dropped; 0 for never.
      chunk_size: how many members are trained at the same time, which bounds the memory; None for all.
        The last chunk is filled up with copies of the last member.
      progress: True for a bar (by rich, if that is there); or a function, called about 100 times while it runs with the
        fraction that is done and, of the members at work, the least loss and how many have diverged.

    Raises:
      TypeError: loss, evaluate, progress or a function of keys has no hash or is no function of so many arguments;
        evaluate returns something else than arrays; optimizers is none of gdx's, or chunk_size or halve no integer;
        keys are no random keys, or missing where a function of a key is given; as `gdx.train`.
      ValueError: optimizers is no batch, chunk_size is less than 1, or the leaves of batches do not
        have one leading axis in common; there are fewer steps than parts, or too few members to halve so often.

    Source: halving as in Jamieson and Talwalkar, Non-stochastic Best Arm Identification and Hyperparameter Optimization
    (2016), with equal parts of the steps.

    >>> import gdx, jax, jax.numpy as jnp
    >>> bowl = lambda theta, batch: jnp.sum((theta - batch) ** 2)
    >>> batch = gdx.grid(gdx.sgd, learning_rate=[0.01, 0.5, 1e3])
    >>> result = gdx.sweep(bowl, batch, jnp.ones(2), jnp.zeros((99, 2)), chunk_size=2)
    >>> result.diverged.tolist(), result.ranking(result.losses[:, -1])
    ([False, False, True], [1, 0])

    From three random starts, with the worse half dropped after each quarter of the steps:

    >>> start, keys = lambda key: jax.random.normal(key, 2), jax.random.split(jax.random.key(0), 3)
    >>> batch = gdx.grid(gdx.sgd, learning_rate=[1e-4, 1e-3, 0.01, 0.02, 0.1, 0.2, 0.4, 1e3])
    >>> result = gdx.sweep(bowl, batch, start, jnp.zeros((12, 2)), keys=keys, halve=3)
    >>> result.losses.shape, result.steps.tolist(), result.ranking(result.losses[..., -1])
    ((8, 3, 12), [3, 3, 3, 6, 6, 9, 12, 3], [6])
    """
    given = {"params": params, "model_state": model_state, "batches": batches}
    made = {name: x for name, x in given.items() if _is_made(x)}
    if made and keys is None:
        name, function = next(iter(made.items()))
        raise TypeError(
            f"sweep: {name} is {reprlib.repr(function)} at the root; expected arrays, or with "
            f"keys=jax.random.split(jax.random.key(0), 3), for three seeds, a function of a key"
        )
    for name, function in made.items():
        check_function(f"sweep: {name}", function, "a key")
    if keys is not None and not (is_key(keys) and np.ndim(keys) == 1 and len(keys)):
        raise TypeError(
            f"sweep: keys is {reprlib.repr(keys)}; expected random keys, one for each seed, such as "
            f"jax.random.split(jax.random.key(0), 3)"
        )
    shapes = {name: jax.eval_shape(lambda x=x: take_apart("sweep: params", x(keys[0]))[0]) for name, x in made.items()}
    check_call("sweep", loss, optimizers, *((shapes[name] if name in made else given[name]) for name in ORDER))
    if not isinstance(optimizers, Transform):
        raise TypeError(
            f"sweep: optimizers is {reprlib.repr(optimizers)}; expected a batch of gdx's, as in "
            f"gdx.grid(gdx.adamw, learning_rate=[1e-3, 1e-2]); gdx.value(optax.lion) takes optax's there"
        )
    members, steps = members_of(optimizers), steps_of(shapes.get("batches", batches))
    chunk = members if chunk_size is None else min(to_integer("sweep: chunk_size", chunk_size, minimum=1), members)
    halve = to_integer("sweep: halve", halve, minimum=0)
    if 2**halve > members or halve >= steps:
        raise ValueError(
            f"sweep: halve is {halve} for {members} members and {steps} steps; expected at least {2**halve} members "
            f"and {halve + 1} steps"
        )
    if evaluate is not None:
        also = () if model_state is None else ("the model_state",)
        check_function("sweep: evaluate", evaluate, "the final parameters", *also)
    told = to_progress("sweep: progress", progress)
    functions = {"loss": loss, "evaluate": evaluate, "progress": told, **made}
    for name, function in functions.items():
        try:
            hash(function)
        except TypeError:
            raise TypeError(
                f"sweep: {name} is {reprlib.repr(function)}, which has no hash, by which compiled programs are found; "
                f"wrap it in a function, such as lambda *arguments: {name}(*arguments)"
            ) from None
    around = Surroundings(*functions.values())
    # of what is made the program takes it apart
    start, rest, parts = take_apart("sweep: params", None if "params" in made else params)
    plan = _Plan(loss, evaluate, told, tuple(made.items()), around, parts, chunk, halve)
    held = {"params": (start, rest), "model_state": model_state, "batches": batches}
    arrays = {name: x for name, x in held.items() if name not in made}
    return Sweep(optimizers, *_sweep(plan, optimizers, keys, arrays))


ORDER = ("params", "batches", "model_state")


def _is_made(x: Any) -> bool:
    """Whether it is a function that makes something, and no module, which may be called too."""
    return callable(x) and jax.tree_util.all_leaves([x]) and not (is_nnx(x) or is_equinox(x))


@functools.partial(jax.jit, static_argnums=0)
def _sweep(plan: _Plan, optimizers: Transform, keys: Any, arrays: dict[str, Any]) -> tuple[jax.Array, Any, Any, Any]:
    optimizers, arrays = jax.tree.map(jnp.asarray, (optimizers, arrays))
    along = types_of(jax.tree.leaves(optimizers)[0])
    # vmap cannot carry the axis of members through a scan that is typed with it
    return untyped(functools.partial(_train_all, plan), along.mesh, along)(optimizers, keys, arrays)


def _train_all(
    plan: _Plan, optimizers: Transform, keys: Any, arrays: dict[str, Any]
) -> tuple[jax.Array, Any, Any, Any]:
    """Losses, what is kept of the last parameters, steps and aux, for each member."""
    made = dict(plan.made)

    def of_seed(name: str, key: Any) -> Any:
        return made[name](key) if name in made else arrays[name]

    members, seeds = members_of(optimizers), () if keys is None else keys.shape[:1]
    steps = steps_of(jax.eval_shape(lambda: of_seed("batches", None if keys is None else keys[0])))
    edges = [round(steps * i / (plan.halve + 1)) for i in range(plan.halve + 2)]
    halved = [-(-members // 2**i) for i in range(plan.halve + 1)]
    lengths = [-(-n // min(plan.size, n)) * (end - begin) for n, begin, end in zip(halved, edges, edges[1:])]

    def train_one(i: int, chunk: jax.Array, tx: Transform, is_copy: jax.Array, carry: Any, key: Any) -> Any:
        """A part of the steps, of one member and seed."""
        if "params" in made:
            start, rest, parts = take_apart("sweep: params", of_seed("params", key))
        else:
            (start, rest), parts = arrays["params"], plan.parts
        if carry is None:
            start, variables = jax.tree.map(jnp.asarray, (start, (rest, of_seed("model_state", key))))
            carry = start, tx.init(start), variables
        step, length = training_step(plan.loss, tx, parts), edges[i + 1] - edges[i]
        if plan.progress is not None:
            before = sum(lengths[:i]) + chunk * length
            step = reporting(step, plan.progress, sum(lengths), before, is_copy, lanes=1 + len(seeds))
        batches = jax.tree.map(lambda x: x[edges[i] : edges[i + 1]], of_seed("batches", key))
        carry, (losses, aux) = jax.lax.scan(step, carry, (jnp.arange(1, length + 1), batches))
        params, _, variables = carry
        final = params if plan.evaluate is None else plan.evaluate(*arguments_of(parts, params, variables))
        return losses, aux, arrays_of("sweep", final), carry if i < plan.halve else None

    def train_some(i: int, chunk: jax.Array, lanes: Any, are_copies: jax.Array) -> Any:
        def each(tx: Transform, carry: Any, is_copy: jax.Array) -> Any:
            one = functools.partial(train_one, i, chunk, tx, is_copy)
            return one(carry, None) if keys is None else jax.vmap(one)(carry, keys)

        optimizers, carry = lanes
        return jax.vmap(each)(optimizers, carry, are_copies)

    def part(i: int, optimizers: Transform, carry: Any) -> Any:
        size = min(plan.size, halved[i])
        return _in_chunks(functools.partial(train_some, i), halved[i], size, (optimizers, carry))

    losses, aux, final, carry = part(0, optimizers, None)
    if not plan.halve:
        return losses, final, jnp.full(members, steps, jnp.int32), aux

    def widened(part: jax.Array, filling: Any) -> jax.Array:
        """With room for the steps that are still to be made."""
        end = (*part.shape[: len(seeds) + 1], steps - edges[1], *part.shape[len(seeds) + 2 :])
        return jnp.concatenate([part, jnp.full(end, filling, part.dtype)], axis=len(seeds) + 1)

    whole = widened(losses, jnp.nan), jax.tree.map(lambda x: widened(x, 0), aux)
    made_steps, alive = jnp.full(members, edges[1], jnp.int32), jnp.arange(members)
    for i in range(1, plan.halve + 1):
        score = jnp.mean(losses[..., losses.shape[-1] // 2 :], axis=range(1, losses.ndim))
        # in their old order
        kept = jnp.sort(jnp.argsort(jnp.where(jnp.isfinite(score), score, jnp.inf))[: halved[i]])
        alive, optimizers, carry = jax.tree.map(lambda x: x[kept], (alive, optimizers, carry))  # noqa: B023
        losses, aux, last, carry = part(i, optimizers, carry)
        of_part = (alive, *[slice(None)] * len(seeds), slice(edges[i], edges[i + 1]))
        whole = jax.tree.map(lambda x, y: x.at[of_part].set(y), whole, (losses, aux))  # noqa: B023
        final = jax.tree.map(lambda x, y: x.at[alive].set(y), final, last)  # noqa: B023
        made_steps = made_steps.at[alive].set(edges[i + 1])
    return whole[0], final, made_steps, whole[1]


def _in_chunks(run: Callable[..., Any], members: int, size: int, lanes: Any) -> Any:
    """`run(chunk, lanes, are_copies)` for so many lanes at a time."""
    chunks = -(-members // size)
    if chunks == 1:
        return run(jnp.zeros([], jnp.int32), lanes, jnp.zeros(members, bool))
    numbers = np.arange(size * chunks)

    def split(leaf: jax.Array) -> jax.Array:
        filled = leaf[np.minimum(numbers, members - 1)] if members < size * chunks else leaf
        # member i is in chunk i % chunks, so that an axis of members that is sharded is so in every chunk
        return jnp.swapaxes(filled.reshape(size, chunks, *leaf.shape[1:]), 0, 1)

    def joined(leaf: jax.Array) -> jax.Array:
        return jnp.swapaxes(leaf, 0, 1).reshape(size * chunks, *leaf.shape[2:])[:members]

    are_copies = jnp.asarray(numbers >= members).reshape(size, chunks).T
    by_chunk = jnp.arange(chunks), jax.tree.map(split, lanes), are_copies
    return jax.tree.map(joined, jax.lax.map(lambda chunk: run(*chunk), by_chunk))


class RangeTest(NamedTuple):
    """Loss against learning rate after a few steps.

    Attributes:
      learning_rates: of shape (points,), ascending.
      losses: of shape (points,): the mean loss of the last tenth of the steps; inf where the run diverged.
      start: the loss before the first step.
      edge: the rate from which on training fails: the geometric mean of the last rate that ends below
        `start` and the next, of those from the best rate upwards; inf if none fails.
      suggested: the rate with the least loss.
    """

    learning_rates: np.ndarray
    losses: np.ndarray
    start: float
    edge: float
    suggested: float


def range_test(
    loss: Loss,
    tx: Transform,
    params: Any,
    batches: Any,
    *,
    low: float = 1e-5,
    high: float = 10.0,
    points: int = 48,
    chunk_size: int | None = None,
    model_state: Any = None,
    progress: Progress | bool = False,
) -> RangeTest:
    """Finds the learning rates that train: one short run for each, all in one program.

    Smith's test raises the rate during one run, so that each rate meets parameters that the ones before
    have made. Here every rate starts from `params`, which costs no more where runs share a program.
    The best rate of a short run is an upper estimate for a long one, which ends with smaller steps.

    Args:
      loss, params, batches, model_state, chunk_size, progress: as in `gdx.sweep`; a few dozen steps do.
      tx: the optimizer, whose `learning_rate` is replaced. Of several learning rates the largest is meant, and the
        others keep their ratios to it.
      low, high: the smallest and the largest rate; the others lie between them at equal ratios.
      points: how many rates are tried, at least 2.

    Raises:
      TypeError: tx is none of gdx's; points is no integer; as `gdx.train`.
      ValueError: tx is a batch, or has no hyperparameter called learning_rate, or several that are not numbers with
        ratios; low and high are not numbers with 0 < low < high;
        points is less than 2; the loss is not finite at the start; no rate ends below the loss that it started from.

    Source: Smith, Cyclical Learning Rates for Training Neural Networks (2017), section 3.3.

    >>> import gdx, jax.numpy as jnp
    >>> bowl = lambda theta, batch: 2 * jnp.sum(theta**2)  # its curvature is 4, so that 0.25 is best and 0.5 the edge
    >>> found = gdx.range_test(bowl, gdx.gradient_descent(0.1), jnp.ones(2), jnp.zeros((20, 1)), points=99)
    >>> 0.24 < found.suggested < 0.26, 0.45 < found.edge < 0.55
    (True, True)
    """
    check_call("range_test", loss, tx, params, batches, model_state)
    if not isinstance(tx, Transform):
        raise TypeError(f"range_test: tx is {reprlib.repr(tx)}; expected one of gdx's optimizers, such as gdx.sgd(0.1)")
    if not (is_number(low) and is_number(high) and 0 < low < high < math.inf):
        raise ValueError(f"range_test: low is {low!r} and high is {high!r}; expected numbers, 0 < low < high")
    rates = np.geomspace(low, high, to_integer("range_test: points", points, minimum=2))
    ratios = _ratios(tx)
    batch = stack(tx.replace(**{name: ratio * rate for name, ratio in ratios.items()}) for rate in rates)
    around = {"model_state": model_state, "chunk_size": chunk_size, "progress": progress}
    result = sweep(loss, batch, params, batches, evaluate=_nothing, **around)
    history = np.asarray(result.losses, float)
    start = float(history[0, 0])
    if not math.isfinite(start):
        raise ValueError(
            f"range_test: the loss is {start} at the start, before any step; expected params and batches where it is "
            f"finite"
        )
    losses = np.where(result.diverged, np.inf, history[:, -max(history.shape[1] // 10, 1) :].mean(axis=1))
    best = int(np.argmin(losses))
    if not losses[best] < start:
        raise ValueError(
            f"range_test: no learning rate from {low:g} to {high:g} ends below the loss of the start, {start:g}; "
            f"try others, or give batches of more steps"
        )
    fails = np.flatnonzero(~(losses[best:] < start))
    edge = math.sqrt(rates[best + fails[0] - 1] * rates[best + fails[0]]) if len(fails) else math.inf
    return RangeTest(rates, losses, start, edge, float(rates[best]))


def _ratios(tx: Transform) -> dict[str, float]:
    """Each learning rate's ratio to the largest, by name."""
    found = {name: x.value for name, x in names_of(tx).items() if name.split(".")[-1] == "learning_rate"}
    shown = ", ".join(f"{name}={text(x)}" for name, x in found.items())
    if not found:
        raise ValueError(
            f"range_test: {tx!r} has no learning_rate to try; give it one, as in "
            f"gdx.chain(tx, gdx.scale_by_learning_rate(0.1))"
        )
    if any(map(np.ndim, found.values())):
        raise ValueError(f"range_test: tx is a batch, of {shown}; expected one optimizer, as in gdx.unstack(tx)[0]")
    if len(found) == 1:
        return dict.fromkeys(found, 1.0)
    if not all(map(is_number, found.values())) or not any(found.values()):
        raise ValueError(
            f"range_test: tx has {shown}; expected numbers, not all 0, to keep their ratios to the largest"
        )
    return {name: x / max(found.values()) for name, x in found.items()}


def _nothing(*model: Any) -> tuple:
    return ()
