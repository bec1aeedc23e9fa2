"""The best learning rate of the character model by width: plain, and with the multiples of `gdx.width`.

Run `python -m benchmarks width`, with `--quick` for a rough look. Each loss is the mean of the last quarter of the
training steps and of all seeds; each best rate is where a parabola through the three lowest is lowest.
"""

import argparse
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gdx
from benchmarks import fewbits
from benchmarks.measure import table

BASE, WIDTHS = 64, (64, 256, 1024)
RATES = 2.0 ** np.arange(-12, -3)
BATCH, STEPS, SEEDS = 64, 200, 2
AT_ONCE = 3
MOST, LEAST = 1.5, 4.0


def start(width: int, key: jax.Array) -> Any:
    """Parameters of the character model with two hidden layers of this width."""
    problem = fewbits.characters()
    context, *_, classes = problem.sizes
    return fewbits.start(problem._replace(sizes=(context, width, width, classes)), key)


def setup(way: str, width: int) -> tuple[gdx.Transform, Any]:
    """Adam and what makes the start of a key; transferred, with the multiples that follow from the base."""
    tx, at_base, at_width = gdx.adam(1e-3), *(functools.partial(start, n) for n in (BASE, width))
    if way == "plain" or width == BASE:
        return tx, at_width
    transfer = gdx.width.transfer(*(jax.eval_shape(make, jax.random.key(0)) for make in (at_base, at_width)))
    return transfer.optimizer(tx), lambda key: transfer.start(at_width(key), at_base(key))


def losses(way: str, width: int, steps: int, seeds: int) -> np.ndarray:
    """The loss at each learning rate."""
    inputs, labels = map(jnp.asarray, fewbits.characters().train)

    def loss(params: Any, examples: jax.Array) -> jax.Array:
        return fewbits.loss(params, inputs[examples], labels[examples])

    def batches(key: jax.Array) -> jax.Array:
        return jax.random.randint(jax.random.fold_in(key, 1), (steps, BATCH), 0, len(inputs))

    tx, params = setup(way, width)
    grid = gdx.grid(tx.replace, learning_rate=RATES)
    keys = jax.random.split(jax.random.key(0), seeds)
    swept = gdx.sweep(loss, grid, params, batches, keys=keys, evaluate=lambda params: (), chunk_size=AT_ONCE)
    return np.asarray(swept.losses)[..., -steps // 4 :].mean(axis=(1, 2))


def best_rate(found: np.ndarray) -> float:
    """Where the parabola through the three lowest is lowest, in the logarithm of the rate; an end where that is."""
    i = int(np.nanargmin(found))
    if not 0 < i < len(found) - 1:
        return RATES[i]
    before, at, after = found[i - 1 : i + 2]
    shift = (before - after) / (before - 2 * at + after) / 2
    return RATES[i] * 2**shift


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, half of the steps")
    args = parser.parse_args()
    steps, seeds = (STEPS // 2, 1) if args.quick else (STEPS, SEEDS)
    print(f"Loss of the character model after {steps} steps of Adam, batches of {BATCH}, {seeds} seeds; base: {BASE}\n")
    header = ["width", *(f"{rate:.2g}" for rate in RATES), "best rate", "lowest", f"at {BASE}'s best"]
    moves = {}
    for way in ("plain", "transferred"):
        print(f"{way}\n")
        best, kept = dict[int, float](), 0
        for width in WIDTHS:
            found = losses(way, width, steps, seeds)
            best[width] = best_rate(found)
            # what one pays who takes the rate, of those tried, that was best for the base
            kept = int(np.nanargmin(found)) if width == BASE else kept
            figures = (f"{best[width]:.2e}", f"{np.nanmin(found):.3f}", f"{found[kept]:.3f}")
            cells = (width, *(f"{x:.3f}" for x in found), *figures)
            # the header and a line of dashes once
            print("\n".join(table(header, [cells]).split("\n")[2 * (width != BASE) :]), flush=True)
        print()
        ends = best[BASE] / best[WIDTHS[-1]]
        moves[way] = max(ends, 1 / ends)
    for way, limit, side in (("plain", LEAST, "at least"), ("transferred", MOST, "at most")):
        print(
            f"Expected: the best rate moves from {BASE} to {WIDTHS[-1]}, {way}, by {side} {limit:g} times. "
            f"Came out: {moves[way]:.3g}."
        )
