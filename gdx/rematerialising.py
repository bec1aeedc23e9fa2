"""Derivatives through many steps that keep few of them: which states to store, and which steps to make again."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from gdx.progress import silent
from gdx.trees import kinds

STATES = 30


class Plan(NamedTuple):
    """How to go back through steps with a stack of stored states.

    A stretch is a step to begin with, the one before which to end, and the row in which to store the state there; a row
    behind the last one stores nothing.

    Attributes:
      rows: of shape (steps,): on the way ahead, the row for the state before each step.
      back: of shape (steps, 3): for each step, the row of the last state that is stored before it, the first of the
        stretches that lead from there to it, and the first of those that come after them.
      stretches: of shape (stretches, 3).
    """

    rows: np.ndarray
    back: np.ndarray
    stretches: np.ndarray


@functools.lru_cache(16)
def plan(steps: int, states: int) -> Plan:
    r"""The plan that makes the fewest steps again, of all that store so many states, that of the start among them.

    Where no step is made ahead more than $r$ times, $s$ states suffice for $\binom{s + r}{s}$ steps. With the smallest
    such $r$, $K$ steps take $r K - \binom{s + r}{r - 1}$ ahead, and each of the $K$ once more in its derivative. (Up to
    $r + 1$ are added here: the way ahead goes on to the end, and does not store the state that it has there.)

    Source: Griewank and Walther, Algorithm 799: Revolve (2000).
    """
    stack, stretches = [0], list[tuple[int, int, int]]()

    def store_before(step: int) -> list[tuple[int, int, int]]:
        stored = []
        while len(stack) < states and stack[-1] < step:
            begin = stack[-1]
            stack.append(begin + split(step + 1 - begin, states - len(stack) + 1))
            stored.append((begin, stack[-1], len(stack) - 1))
        return stored

    store_before(steps - 1)
    rows, back = np.full(steps, states, np.int32), np.zeros((steps, 3), np.int32)
    rows[stack] = np.arange(len(stack))
    for step in reversed(range(steps)):
        top, first = len(stack) - 1, len(stretches)
        stretches += store_before(step)
        if stack[-1] == step:
            stack.pop()
        else:
            stretches.append((stack[-1], step, states))
        back[step] = top, first, len(stretches)
    # one more, of no steps: JAX does not index what is empty, not even in a loop that is never entered
    return Plan(rows, back, np.array([*stretches, (0, 0, states)], np.int32))


def split(steps: int, states: int) -> int:
    """After how many steps to store the next state, if one is stored before them: the largest best number."""
    if states == 1:
        return steps - 1
    times = 1
    while math.comb(states + times, states) < steps:
        times += 1
    return min(math.comb(states + times - 1, states), steps - math.comb(states + times - 2, states - 1))


def rematerialised_scan(
    step: Callable[[Any, Any], Any], carry: Any, inputs: Any, *, states: int = STATES
) -> tuple[Any, Any]:
    """`jax.lax.scan`, whose derivative by reverse mode stores few carries and makes the steps between them again."""
    # one without a dtype of its own gets one in the first step
    carry = jax.tree.map(lambda x: jnp.asarray(x, x.dtype), carry)
    # what the step closes over becomes an argument, for it may have a slope
    first = jax.tree.map(lambda x: x[0], inputs)
    traced, shapes = jax.make_jaxpr(step, return_shape=True)(carry, first)
    with silent():  # steps that are made again are no progress
        again = jax.make_jaxpr(lambda *arguments: step(*arguments))(carry, first)
    if kinds(shapes[0]) != kinds(carry):
        return jax.lax.scan(step, carry, inputs)  # its error says where
    starts, inputs = jax.tree.leaves(carry), jax.tree.leaves(inputs)
    states, width = min(states, len(inputs[0])), len(starts)
    # numpy's: what belongs to the program in which the run is traced is gone in that of its derivative
    rows, back, stretches = plan(len(inputs[0]), states)

    def make(constants: Any, state: Any, given: Any, program: Any = again) -> tuple[list[Any], list[Any]]:
        found = jaxpr_as_fun(ClosedJaxpr(program.jaxpr, constants))(*state, *given)
        return found[:width], found[width:]

    @jax.custom_vjp
    def run(told: Any, constants: Any, state: Any, inputs: Any) -> Any:
        return jax.lax.scan(functools.partial(make, told, program=traced), state, inputs)

    def ahead(*arguments: Any) -> tuple[Any, Any]:
        told, constants, state, inputs = jax.tree.map(lambda x: x.value, arguments)

        def store(carry: Any, at: Any) -> tuple[Any, Any]:
            (state, stored), (row, given) = carry, at
            stored = _put(stored, row, state)
            state, out = make(told, state, given, program=traced)
            return (state, stored), out

        stored = [jnp.broadcast_to(x, (states, *x.shape)) for x in state]
        (state, stored), outs = jax.lax.scan(store, (state, stored), (rows, inputs))
        split = [[x.perturbed and _has_slope(x.value) for x in arguments[i]] for i in (1, 3)]
        return (state, outs), (stored, _parted(constants, split[0]), _parted(inputs, split[1]))

    def go_back(kept: Any, slopes: Any) -> tuple[Any, Any, Any, Any]:
        stored, (moving, fixed), inputs = kept
        constants, floats = _joined(moving, fixed), [_has_slope(x) for x in starts]
        state_slope = [_instantiated(x, y[0]) if yes else None for x, y, yes in zip(slopes[0], stored, floats)]
        # of what comes out only some has a slope: mostly the losses, or one of them
        out_slopes = [None if isinstance(x, SymbolicZero) or not _has_slope(x) else x for x in slopes[1]]

        def step_back(carry: Any, at: Any) -> tuple[Any, Any]:
            stored, slope, total = carry
            (top, first, last), (own, others), out_slope = at

            def stretch(i: Any, carry: Any) -> Any:
                stored, state = carry
                begin, end, row = jnp.asarray(stretches)[i]

                def again(t: Any, state: Any) -> Any:
                    return make(constants, state, [x[t] for x in _joined(*inputs)])[0]

                state = jax.lax.fori_loop(begin, end, again, state)
                return _put(stored, row, state), state

            stored, state = jax.lax.fori_loop(first, last, stretch, (stored, [x[top] for x in stored]))
            moved, rest = _parted(state, floats)

            def with_slopes(moving: Any, moved: Any, own: Any) -> Any:
                state, out = make(_joined(moving, fixed), _joined(moved, rest), _joined(own, others))
                return [_parted(state, floats)[0], [x if y is not None else None for x, y in zip(out, out_slopes)]]

            added, slope, own_slope = jax.vjp(with_slopes, moving, moved, own)[1]([slope, out_slope])
            return (stored, slope, jax.tree.map(jnp.add, total, added)), own_slope

        begin = stored, state_slope, jax.tree.map(jnp.zeros_like, moving)
        (_, slope, total), own_slopes = jax.lax.scan(step_back, begin, (back, inputs, out_slopes), reverse=True)
        return [None] * len(traced.consts), total, slope, own_slopes

    run.defvjp(ahead, go_back, symbolic_zeros=True)
    state, outs = run(traced.consts, again.consts, starts, inputs)
    return jax.tree.unflatten(jax.tree.structure(shapes), [*state, *outs])


def _has_slope(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _instantiated(x: Any, like: jax.Array) -> jax.Array:
    return jnp.zeros_like(like) if isinstance(x, SymbolicZero) else x


def _put(stored: list[Any], row: Any, state: list[Any]) -> list[Any]:
    return [x.at[row].set(y, mode="drop") for x, y in zip(stored, state)]


def _parted(values: list[Any], where: list[bool]) -> tuple[list[Any], list[Any]]:
    """Those for which it holds, and the others; each with None where the other has something."""
    return [x if yes else None for x, yes in zip(values, where)], [None if yes else x for x, yes in zip(values, where)]


def _joined(these: list[Any], those: list[Any]) -> list[Any]:
    return [y if x is None else x for x, y in zip(these, those)]
