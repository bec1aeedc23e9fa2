"""A transform whose state waits in the host's memory between steps."""

import collections
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax

from gdx.compat import evaluate, inlined, memory_kinds
from gdx.fields import static, to_integer
from gdx.sharding.state import is_arrays
from gdx.transform import Transform, to_transform

_DEVICE, _HOST = jax.memory.Space.Device, jax.memory.Space.Host


class offload_state(Transform):
    """Keeps the state of any transform in the host's memory between steps, with the same bits.

    In each step every leaf's moments are brought to the device, used and sent back before the next leaf's, or beside
    them. Beyond parameters and gradients an H100 then holds the moments of one leaf, and a TPU, which fetches ahead,
    those of three or four. Counts and small arrays stay on the device. `init` makes the moments in the host's memory. A
    state that lies on the device, such as one that `tx` alone has made, moves with its first `update`;
    before a loop of steps in one program, as in `gdx.train(state=)`, `tx.put(state, jax.memory.Space.Host)` moves it.

    The price is the link to the host: AdamW fetches 8 bytes for each parameter and sends 8 back, with moments in
    bfloat16 4 and 4, in 8 bits 4 (the codes are read twice) and 2. At 50 GB/s that is 0.32 seconds in each step for a
    billion parameters in float32: it pays where a step takes much longer, and memory is short. What was compiled for a
    TPU and an H100: `python -m benchmarks sharding host`. Tracing takes longer, too, once for each program: 0.7
    seconds for a thousand leaves.

    The state's structure is that of `tx` alone, and so are its checkpoints. On a mesh it goes inside,
    `shard_state(offload_state(tx), mesh)`, and each device's part waits in its own host's memory.

    Args:
      tx: the transform, gdx's or optax's.
      minimum_size: arrays of fewer numbers, and all scalars, stay on the device.

    Raises:
      TypeError: tx is no transform, or minimum_size no integer.
      ValueError: minimum_size is less than 1; or, from `init` and `update`, the device has no memory "pinned_host" for
        programs. GPUs and TPUs have it, and CPUs from jax 0.10 on, where it is the same memory.

    Limits: what one compiled function or condition does for all leaves has all their moments at once. So do
    `skip_spikes` and `average_parameters` inside; outside, as in `skip_spikes(offload_state(tx))`, they do not.
    `gdx.sweep(halve=)` cannot choose among such states. Slopes through one step are right; through a loop of them JAX
    (0.12) has none where a state is on the host. With 8 bits on TPUs the compiler (libtpu 0.0.42) ends with an internal
    error. It has run on CPUs alone; for GPUs and TPUs it was compiled.

    >>> import gdx, jax, jax.numpy as jnp
    >>> params = {"w": jnp.ones((64, 512)), "b": jnp.ones(7)}
    >>> tx = gdx.sharding.offload_state(gdx.adamw(1e-3))
    >>> if jax.__version_info__ >= (0, 10):  # or on a GPU or TPU
    ...     updates, state = jax.jit(tx.update)(params, tx.init(params), params)
    ...     assert state[0].mu["w"].sharding.memory_kind == "pinned_host"
    >>> tx.replace(b1=0.8)
    offload_state(tx=adamw(learning_rate=0.001, b1=0.8))
    """

    tx: Transform = dataclasses.field(metadata={"convert": to_transform})
    minimum_size: int = static(default=4096, convert=functools.partial(to_integer, minimum=1))

    def init_tree(self, params: optax.Params) -> optax.OptState:
        _check_memory(params)
        return _init(self, params)

    def update_tree(
        self, updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        _check_memory(updates)
        arrays = {name: value for name, value in extra_args.items() if is_arrays(value)}
        others = tuple((name, value) for name, value in extra_args.items() if name not in arrays)
        return _update(self, updates, state, params, arrays, others)

    def moves(self, x: Any) -> bool:
        """Whether an array of the state is large enough."""
        return x.ndim > 0 and x.size >= self.minimum_size

    def put(self, state: Any, memory: Any) -> Any:
        """A state with its large arrays in this memory."""
        return jax.tree.map(lambda x: jax.device_put(x, memory) if self.moves(x) else x, state)


def _check_memory(tree: Any) -> None:
    """Raises where the device has no memory of the host's, as far as it shows."""
    placed = (x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer))
    device = next((min(x.devices(), key=lambda d: d.id) for x in placed), jax.devices()[0])
    if "pinned_host" not in (kinds := memory_kinds(device)):
        raise ValueError(
            f"offload_state: programs on {device} have the memory {', '.join(map(repr, kinds))}; expected "
            f"'pinned_host' too, as GPUs and TPUs have it, and CPUs from jax 0.10 on. Leave offload_state out here"
        )


@jax.jit
def _init(tx: offload_state, params: Any) -> Any:
    return tx.put(tx.tx.init(params), _HOST)


@functools.partial(jax.jit, static_argnums=5)
def _update(
    tx: offload_state, updates: Any, state: Any, params: Any, arrays: dict[str, Any], others: tuple
) -> tuple[Any, Any]:
    def step(state: Any, tx: offload_state, updates: Any, params: Any, arrays: dict[str, Any]) -> tuple[Any, Any]:
        on_device = tx.put(state, _DEVICE)
        updates, state = tx.tx.update(updates, on_device, params, **arrays, **dict(others))
        return updates, tx.put(state, _HOST)

    return _leaf_by_leaf(step, tx.moves, state, tx, updates, params, arrays)


def _leaf_by_leaf(step: Callable[..., Any], moves: Callable[[Any], bool], state: Any, *args: Any) -> tuple[Any, Any]:
    """`step(state, *args)`, updates and state, which fetches what one leaf needs once that of another is sent back.

    What the step does is put into the order in which its updates, one after the other, need it.
    """
    traced, shapes = jax.make_jaxpr(step, return_shape=True)(state, *args)
    count = len(jax.tree.leaves(state))
    last = len(traced.jaxpr.outvars) - count
    traced = inlined(traced, functools.partial(_of_several, last))
    jaxpr: Any = traced.jaxpr
    old, new, updates = jaxpr.invars[:count], jaxpr.outvars[last:], jaxpr.outvars[:last]
    turns: dict[Any, int] = {}

    def turn_of(equation: Any) -> int:
        return min((turns.get(v, last) for v in equation.outvars), default=last)

    def need(pairs: Iterable[tuple[Any, int]]) -> None:
        turns.update((v, min(turn, turns.get(v, last))) for v, turn in pairs if not _is_literal(v))

    def plan(due: Iterable[tuple[Any, int]]) -> None:
        need(due)
        for equation in reversed(jaxpr.eqns):
            need(zip(equation.invars, itertools.repeat(turn_of(equation))))

    plan(zip(updates, itertools.count()))
    # a moment is due as soon as all that it is made of has been needed
    ready = {v: turns.get(v, 0) for v in (*jaxpr.constvars, *jaxpr.invars)}
    for equation in jaxpr.eqns:
        turn = max((ready[v] for v in equation.invars if not _is_literal(v)), default=0)
        ready.update(zip(equation.outvars, itertools.repeat(turn)))
    plan((v, ready[v]) for v in new if not _is_literal(v))

    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*traced.consts, *jax.tree.leaves((state, *args))]))
    fetched, sent = (collections.defaultdict[int, list[Any]](list) for _ in range(2))
    for kept, variables in ((fetched, old), (sent, new)):
        for v in variables:
            if moves(v.aval):
                kept[turns.get(v, last)].append(v)
    before: list[Any] = []
    for turn, equations in itertools.groupby(sorted(jaxpr.eqns, key=turn_of), turn_of):
        if before and fetched[turn]:
            # of what is on the host alone: around what is on the device it would keep the compiler from fusing it
            both = [*fetched[turn], *before]
            values.update(zip(both, jax.lax.optimization_barrier([values[v] for v in both])))
            before = []
        evaluate(jaxpr, equations, values)
        before += sent[turn]
    out = [v.val if _is_literal(v) else values[v] for v in jaxpr.outvars]
    return jax.tree.unflatten(jax.tree.structure(shapes), out)


def _of_several(count: int, jaxpr: Any, calls: list[Any]) -> list[Any]:
    """The calls that work on arrays of other than one update, of so many: what is of one is due as a whole."""
    reached: dict[Any, tuple[int, int]] = {}

    def reach(variables: Iterable[Any]) -> tuple[int, int]:
        found = [reached[v] for v in variables if v in reached]
        return min((low for low, _ in found), default=count), max((high for _, high in found), default=-1)

    def add(variables: Iterable[Any], low: int, high: int) -> None:
        for v in variables:
            if not _is_literal(v):
                before = reached.get(v, (count, -1))
                reached[v] = min(low, before[0]), max(high, before[1])

    for i, v in enumerate(jaxpr.outvars[:count]):
        add([v], i, i)
    several, called = [], {*map(id, calls)}
    for equation in reversed(jaxpr.eqns):
        low, high = reach(equation.outvars)
        add(equation.invars, low, high)
        if id(equation) in called and low != high and any(v.aval.ndim for v in equation.outvars):
            several.append(equation)
    return several


def _is_literal(variable: Any) -> bool:
    return hasattr(variable, "val")
