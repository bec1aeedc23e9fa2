"""Slopes of a loss at the end of a run in its hyperparameters: time, memory, work, and how right they are.

Run `python -m benchmarks slopes`, with `--quick` for a rough look.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gdx
from benchmarks.measure import came_out, interleaved, ratio, table
from gdx.compat import enable_x64
from gdx.demo.problems import digits
from gdx.rematerialising import STATES, plan

STEPS, LONG = 1000, 10_000
POINT = {"learning_rate": 0.05, "momentum": 0.5, "weight_decay": 1e-3}


def ways() -> dict[str, Callable[[jax.Array], Any]]:
    """A run on the digits without slopes, and each way to have those of its first hyperparameters."""
    problem = digits()
    start, batches = problem.start(jax.random.key(0)), problem.batches(0, STEPS)
    validation = tuple(column[:288] for column in problem.train)

    def final(point: jax.Array, remat: bool = False) -> jax.Array:
        learning_rate, momentum, weight_decay = point
        tx = gdx.chain(gdx.add_decoupled_weight_decay(weight_decay), gdx.sgd(learning_rate, momentum))
        return problem.loss(gdx.train(problem.loss_on, tx, start, batches, remat=remat).params, validation)

    def forward(count: int) -> Callable[[jax.Array], Any]:
        one = lambda point, direction: jax.jvp(final, (point,), (direction,))  # noqa: E731
        return lambda point: jax.vmap(functools.partial(one, point))(jnp.eye(len(POINT))[:count])

    return {
        "none": final,
        "reverse, remat=False": jax.value_and_grad(final),
        "reverse, remat=True": jax.value_and_grad(functools.partial(final, remat=True)),
        **{f"forward, of {count}": forward(count) for count in (1, 2, 3)},
    }


def costs_table(rounds: int) -> str:
    """Time and memory."""
    point = jnp.array(list(POINT.values()))
    programs: dict[str, Any] = {name: jax.jit(way).lower(point).compile() for name, way in ways().items()}
    calls = {name: functools.partial(_call, program, point) for name, program in programs.items()}
    seconds = interleaved(calls, rounds)
    rows = [
        (name, ratio(seconds, name, "none"), f"{program.memory_analysis().temp_size_in_bytes / 1e6:.1f}")
        for name, program in programs.items()
    ]
    found = {"reverse, remat=True": ratio(seconds, "reverse, remat=True", "none")}
    return "\n".join(
        [
            f"{STEPS} steps of SGD on the digits, slopes of {len(POINT)} hyperparameters, against the run without\n",
            table(["slopes", "time", "memory, MB"], rows),
            "",
            came_out("time, of a run without slopes", 4, found),
        ]
    )


def _call(program: Any, point: jax.Array) -> None:
    jax.block_until_ready(program(point))


def work_table() -> str:
    """Steps that are made, by the plan, and the error of slopes through as many."""
    rows = []
    for steps in (100, STEPS, LONG, 10 * LONG):
        stretches = plan(steps, STATES).stretches
        again = int(np.sum(np.maximum(stretches[:, 1] - stretches[:, 0], 0)))
        rows.append((f"{steps:,}", STATES, f"{(steps + again) / steps:.2f}", f"{(2 * steps + again) / steps:.2f}"))
    with enable_x64(True):
        error = slope_error()
    header = ["steps", "stored states", "steps ahead, of all", "with those of the derivative"]
    return "\n".join(
        [
            table(header, rows),
            "",
            came_out("steps ahead, of all", 4, {f"{row[0]} steps": float(row[2]) for row in rows[:3]}),
            came_out(f"relative error of slopes through {LONG:,} steps", 1e-6, error),
        ]
    )


def slope_error() -> dict[str, float]:
    """Of Adam on a smooth problem, against finite differences in float64."""
    curvature = jnp.linspace(0.5, 2.0, 4)
    batches = 0.1 * jnp.cos(jnp.arange(LONG * 4.0)).reshape(LONG, 4)

    def final(point: jax.Array) -> jax.Array:
        tx = gdx.adam(point[0], point[1], eps=1e-3)
        loss = lambda theta, noise: jnp.sum(curvature * jnp.log(jnp.cosh(theta - 1 - noise)))  # noqa: E731
        trained = gdx.train(loss, tx, jnp.zeros(4), batches, remat=True)
        return jnp.sum(trained.params**2) + jnp.mean(trained.losses)

    point, run = jnp.array([1e-3, 0.9]), jax.jit(final)
    slopes, errors = jax.jit(jax.grad(final))(point), {}
    for i, name in enumerate(("learning_rate", "b1")):
        step = 1e-4 * point[i] * jnp.eye(2)[i]
        a, b, c, d = (float(run(point + k * step)) for k in (1, -1, 2, -2))
        expected = (8 * (a - b) - (c - d)) / (12 * float(step[i]))
        errors[name] = abs(float(slopes[i]) / expected - 1)
    return errors


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    args = parser.parse_args()
    print(costs_table(3 if args.quick else args.rounds), "\n")
    print(work_table())


if __name__ == "__main__":
    main()
