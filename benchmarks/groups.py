"""What stands around an optimizer: groups by path, a guard against spikes, an average of the parameters.

Run `python -m benchmarks groups`, with `--quick` for a rough look. Every figure is the median of the ratios of
interleaved timings, with their quartiles, to the same without it: AdamW for all parameters, or AdamW alone.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdx
from benchmarks.measure import calls_for, came_out, interleaved, ratio, table
from benchmarks.step import Run, lowering, repeated, train_step

LEAVES, SIZE = 1000, 3_200
RATE, DECAY = 1e-3, 1e-4
GROUPS = ("layer", "norm", "bias", "embed")
WIDTH, LAYERS, BATCHES = 512, 4, (64, 256)
EVERY = 10
PLACES = 12


def leaves() -> dict[str, Any]:
    """The shapes of a thousand leaves, a quarter of them in each group."""
    return {name: [jax.ShapeDtypeStruct((SIZE,), jnp.float32) for _ in range(LEAVES // len(GROUPS))] for name in GROUPS}


def in_groups() -> dict[str, optax.GradientTransformation]:
    """AdamW for all parameters, and with another decay or learning rate in three of the four groups."""
    rates, decays = dict(zip(GROUPS, (1.0, 1.0, 0.5, 0.1))), dict(zip(GROUPS, (1.0, 0.0, 1.0, 1.0)))
    changes = {
        "norm": {"weight_decay": 0.0},
        "bias": {"learning_rate": gdx.times(0.5)},
        "embed": {"learning_rate": gdx.times(0.1)},
    }

    def partition(adamw: Any) -> optax.GradientTransformation:
        each = {name: adamw(RATE * rates[name], weight_decay=DECAY * decays[name]) for name in GROUPS}
        return optax.partition(each, {name: name for name in GROUPS})

    return {
        "ungrouped": gdx.adamw(RATE, weight_decay=DECAY),
        "ungrouped, once more": gdx.adamw(RATE, weight_decay=DECAY),
        "gdx.groups": gdx.groups(gdx.adamw(RATE, weight_decay=DECAY), changes),
        "optax.partition of gdx's": partition(gdx.adamw),
        "optax's, ungrouped": optax.adamw(RATE, weight_decay=DECAY),
        "optax.partition of optax's": partition(optax.adamw),
    }


def around() -> dict[str, optax.GradientTransformation]:
    """AdamW alone, and with each of what stands around it."""
    tx = gdx.adamw(RATE, weight_decay=DECAY)
    return {
        "alone": tx,
        "alone, once more": tx,
        "skip_spikes": gdx.skip_spikes(tx),
        "skip_spikes, clip": gdx.skip_spikes(tx, clip=True),
        "optax.apply_if_finite": optax.apply_if_finite(tx, 10),
        "average_parameters": gdx.average_parameters(tx),
        "average_parameters, bfloat16": gdx.average_parameters(tx, dtype=gdx.storage.StochasticBfloat16()),
        "average_parameters, decay=None": gdx.average_parameters(tx, None),
        "watch": gdx.watch(tx, every=EVERY),
    }


def random_like(shapes: Any) -> Any:
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(0.05 * random.standard_normal(x.shape, np.float32)), shapes)


def loss(params: Any, batch: jax.Array) -> jax.Array:
    """That of a network with a million parameters."""
    x = batch
    for weights in params:
        x = jnp.tanh(x @ weights)
    return jnp.mean((x - batch) ** 2)


def jitted_step(tx: Any, gradient: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """A training step whose gradient is made of the parameters and of what is given."""

    def step(params: Any, state: Any, given: Any) -> Any:
        return train_step(tx, params, state, gradient(params, given))

    return jax.jit(step, donate_argnums=(0, 1))


def allocated(tx: Any, step: Callable[..., Any], params: Any, given: Any) -> Run:
    """Steps with buffers of their own."""
    params = jax.tree.map(jnp.copy, params)
    return repeated(step, (params, tx.init(params)), given)


def time_steps(
    ways: dict[str, Any], shapes: Any, gradient: Callable[[Any, Any], Any], given: Any, rounds: int
) -> dict[str, np.ndarray]:
    """Seconds of some steps in each way."""
    params, parts, steps = random_like(shapes), list[dict[str, np.ndarray]](), 0
    # where code and buffers lie makes 5 to 15 %, of the same program too: compile and allocate anew, in random order
    for seed in range(PLACES):
        order = np.random.default_rng(seed).permutation(list(ways))
        runs = {name: allocated(ways[name], jitted_step(ways[name], gradient), params, given) for name in order}
        for run in runs.values():
            run(2)
        # as many as have the same share of watched ones
        calls = lambda: calls_for(lambda: runs[next(iter(ways))](1), duration=0.02)  # noqa: B023, E731
        steps = steps or -(-calls() // EVERY) * EVERY
        parts.append(
            interleaved(
                {name: functools.partial(run, steps) for name, run in runs.items()},
                max(rounds // PLACES, 2),
                seed=seed,
            )
        )
    return {name: np.concatenate([part[name] for part in parts]) for name in ways}


def groups_table(rounds: int) -> str:
    """Time of a step, and of tracing and lowering it, for a thousand leaves in four groups."""
    ways, shapes = in_groups(), leaves()
    steps = time_steps(ways, shapes, lambda params, gradients: gradients, random_like(shapes), rounds)
    lowers = {name: lowering(tx, shapes, whole=True) for name, tx in ways.items()}
    warm = interleaved(lowers, max(rounds // 4, 3))
    cold = interleaved(lowers, max(rounds // 4, 3), dict.fromkeys(lowers, jax.clear_caches))
    alone = {name: "optax's, ungrouped" if name.endswith("of optax's") else "ungrouped" for name in ways}
    shown = [name for name in ways if name not in alone.values()]
    found = {name: [ratio(seconds, name, alone[name]) for seconds in (steps, warm, cold)] for name in shown}
    step, *traces = found["gdx.groups"]
    return "\n".join(
        [
            f"{LEAVES} leaves of {SIZE} numbers in {len(GROUPS)} groups, against AdamW for all (gdx's or optax's)",
            "warm: JAX has traced these leaves before in another program; cold: after jax.clear_caches()\n",
            table(
                ["optimizer", "step", "trace and lower, warm", "cold"],
                [(name, *figures) for name, figures in found.items()],
            ),
            "",
            came_out("a step of gdx.groups", 1.02, {"gdx.groups": step}),
            came_out("to trace and lower gdx.groups", 1.1, dict(zip(("warm", "cold"), traces))),
        ]
    )


def around_table(rounds: int) -> str:
    """Time of a step with a guard or an average, against AdamW alone."""
    ways = around()
    shapes = [jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32)] * LAYERS
    batches = [random_like(jax.ShapeDtypeStruct((size, WIDTH), jnp.float32)) for size in BATCHES]
    training = [time_steps(ways, shapes, jax.grad(loss), batch, rounds) for batch in batches]
    steps = time_steps(ways, shapes, lambda params, gradients: gradients, random_like(shapes), rounds)
    rows = [(name, *(ratio(seconds, name, "alone") for seconds in (*training, steps))) for name in ways]
    watched = {f"at {size}": ratio(seconds, "watch", "alone") for size, seconds in zip(BATCHES, training)}
    return "\n".join(
        [
            f"{LAYERS * WIDTH**2 / 1e6:.1f}M parameters, against AdamW alone:\n"
            f"with the gradient of a network on so many examples, and with a gradient that is given\n",
            table(["around AdamW", *(f"training step, {size}" for size in BATCHES), "optimizer step"], rows[1:]),
            "",
            came_out(
                "a guarded optimizer step as long as with optax.apply_if_finite",
                1.05,
                {"skip_spikes": ratio(steps, "skip_spikes", "optax.apply_if_finite")},
            ),
            came_out("a training step of which every tenth is watched", 1.03, watched),
        ]
    )


TABLES = {"groups": groups_table, "around": around_table}


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=36, help="rounds per row; a quarter of it for tracing")
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--quick", action="store_true", help="few rounds")
    args = parser.parse_args()
    for name in args.tables:
        print(TABLES[name](6 if args.quick else args.rounds), "\n")


if __name__ == "__main__":
    main()
