"""A transform whose state waits in the host's memory between steps."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from gdx.compat import memory_kinds
from gdx.fields import static, to_integer
from gdx.sharding.state import is_arrays
from gdx.transform import Transform, to_transform

_DEVICE, _HOST = jax.memory.Space.Device, jax.memory.Space.Host


class offload_state(Transform):
    """Keeps the state of any transform in the host's memory between steps.

    Args:
      tx: the transform, gdx's or optax's.
      minimum_size: arrays of fewer numbers, and all scalars, stay on the device.
    """

    tx: Transform = dataclasses.field(metadata={"convert": to_transform})
    minimum_size: int = static(default=4096, convert=functools.partial(to_integer, minimum=1))

    def init_tree(self, params: optax.Params) -> optax.OptState:
        self._check_there(params)
        return _init(self, params)

    def update_tree(
        self, updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        self._check_there(updates)
        arrays = {name: value for name, value in extra_args.items() if is_arrays(value)}
        others = tuple((name, value) for name, value in extra_args.items() if name not in arrays)
        return _update(self, updates, state, params, arrays, others)

    def put(self, tree: Any, memory: Any) -> Any:
        """A state, or what is like one, with its large arrays in this memory."""
        return jax.tree.map(lambda x: jax.device_put(x, memory) if self.moves(x) else x, tree)

    def moves(self, x: Any) -> bool:
        """Whether an array of the state is large enough."""
        return x.ndim > 0 and x.size >= self.minimum_size

    def _check_there(self, tree: Any) -> None:
        """Raises where the device has no such memory, as far as it shows."""
        placed = (x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer))
        device = next((min(x.devices(), key=lambda d: d.id) for x in placed), jax.devices()[0])
        kinds = memory_kinds(device)
        if "pinned_host" not in kinds:
            raise ValueError(
                f"offload_state: {device} has the memory {' and '.join(map(repr, kinds))}; expected 'pinned_host' among "
                f"them, as GPUs and TPUs have it, and CPUs from jax 0.10 on. Leave offload_state out: {self.tx!r}"
            )


@jax.jit
def _init(tx: offload_state, params: Any) -> Any:
    return tx.put(tx.tx.init(params), _HOST)


@functools.partial(jax.jit, static_argnums=5)
def _update(
    tx: offload_state, updates: Any, state: Any, params: Any, arrays: dict[str, Any], others: tuple
) -> tuple[Any, Any]:
    def step(tx: offload_state, state: Any, updates: Any, params: Any, arrays: dict[str, Any]) -> tuple[Any, Any]:
        there = tx.put(state, _DEVICE)
        updates, state = tx.tx.update(updates, there, params, **arrays, **dict(others))
        return updates, tx.put(state, _HOST)

    return _in_turn(step, tx, state, updates, params, arrays)


def _in_turn(step: Callable[..., Any], tx: Any, state: Any, *args: Any) -> tuple[Any, Any]:
    """`step(tx, state, *args)`, each leaf's moments fetched once those of the leaf before have been sent back.

    What the step does is put into the order in which its updates need it, and nothing else is changed.
    """
    traced, shapes = jax.make_jaxpr(step, return_shape=True)(tx, state, *args)
    jaxpr, given = traced.jaxpr, jax.tree.leaves((tx, state, *args))
    first, count = len(jax.tree.leaves(tx)), len(jax.tree.leaves(state))
    old, new, updates = jaxpr.invars[first:][:count], jaxpr.outvars[-count:], jaxpr.outvars[:-count]

    last = len(jaxpr.outvars)
    turns: dict[Any, int] = {}

    def need(variables: Any, turn: int) -> None:
        turns.update((v, min(turn, turns.get(v, last))) for v in variables if not hasattr(v, "val"))

    def turn_of(equation: Any) -> int:
        return min((turns.get(v, last) for v in equation.outvars), default=last)

    def spread() -> None:
        for equation in reversed(jaxpr.eqns):
            need(equation.invars, turn_of(equation))

    for turn, update in enumerate(updates):
        need([update], turn)
    spread()
    # a moment is due as soon as all that it is made of has been needed
    ready = {v: turns.get(v, 0) for v in jaxpr.invars}
    for equation in jaxpr.eqns:
        turn = max((ready.get(v, 0) for v in equation.invars if not hasattr(v, "val")), default=0)
        ready.update((v, turn) for v in equation.outvars)
    for after in new:
        need([after], ready.get(after, 0))
    spread()

    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*traced.consts, *given]))
    sent: list[Any] = []
    for turn, equations in itertools.groupby(sorted(jaxpr.eqns, key=turn_of), turn_of):
        fetched = [v for v in old if tx.moves(v.aval) and turns.get(v) == turn]
        if fetched and sent:
            held = [*fetched, *sent]
            values.update(zip(held, jax.lax.optimization_barrier([values[v] for v in held])))
            sent = []
        equations = list(equations)
        made = [v for equation in equations for v in equation.outvars]
        part = jaxpr.replace(constvars=[], invars=list(values), eqns=equations, outvars=made)
        values.update(zip(made, jax.core.eval_jaxpr(part, [], *values.values())))
        sent += [v for v in new if v in values and turns.get(v) == turn and tx.moves(v.aval)]
    out = [v.val if hasattr(v, "val") else values[v] for v in jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(shapes), out)
