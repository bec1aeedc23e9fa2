"""Where the versions of JAX that gdx runs on differ: one function each, with the version from which on it can go."""

import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp


def enable_x64(on: bool) -> AbstractContextManager[None]:
    """Double precision on or off. From jax 0.8 on: `jax.enable_x64(on)`."""
    # the older place is gone from 0.9 on, so it is looked up only where there is no other
    return jax.enable_x64(on) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(on)  # type: ignore[attr-defined]


def has_no_derivative(error: Exception) -> bool:
    """Whether JAX says that something cannot be differentiated. From jax 0.10 on, without the words after `+`."""
    # the older ones trip over their own message about a loop with an open end
    return any(words in str(error) for words in ("differentiation", "autodiff", "+: 'NoneType' and 'tuple'"))


def initialize_distributed(address: str, count: int, number: int, **timeouts: int) -> None:
    """Joins the processes of one program. From jax 0.8.1 on: `jax.distributed.initialize`, with every timeout."""
    known = inspect.signature(jax.distributed.initialize).parameters
    timeouts = {name: seconds for name, seconds in timeouts.items() if name in known}
    jax.distributed.initialize(address, count, number, **timeouts)  # type: ignore[arg-type]


def unregister_event_duration_listener(listener: Callable[..., None]) -> None:
    """Stops telling this listener. From jax 0.8 on: `jax.monitoring.unregister_event_duration_listener(listener)`."""
    if hasattr(jax.monitoring, "unregister_event_duration_listener"):
        jax.monitoring.unregister_event_duration_listener(listener)
    else:
        jax._src.monitoring._unregister_event_duration_listener_by_callback(listener)  # type: ignore[attr-defined]


def varying_axes(x: Any) -> frozenset[str]:
    """The axes of `jax.shard_map` along which an array differs. From jax 0.10 on: `manual_axis_type.varying`."""
    kind: Any = jax.typeof(x)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma


def to_varying(x: jax.Array, axes: Collection[str]) -> jax.Array:
    """An array typed as one that differs along these axes. From jax 0.8 on: `jax.lax.pcast(..., to="varying")`."""
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, tuple(axes), to="varying")
    return jax.lax.pvary(x, tuple(axes))  # type: ignore[attr-defined]


def contracts_all() -> bool:
    """Whether each sum of a product on a CPU becomes a fused multiply-add. From jax 0.12 on: False.

    There LLVM is told so operation by operation, and forgets it for those that it joins into wider vectors.
    """
    return jax.__version_info__ < (0, 12)


def wrap_key_data(value: Any, dtype: Any) -> jax.Array:
    """A random key of this dtype from its bits. From jax 0.10 on: `jax.random.wrap_key_data(value, dtype=dtype)`."""
    return jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(jnp.empty(0, dtype)))


def memory_kinds(device: Any) -> list[str]:
    """The memories of a device that programs can use. From jax 0.10 on: all that it has."""
    # before, a program on a CPU puts what is for the host into the device's memory, or ends Python
    is_short = device.platform == "cpu" and jax.__version_info__ < (0, 10)
    return [device.default_memory().kind] if is_short else [memory.kind for memory in device.addressable_memories()]


def evaluate(jaxpr: Any, equations: Iterable[Any], values: dict[Any, Any]) -> None:
    """Adds to the values of variables those that some of a program's equations make; how one is bound differs."""
    equations = list(equations)
    made = [v for equation in equations for v in equation.outvars]
    taken = {v: None for equation in equations for v in equation.invars if not hasattr(v, "val")}
    given = [v for v in taken if v in values]
    part = jaxpr.replace(constvars=[], invars=given, eqns=equations, outvars=made)
    values.update(zip(made, jax.core.eval_jaxpr(part, [], *(values[v] for v in given))))


def inlined(traced: Any, which: Callable[[Any, list[Any]], list[Any]]) -> Any:
    """A program without those calls of `jax.jit(..., inline=True)` in it that `which(jaxpr, calls)` chooses.

    Before jax 0.12: the program itself, traced without any.
    """

    def chosen() -> set[int]:
        calls = [equation for equation in traced.jaxpr.eqns if equation.params.get("inline")]
        return {id(equation) for equation in which(traced.jaxpr, calls)} if calls else set()

    def run(*args: Any) -> list[Any]:
        values = dict(zip([*traced.jaxpr.constvars, *traced.jaxpr.invars], [*traced.consts, *args]))
        for equation in traced.jaxpr.eqns:
            if id(equation) in calls:
                inner, given = (
                    equation.params["jaxpr"],
                    (v.val if hasattr(v, "val") else values[v] for v in equation.invars),
                )
                values.update(zip(equation.outvars, jax.core.eval_jaxpr(inner.jaxpr, inner.consts, *given)))
            else:
                evaluate(traced.jaxpr, [equation], values)
        return [v.val if hasattr(v, "val") else values[v] for v in traced.jaxpr.outvars]

    while calls := chosen():
        # a function of its own for each round: JAX would remember the program that the last one was
        traced = jax.make_jaxpr(lambda *args: run(*args))(*traced.in_avals)
    return traced


@jax.custom_jvp
def barrier(tree: Any) -> Any:
    """A fence for the compiler. From jax 0.11 on: `jax.lax.optimization_barrier`; before, all in it got slopes."""
    return jax.lax.optimization_barrier(tree)


@functools.partial(barrier.defjvp, symbolic_zeros=True)
def _barrier_jvp(primals: tuple, tangents: tuple) -> tuple:
    return barrier(*primals), *tangents
