"""AdamW's jitted training step, gdx against optax and torch: how fast it runs, and how fast it is traced and compiled.

Run `python -m benchmarks step`, with `--quick` for a rough look. Every figure is the median of the
ratios of interleaved timings, with their quartiles: below 1, gdx is faster.
"""

import argparse
import functools
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdx
from benchmarks.measure import Ratio, calls_for, came_out, interleaved, ratio, table
from benchmarks.models import resnet50

try:
    import torch
except ImportError:
    torch = None

STEPS = {"1x32M": [32_000_000], "100x320k": [320_000] * 100, "1000x3.2k": [3_200] * 1000, "10x2k": [2_000] * 10}
RATE, DECAY = 1e-3, 1e-4
ALLOCATIONS = 6

Run = Callable[[int], None]
"""Makes that many training steps."""


def shapes_of(tree: Any) -> Any:
    """The tree of abstract float32 arrays with these shapes."""
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree, is_leaf=lambda x: isinstance(x, tuple)
    )


def gpt2() -> Any:
    """The parameters of GPT-2 small: 148 leaves, 124M numbers."""
    norm = {"scale": (768,), "bias": (768,)}

    def dense(inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {"kernel": (inputs, outputs), "bias": (outputs,)}

    block = {
        "ln_1": norm,
        "attn": {"c_attn": dense(768, 2304), "c_proj": dense(768, 768)},
        "ln_2": norm,
        "mlp": {"c_fc": dense(768, 3072), "c_proj": dense(3072, 768)},
    }
    return shapes_of({"wte": (50257, 768), "wpe": (1024, 768), "h": [block] * 12, "ln_f": norm})


MODELS = {
    "1000x3.2k": lambda: shapes_of([(3_200,)] * 1000),
    "GPT-2": gpt2,
    "ResNet-50": lambda: shapes_of(resnet50(is_flax=True)),
}


def train_step(tx: Any, params: Any, state: Any, grads: Any) -> tuple[Any, Any]:
    """One training step, given the gradient."""
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def jax_step(sizes: Sequence[int], tx: Any, *, argument: bool = False) -> Callable[[], Run]:
    """A function that allocates parameters; `argument` passes the optimizer to the jitted step as one."""
    if argument:
        passed = jax.jit(train_step, donate_argnums=(1, 2))

        def step(*args: Any) -> Any:
            return passed(tx, *args)

    else:

        def closed_over(params: Any, state: Any, grads: Any) -> Any:
            return train_step(tx, params, state, grads)

        step = jax.jit(closed_over, donate_argnums=(0, 1))

    def allocate() -> Run:
        random = np.random.default_rng(0)
        params, grads = ([jnp.asarray(random.random(size, np.float32)) for size in sizes] for _ in range(2))
        return repeated(step, (params, tx.init(params)), grads)

    return allocate


def repeated(step: Callable[..., Any], carry: Any, given: Any) -> Run:
    """Steps from this carry on, each with what is given."""

    def run(steps: int) -> None:
        nonlocal carry
        for _ in range(steps):
            carry = step(*carry, given)
        jax.block_until_ready(carry)

    return run


def torch_step(sizes: Sequence[int]) -> Callable[[], Run]:
    """As `jax_step`, for torch's fused AdamW."""

    def allocate() -> Run:
        params = [torch.nn.Parameter(torch.rand(size)) for size in sizes]
        for p in params:
            p.grad = torch.rand(p.shape)
        optimizer = torch.optim.AdamW(params, lr=RATE, weight_decay=DECAY, fused=True)

        def run(steps: int) -> None:
            for _ in range(steps):
                optimizer.step()

        return run

    return allocate


def time_steps(row: str, rounds: int) -> list[Sequence[object]]:
    """The rows of the first table for parameters of these sizes: one for each way to pass the optimizer."""
    sizes, tx = STEPS[row], gdx.adamw(RATE, weight_decay=DECAY)
    contenders = {
        "optax": jax_step(sizes, optax.adamw(RATE, weight_decay=DECAY)),
        "closed over": jax_step(sizes, tx),
        "argument, on the host": jax_step(sizes, tx, argument=True),
        "argument, on the device": jax_step(sizes, jax.device_put(tx), argument=True),
    }
    ways = [name for name in contenders if name != "optax"]
    if torch is not None:
        contenders["torch"] = torch_step(sizes)
    steps = 0
    parts: list[dict[str, np.ndarray]] = []
    # where the buffers lie makes some 5 %, and what is allocated first lies best: so allocate often, in random order
    for seed in range(ALLOCATIONS):
        runs = {name: contenders[name]() for name in np.random.default_rng(seed).permutation(list(contenders))}
        for run in runs.values():
            run(2)
        steps = steps or calls_for(lambda: runs["optax"](1), duration=0.02)  # noqa: B023
        # a pause lets the threads that one library leaves spinning go to sleep before the next one is timed
        parts.append(
            interleaved(
                {name: functools.partial(run, steps) for name, run in runs.items()},
                max(rounds // ALLOCATIONS, 2),
                setups=dict.fromkeys(runs, functools.partial(time.sleep, 0.01)),
                seed=seed,
            )
        )
        runs.clear()
    seconds = {name: np.concatenate([part[name] for part in parts]) for name in contenders}
    return [
        (row, way, ratio(seconds, way, "optax"), "-" if torch is None else ratio(seconds, way, "torch")) for way in ways
    ]


def lowering(tx: Any, params: Any, *, whole: bool) -> Callable[[], Any]:
    """A function that traces and lowers `tx.update`, or the whole training step, as a program of its own."""
    state = jax.eval_shape(tx.init, params)

    def lower() -> Any:
        def update(params: Any, state: Any, grads: Any) -> Any:
            return train_step(tx, params, state, grads) if whole else tx.update(grads, state, params)

        return jax.jit(update, donate_argnums=(0, 1)).lower(params, state, params)

    return lower


def time_compilation(model: str, rounds: int, *, whole: bool) -> tuple[str, str, Ratio, Ratio, Ratio]:
    """The row of the second table for this model."""
    params = MODELS[model]()
    lowers = {
        "gdx": lowering(gdx.adamw(RATE, weight_decay=DECAY), params, whole=whole),
        "optax": lowering(optax.adamw(RATE, weight_decay=DECAY), params, whole=whole),
    }
    lowered: dict[str, Any] = {}

    def against_optax(functions: dict[str, Callable], setups: dict[str, Callable], rounds: int = rounds) -> Ratio:
        return ratio(interleaved(functions, rounds, setups), "gdx", "optax")

    def lower_anew(name: str) -> None:
        lowered[name] = lowers[name]()

    def compile_anew(name: str) -> None:
        lowered[name].compile()

    def forget() -> None:
        jax.clear_caches()
        gc.collect()

    # a collection of garbage, of all that JAX keeps, takes half as long as tracing, and would fall on either
    gc.disable()
    cold = against_optax(lowers, dict.fromkeys(lowers, forget))
    warm = against_optax(lowers, dict.fromkeys(lowers, gc.collect))
    gc.enable()
    compiling = against_optax(
        {name: functools.partial(compile_anew, name) for name in lowers},
        {name: functools.partial(lower_anew, name) for name in lowers},
        max(rounds, 5),
    )
    return model, "whole step" if whole else "update", warm, cold, compiling


def main() -> None:
    """Prints the two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = [*STEPS, *(model for model in MODELS if model not in STEPS)]
    parser.add_argument(
        "--rounds", type=int, default=18, help="rounds per row; a third of it for tracing and compiling"
    )
    parser.add_argument("--rows", nargs="+", choices=choices, default=choices)
    parser.add_argument("--quick", action="store_true", help="few rounds")
    args = parser.parse_args()
    rounds = 6 if args.quick else args.rounds

    if torch is None:
        print("torch is not installed: its column is left out\n")
    rows = [row for name in STEPS if name in args.rows for row in time_steps(name, rounds)]
    if rows:
        print("Time of the training step (parameters and state donated)\n")
        print(table(["parameters", "gdx's optimizer", "gdx / optax", "gdx / torch"], rows), "\n")
        found: dict[str, Any] = {f"{name}, {way}": against for name, way, against, _ in rows}
        print(came_out("as long as optax", 1.03, found), "\n")

    compiled = [
        time_compilation(model, max(rounds // 3, 3), whole=whole)
        for model in MODELS
        if model in args.rows
        for whole in (False, True)
    ]
    if compiled:
        print("Time to trace and lower, and to compile, as a new program each time, gdx / optax")
        print("warm: JAX has traced these leaves before in another program; cold: after jax.clear_caches()\n")
        print(table(["parameters", "program", "warm", "cold", "compile"], compiled), "\n")
        cold = {f"{model}, {program}": ratios[1] for model, program, *ratios in compiled}
        many = {name: cold.pop(name) for name in [*cold] if name.startswith("1000x")}
        for what, most, traced in (("to trace a thousand leaves", 0.3, many), ("to trace a model, cold", 0.6, cold)):
            if traced:
                print(came_out(what, most, traced))
        print(came_out("to compile", 1.05, {f"{row[0]}, {row[1]}": row[4] for row in compiled}))
