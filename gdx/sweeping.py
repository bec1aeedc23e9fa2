"""Training with many optimizers in one compiled program: sweeps, over seeds too, and halving."""

import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdx.arguments import check_function
from gdx.fields import is_concrete, is_key, to_integer
from gdx.mesh import types_of
from gdx.modules import Parts, is_equinox, is_nnx, take_apart
from gdx.population import labels, mean_and_error, members_of, to_scores
from gdx.progress import Progress, say_interrupted, to_progress
from gdx.sharding.offload import offload_state
from gdx.stages import Plan, in_one, in_parts, nothing
from gdx.surroundings import Surroundings
from gdx.training import Evaluated, Loss, Rows, check_call, check_evaluate, steps_of, to_period
from gdx.transform import Transform
from gdx.trees import check_arrays, path_text


class Sweep(NamedTuple):
    """What became of each member of a batch of optimizers.

    With keys every array has an axis of seeds behind that of members.

    Attributes:
      optimizers: the batch.
      losses: of shape (members, steps): the loss on each batch of data, before the step that it makes; NaN for the
        steps that a member did not make.
      final: what `evaluate` made of each member's last parameters, with a leading axis of members; NaN, of integers 0,
        for one that had made no step when Ctrl-C ended the sweep.
      steps: int32, of shape (members,): how many each made: fewer than there are for what was dropped by halving, or
        had not come to its turn.
      aux: what the loss returned beside the loss, with leading axes of members and steps; None where it is the loss
        alone. Zeros for the steps that were not made.
      evaluated: with `every`, what `evaluate` returned each so many steps and at the end, with leading axes of members
        and evaluations, and after which steps, the same for all; NaN, of integers 0, for steps that were not made.
    """

    optimizers: Transform
    losses: jax.Array
    final: Any
    steps: jax.Array
    aux: Any = None
    evaluated: Evaluated | None = None

    @property
    def diverged(self) -> jax.Array:
        """Of shape (members,), or (members, seeds): whether the last loss or a number in final is infinite or NaN."""
        axes = self.losses.ndim - 1
        last = jnp.maximum(self.steps - 1, 0).reshape(-1, *[1] * axes)
        finite = jnp.isfinite(jnp.take_along_axis(self.losses, last, axis=-1)[..., 0])
        for leaf in jax.tree.leaves(self.final):
            finite &= jnp.all(jnp.isfinite(leaf), axis=tuple(range(axes, leaf.ndim)))
        return ~finite & (self.steps > 0).reshape(-1, *[1] * (axes - 1))

    @property
    def labels(self) -> list[dict[str, float]]:
        """What tells the members apart, as `gdx.labels`."""
        return labels(self.optimizers)

    def mean(self, score: Any) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard error of a score over the seeds, of shape (members,); NaN where one diverged.

        Args:
          score: of shape (members, seeds), such as `sweep.final["loss"]`; of shape (members,) without keys, where the
            error is NaN.

        Raises:
          TypeError: score is no real numbers.
          ValueError: score has another shape.
        """
        return self._mean("mean", score)

    def _mean(self, label: str, score: Any) -> tuple[np.ndarray, np.ndarray]:
        shape = self.losses.shape[:-1]
        each = "member, as in" if len(shape) == 1 else "member and seed, as in"
        each += f" sweep.losses[{', '.join([':'] * len(shape))}, -1]"
        score = np.where(self.diverged, np.nan, to_scores(label, score, shape, each))
        return mean_and_error(score.reshape(len(self.losses), -1))

    def ranking(self, score: Any) -> list[int]:
        """The members from the least mean score to the largest, of those that made all steps and did not diverge.

        Args:
          score: of shape (members,), such as `sweep.final["loss"]`; with keys (members, seeds).

        Raises:
          TypeError: score is no real numbers.
          ValueError: score has another shape.
        """
        means, _ = self._mean("ranking", score)
        means = np.where(self.steps < self.losses.shape[-1], np.nan, means)
        return [int(i) for i in np.argsort(means, stable=True) if np.isfinite(means[i])]


OfSeed = Any | Callable[[jax.Array], Any]
"""A tree of arrays or a module, or a function of a random key that makes one."""


def sweep(
    loss: Loss,
    optimizers: Transform,
    params: OfSeed,
    batches: OfSeed,
    *,
    model_state: OfSeed = None,
    keys: Any = None,
    evaluate: Callable[..., Any] | None = None,
    every: int | None = None,
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
    handwritten digits, from three seeds, was the best of all with 0.25 of the steps and 0.29 of the time (`python -m
    benchmarks sweep`). Under `jax_debug_nans`, look at losses through numpy: JAX stops at the NaN of what was dropped.

    Ctrl-C: with `progress`, called outside `jax.jit`, it runs in about 100 parts, one program called again and again,
    between which Ctrl-C ends it. Then it warns and returns the steps that were made: losses end with the last of them,
    `steps` says how many each member has, and final is made of the parameters there. Of chunks the later ones may have
    none. Before the first part, Ctrl-C is KeyboardInterrupt. Parts take memory for two copies of parameters and
    states, and about 0.2 ms each. They have the bits of one call, but for what that computes once for all members,
    such as a model_state that does not depend on the parameters: to rounding there. Inside `jax.jit`, over several
    processes and along explicit axes of a mesh it is all or nothing.

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
      every: each how many steps to evaluate, besides the end, for `Sweep.evaluated`; None for the end alone.
      halve: how many times the worse half is dropped; 0 for never.
      chunk_size: how many members are trained at the same time, which bounds the memory; None for all.
        The last chunk is filled up with copies of the last member.
      progress: True for a bar (by rich, if that is there); or a function, called about 100 times while it runs with the
        fraction that is done and, of the members at work, the least loss and how many have diverged.

    Raises:
      TypeError: loss, evaluate, progress or a function of keys has no hash or is no function of so many arguments;
        evaluate returns something else than arrays; optimizers is none of gdx's, or chunk_size or halve no integer;
        keys are no random keys, or missing where a function of a key is given; as `gdx.train`.
      ValueError: optimizers is no batch, chunk_size or every is less than 1, or the leaves of batches do not have one
        leading axis in common; every is given without evaluate; there are fewer steps than parts, or too few members
        to halve so often.

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
    result, done = sweep_of(
        "sweep", loss, optimizers, params, batches, model_state, keys, evaluate, every, halve, chunk_size, progress
    )
    say_interrupted("sweep", done)
    return result


def sweep_of(
    name: str,
    loss: Loss,
    optimizers: Transform,
    params: OfSeed,
    batches: OfSeed,
    model_state: OfSeed = None,
    keys: Any = None,
    evaluate: Callable[..., Any] | None = None,
    every: int | None = None,
    halve: int = 0,
    chunk_size: int | None = None,
    progress: Progress | bool = False,
) -> tuple[Sweep, float]:
    """As `sweep`, for what is called so; and how much of the work was done."""
    given = {"params": params, "model_state": model_state, "batches": batches}
    made = {argument: x for argument, x in given.items() if _is_made(x)}
    if made and keys is None:
        argument, function = next(iter(made.items()))
        raise TypeError(
            f"{name}: {argument} is {reprlib.repr(function)} at the root; expected arrays, or with "
            f"keys=jax.random.split(jax.random.key(0), 3), for three seeds, a function of a key"
        )
    for argument, function in made.items():
        check_function(f"{name}: {argument}", function, "a key")
    if keys is not None and not (is_key(keys) and np.ndim(keys) == 1 and len(keys)):
        raise TypeError(
            f"{name}: keys is {reprlib.repr(keys)}; expected random keys, one for each seed, such as "
            f"jax.random.split(jax.random.key(0), 3)"
        )
    shapes = {argument: _shapes(name, argument, function, keys[0]) for argument, function in made.items()}
    check_call(name, loss, optimizers, *((shapes[x] if x in made else given[x]) for x in ORDER))
    if not isinstance(optimizers, Transform):
        raise TypeError(
            f"{name}: optimizers is {reprlib.repr(optimizers)}; expected a batch of gdx's, as in "
            f"gdx.grid(gdx.adamw, learning_rate=[1e-3, 1e-2]); gdx.value(optax.lion) takes optax's there"
        )
    members, steps = members_of(optimizers, name), steps_of(shapes.get("batches", batches))
    chunk = members if chunk_size is None else min(to_integer(f"{name}: chunk_size", chunk_size, minimum=1), members)
    halve = to_integer(f"{name}: halve", halve, minimum=0)
    if 2**halve > members or halve >= steps:
        raise ValueError(
            f"{name}: halve is {halve} for {members} members and {steps} steps; expected at least {2**halve} members "
            f"and {halve + 1} steps"
        )
    is_offloaded = lambda x: isinstance(x, offload_state)  # noqa: E731
    if halve and any(map(is_offloaded, jax.tree.leaves(optimizers, is_leaf=is_offloaded))):
        raise ValueError(
            f"{name}: halve is {halve} for states in the host's memory, of which no half can be taken; expected "
            f"halve=0, or optimizers without gdx.sharding.offload_state"
        )
    if evaluate is not None:
        check_evaluate(name, evaluate, model_state)
    period = to_period(name, every, evaluate)
    told = to_progress(f"{name}: progress", progress)
    functions = {"loss": loss, "evaluate": evaluate, "progress": told, **made}
    for argument, function in functions.items():
        try:
            hash(function)
        except TypeError:
            raise TypeError(
                f"{name}: {argument} is {reprlib.repr(function)}, which has no hash, by which compiled programs are "
                f"found; wrap it in a function, such as lambda *arguments: {argument}(*arguments)"
            ) from None
    # of what is made the program takes it apart
    start, rest, parts = take_apart(f"{name}: params", None if "params" in made else params)
    _check_hash(name, parts, params)
    held = {"params": (start, rest), "model_state": model_state, "batches": batches}
    arrays = {argument: x for argument, x in held.items() if argument not in made}
    mesh = types_of(jax.tree.leaves(optimizers)[0]).mesh
    can_part = not mesh.explicit_axes and all(map(is_concrete, jax.tree.leaves((optimizers, keys, arrays))))
    inside = None if can_part else told
    around = Surroundings(loss, evaluate, inside, *made.values())
    plan = Plan(name, loss, evaluate, period, inside, tuple(made.items()), around, parts, chunk, halve, steps)
    if can_part and told is not None:
        found, done = in_parts(plan, told, optimizers, keys, arrays)
    else:
        found, done = in_one(plan, optimizers, keys, arrays), 1.0
    final, rows = found.final
    evaluated = _evaluated(rows[0], period, steps) if rows else None
    losses = found.losses
    if halve or done < 1:
        losses = _with_nan(losses, losses.ndim - 1, jnp.expand_dims(found.steps, range(1, losses.ndim)))
    return Sweep(optimizers, losses, final, found.steps, found.aux, evaluated), done


def no_results(*model: Any) -> tuple:
    """To be evaluated in place of the final losses, where nobody wants these."""
    return ()


def _evaluated(rows: Rows, every: int, steps: int) -> Evaluated:
    """What each member evaluated, up to the last that one of them did."""
    axis, number = rows.number.ndim, rows.number
    size = int(number.max()) if is_concrete(number) else -(-steps // every)
    _, values = rows.rows

    def cut(x: jax.Array) -> jax.Array:
        x = jax.lax.slice_in_dim(x, 0, size, axis=axis)
        return _with_nan(x, axis, number.reshape(*number.shape, *[1] * (x.ndim - axis)))

    return Evaluated(jnp.minimum(jnp.arange(1, size + 1, dtype=jnp.int32) * every, steps), jax.tree.map(cut, values))


def _with_nan(x: jax.Array, axis: int, number: jax.Array) -> jax.Array:
    """The array with NaN, or 0 where there is none, behind so many along an axis."""
    with jax.debug_nans(False):  # these are meant
        is_made = jax.lax.broadcasted_iota(jnp.int32, x.shape, axis) < number
        return jnp.where(is_made, x, nothing((), x))


def _shapes(name: str, argument: str, function: Callable[[Any], Any], key: Any) -> Any:
    """Those of what a function of a key makes; of a module, of what is trained.

    Raises:
      TypeError: it is no arrays.
    """
    label = f"{name}: {argument} by its function of a key"

    def shapes(key: Any) -> Any:
        made = function(key)
        made = take_apart(label, made)[0] if argument == "params" else made
        check_arrays(label, made)
        return made

    return jax.eval_shape(shapes, key)


def _check_hash(name: str, parts: Parts, model: Any) -> None:
    """Raises where something in a module has no hash."""
    try:
        hash(parts)
    except TypeError as error:
        found = [path_text(path) for path, x in jax.tree_util.tree_leaves_with_path(model) if not _has_hash(x)]
        at = f" at {found[0]}" if found else ""
        raise TypeError(
            f"{name}: params has something without a hash{at} ({error}), by which compiled programs are found; "
            f"expected arrays of JAX's, as jnp.asarray makes them, tuples and what else has a hash. Or make the module "
            f"by a function of a key, with keys=..."
        ) from None


def _has_hash(x: Any) -> bool:
    return isinstance(x, jax.Array) or getattr(type(x), "__hash__", None) is not None


ORDER = ("params", "batches", "model_state")


def _is_made(x: Any) -> bool:
    """Whether it is a function that makes something, and no module, which may be called too."""
    return callable(x) and jax.tree_util.all_leaves([x]) and not (is_nnx(x) or is_equinox(x))
