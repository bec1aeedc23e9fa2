"""Watching: how large gradients, updates and parameters are, kept beside any optimizer."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gdx.checks import check_alike, check_state, one_of, require_params
from gdx.fields import static, to_integer, to_word
from gdx.grouping import assigned_to, groups, leaf_paths
from gdx.numerics import accurate, either, norm
from gdx.transform import Transform, all_within, hyperparams_in_use, is_bfloat16, to_transform
from gdx.values import is_float


class Watched(NamedTuple):
    """What `watch` measured in one step, or in several with a leading axis of them.

    Each is a number; where groups or leaves are watched, an array with one for each, in the order of `names`.

    Attributes:
      step: int32, the count of the step: the first is 0; -1 before the first.
      gradient_norm: of the gradients that `update` was given.
      update_norm: of the updates, as they are returned.
      parameter_norm: of the parameters before the step.
      update_over_parameter: the ratio of their root mean squares; inf where all parameters are 0 and an update is not.
      cosine: of the angle between update and gradient: -1 straight downhill; 0 where one of them is 0.
      unmoved: of the bfloat16 parameters, the share that the update is too small to change; 0 where there are none,
        and None where the whole tree has none.
      hyperparameters: those of the optimizer by name, as the step used them, schedules at its count.
      parts: for each group or leaf a dict of its name and None; () where the whole tree is watched.

    >>> import gdx
    >>> gdx.Watched(0, 1.0, 0.1, 2.0, 0.05, -1.0, None, {}, ({"a": None}, {"b": None})).names
    ('a', 'b')
    """

    step: Any
    gradient_norm: Any
    update_norm: Any
    parameter_norm: Any
    update_over_parameter: Any
    cosine: Any
    unmoved: Any
    hyperparameters: dict[str, Any]
    # names as keys, which belong to the structure: so a state has them too, and no text among its arrays
    parts: tuple[dict[str, None], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the groups or leaves; () where the whole tree is watched."""
        return tuple(name for part in self.parts for name in part)


class WatchState(NamedTuple):
    """State of `watch`.

    Attributes:
      count: int32 scalar, the number of updates so far.
      watched: the last measurement, a `Watched`.
      inner_state: that of the transform inside.
    """

    count: jax.Array  # type: ignore[assignment]
    watched: Any
    inner_state: Any


class watch(Transform):
    r"""Measures norms, ratios and angles of what a transform does in every n-th step. Its updates pass unchanged.

    In steps 0, `every`, 2 `every`, ... it measures what `Watched` lists, in the state, without any other input or
    output: in `jax.jit`, in a scan, on a mesh, in a batch of optimizers. `read_watch` reads the last measurement;
    `gdx.train` collects all of a run as curves, which `gdx.plot.watched` draws.

    State: `WatchState(count, watched, inner_state)`, a few scalars, or small arrays of them.

    Cost: a measured step computes the updates twice, and reads gradients, updates and parameters for their norms; the
    others take as long as without. With every tenth step measured on two CPU cores, a training step of a network of 1M
    parameters takes 1.02 times as long at batches of 64, no longer at 256, and AdamW alone 1.3 times (`python -m
    benchmarks groups`). What the transform inside does besides, such as evaluating the loss for a line search, is done
    twice, too. In a batch whose members have a count each, as from `jax.vmap` over states, every step is measured, and
    most of it thrown away.

    Args:
      tx: the optimizer, gdx's or optax's. What comes before and after it in a chain is not seen.
      every: each how many steps one is measured, at least 1.
      per: "all" for the whole tree; "group" for the groups of the one `gdx.groups` inside tx, named by their patterns,
        and "others" for all other parameters; "leaf" for every leaf, named by its path as groups spell it.

    Raises:
      TypeError: tx is no transform, or every no integer; the parameters are a pair of `optax.lookahead`, which goes
        around.
      ValueError: every is less than 1; per is none of these, or "group" where tx does not have one `gdx.groups` in it;
        update is called without parameters; gradients differ between devices inside `jax.shard_map`.

    >>> import gdx, jax.numpy as jnp
    >>> tx = gdx.watch(gdx.sgd(0.1, momentum=0.9), every=10)
    >>> params = jnp.array([3.0, 4.0])
    >>> _, state = tx.update(params, tx.init(params), params)
    >>> watched = gdx.read_watch(state)
    >>> float(watched.gradient_norm), f"{watched.update_over_parameter:.2f}", f"{watched.cosine:.2f}"
    (5.0, '0.10', '-1.00')
    """

    tx: Transform = dataclasses.field(metadata={"convert": to_transform})
    every: int = static(default=10, convert=functools.partial(to_integer, minimum=1))
    per: str = static(default="all", convert=lambda label, value: to_word(label, value, "all", "group", "leaf"))

    def validate(self) -> None:
        if self.per == "group":
            _ = self._patterns

    @property
    def _patterns(self) -> tuple[str, ...]:
        found = [inner.patterns for inner in all_within(self.tx) if isinstance(inner, groups)]
        if len(found) != 1:
            raise ValueError(
                f"watch: per='group' takes its groups from one gdx.groups inside tx, and {self.tx!r} has "
                f"{len(found) or 'none'} in it; expected watch(gdx.groups(...), per='group'), or per='leaf'"
            )
        return found[0]

    def _parts(self, tree: Any) -> list[tuple[str, list[int]]]:
        """Name and leaves, by their number, of each part that is measured by itself."""
        names = [*leaf_paths(tree)]
        if self.per == "leaf":
            return [(name, [i]) for i, name in enumerate(names)]
        if self.per == "all":
            return [("", [*range(len(names))])]
        names, assigned = [*self._patterns, "others"], assigned_to(self._patterns, jax.tree.structure(tree))
        members = [[i for i, group in enumerate(assigned) if group == number] for number in range(len(names))]
        return [(name, leaves) for name, leaves in zip(names, members) if leaves]

    def _in_use(self, inner_state: Any) -> dict[str, Any]:
        in_use = hyperparams_in_use(self.tx, inner_state)
        return {name: jnp.asarray(x, jnp.result_type(float)) for name, x in in_use.items() if is_float(x)}

    def _init(self, params: optax.Params) -> WatchState:
        inner_state, parts = self.tx._init(params), self._parts(params)
        shape = () if self.per == "all" else (len(parts),)
        has_unmoved = any(map(is_bfloat16, jax.tree.leaves(params)))
        # each an array of its own, or the state could not be donated
        *fields, unmoved = (jnp.zeros(shape, jnp.result_type(float)) for _ in range(6))
        in_use = jax.tree.map(jnp.zeros_like, self._in_use(inner_state))
        found = jnp.full([], -1, jnp.int32), *fields, unmoved if has_unmoved else None, in_use, self._named(parts)
        return WatchState(jnp.zeros([], jnp.int32), Watched._make(found), inner_state)

    def _named(self, parts: list[tuple[str, list[int]]]) -> tuple[dict[str, None], ...]:
        return () if self.per == "all" else tuple({name: None} for name, _ in parts)

    def _update(self, updates: Any, state: Any, params: Any, extra_args: dict[str, Any]) -> tuple[Any, WatchState]:
        check_state(self, state, WatchState)
        if jax.tree.leaves(updates):
            require_params(self, params)
        if isinstance(params, optax.LookaheadParams):
            raise TypeError("watch: params is a pair of optax.lookahead; expected optax.lookahead(watch(tx), ...)")
        check_alike(self, "gradients or parameters", (updates, params), "measure")
        inner_state = state.inner_state

        def measured() -> Watched:
            new, _ = self.tx._update(updates, inner_state, params, extra_args)
            new = self._as_returned(new, updates, params)
            parts, trees = self._parts(updates), map(jax.tree.leaves, (updates, new, params))
            found = _measured(tuple(tuple(leaves) for _, leaves in parts), self.per == "all", *trees)
            found = state.count, *found, self._in_use(inner_state), self._named(parts)
            return jax.lax.stop_gradient(Watched._make(found))

        watched = either(state.count % self.every == 0, measured, lambda: state.watched)
        # Or the update would read old moments after they are overwritten, and the compiler copy them in every step: it
        # cannot know that no step is below -1. The updates that are measured are others: those of the step would have
        # to be written out.
        updates = jax.tree.map(lambda g: jnp.where(watched.step < -1, jnp.zeros_like(g), g), updates)
        updates, inner_state = self.tx._update(updates, inner_state, params, extra_args)
        return updates, WatchState(optax.safe_increment(state.count), watched, inner_state)

    def _counts(self, state: Any) -> Iterator[tuple[Any, Any]]:
        check_state(self, state, WatchState)
        for path, count in self.tx._counts(state.inner_state):
            yield ("tx", *path), count


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measured(parts: tuple[tuple[int, ...], ...], is_one: bool, gradients: list, updates: list, params: list) -> Any:
    """The numbers of `Watched`, of all leaves or of each part's."""
    # written once, not computed again for each sum
    updates = jax.lax.optimization_barrier(updates)
    rows = [_of_part(*([tree[i] for i in part] for tree in (gradients, updates, params))) for part in parts]
    *columns, unmoved = rows[0] if is_one else ([*map(jnp.stack, zip(*rows))] or [jnp.zeros(0)] * 6)
    return *columns, unmoved if any(map(is_bfloat16, params)) else None


def _of_part(gradients: list, updates: list, params: list) -> tuple[jax.Array, ...]:
    dtype = jnp.result_type(float)
    g, u, p = (norm(leaves, jnp.ones([], dtype)) for leaves in (gradients, updates, params))
    cosine, unmoved = (jnp.zeros([], dtype) for _ in range(2))
    for pair in zip(gradients, updates):
        a, b = (_over(accurate(x), of) for x, of in zip(pair, (g, u)))
        cosine += jnp.sum((a.conj() * b).real).astype(dtype)
    narrow = [(p, u) for p, u in zip(params, updates) if is_bfloat16(p) and p.size]
    with jax.numpy_dtype_promotion("standard"):
        for old, update in narrow:
            unmoved += jnp.sum(optax.apply_updates(old, update) == old).astype(dtype)
    share = unmoved / max(sum(p.size for p, _ in narrow), 1)
    # no update is 0 of the parameters, of those that are 0 too
    return g, u, p, u / jnp.where(u == 0, 1, p), jnp.clip(cosine, -1, 1), share


def _over(x: jax.Array, of: jax.Array) -> jax.Array:
    return x * (1 / jnp.maximum(of, jnp.finfo(of.dtype).tiny)).astype(x.dtype)


def read_watch(state: Any) -> Watched:
    """The last measurement of `watch`; its step is -1 before the first.

    Args:
      state: a state with one `watch` in it, however deep; also of a batch of optimizers, with a leading axis.

    Raises:
      ValueError: there is none in the state, or there are several.

    >>> import gdx, jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(4)}
    >>> tx = gdx.watch(gdx.groups(gdx.sgd(0.5), {"bias": dict(learning_rate=0.1)}), per="group")
    >>> _, state = tx.update(params, tx.init(params), params)
    >>> watched = gdx.read_watch(state)
    >>> dict(zip(watched.names, watched.update_over_parameter.round(3).tolist()))
    {'bias': 0.1..., 'others': 0.5}
    """
    return watch_state(state).watched


def watch_state(state: Any) -> WatchState:
    """The state of the one `watch` in a state."""
    return one_of("read_watch", state, WatchState, "record", "gdx.watch(tx)")
