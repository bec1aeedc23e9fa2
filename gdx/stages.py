"""How the members of a sweep are trained: all stages of halving in one program, or in parts with progress between."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdx.mesh import types_of, untyped
from gdx.modules import Parts, take_apart
from gdx.population import members_of
from gdx.progress import Progress, reporting, shown, steps_between
from gdx.surroundings import Surroundings
from gdx.training import Loss, Rows, evaluating, evaluation, training_step
from gdx.transform import Transform


@dataclass(frozen=True)
class Plan:
    """What a program of a sweep is found by: its functions, what they use, and what no array can say.

    Attributes:
      name: of what was called, for its errors.
      made: the function of a key that makes it, by the name of what is not given as arrays.
      size: how many members at a time.
    """

    name: str
    loss: Loss
    evaluate: Callable[..., Any] | None
    every: int
    progress: Progress | None
    made: tuple[tuple[str, Callable[[Any], Any]], ...]
    around: Surroundings
    parts: Parts
    size: int
    halve: int
    steps: int


class Found(NamedTuple):
    """Of all members: losses and aux, 0 for steps that were not made; what is kept at the end, and how many steps.

    Attributes:
      final: what is kept of the last parameters, and the rows of what was evaluated on the way, if it was; NaN, or 0
        where there is no NaN, for members that made no step.
    """

    losses: jax.Array
    aux: Any
    final: tuple[Any, list[Rows]]
    steps: jax.Array


class Stage(NamedTuple):
    """So many members, so many at a time, make these steps; then the worse half is dropped, but after the last one.

    Attributes:
      before: how much work was done before it.
    """

    members: int
    size: int
    begin: int
    end: int
    before: int
    is_last: bool

    @property
    def chunks(self) -> int:
        return -(-self.members // self.size)

    @property
    def work(self) -> int:
        return self.chunks * (self.end - self.begin)


def stages_of(plan: Plan, members: int) -> list[Stage]:
    edges, before = [round(plan.steps * i / (plan.halve + 1)) for i in range(plan.halve + 2)], 0
    stages = list[Stage]()
    for begin, end in itertools.pairwise(edges):
        stages.append(Stage(members, min(plan.size, members), begin, end, before, end == plan.steps))
        members, before = -(-members // 2), before + stages[-1].work
    return stages


class Run:
    """What each member does from one seed: its key, and what was made of that already, by name."""

    def __init__(self, plan: Plan, arrays: dict[str, Any], seed: tuple[Any, dict[str, Any]]):
        self.plan, (self.key, made) = plan, seed
        self.arrays = arrays | made
        if "params" in dict(plan.made):
            self.start, self.rest, self.parts = take_apart(f"{plan.name}: params", self.given("params"))
        else:
            (self.start, self.rest), self.parts = self.given("params"), plan.parts
        self.evaluation = evaluation(plan.name, plan.evaluate, self.parts)

    def given(self, name: str) -> Any:
        return self.arrays[name] if name in self.arrays else dict(self.plan.made)[name](self.key)

    def begin(self, tx: Transform) -> Any:
        """What a step carries on, before the first one."""
        start, variables = jax.tree.map(jnp.asarray, (self.start, (self.rest, self.given("model_state"))))
        return (start, tx.init(start), variables), *self._on_the_way(tx)[1](start, variables)

    def step(self, tx: Transform) -> Callable[[Any, Any], Any]:
        return self._on_the_way(tx)[0]

    def _on_the_way(self, tx: Transform) -> tuple[Callable[[Any, Any], Any], Callable[[Any, Any], list[Any]]]:
        plan, plain = self.plan, training_step(self.plan.loss, tx, self.parts, self.plan.name)

        def step(carry: Any, inputs: Any) -> Any:
            carry, out = plain(carry[0], inputs)
            return (carry,), out

        if not plan.every:
            return step, lambda start, variables: []
        step, room = evaluating(step, self.evaluation, plan.every, plan.steps)
        return step, lambda start, variables: [room(start, variables)]

    def final(self, carry: Any) -> tuple[Any, list[Rows]]:
        """What is kept of the parameters, and what was on the way."""
        (params, _, variables), *rows = carry
        return self.evaluation(params, variables), rows


def of_each(plan: Plan, seeds: Any, arrays: dict[str, Any], function: Any, members: Any, *given: Any) -> Any:
    """`function(run, member, *given)` for each member and seed; what is given besides has an axis for each of them."""

    def of_one(member: Any, seed: Any, *given: Any) -> Any:
        return function(Run(plan, arrays, seed), member, *given)

    def of_member(member: Any, *given: Any) -> Any:
        one = functools.partial(of_one, member)
        return one(seeds, *given) if seeds[0] is None else jax.vmap(one)(seeds, *given)

    return jax.vmap(of_member)(members, *given)


@dataclass
class Lanes:
    """What members that are trained at the same time have made in one stage.

    Attributes:
      members: which they are; lanes beyond these are copies.
      begin: the step that the stage begins with.
      done: what a step carries on, if one follows, the last step, and the rows of losses and aux.
      final: what is kept.
    """

    members: jax.Array
    begin: int
    done: tuple[Any, int, list[Any]]
    final: Any = None


def train_members(optimizers: Transform, stages: list[Stage], make: Callable[..., tuple[jax.Array, Any]]) -> None:
    """Makes one stage after the other, and of the members takes the better half on.

    Args:
      make: given the stage, the members, their optimizers and what they carry on, it returns their losses and what
        they carry on.
    """
    members, carry = jnp.arange(stages[0].members), None
    for stage in stages:
        losses, carry = make(stage, members, optimizers, carry)
        if not stage.is_last:
            kept = better_half(losses)
            members, optimizers, carry = jax.tree.map(lambda x: x[kept], (members, optimizers, carry))  # noqa: B023


def better_half(losses: jax.Array) -> jax.Array:
    """The members with the smaller mean loss in the second half of these steps, in their old order."""
    score = jnp.mean(losses[..., losses.shape[-1] // 2 :], axis=range(1, losses.ndim))
    return jnp.sort(jnp.argsort(jnp.where(jnp.isfinite(score), score, jnp.inf))[: -(-len(score) // 2)])


@functools.partial(jax.jit, static_argnums=0)
def in_one(plan: Plan, optimizers: Transform, keys: Any, arrays: dict[str, Any]) -> Found:
    """The whole sweep as one program."""
    optimizers, arrays = jax.tree.map(jnp.asarray, (optimizers, arrays))
    along = types_of(jax.tree.leaves(optimizers)[0])
    # vmap cannot carry the axis of members through a scan that is typed with it
    return untyped(functools.partial(_in_one, plan), along.mesh, along)(optimizers, keys, arrays)


def _in_one(plan: Plan, optimizers: Transform, keys: Any, arrays: dict[str, Any]) -> Found:
    members, lanes_of = members_of(optimizers), () if keys is None else keys.shape
    stages, found = stages_of(plan, members), list[Lanes]()
    total = stages[-1].before + stages[-1].work

    def make(stage: Stage, members: jax.Array, optimizers: Transform, carry: Any) -> tuple[jax.Array, Any]:
        def one(chunk: jax.Array, run: Run, member: Any, carry: Any) -> Any:
            (tx, is_copy), (begin, end) = member, (stage.begin, stage.end)
            carry, step = run.begin(tx) if carry is None else carry, run.step(tx)
            if plan.progress is not None:
                before = stage.before + chunk * (end - begin) - begin
                step = reporting(step, plan.progress, total, before, is_copy, lanes=1 + len(lanes_of))
            batches = jax.tree.map(lambda x: x[begin:end], run.given("batches"))
            carry, out = jax.lax.scan(step, carry, (jnp.arange(begin + 1, end + 1), batches))
            return out, run.final(carry), None if stage.is_last else carry

        def some(chunk: jax.Array, lanes: Any, are_copies: jax.Array) -> Any:
            optimizers, carry = lanes
            return of_each(plan, (keys, {}), arrays, functools.partial(one, chunk), (optimizers, are_copies), carry)

        rows, final, carry = in_chunks(some, stage, (optimizers, carry))
        found.append(Lanes(members, stage.begin, (None, stage.end, [rows]), final))
        return rows[0], carry

    train_members(optimizers, stages, make)
    return together(found, members, len(lanes_of))


def in_parts(
    plan: Plan, progress: Progress, optimizers: Transform, keys: Any, arrays: dict[str, Any]
) -> tuple[Found, float]:
    """As `in_one`, and how much of it was done: in parts with progress after each, it ends with what there is."""
    optimizers, arrays = jax.tree.map(jnp.asarray, (optimizers, arrays))
    seeds = keys, made_batches(plan, keys) if "batches" in dict(plan.made) else {}
    members, axes = members_of(optimizers), int(keys is not None)
    stages, found, done = stages_of(plan, members), list[Lanes](), 0
    total = stages[-1].before + stages[-1].work
    size = steps_between(total)

    def make(stage: Stage, members: jax.Array, optimizers: Transform, carry: Any) -> tuple[jax.Array, Any]:
        nonlocal done
        of_stage = list[Lanes]()
        for chunk in range(stage.chunks):
            tx, carried = one_chunk(stage, chunk, (optimizers, carry))
            carried = first_carry(plan, tx, seeds, arrays) if carried is None else carried
            lanes = Lanes(members[chunk :: stage.chunks], stage.begin, (carried, stage.begin, []))
            of_stage.append(lanes)
            found.append(lanes)
            while lanes.done[1] < stage.end:
                carried, begin, rows = lanes.done
                end = min(begin + size, stage.end)
                carried, row = some_steps(plan, size, tx, seeds, arrays, carried, begin, end)
                last = np.asarray(row[0], float)[: len(lanes.members), ..., end - begin - 1]
                # in one assignment: an interruption comes before it or after it
                lanes.done = carried, end, [*rows, row]
                done += end - begin
                finite = np.isfinite(last)
                progress(done / total, float(last[finite].min(initial=np.inf)), int((~finite).sum()))
            lanes.final = kept_of(plan, seeds, arrays, lanes.done[0])
            if stage.is_last:
                lanes.done = None, *lanes.done[1:]
        if stage.is_last:
            return rows_of(of_stage[0], axes)[0], None
        losses, carry = joined(stage, [(rows_of(lanes, axes)[0], lanes.done[0]) for lanes in of_stage])
        for lanes in of_stage:
            lanes.done = None, *lanes.done[1:]
        return losses, carry

    try:
        with shown(progress):
            train_members(optimizers, stages, make)
    except KeyboardInterrupt:
        found = [lanes for lanes in found if lanes.done[2]]
        if not found:
            raise
    for lanes in found:
        if lanes.final is None:
            lanes.final = kept_of(plan, seeds, arrays, lanes.done[0])
    with jax.debug_nans(False):  # these are meant
        return together(found, members, axes), done / total


@functools.partial(jax.jit, static_argnums=0)
def made_batches(plan: Plan, keys: Any) -> dict[str, Any]:
    """Those of each seed, made once for all parts."""
    return {"batches": jax.vmap(dict(plan.made)["batches"])(keys)}


@functools.partial(jax.jit, static_argnums=0)
def first_carry(plan: Plan, optimizers: Transform, seeds: Any, arrays: dict[str, Any]) -> Any:
    return of_each(plan, seeds, arrays, lambda run, tx: run.begin(tx), optimizers)


@functools.partial(jax.jit, static_argnums=(0, 1))
def some_steps(
    plan: Plan, size: int, optimizers: Transform, seeds: Any, arrays: dict[str, Any], carry: Any, begin: Any, end: Any
) -> tuple[Any, Any]:
    """The steps from one to another, at most so many: what they carry on, and rows of losses and aux.

    Where they begin and end are numbers, so that one program makes them all.
    """

    def one(run: Run, tx: Transform, carry: Any) -> Any:
        step, batches = run.step(tx), run.given("batches")

        def inputs(n: Any) -> Any:
            return n + 1, jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, n, keepdims=False), batches)

        def body(n: Any, carried: Any) -> Any:
            carry, out = step(carried[0], inputs(n))
            put = lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, n - begin, 0)  # noqa: E731
            return carry, jax.tree.map(put, carried[1], out)

        _, out = jax.eval_shape(step, carry, inputs(begin))
        rows = jax.tree.map(lambda x: jnp.empty((size, *x.shape), x.dtype), out)
        return jax.lax.fori_loop(begin, end, body, (carry, rows))

    return of_each(plan, seeds, arrays, one, optimizers, carry)


@functools.partial(jax.jit, static_argnums=0)
def kept_of(plan: Plan, seeds: Any, arrays: dict[str, Any], carry: Any) -> Any:
    """What is kept of these members' parameters."""
    members = jnp.zeros(jax.tree.leaves(carry)[0].shape[:1])
    return of_each(plan, seeds, arrays, lambda run, _, carry: run.final(carry), members, carry)


def rows_of(lanes: Lanes, axes: int) -> Any:
    """Losses and aux of all steps that they made; so many axes of seeds are between members and steps."""
    _, end, rows = lanes.done
    whole = rows[0] if len(rows) == 1 else jax.tree.map(lambda *x: jnp.concatenate(x, axis=1 + axes), *rows)
    return jax.tree.map(lambda x: jax.lax.slice_in_dim(x, 0, end - lanes.begin, axis=1 + axes), whole)


def together(found: list[Lanes], members: int, axes: int) -> Found:
    """What was made, of all members."""
    rows = [rows_of(lanes, axes) for lanes in found]
    steps = jnp.zeros(members, jnp.int32)
    for lanes in found:
        steps = steps.at[lanes.members].set(lanes.done[1])
    if len(found) == 1 and len(found[0].members) == members:
        (losses, aux), final = rows[0], found[0].final
        return Found(losses, aux, final, steps)
    last = max(lanes.done[1] for lanes in found)
    # begun with a first stage of all members, they stay on the devices where they are
    is_begun = len(found[0].members) == members
    others = found[is_begun:]

    def whole(*pieces: jax.Array) -> jax.Array:
        length = last - found[0].done[1] * is_begun
        seeds, rest = pieces[0].shape[1 : 1 + axes], pieces[0].shape[2 + axes :]
        filled = jnp.zeros((members, *seeds, length, *rest), pieces[0].dtype)
        if is_begun:
            filled = jnp.concatenate([pieces[0], filled], axis=1 + axes)
        for lanes, piece in zip(others, pieces[is_begun:]):
            at = (lanes.members, *[slice(None)] * axes, slice(lanes.begin, lanes.done[1]))
            filled = filled.at[at].set(piece[: len(lanes.members)])
        return filled

    def kept(*pieces: jax.Array) -> jax.Array:
        filled = pieces[0] if is_begun else nothing((members, *pieces[0].shape[1:]), pieces[0])
        for lanes, piece in zip(others, pieces[is_begun:]):
            filled = filled.at[lanes.members].set(piece[: len(lanes.members)])
        return filled

    losses, aux = jax.tree.map(whole, *rows)
    return Found(losses, aux, jax.tree.map(kept, *(lanes.final for lanes in found)), steps)


def nothing(shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """NaN, or 0 where there is none."""
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, like)
        words = jnp.zeros((*shape, *data.shape[like.ndim :]), data.dtype)
        return jax.random.wrap_key_data(words, impl=jax.random.key_impl(like))
    return jnp.full(shape, jnp.nan if jnp.issubdtype(like.dtype, jnp.inexact) else 0, like.dtype)


def in_chunks(run: Callable[..., Any], stage: Stage, lanes: Any) -> Any:
    """`run(chunk, lanes, are_copies)` for so many lanes at a time."""
    if stage.chunks == 1:
        return run(jnp.zeros([], jnp.int32), lanes, jnp.zeros(stage.members, bool))
    are_copies = jnp.asarray(_numbers(stage) >= stage.members).reshape(stage.size, stage.chunks).T
    by_chunk = jnp.arange(stage.chunks), _split(stage, lanes), are_copies
    return _put_together(stage, jax.lax.map(lambda chunk: run(*chunk), by_chunk))


def _numbers(stage: Stage) -> np.ndarray:
    """Of all lanes; beyond the members they are copies."""
    return np.arange(stage.size * stage.chunks)


def _split(stage: Stage, lanes: Any) -> Any:
    def split(leaf: jax.Array) -> jax.Array:
        numbers = _numbers(stage)
        filled = leaf[np.minimum(numbers, stage.members - 1)] if stage.members < len(numbers) else leaf
        # member i is in chunk i % chunks, so that an axis of members that is sharded is so in every chunk
        return jnp.swapaxes(filled.reshape(stage.size, stage.chunks, *leaf.shape[1:]), 0, 1)

    return jax.tree.map(split, lanes)


def _put_together(stage: Stage, chunks: Any) -> Any:
    def join(leaf: jax.Array) -> jax.Array:
        return jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:])[: stage.members]

    return jax.tree.map(join, chunks)


def one_chunk(stage: Stage, number: int, lanes: Any) -> Any:
    return lanes if stage.chunks == 1 else _one_chunk(stage, number, lanes)


@functools.partial(jax.jit, static_argnums=0)
def _one_chunk(stage: Stage, number: Any, lanes: Any) -> Any:
    return jax.tree.map(lambda x: x[number], _split(stage, lanes))


@functools.partial(jax.jit, static_argnums=0)
def joined(stage: Stage, chunks: list[Any]) -> Any:
    return chunks[0] if stage.chunks == 1 else _put_together(stage, jax.tree.map(lambda *x: jnp.stack(x), *chunks))
