"""Trains on digits with the optimizer's state spread over devices and processes, and checkpoints to go on from."""

import argparse
import functools
import itertools
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import gdx
from gdx.checkpoint import CheckpointError, Checkpoints
from gdx.demo import processes, terminal
from gdx.demo.problems import BATCH_SIZE, OPTIMIZERS, STEPS, digits, stacked

EXTRAS = ("checkpoint", "demo")
KEEPS = True
EXAMPLES = """\
The devices are simulated on the CPU. Each device takes an equal part of every batch and keeps an equal part of the
optimizer's state; each process has an equal part of the devices.

examples:
  python -m gdx train --devices 8
  python -m gdx train --devices 4 --processes 2 --checkpoints run
  python -m gdx train --devices 2 --checkpoints run --steps 4000 --resume
"""
STORAGE = {
    "float32": (None, None),
    "bfloat16": (gdx.storage.StochasticBfloat16(), gdx.storage.StochasticBfloat16()),
    "8-bit": (
        gdx.storage.SignedFourthRoot8(block=64, minimum_size=1024),
        gdx.storage.FourthRoot8(block=64, minimum_size=1024),
    ),
}
CHUNK = 20  # steps in one call


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, positive = parser.add_argument, terminal.in_range(int, 1)
    add("--devices", type=positive, metavar="N", help="in all processes together (default: one in each)")
    add("--processes", type=positive, default=1, metavar="N", help="that share the devices equally (default: 1)")
    add("--optimizer", choices=OPTIMIZERS["digits"], default="adamw", help="(default: adamw)")
    terminal.add_hyperparameters(parser, float, "X")
    add("--storage", choices=STORAGE, default="float32", help="how its state is held (default: float32)")
    folder = "the folder of the checkpoints (default: %(default)s)"
    add("--checkpoints", default="gdx-checkpoints", metavar="DIR", help=folder)
    every = f"steps between two checkpoints, a multiple of {CHUNK} (default: 200)"
    add("--every", type=terminal.in_range(int, CHUNK), default=200, metavar="N", help=every)
    add("--resume", action="store_true", help="go on from the newest checkpoint, with any devices")
    add("--allow", default="", metavar="NAMES", help="comma separated, what --resume may change: learning-rate")
    terminal.add_common(parser, STEPS["digits"])


def check(arguments: argparse.Namespace) -> None:
    count, every = arguments.processes, arguments.every
    devices = arguments.devices = arguments.devices or count
    size = arguments.batch_size = arguments.batch_size or BATCH_SIZE
    arguments.extra = {"seed": arguments.seed, "batch_size": size}  # what a run that goes on has to have again
    if devices % count:
        raise ValueError(f"--devices is {devices}; expected a multiple of {count}, the number of processes")
    if size % devices:
        raise ValueError(f"--batch-size is {size}; expected a multiple of {devices}, the number of devices")
    if every % CHUNK:
        raise ValueError(f"--every is {every}; expected a multiple of {CHUNK}")
    name = arguments.optimizer
    tx = OPTIMIZERS["digits"][name].replace(**terminal.hyperparameters(arguments))
    first, second = STORAGE[arguments.storage]
    moments = {"mu_dtype": first, "nu_dtype": second, "accumulator_dtype": first}
    held = {field: kind for field, kind in moments.items() if hasattr(tx, field)}
    if first is not None and not held:
        raise ValueError(f"--storage does not apply to {name}, which has no state; choose another --optimizer")
    arguments.tx = tx.replace(**held)
    if not arguments.checkpoints:
        raise ValueError("--checkpoints is empty; expected a folder, such as run")
    folder = arguments.folder = Path(arguments.checkpoints)
    found = _has_checkpoints(folder)
    if arguments.resume and not found:
        raise ValueError(f"--resume: there is no checkpoint in {str(folder)!r}; leave it out to begin a run there")
    if found and not arguments.resume:
        raise ValueError(f"{str(folder)!r} has the checkpoints of a run; go on by --resume, or give another folder")
    terminal.check_folder(folder, make=True)


def _has_checkpoints(folder: Path) -> bool:
    return folder.is_dir() and any(path.name.isdecimal() for path in folder.iterdir())


def run(arguments: argparse.Namespace) -> int:
    """Starts the processes and waits for them; in one of them, does its part."""
    if processes.PROCESS in os.environ:
        return processes.join(lambda: _train(arguments))
    command = ["-m", "gdx", "train", *arguments.options]
    devices = arguments.devices // arguments.processes
    code, reason = processes.run([sys.executable, *command], arguments.processes, devices=devices)
    if reason:
        print(f"python -m gdx train: {reason}", file=sys.stderr)
    if code in (1, 130) and _has_checkpoints(arguments.folder):
        again = shlex.join(["python", *(word for word in command if word != "--resume"), "--resume"])
        print(f"go on from the newest checkpoint with: {again}", file=sys.stderr)
    return code


def _train(arguments: argparse.Namespace) -> int:
    steps, name, folder = arguments.steps, arguments.optimizer, arguments.folder
    mesh = jax.make_mesh((arguments.devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    console, problem = terminal.console(), digits()
    console.quiet = jax.process_index() > 0
    tx = gdx.sharding.shard_state(arguments.tx, mesh)
    params = _put(problem.start(jax.random.key(arguments.seed)), mesh)
    step, state = 0, tx.init(params)
    # after a chunk of steps parameters and state are where they were
    out_shardings = (*jax.tree.map(lambda x: x.sharding, (params, state)), None)
    advance = jax.jit(functools.partial(problem.advance, tx), donate_argnums=(0, 1), out_shardings=out_shardings)
    with Checkpoints(folder) as checkpoints:
        if arguments.resume:
            step, params, state = _restored(checkpoints, tx, params, state, arguments)
        size = gdx.describe(arguments.tx, params, mesh)
        console.print(
            f"{problem.title}; {name} from step {step} to {steps}; devices: {arguments.devices}, in processes: "
            f"{arguments.processes}, each with {size.nbytes_per_device:,} of the {size.nbytes:,} bytes of state"
        )
        stream = itertools.islice(problem.batches(arguments.seed, arguments.batch_size), step, None)
        saved, stop = step, False
        with terminal.progress(console, steps, name) as update:
            while step < steps and not stop:
                # the same ends of chunks in every run, resumed or not: their programs may differ in rounding
                length = min(CHUNK - step % CHUNK, steps - step)
                params, state, metrics = advance(params, state, _put(stacked(stream, length), mesh, None, "data"))
                step += length
                update(name, step, terminal.status(metrics))
                if not np.isfinite(metrics["loss"]):
                    console.print(f"step {step}: the loss is not finite; nothing was saved since step {saved}")
                    return 1
                # processes get a signal at different times, and have to stop at the same step
                stop = multihost_utils.process_allgather(terminal.interrupted.is_set()).any()
                if step % arguments.every == 0 or step == steps or stop:
                    checkpoints.save(step, tx, params, state, extra=arguments.extra)
                    saved = step
                    console.print(f"checkpoint of step {step}: {folder}")
        checkpoints.wait()
    return 130 if step < steps else 0


def _restored(checkpoints: Checkpoints, tx: Any, params: Any, state: Any, arguments: argparse.Namespace) -> Any:
    """Step, parameters and state of the newest checkpoint; `Refused` unless it can be read and is of the same run."""
    allow = [name.replace("-", "_") for name in arguments.allow.split(",") if name]
    try:
        step, params, state, saved = checkpoints.restore(tx, params, state, allow=allow)
    except CheckpointError as error:
        text, _, names = str(error).partition("pass allow=")
        option = "give --allow " + ",".join(re.findall(r"'(\w+)'", names)).replace("_", "-")
        raise processes.Refused(text + option if names else text) from error
    for name, value in arguments.extra.items():
        if saved[name] != value:
            option = f"--{name.replace('_', '-')}"
            raise processes.Refused(f"{option} is {value}; the checkpoint was saved with {saved[name]}")
    if step >= arguments.steps:
        raise processes.Refused(f"--steps is {arguments.steps}; the newest checkpoint is of step {step}, expected more")
    return step, params, state


def _put(tree: Any, mesh: jax.sharding.Mesh, *axes: str | None) -> Any:
    """Arrays that every process has, on the mesh, split along these axes."""
    sharding = jax.NamedSharding(mesh, jax.P(*axes))
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, np.asarray(x).__getitem__), tree)
