"""State in few bits: its size, the time and the bytes that a step takes, and what it does to training.

Run `python -m benchmarks.storage`, or only some of its parts: `memory time quality training`. The
part `devices` compiles for accelerators that are not there: `tpu` needs `libtpu`, `h100` the
packages `jax-cuda12-plugin` and `jax-cuda12-pjrt`. Times are medians of the ratios of interleaved
timings, with their quartiles: below 1, gdx is faster.
"""

import argparse
import functools
import math
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

# no accelerator is looked for: the part `devices` compiles for ones that are elsewhere
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdx
import gdx.plot
from benchmarks.fewbits import PROBLEMS, compare, eight_bit_error, second_moment_after_shrinking
from benchmarks.measure import interleaved, ratio, table
from benchmarks.step import train_step

try:
    import torch
except ImportError:
    torch = None

RATE = 1e-3
SIZES = {"1x32M": [32_000_000], "100x320k": [320_000] * 100}
BFLOAT16: dict[str, Any] = {"mu_dtype": "bfloat16", "nu_dtype": gdx.storage.StochasticBfloat16()}
EIGHT_BIT: dict[str, Any] = {"mu_dtype": gdx.storage.SignedFourthRoot8(), "nu_dtype": gdx.storage.FourthRoot8()}


def _rounded(rounding: gdx.Transform, **formats: Any) -> gdx.Transform:
    return gdx.chain(gdx.adamw(RATE, **formats), rounding)


# the optimizer, and the dtype of parameters and gradients
OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "f32": (gdx.adamw(RATE), jnp.float32),
    "bf16 state": (gdx.adamw(RATE, **BFLOAT16), jnp.float32),
    "8-bit state": (gdx.adamw(RATE, **EIGHT_BIT), jnp.float32),
    "bf16 everything, stochastic": (_rounded(gdx.round_stochastically(), **BFLOAT16), jnp.bfloat16),
    "bf16 everything, compensated": (_rounded(gdx.round_with_compensation(), **BFLOAT16), jnp.bfloat16),
    "bf16 and f32 master": (_rounded(gdx.round_with_master(), **BFLOAT16), jnp.bfloat16),
    "8-bit state, bf16 stochastic": (_rounded(gdx.round_stochastically(), **EIGHT_BIT), jnp.bfloat16),
}
OPTAX: dict[str, tuple[Any, Any]] = {
    "optax f32": (optax.adamw(RATE), jnp.float32),
    "optax bf16": (optax.adamw(RATE, mu_dtype="bfloat16"), jnp.bfloat16),
}


def compiled_step(tx: Any, params: Any, state: Any, options: dict[str, Any] | None = None) -> Any:
    """The training step, compiled; arrays may be abstract."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        return train_step(tx, params, state, grads)

    return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile(options)


def nbytes(tree: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def measure_memory() -> None:
    """Prints the first table."""
    rows = []
    for sizes_name, sizes in SIZES.items():
        count = sum(sizes)
        for name, (tx, dtype) in (OPTAX | OPTIMIZERS).items():
            params = [jnp.zeros(size, dtype) for size in sizes]
            state = tx.init(params)
            memory = compiled_step(tx, params, state).memory_analysis()
            kept = memory.argument_size_in_bytes - 2 * nbytes(params)
            sizes_of = [nbytes(state), kept, memory.alias_size_in_bytes - nbytes(params), memory.temp_size_in_bytes]
            rows.append((sizes_name, name, *(f"{size / count:.3f}" for size in sizes_of)))
    print("Bytes per parameter: state as held, as the compiled step takes it, as it donates it; temporary memory\n")
    print(table(["parameters", "optimizer", "held", "taken", "donated", "temporary"], rows), "\n")


def allocate(name: str, tx: Any, dtype: Any, sizes: Sequence[int]) -> Callable[[], None]:
    """A function that makes one step."""
    random = np.random.default_rng(0)
    params, grads = ([jnp.asarray(random.standard_normal(n, np.float32), dtype) for n in sizes] for _ in range(2))
    state = tx.init(params)
    step, carry = compiled_step(tx, params, state), (params, state)

    def run() -> None:
        nonlocal carry
        carry = step(*carry, grads)
        jax.block_until_ready(carry)

    return run


def allocate_torch(dtype: Any, sizes: Sequence[int]) -> Callable[[], None]:
    """As `allocate`, for torch's fused AdamW."""
    params = [torch.nn.Parameter(torch.randn(n).to(dtype)) for n in sizes]
    for p in params:
        p.grad = torch.randn(p.shape).to(dtype)
    return torch.optim.AdamW(params, lr=RATE, weight_decay=1e-4, fused=True).step


def measure_time(rounds: int) -> None:
    """Prints the second table."""
    rows = []
    for sizes_name, sizes in SIZES.items():
        runs = {name: allocate(name, *optimizer, sizes) for name, optimizer in (OPTAX | OPTIMIZERS).items()}
        if torch is not None:
            runs["torch f32"] = allocate_torch(torch.float32, sizes)
            runs["torch bf16"] = allocate_torch(torch.bfloat16, sizes)
        # a pause lets the threads that one library leaves spinning go to sleep before the next one is timed
        seconds = interleaved(runs, rounds, dict.fromkeys(runs, functools.partial(time.sleep, 0.01)))
        baselines = [name for name in ("optax f32", "optax bf16", "torch f32", "torch bf16") if name in runs]
        rows += [(sizes_name, name, *(ratio(seconds, name, base) for base in baselines)) for name in runs]
        runs.clear()
    print("Time of the training step, as a ratio to that of each library\n")
    print(table(["parameters", "optimizer", *baselines], rows), "\n")


H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128 block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535 block_dim_limit_z: 65535 memory_bandwidth: 3352320000000 l2_cache_size: 52428800
  clock_rate_ghz: 1.98 device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 } registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 } runtime_version { major: 12 minor: 6 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def topology(device: str) -> Any:
    """The device, which need not be there."""
    from jax.experimental import topologies

    if device == "tpu":
        return topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2")
    import jax_plugins.xla_cuda12  # type: ignore[import-not-found]  # noqa: F401

    return topologies.get_topology_desc(platform="cuda", topology_name="", target_config=H100, topology="1x1x1")


_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def bytes_moved(text: str) -> int:
    """What the kernels of a compiled program read and write, from its text: each operand and result once."""
    entry = text[text.index("\nENTRY") :].split("\n}")[0].splitlines()[1:]
    sizes, total = {}, 0
    for line in entry:
        found = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*?)\)(?:,|$)", line)
        if found is None:
            continue
        name, shapes, operation, operands = found.groups()
        sizes[name] = sum(
            _BYTES[dtype] * math.prod(map(int, filter(None, shape.split(","))))
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        )
        if operation not in ("parameter", "constant", "tuple", "get-tuple-element", "bitcast"):
            total += sizes[name] + sum(sizes.get(operand, 0) for operand in re.findall(r"%([\w.\-]+)", operands))
    return total


def measure_devices(devices: Sequence[str]) -> None:
    """Prints the third table."""
    floors = dict(zip(OPTIMIZERS, ("28", "20", "16.1", "14", "18", "22", "10.1")))
    shape = (8192, 4096)
    columns: dict[str, dict[str, tuple[str, str]]] = {}
    for device in devices:
        try:
            sharding = jax.sharding.SingleDeviceSharding(topology(device).devices[0])
        except Exception as error:
            print(f"{device} cannot be compiled for: {str(error).splitlines()[0]}")
            continue
        options = {"xla_msa_enable": False} if device == "tpu" else None
        columns[device] = {}
        for name, (tx, dtype) in OPTIMIZERS.items():
            params = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
            state = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),  # noqa: B023
                jax.eval_shape(tx.init, params),
            )
            step = compiled_step(tx, params, state, options)
            cost = step.cost_analysis()
            moved = cost["bytes accessed"] if cost else bytes_moved(step.as_text())
            temporary = step.memory_analysis().temp_size_in_bytes
            columns[device][name] = (f"{moved / math.prod(shape):.1f}", f"{temporary / math.prod(shape):.1f}")
    if columns:
        print("Bytes per parameter that the compiled step reads and writes, and its temporary memory\n")
        header = ["optimizer", "least", *(f"{device} {what}" for device in columns for what in ("moved", "temporary"))]
        rows = [(name, floors[name], *sum((columns[d][name] for d in columns), ())) for name in OPTIMIZERS]
        print(table(header, rows), "\n")


def measure_quality() -> None:
    """Prints the fourth and fifth tables."""
    print("Error of the 8-bit update, relative to its root mean square, on the gradients of a float32 run\n")
    rows = [(name, *(f"{error:.3f}" for error in eight_bit_error(name)), "<= 0.06") for name in PROBLEMS]
    print(table(["problem", "step 10", "step 100", "step 500", "target"], rows), "\n")
    print("Second moment over its exact value, after gradients became 100 times smaller (b2 = 0.999)\n")
    counts = (1000, 2000, 5000)
    rows = [(name, *(f"{x:.2f}" for x in found)) for name, found in second_moment_after_shrinking(counts).items()]
    print(table(["format of nu", *(f"{count} steps later" for count in counts)], rows), "\n")


def measure_training(seeds: int, picture: str | None) -> None:
    """Prints the sixth table, and draws it."""
    histories, rows = {}, []
    for problem in PROBLEMS:
        histories[problem], differences = compare(problem, seeds)
        rows += [(problem, name, *cells) for name, cells in differences.items()]
    print(f"Validation loss at the end: mean of {seeds} seeds, and what each adds to float32's with the same seed\n")
    print(table(["problem", "held in", "loss", "mean added", *(f"seed {seed}" for seed in range(seeds))], rows))
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
    parser.add_argument("--devices", nargs="+", default=["tpu", "h100"], choices=["tpu", "h100"])
    parser.add_argument("--picture", help="file to draw the training comparison in")
    args = parser.parse_args()
    chosen = args.parts or parts
    if not set(chosen) <= set(parts):
        parser.error(f"parts are {', '.join(parts)}")
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
        measure_training(args.seeds, args.picture)


if __name__ == "__main__":
    main()
