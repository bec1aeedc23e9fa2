"""Training with many optimizers in one compiled program: sweeps, over seeds too, halving, and range tests."""

import functools
import math
import reprlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdx.arguments import check_function
from gdx.fields import is_concrete, is_key, is_number, text, to_integer
from gdx.mesh import types_of, untyped
from gdx.modules import Parts, is_equinox, is_nnx, take_apart
from gdx.population import labels, mean_and_error, members_of, stack, to_scores
from gdx.progress import REPORTS, Progress, reporting, say_interrupted, shown, to_progress
from gdx.sharding.offload import offload_state
from gdx.surroundings import Surroundings
from gdx.training import Loss, arguments_of, arrays_of, check_call, steps_of, training_step
from gdx.transform import Transform
from gdx.trees import check_arrays, path_text
from gdx.values import names_of


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
    params: OfSeed,
    batches: OfSeed,
    *,
    model_state: OfSeed = None,
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
    shapes = {name: _shapes(name, function, keys[0]) for name, function in made.items()}
    check_call("sweep", loss, optimizers, *((shapes[name] if name in made else given[name]) for name in ORDER))
    if not isinstance(optimizers, Transform):
        raise TypeError(
            f"sweep: optimizers is {reprlib.repr(optimizers)}; expected a batch of gdx's, as in "
            f"gdx.grid(gdx.adamw, learning_rate=[1e-3, 1e-2]); gdx.value(optax.lion) takes optax's there"
        )
    members, steps = members_of(optimizers, "sweep"), steps_of(shapes.get("batches", batches))
    chunk = members if chunk_size is None else min(to_integer("sweep: chunk_size", chunk_size, minimum=1), members)
    halve = to_integer("sweep: halve", halve, minimum=0)
    if 2**halve > members or halve >= steps:
        raise ValueError(
            f"sweep: halve is {halve} for {members} members and {steps} steps; expected at least {2**halve} members "
            f"and {halve + 1} steps"
        )
    is_offloaded = lambda x: isinstance(x, offload_state)  # noqa: E731
    if halve and any(map(is_offloaded, jax.tree.leaves(optimizers, is_leaf=is_offloaded))):
        raise ValueError(
            f"sweep: halve is {halve} for states in the host's memory, of which no half can be taken; expected "
            f"halve=0, or optimizers without gdx.sharding.offload_state"
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
    # of what is made the program takes it apart
    start, rest, parts = take_apart("sweep: params", None if "params" in made else params)
    _check_hash(parts, params)
    held = {"params": (start, rest), "model_state": model_state, "batches": batches}
    arrays = {name: x for name, x in held.items() if name not in made}
    plan = _Plan(loss, evaluate, told, tuple(made.items()), Surroundings(*functions.values()), parts, chunk, halve)
    mesh = types_of(jax.tree.leaves(optimizers)[0]).mesh
    if told is None or mesh.explicit_axes or not all(map(is_concrete, jax.tree.leaves((optimizers, keys, arrays)))):
        result, done = _sweep(plan, optimizers, keys, arrays), 1.0
    else:
        around = Surroundings(*(x for name, x in functions.items() if name != "progress"))
        plan = replace(plan, progress=None, around=around)
        result, done = _in_parts(plan, told, optimizers, keys, arrays)
        say_interrupted("sweep", done)
    losses, final, made_steps, aux = result
    if halve or done < 1:
        with jax.debug_nans(False):  # these are meant
            step = jax.lax.broadcasted_iota(jnp.int32, losses.shape, losses.ndim - 1)
            is_made = step < jnp.expand_dims(made_steps, range(1, losses.ndim))
            losses = jnp.where(is_made, losses, jnp.asarray(jnp.nan, losses.dtype))
    return Sweep(optimizers, losses, final, made_steps, aux)


def _shapes(name: str, function: Callable[[Any], Any], key: Any) -> Any:
    """Those of what a function of a key makes; of a module, of what is trained.

    Raises:
      TypeError: it is no arrays.
    """
    label = f"sweep: {name} by its function of a key"

    def shapes(key: Any) -> Any:
        made = function(key)
        made = take_apart(label, made)[0] if name == "params" else made
        check_arrays(label, made)
        return made

    return jax.eval_shape(shapes, key)


def _check_hash(parts: Parts, model: Any) -> None:
    """Raises where something in a module has no hash."""
    try:
        hash(parts)
    except TypeError as error:
        found = [path_text(path) for path, x in jax.tree_util.tree_leaves_with_path(model) if not _has_hash(x)]
        at = f" at {found[0]}" if found else ""
        raise TypeError(
            f"sweep: params has something without a hash{at} ({error}), by which compiled programs are found; expected "
            f"arrays of JAX's, as jnp.asarray makes them, tuples and what else has a hash. Or make the module by a "
            f"function of a key, with keys=..."
        ) from None


def _has_hash(x: Any) -> bool:
    return isinstance(x, jax.Array) or getattr(type(x), "__hash__", None) is not None


ORDER = ("params", "batches", "model_state")


def _is_made(x: Any) -> bool:
    """Whether it is a function that makes something, and no module, which may be called too."""
    return callable(x) and jax.tree_util.all_leaves([x]) and not (is_nnx(x) or is_equinox(x))


class _Run:
    """What each member does from one seed."""

    def __init__(self, plan: _Plan, arrays: dict[str, Any], key: Any):
        self.plan, self.arrays, self.key, self.made = plan, arrays, key, dict(plan.made)
        if "params" in self.made:
            self.start, self.rest, self.parts = take_apart("sweep: params", self.given("params"))
        else:
            (self.start, self.rest), self.parts = arrays["params"], plan.parts

    def given(self, name: str) -> Any:
        return self.made[name](self.key) if name in self.made else self.arrays[name]

    def begin(self, tx: Transform) -> Any:
        """What a step carries on, before the first one."""
        start, variables = jax.tree.map(jnp.asarray, (self.start, (self.rest, self.given("model_state"))))
        return start, tx.init(start), variables

    def step(self, tx: Transform) -> Callable[[Any, Any], Any]:
        return training_step(self.plan.loss, tx, self.parts, "sweep")

    def final(self, carry: Any) -> Any:
        """What is kept of the parameters."""
        params, _, variables = carry
        if self.plan.evaluate is not None:
            params = self.plan.evaluate(*arguments_of(self.parts, params, variables))
        return arrays_of("sweep", params)


class _Stage(NamedTuple):
    """So many members, so many at a time, make these steps; then the worse half is dropped."""

    members: int
    size: int
    begin: int
    end: int

    @property
    def chunks(self) -> int:
        return -(-self.members // self.size)

    @property
    def work(self) -> int:
        return self.chunks * (self.end - self.begin)


def _stages(plan: _Plan, members: int, steps: int) -> list[_Stage]:
    edges = [round(steps * i / (plan.halve + 1)) for i in range(plan.halve + 2)]
    halved = [-(-members // 2**i) for i in range(plan.halve + 1)]
    return [_Stage(n, min(plan.size, n), *part) for n, *part in zip(halved, edges, edges[1:])]


def _better_half(losses: jax.Array) -> jax.Array:
    """The members with the smaller mean loss in the second half of these steps, in their old order."""
    score = jnp.mean(losses[..., losses.shape[-1] // 2 :], axis=range(1, losses.ndim))
    return jnp.sort(jnp.argsort(jnp.where(jnp.isfinite(score), score, jnp.inf))[: -(-len(score) // 2)])


@functools.partial(jax.jit, static_argnums=0)
def _sweep(plan: _Plan, optimizers: Transform, keys: Any, arrays: dict[str, Any]) -> tuple[jax.Array, Any, Any, Any]:
    optimizers, arrays = jax.tree.map(jnp.asarray, (optimizers, arrays))
    along = types_of(jax.tree.leaves(optimizers)[0])
    # vmap cannot carry the axis of members through a scan that is typed with it
    return untyped(functools.partial(_train_all, plan), along.mesh, along)(optimizers, keys, arrays)


def _train_all(
    plan: _Plan, optimizers: Transform, keys: Any, arrays: dict[str, Any]
) -> tuple[jax.Array, Any, Any, Any]:
    """Losses, what is kept of the last parameters, steps and aux, for each member; 0 for steps that it did not make."""
    members, seeds = members_of(optimizers), () if keys is None else keys.shape[:1]
    made = dict(plan.made)
    steps = steps_of(jax.eval_shape(lambda: made["batches"](keys[0])) if "batches" in made else arrays["batches"])
    stages = _stages(plan, members, steps)
    total = sum(stage.work for stage in stages)

    def train_one(i: int, chunk: jax.Array, tx: Transform, is_copy: jax.Array, carry: Any, key: Any) -> Any:
        """A part of the steps, of one member and seed."""
        run, (*_, begin, end) = _Run(plan, arrays, key), stages[i]
        carry = run.begin(tx) if carry is None else carry
        step = run.step(tx)
        if plan.progress is not None:
            before = sum(stage.work for stage in stages[:i]) + chunk * (end - begin)
            step = reporting(step, plan.progress, total, before, is_copy, lanes=1 + len(seeds))
        batches = jax.tree.map(lambda x: x[begin:end], run.given("batches"))
        carry, (losses, aux) = jax.lax.scan(step, carry, (jnp.arange(1, end - begin + 1), batches))
        return losses, aux, run.final(carry), carry if i < plan.halve else None

    def train_some(i: int, chunk: jax.Array, lanes: Any, are_copies: jax.Array) -> Any:
        def each(tx: Transform, carry: Any, is_copy: jax.Array) -> Any:
            one = functools.partial(train_one, i, chunk, tx, is_copy)
            return one(carry, None) if keys is None else jax.vmap(one)(carry, keys)

        optimizers, carry = lanes
        return jax.vmap(each)(optimizers, carry, are_copies)

    def part(i: int, optimizers: Transform, carry: Any) -> Any:
        return _in_chunks(functools.partial(train_some, i), stages[i], (optimizers, carry))

    losses, aux, final, carry = part(0, optimizers, None)
    if not plan.halve:
        return losses, final, jnp.full(members, steps, jnp.int32), aux

    def widened(part: jax.Array) -> jax.Array:
        """With room for the steps that are still to be made."""
        end = (*part.shape[: len(seeds) + 1], steps - stages[0].end, *part.shape[len(seeds) + 2 :])
        return jnp.concatenate([part, jnp.zeros(end, part.dtype)], axis=len(seeds) + 1)

    whole = jax.tree.map(widened, (losses, aux))
    made_steps, alive = jnp.full(members, stages[0].end, jnp.int32), jnp.arange(members)
    for i, (*_, begin, end) in list(enumerate(stages))[1:]:
        kept = _better_half(losses)
        alive, optimizers, carry = jax.tree.map(lambda x: x[kept], (alive, optimizers, carry))  # noqa: B023
        losses, aux, last, carry = part(i, optimizers, carry)
        of_part = (alive, *[slice(None)] * len(seeds), slice(begin, end))
        whole = jax.tree.map(lambda x, y: x.at[of_part].set(y), whole, (losses, aux))  # noqa: B023
        final = jax.tree.map(lambda x, y: x.at[alive].set(y), final, last)  # noqa: B023
        made_steps = made_steps.at[alive].set(end)
    return whole[0], final, made_steps, whole[1]


@dataclass
class _Lanes:
    """What members that are trained at the same time have made in one stage.

    Attributes:
      members: which they are; lanes beyond these are copies.
      begin: the step that the stage begins with.
      done: what a step carries on, the last step, and the rows of losses and aux.
    """

    members: np.ndarray
    begin: int
    done: tuple[Any, int, list[Any]]
    final: Any = None


def _in_parts(
    plan: _Plan, progress: Progress, optimizers: Transform, keys: Any, arrays: dict[str, Any]
) -> tuple[tuple[jax.Array, Any, Any, Any], float]:
    """As `_sweep`, and how much of it was done: in parts with progress after each, it ends with what there is."""
    optimizers, arrays = jax.tree.map(jnp.asarray, (optimizers, arrays))
    if "batches" in dict(plan.made):
        arrays = {**arrays, "batches": _batches(plan, keys)}
    members, seeds = members_of(optimizers), () if keys is None else keys.shape[:1]
    leaf = jax.tree.leaves(arrays["batches"])[0]
    stages = _stages(plan, members, leaf.shape["batches" in dict(plan.made)])
    total, done = sum(stage.work for stage in stages), 0
    size = max(total // REPORTS, 1)
    alive, carry, found = np.arange(members), None, list[_Lanes]()
    try:
        with shown(progress):
            for i, stage in enumerate(stages):
                of_stage = list[_Lanes]()
                for chunk in range(stage.chunks):
                    tx, inner = _chunk(stage, chunk, (optimizers, carry))
                    inner = _begin(plan, tx, keys, arrays) if inner is None else inner
                    lanes = _Lanes(alive[chunk :: stage.chunks], stage.begin, (inner, stage.begin, []))
                    of_stage.append(lanes)
                    found.append(lanes)
                    while lanes.done[1] < stage.end:
                        inner, begin, rows = lanes.done
                        end = min(begin + size, stage.end)
                        inner, row = _some_steps(plan, size, tx, keys, arrays, inner, begin, end)
                        last = np.asarray(row[0], float)[: len(lanes.members), ..., end - begin - 1]
                        # in one assignment: an interruption comes before it or after it
                        lanes.done = inner, end, [*rows, row]
                        done += end - begin
                        finite = np.isfinite(last)
                        progress(done / total, float(last[finite].min(initial=np.inf)), int((~finite).sum()))
                    lanes.final = _final(plan, keys, arrays, lanes.done[0])
                    if i == plan.halve:
                        lanes.done = (None, *lanes.done[1:])
                if i < plan.halve:
                    losses = _joined(stage, [_rows(lanes, seeds)[0] for lanes in of_stage])
                    kept = _better_half(losses)
                    carry = _joined(stage, [lanes.done[0] for lanes in of_stage])
                    optimizers, carry = jax.tree.map(lambda x: x[kept], (optimizers, carry))  # noqa: B023
                    alive = alive[np.asarray(kept)]
                    for lanes in of_stage:
                        lanes.done = (None, *lanes.done[1:])
    except KeyboardInterrupt:
        found = [lanes for lanes in found if lanes.done[2]]
        if not found:
            raise
    for lanes in found:
        if lanes.final is None:
            lanes.final = _final(plan, keys, arrays, lanes.done[0])
    return _assembled(found, members, seeds), done / total


@functools.partial(jax.jit, static_argnums=0)
def _batches(plan: _Plan, keys: Any) -> Any:
    """Those of each seed, made once for all parts."""
    return jax.vmap(dict(plan.made)["batches"])(keys)


@functools.partial(jax.jit, static_argnums=0)
def _begin(plan: _Plan, optimizers: Transform, keys: Any, arrays: dict[str, Any]) -> Any:
    """What the steps of these members carry on, before the first one."""

    def each(tx: Transform) -> Any:
        one = lambda key: _Run(plan, arrays, key).begin(tx)  # noqa: E731
        return one(None) if keys is None else jax.vmap(one)(keys)

    return jax.vmap(each)(optimizers)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _some_steps(
    plan: _Plan, size: int, optimizers: Transform, keys: Any, arrays: dict[str, Any], carry: Any, begin: Any, end: Any
) -> tuple[Any, Any]:
    """The steps from one to another, at most so many: what they carry on, and rows of losses and aux.

    Where they begin and end are numbers, so that one program makes them all.
    """

    def one(tx: Transform, carry: Any, key: Any, batches: Any) -> Any:
        step = _Run(plan, arrays, key).step(tx)

        def inputs(n: Any) -> Any:
            return n + 1, jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, n, keepdims=False), batches)

        def body(n: Any, carried: Any) -> Any:
            carry, out = step(carried[0], inputs(n))
            put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, n - begin, 0)  # noqa: E731
            return carry, jax.tree.map(put, carried[1], out)

        _, out = jax.eval_shape(step, carry, inputs(begin))
        rows = jax.tree.map(lambda x: jnp.empty((size, *x.shape), x.dtype), out)
        return jax.lax.fori_loop(begin, end, body, (carry, rows))

    def each(tx: Transform, carry: Any) -> Any:
        if keys is None:
            return one(tx, carry, None, arrays["batches"])
        axes = 0, 0, 0 if "batches" in dict(plan.made) else None
        return jax.vmap(functools.partial(one, tx), axes)(carry, keys, arrays["batches"])

    return jax.vmap(each)(optimizers, carry)


@functools.partial(jax.jit, static_argnums=0)
def _final(plan: _Plan, keys: Any, arrays: dict[str, Any], carry: Any) -> Any:
    """What is kept of these members' parameters."""

    def each(carry: Any) -> Any:
        one = lambda carry, key: _Run(plan, arrays, key).final(carry)  # noqa: E731
        return one(carry, None) if keys is None else jax.vmap(one)(carry, keys)

    return jax.vmap(each)(carry)


def _rows(lanes: _Lanes, seeds: tuple[int, ...]) -> Any:
    """Losses and aux of all steps that they made."""
    _, end, rows = lanes.done
    whole = jax.tree.map(lambda *x: jnp.concatenate(x, axis=1 + len(seeds)), *rows)
    return jax.tree.map(lambda x: jax.lax.slice_in_dim(x, 0, end - lanes.begin, axis=1 + len(seeds)), whole)


def _assembled(found: list[_Lanes], members: int, seeds: tuple[int, ...]) -> tuple[jax.Array, Any, Any, Any]:
    """As `_sweep`, of what was made; NaN is kept of members that made no step."""
    steps, at, count = np.zeros(members, np.int32), np.zeros(members, int), 0
    for lanes in found:
        steps[lanes.members] = lanes.done[1]
        at[lanes.members] = count + np.arange(len(lanes.members))
        count += len(lanes.members)
    rows = [_rows(lanes, seeds) for lanes in found]
    if len(found) == 1 and count == members:
        return rows[0][0], found[0].final, jnp.asarray(steps), rows[0][1]

    def whole(*pieces: jax.Array) -> jax.Array:
        shape = (members, *seeds, int(steps.max()), *pieces[0].shape[2 + len(seeds) :])
        filled = jnp.zeros(shape, pieces[0].dtype)
        for lanes, piece in zip(found, pieces):
            place = (lanes.members, *[slice(None)] * len(seeds), slice(lanes.begin, lanes.done[1]))
            filled = filled.at[place].set(piece[: len(lanes.members)])
        return filled

    def last(*pieces: jax.Array) -> jax.Array:
        joined = jnp.concatenate([x[: len(lanes.members)] for lanes, x in zip(found, pieces)])[at]
        has_none = (steps == 0).reshape(-1, *[1] * (joined.ndim - 1))
        if has_none.any() and not jnp.issubdtype(joined.dtype, jax.dtypes.prng_key):
            nothing = jnp.nan if jnp.issubdtype(joined.dtype, jnp.inexact) else 0
            joined = jnp.where(has_none, jnp.asarray(nothing, joined.dtype), joined)
        return joined

    with jax.debug_nans(False):  # these are meant
        losses, aux = jax.tree.map(whole, *rows)
        return losses, jax.tree.map(last, *(lanes.final for lanes in found)), jnp.asarray(steps), aux


def _in_chunks(run: Callable[..., Any], stage: _Stage, lanes: Any) -> Any:
    """`run(chunk, lanes, are_copies)` for so many lanes at a time."""
    if stage.chunks == 1:
        return run(jnp.zeros([], jnp.int32), lanes, jnp.zeros(stage.members, bool))
    are_copies = jnp.asarray(_numbers(stage) >= stage.members).reshape(stage.size, stage.chunks).T
    by_chunk = jnp.arange(stage.chunks), _split(stage, lanes), are_copies
    return _put_together(stage, jax.lax.map(lambda chunk: run(*chunk), by_chunk))


def _numbers(stage: _Stage) -> np.ndarray:
    """Of all lanes; beyond the members they are copies."""
    return np.arange(stage.size * stage.chunks)


def _split(stage: _Stage, lanes: Any) -> Any:
    def split(leaf: jax.Array) -> jax.Array:
        numbers = _numbers(stage)
        filled = leaf[np.minimum(numbers, stage.members - 1)] if stage.members < len(numbers) else leaf
        # member i is in chunk i % chunks, so that an axis of members that is sharded is so in every chunk
        return jnp.swapaxes(filled.reshape(stage.size, stage.chunks, *leaf.shape[1:]), 0, 1)

    return jax.tree.map(split, lanes)


def _put_together(stage: _Stage, chunks: Any) -> Any:
    def joined(leaf: jax.Array) -> jax.Array:
        return jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:])[: stage.members]

    return jax.tree.map(joined, chunks)


def _chunk(stage: _Stage, number: int, lanes: Any) -> Any:
    return lanes if stage.chunks == 1 else _one_chunk(stage, number, lanes)


@functools.partial(jax.jit, static_argnums=0)
def _one_chunk(stage: _Stage, number: Any, lanes: Any) -> Any:
    return jax.tree.map(lambda x: x[number], _split(stage, lanes))


@functools.partial(jax.jit, static_argnums=0)
def _joined(stage: _Stage, chunks: list[Any]) -> Any:
    if stage.chunks == 1:
        return chunks[0]
    return _put_together(stage, jax.tree.map(lambda *x: jnp.stack(x), *chunks))


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
    The best rate of a short run is an upper estimate for a long one, which ends with smaller steps. Ctrl-C is as in
    `gdx.sweep`, but KeyboardInterrupt where chunks have made different numbers of steps.

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
    if np.any(result.steps < result.losses.shape[1]):
        raise KeyboardInterrupt("range_test: interrupted when rates had made different numbers of steps")
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
