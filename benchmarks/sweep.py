"""A sweep of 32 learning rates on the digits network, six ways; halving; many steps in one call against many calls.

Run `python -m benchmarks sweep`, with `--quick` for a rough look. Every figure of time is the median of the
ratios of interleaved timings, with their quartiles: below 1, gdx is faster.
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
from gdx.compat import unregister_event_duration_listener
from gdx.demo.problems import digits
from gdx.training import training_step

RATES = np.geomspace(1e-4, 1e-1, 32)
BATCH = 64
LEAST_COMPILATION = 0.1  # seconds
TREES = {"10x2k": (10, 2_000), "100x3.2k": (100, 3_200), "1000x3.2k": (1000, 3_200)}
TARGETS = {"10x2k": 0.35, "100x3.2k": 0.45, "1000x3.2k": 0.35}


def contenders(steps: int) -> dict[str, Callable[[], Callable[[np.ndarray], Any]]]:
    """The ways to sweep: each makes a function from learning rates to final losses, with programs of its own."""
    problem = digits()
    start = problem.start(jax.random.key(0))
    examples = jnp.asarray(np.random.default_rng(0).integers(0, len(problem.train[0]), (steps, BATCH)))

    def train(tx: optax.GradientTransformation) -> jax.Array:
        return gdx.train(problem.loss_on, tx, start, examples).losses[-1]

    def train_at(rate: Any) -> jax.Array:
        return train(optax.adamw(rate))

    def closure_for_each_step() -> Callable:
        def final(rate: float) -> float:
            tx = optax.adamw(rate)
            train_step = jax.jit(lambda carry, batch: training_step(problem.loss_on, tx)(carry, batch))
            carry = (start, tx.init(start), (None, None))
            for batch in examples:
                carry, (loss, _) = train_step(carry, (0, batch))
            return float(loss)

        return lambda rates: list(map(final, rates))

    def closure_for_each_rate() -> Callable:
        return lambda rates: [float(jax.jit(functools.partial(train_at, rate))()) for rate in rates]

    def by_hand() -> Callable:
        jitted = jax.jit(functools.partial(train_at))
        return lambda rates: [float(jitted(rate)) for rate in rates]

    def by_hand_under_vmap() -> Callable:
        jitted = jax.jit(jax.vmap(functools.partial(train_at)))
        return lambda rates: np.asarray(jitted(jnp.asarray(rates, jnp.float32)))

    def optimizer_argument() -> Callable:
        jitted = jax.jit(functools.partial(train))
        return lambda rates: [float(jitted(gdx.adamw(rate))) for rate in rates]

    def one_program() -> Callable:
        def loss(params: Any, batch: Any) -> jax.Array:
            return problem.loss_on(params, batch)

        def final(rates: np.ndarray) -> np.ndarray:
            batch = gdx.grid(gdx.adamw, learning_rate=rates)
            return np.asarray(gdx.sweep(loss, batch, start, examples, evaluate=_nothing).losses[:, -1])

        return final

    return {
        "optax, a closure for each rate, a call for each step": closure_for_each_step,
        "optax, a closure for each rate, one call": closure_for_each_rate,
        "optax, the rate an argument by hand": by_hand,
        "optax, the same under vmap": by_hand_under_vmap,
        "gdx, the optimizer an argument": optimizer_argument,
        "gdx.sweep": one_program,
    }


def _nothing(params: Any) -> tuple:
    return ()


def compile_count(function: Callable[[], Any]) -> int:
    """How many programs XLA compiles while the function runs, single operations not counted."""
    count = 0

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        nonlocal count
        # what else is compiled are single operations: reading an entry, making zeros
        count += event == "/jax/core/compile/backend_compile_duration" and duration_secs > LEAST_COMPILATION

    jax.monitoring.register_event_duration_secs_listener(listen)
    function()
    unregister_event_duration_listener(listen)
    return count


def time_sweeps(steps: int, rounds: int) -> list[list[object]]:
    """A row for each way: compilations, and times relative to `gdx.sweep`, from nothing and with programs kept."""
    ways = contenders(steps)
    baseline = "gdx.sweep"
    losses = {name: np.asarray(make()(RATES)) for name, make in ways.items()}
    calm = RATES < 1e-2  # training at higher rates multiplies every rounding
    for name, found in losses.items():
        np.testing.assert_allclose(found[calm], losses[baseline][calm], rtol=1e-3, err_msg=name)
    counts = {}
    for name, make in ways.items():
        jax.clear_caches()
        counts[name] = compile_count(lambda make=make: make()(RATES))  # type: ignore[misc]
    cold = interleaved(
        {name: lambda make=make: make()(RATES) for name, make in ways.items()},  # type: ignore[misc]
        rounds,
        dict.fromkeys(ways, jax.clear_caches),
    )
    kept = {name: make() for name, make in ways.items()}
    warm = interleaved(
        {name: lambda run=run: run(1.01 * RATES) for name, run in kept.items()},  # type: ignore[misc]
        rounds,
        # what compiles anew leaves the caches of the processor cold for the next one
        {name: lambda run=run: run(RATES) for name, run in kept.items() if "closure" not in name},  # type: ignore[misc]
    )
    return [[name, counts[name], ratio(cold, name, baseline), ratio(warm, name, baseline)] for name in ways]


def time_steps(name: str, rounds: int) -> list[object]:
    """The row of one tree: time for each step of 16 and 64 in a call, relative to a call for each."""
    leaves, size = TREES[name]
    params = [jnp.asarray(x) for x in np.random.default_rng(0).standard_normal((leaves, size)).astype(np.float32)]
    tx = jax.device_put(gdx.adamw(1e-4))

    def loss(params: Any, batch: Any) -> jax.Array:
        return 0.5 * optax.tree.norm(params, squared=True)

    def run(steps: int) -> Callable[[], None]:
        batches = jnp.zeros(steps, jnp.int32)

        @functools.partial(jax.jit, donate_argnums=(1, 2))
        def call(tx: Any, params: Any, state: Any) -> Any:
            if steps == 1:
                return training_step(loss, tx)((params, state, (None, None)), (0, None))[0][:2]
            return gdx.train(loss, tx, params, batches, state=state)[:2]

        carry = jax.tree.map(jnp.copy, (params, tx.init(params)))

        def sixty_four() -> None:
            nonlocal carry
            for _ in range(64 // steps):
                carry = call(tx, *carry)
            jax.block_until_ready(carry)

        return sixty_four

    functions = {str(steps): run(steps) for steps in (1, 16, 64)}
    calls = {key: calls_for(function, duration=0.05) for key, function in functions.items()}

    def repeated(function: Callable[[], None], times: int) -> None:
        for _ in range(times):
            function()

    times = max(min(calls.values()), 1)
    seconds = interleaved(
        {key: functools.partial(repeated, function, times) for key, function in functions.items()}, rounds
    )
    return [name, ratio(seconds, "16", "1"), ratio(seconds, "64", "1"), f"<= {TARGETS[name]}"]


def halving_table(rounds: int) -> str:
    """The best of 256 optimizers from three seeds, all trained to the end or the worse half dropped again and again."""
    problem = digits()
    batches, keys = problem.batches(0, 320), jax.random.split(jax.random.key(0), 3)
    grid = gdx.grid(gdx.adamw, learning_rate=np.geomspace(1e-4, 1, 64), weight_decay=[0.0, 0.01, 0.1, 1.0])

    def shuffled(key: jax.Array) -> jax.Array:
        return jax.random.permutation(key, batches)

    run = functools.partial(
        gdx.sweep, problem.loss_on, grid, problem.start, shuffled, keys=keys, evaluate=problem.evaluate
    )
    found = {halve: run(halve=halve) for halve in (0, 3, 7)}
    whole = found[0]
    ways = {str(halve): lambda halve=halve: jax.block_until_ready(run(halve=halve).losses) for halve in found}
    seconds = interleaved(ways, rounds)
    rows = []
    for halve, swept in found.items():
        best = swept.ranking(swept.final["loss"])[0]
        shown = ", ".join(f"{value:.3g}" for value in swept.labels[best].values())
        loss, error = (x[best] for x in whole.mean(whole.final["loss"]))
        accuracy = float(whole.final["accuracy"][best].mean())
        share = f"{swept.steps.sum() / whole.steps.sum():.3f}"
        rows.append(
            (halve, share, shown, f"{loss:.4f} +- {error:.4f}", f"{accuracy:.2%}", ratio(seconds, str(halve), "0"))
        )
    header = ["halve", "share of the steps", "best rate, decay", "its training loss", "test accuracy", "time"]
    quarter = float(found[7].steps.sum() / whole.steps.sum())
    return table(header, rows) + "\n\n" + came_out("steps with halve=7", 0.25, {"halve=7": quarter})


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rounds", type=int, default=5, help="rounds from nothing; four times as many of the short ones"
    )
    parser.add_argument("--steps", type=int, default=100, help="training steps of each rate")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    args = parser.parse_args()
    rounds = 2 if args.quick else args.rounds
    print(f"32 learning rates, {args.steps} steps of AdamW on the digits network: time relative to gdx.sweep\n")
    header = ["way", "compilations", "from nothing", "32 other rates"]
    print(table(header, time_sweeps(args.steps, rounds)), "\n")
    print(
        "The best of 256 optimizers on the digits, 320 steps; its loss on what it was not trained on, after all steps\n"
    )
    print(halving_table(rounds), "\n")
    print("Time for each step of a call, relative to a call for each step\n")
    print(
        table(
            ["parameters", "16 steps a call", "64 steps a call", "target"], [time_steps(n, 4 * rounds) for n in TREES]
        )
    )
