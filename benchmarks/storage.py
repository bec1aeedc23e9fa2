"""State in few bits: its size, the time and the bytes that a step takes, and what it does to training.

Run `python -m benchmarks storage`, or only some of its parts: `memory time quality training`. The
part `devices` compiles for accelerators that are not there: `tpu` needs `libtpu`, `h100` the
packages `jax-cuda12-plugin` and `jax-cuda12-pjrt`. Times are medians of the ratios of interleaved
timings, with their quartiles: below 1, gdx is faster.
"""

import argparse
import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdx
import gdx.plot
from benchmarks.devices import OPTIONS, available, compiled_step, devices, nbytes_moved
from benchmarks.fewbits import (
    BFLOAT16,
    BOTH,
    COLUMNS,
    EIGHT_BIT,
    FORMATS,
    FOUR_BIT,
    PROBLEMS,
    ROWS,
    TURNED,
    compare,
    eight_bit_errors,
    rare_row_errors,
    second_moment_after_shrinking,
)
from benchmarks.measure import came_out, interleaved, ratio, table
from benchmarks.models import TREES

try:
    import torch
except ImportError:
    torch = None

RATE = 1e-3
SHAPES = {"1x32M": [(8192, 4096)], "100x320k": [(640, 512)] * 100}


# at most how long a step takes, of another's time
EXPECTED = [
    ("bf16 state", "optax f32", 1.15),
    ("bf16 everything, stochastic", "optax bf16", 0.6),
    ("8-bit state", "optax f32", 2),
]

# at most what it may add to the loss
LOSSES = {"4-bit state": 0.005, "bf16 parameters, corrected": 0.002, "8-bit state, bf16 corrected": 0.002}


def _rounded(rounding: gdx.Transform, **formats: Any) -> gdx.Transform:
    return gdx.chain(gdx.adamw(RATE, **formats), rounding)


# the optimizer, and the dtype of parameters and gradients
OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "f32": (gdx.adamw(RATE), jnp.float32),
    "bf16 state": (gdx.adamw(RATE, **BFLOAT16), jnp.float32),
    "8-bit state": (gdx.adamw(RATE, **EIGHT_BIT), jnp.float32),
    "4-bit state": (gdx.adamw(RATE, **FOUR_BIT), jnp.float32),
    "bf16 everything, stochastic": (_rounded(gdx.round_stochastically(), **BFLOAT16), jnp.bfloat16),
    "bf16 everything, corrected": (_rounded(gdx.round_with_correction(), **BFLOAT16), jnp.bfloat16),
    "bf16 everything, compensated": (_rounded(gdx.round_with_compensation(), **BFLOAT16), jnp.bfloat16),
    "bf16 and f32 master": (_rounded(gdx.round_with_master(), **BFLOAT16), jnp.bfloat16),
    "8-bit state, bf16 stochastic": (_rounded(gdx.round_stochastically(), **EIGHT_BIT), jnp.bfloat16),
    "8-bit state, bf16 corrected": (_rounded(gdx.round_with_correction(), **EIGHT_BIT), jnp.bfloat16),
}
OPTAX: dict[str, tuple[Any, Any]] = {
    "optax f32": (optax.adamw(RATE), jnp.float32),
    "optax bf16": (optax.adamw(RATE, mu_dtype="bfloat16"), jnp.bfloat16),
}


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(map(gdx.storage.blocks.nbytes, jax.tree.leaves(tree)))


def measure_memory() -> None:
    """Prints the first table."""
    rows: list[Any] = []
    for shapes_name, shapes in SHAPES.items():
        count = sum(map(math.prod, shapes))
        for name, (tx, dtype) in (OPTAX | OPTIMIZERS).items():
            params = [jnp.zeros(shape, dtype) for shape in shapes]
            state = tx.init(params)
            memory = compiled_step(tx, params, state).memory_analysis()
            kept = memory.argument_size_in_bytes - 2 * nbytes(params)
            sizes_of = [nbytes(state), kept, memory.alias_size_in_bytes - nbytes(params), memory.temp_size_in_bytes]
            rows.append((shapes_name, name, *(f"{size / count:.3f}" for size in sizes_of)))
    print("Bytes per parameter: state as held, as the compiled step takes it, as it donates it; temporary memory\n")
    print(table(["parameters", "optimizer", "held", "taken", "donated", "temporary"], rows), "\n")
    print("Bytes per parameter of the state of models in few bits, and the leaves that stay in float32\n")
    rows = []
    for (name, tree), bits in itertools.product(TREES.items(), (8, 4)):
        tx = gdx.adamw(RATE, **{8: EIGHT_BIT, 4: FOUR_BIT}[bits])
        found = gdx.describe(tx, [jax.ShapeDtypeStruct(s, "float32") for s in tree])
        bytes_whole = sum(place.nbytes for place in found.whole) / found.parameters
        parameters, leaves = f"{found.parameters:,}", f"{len(found.whole) // 2} of {len(tree)}"
        rows.append((name, parameters, bits, f"{found.nbytes_per_parameter:.3f}", leaves, f"{bytes_whole:.3f}"))
    print(table(["model", "parameters", "bits", "held", "in float32", "their part"], rows), "\n")


def allocate(tx: Any, dtype: Any, shapes: Sequence[tuple[int, ...]]) -> Callable[[], None]:
    """A function that makes one step."""
    random = np.random.default_rng(0)
    params, grads = ([jnp.asarray(random.standard_normal(s, np.float32), dtype) for s in shapes] for _ in range(2))
    state = tx.init(params)
    step, carry = compiled_step(tx, params, state), (params, state)

    def run() -> None:
        nonlocal carry
        carry = step(*carry, grads)
        jax.block_until_ready(carry)

    return run


def allocate_torch(dtype: Any, shapes: Sequence[tuple[int, ...]]) -> Callable[[], None]:
    """As `allocate`, for torch's fused AdamW."""
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape).to(dtype)
    return torch.optim.AdamW(params, lr=RATE, weight_decay=1e-4, fused=True).step


def measure_time(rounds: int) -> None:
    """Prints the second table."""
    rows: list[Any] = []
    for shapes_name, shapes in SHAPES.items():
        runs = {name: allocate(*optimizer, shapes) for name, optimizer in (OPTAX | OPTIMIZERS).items()}
        if torch is not None:
            runs["torch f32"] = allocate_torch(torch.float32, shapes)
            runs["torch bf16"] = allocate_torch(torch.bfloat16, shapes)
        # a pause lets the threads that one library leaves spinning go to sleep before the next one is timed
        seconds = interleaved(runs, rounds, dict.fromkeys(runs, functools.partial(time.sleep, 0.01)))
        baselines = [name for name in ("optax f32", "optax bf16", "torch f32", "torch bf16") if name in runs]
        rows += [(shapes_name, name, *(ratio(seconds, name, base) for base in baselines)) for name in runs]
        runs.clear()
    print("Time of the training step, as a ratio to that of each library\n")
    print(table(["parameters", "optimizer", *baselines], rows), "\n")
    for name, base, most in EXPECTED:
        found = {row[0]: dict(zip(baselines, row[2:]))[base] for row in rows if row[1] == name}
        print(came_out(f"{name}, of {base}", most, found))
    print()


def measure_devices(kinds: list[str]) -> None:
    """Prints the third table."""
    floors = dict(zip(OPTIMIZERS, ("28", "20", "16.1", "14.1", "14", "16", "18", "22", "10.1", "12.1")))
    layouts = {"axis=-2": TURNED, "whole rows": ROWS, "whole columns": COLUMNS, "rows and columns": BOTH}
    turned = {f"8-bit state, {name}": (gdx.adamw(RATE, **settings), jnp.float32) for name, settings in layouts.items()}
    optimizers, floors = OPTIMIZERS | turned, floors | dict.fromkeys(turned, "16.1")
    shape = (8192, 4096)
    columns: dict[str, dict[str, tuple[str, str]]] = {}
    for device in available(kinds):
        sharding = jax.sharding.SingleDeviceSharding(devices(device)[0])
        columns[device] = {}
        for name, (tx, dtype) in optimizers.items():
            params = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            state = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),  # noqa: B023
                jax.eval_shape(tx.init, params),
            )
            step = compiled_step(tx, params, state, OPTIONS[device])
            moved = nbytes_moved(step)
            temporary = step.memory_analysis().temp_size_in_bytes
            columns[device][name] = (f"{moved / math.prod(shape):.1f}", f"{temporary / math.prod(shape):.1f}")
    if columns:
        print("Bytes per parameter that the compiled step reads and writes, and its temporary memory\n")
        header = ["optimizer", "least", *(f"{device} {what}" for device in columns for what in ("moved", "temporary"))]
        rows = [(name, floors[name], *sum((columns[d][name] for d in columns), ())) for name in optimizers]
        print(table(header, rows), "\n")


def measure_quality() -> None:
    """Prints the fourth to sixth tables."""
    print("Error of the 8-bit update, relative to its root mean square, on the gradients of a float32 run\n")
    steps = (10, 30, 100, 300, 500)
    errors = [(name, *row) for name in ("digits", "characters") for row in eight_bit_errors(name, steps).items()]
    rows = [(name, axis, *(f"{error:.3f}" for error in row)) for name, axis, row in errors]
    print(table(["problem", "axis", *(f"step {count}" for count in steps)], rows), "\n")
    found = {f"{name}, axis {axis}, step {count}": x for name, axis, row in errors for count, x in zip(steps, row)}
    print(came_out("the error", 0.06, found), "\n")
    print("The same in rows that are hit once in 1,000 steps, by the spread of the columns' magnitudes\n")
    spreads = {"all alike": 0.0, "a factor e": 1.0}
    rare = {name: rare_row_errors(spread) for name, spread in spreads.items()}
    rows = [(name, *(f"{error:.3f}" for error in row.values())) for name, row in rare.items()]
    print(table(["columns", *(f"axis {axis}" for axis in rare["all alike"])], rows), "\n")
    print("Second moment over its exact value, after gradients became 100 times smaller (b2 = 0.999)\n")
    counts = (1000, 2000, 5000)
    rows = [(name, *(f"{x:.2f}" for x in found)) for name, found in second_moment_after_shrinking(counts).items()]
    print(table(["format of nu", *(f"{count} steps later" for count in counts)], rows), "\n")


def measure_training(seeds: int, formats: Sequence[str], picture: str | None) -> None:
    """Prints the seventh table, and draws it."""
    histories, rows, added = {}, [], dict[tuple[str, str], float]()
    for problem in PROBLEMS:
        histories[problem], found = compare(problem, seeds, formats)
        for name, (loss, *differences) in found.items():
            cells = [cell for mean, error in differences for cell in (f"{mean:+.4f}", f"{error:.4f}")]
            rows.append((problem, name, f"{loss:.4f}", *cells))
            added[problem, name] = differences[0][0]
    print(
        f"Validation loss at the end: mean of {seeds} seeds, and what each adds to that of another with the same seed\n"
    )
    print(table(["problem", "held in", "loss", "added to float32", "error", "to f32 master", "error"], rows), "\n")
    for format, most in LOSSES.items():
        if of_format := {problem: x for (problem, name), x in added.items() if name == format}:
            print(came_out(f"what {format} adds to float32", most, of_format))
    if picture:
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(1, len(PROBLEMS), figsize=(13, 5), layout="constrained")
        for ax, problem in zip(axes, PROBLEMS):
            steps, losses = histories[problem]
            gdx.plot.loss_curves(losses, ax, steps=dict.fromkeys(losses, steps))
            best = min(float(np.min(curve)) for curve in losses.values())
            ax.set(title=problem, ylabel="validation loss", ylim=(0.9 * best, None))
        figure.savefig(picture, dpi=110)
        print(f"\ndrawn in {picture}")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["memory", "time", "devices", "quality", "training"]
    parser.add_argument("parts", nargs="*", help=f"which of {', '.join(parts)}; all by default")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of each training run")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), metavar="NAME", help=", ".join(FORMATS))
    parser.add_argument("--devices", nargs="+", default=["tpu", "h100"], choices=["tpu", "h100"])
    parser.add_argument("--picture", help="file to draw the training comparison in")
    args = parser.parse_args()
    chosen = args.parts or parts
    if not set(chosen) <= set(parts):
        parser.error(f"parts are {', '.join(parts)}")
    if not set(args.formats) <= set(FORMATS):
        parser.error(f"formats are {', '.join(FORMATS)}")
    if torch is None and "time" in chosen:
        print("torch is not installed: its columns are left out\n")
    if "memory" in chosen:
        measure_memory()
    if "time" in chosen:
        measure_time(args.rounds)
    if "devices" in chosen:
        measure_devices(args.devices)
    if "quality" in chosen:
        measure_quality()
    if "training" in chosen:
        measure_training(args.seeds, args.formats, args.picture)
