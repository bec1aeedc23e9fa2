"""Trains on digits with the optimizer's state spread over devices and processes, and checkpoints to go on from."""

import argparse
import itertools
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gdx
from gdx.checkpoint import CheckpointError, Checkpoints
from gdx.demo import processes, show
from gdx.demo.loop import Report, batches
from gdx.demo.options import (
    HYPERPARAMETERS,
    add_hyperparameters,
    check_batch_size,
    check_seed,
    check_steps,
    either,
    optimizer_with,
)
from gdx.demo.problems import BATCH_SIZE, OPTIMIZERS, STEPS, TRAINING_IMAGES, Problem, digits

EXTRAS = ("checkpoint", "demo")
EXAMPLES = """\
The devices are simulated on the CPU. Each device takes an equal part of every batch and keeps an equal part of the
optimizer's state; each process has an equal part of the devices.

examples:
  python -m gdx train --devices 8
  python -m gdx train --devices 4 --processes 2 --checkpoints run
  python -m gdx train --devices 2 --checkpoints run --steps 4000 --resume
"""
DEFAULTS: dict[str, Any] = {
    "optimizer": "adamw",
    "storage": "float32",
    "processes": 1,
    "checkpoints": Path("gdx-checkpoints"),
    "every": 200,
    "steps": STEPS["digits"],
    "batch_size": BATCH_SIZE,
    "seed": 0,
}
STORAGE = {
    "float32": (None, None),
    "bfloat16": (gdx.storage.StochasticBfloat16(), gdx.storage.StochasticBfloat16()),
    "8-bit": (
        gdx.storage.SignedFourthRoot8(block=64, minimum_size=1024),
        gdx.storage.FourthRoot8(block=64, minimum_size=1024),
    ),
}
CHUNK = 20  # steps in one call


@dataclass(frozen=True)
class Plan:
    """The checked options: what is trained, on what, and where the checkpoints go."""

    name: str
    tx: gdx.Transform
    devices: int
    processes: int
    checkpoints: Path
    every: int
    resume: bool
    allow: tuple[str, ...]
    batch_size: int
    steps: int
    seed: int
    options: tuple[str, ...]

    @property
    def again(self) -> str:
        """The command that goes on with the run."""
        options = [option for option in self.options if option != "--resume"]
        return shlex.join(["python", "-m", "gdx", "train", *options, "--resume"])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""

    def add(name: str, help: str, metavar: str = "N", kind: Any = int) -> None:
        default = DEFAULTS[name[2:].replace("-", "_")]
        parser.add_argument(name, type=kind, metavar=metavar, help=f"{help} (default: {default})")

    parser.add_argument("--devices", type=int, metavar="N", help="in all processes together (default: one in each)")
    add("--processes", "that share the devices equally")
    add("--optimizer", either(list(OPTIMIZERS["digits"])), "NAME", str)
    add_hyperparameters(parser, float, "X")
    add("--storage", f"how its state is held: {either(list(STORAGE))}", "KIND", str)
    add("--checkpoints", "the folder of the checkpoints", "DIR", Path)
    add("--every", f"steps between two checkpoints, a multiple of {CHUNK}")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint, with any devices")
    parser.add_argument("--allow", metavar="NAMES", help="comma separated, what --resume may change: learning-rate")
    add("--steps", "of the whole run, at least 1")
    add("--batch-size", f"images per step, a multiple of the devices, at most {TRAINING_IMAGES}")
    add("--seed", "of the initial parameters and the batches")


def plan(arguments: argparse.Namespace) -> Plan:
    """Checks the options.

    Raises:
      ValueError: an option is wrong; the message says what is allowed.
    """
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    resume = given.pop("resume")
    allow = tuple(name.replace("-", "_") for name in given.get("allow", "").split(",") if name)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]
    chosen = {**DEFAULTS, **given}
    count = chosen["processes"]
    devices = chosen.get("devices", count)
    if count < 1:
        raise ValueError(f"--processes is {count}; expected at least 1")
    if devices < 1 or devices % count:
        raise ValueError(
            f"--devices is {devices}, which {count} {'process' if count == 1 else 'processes'} cannot share equally; "
            f"expected a positive multiple of {count}"
        )
    batch_size = check_batch_size(chosen["batch_size"], "digits")
    if batch_size % devices:
        raise ValueError(
            f"--batch-size is {batch_size}, which {devices} devices cannot share equally; "
            f"expected a multiple of {devices}"
        )
    if chosen["every"] < CHUNK or chosen["every"] % CHUNK:
        raise ValueError(f"--every is {chosen['every']}; expected a multiple of {CHUNK}")
    return Plan(
        chosen["optimizer"],
        _optimizer(chosen),
        devices,
        count,
        _check_checkpoints(chosen["checkpoints"], resume),
        chosen["every"],
        resume,
        allow,
        batch_size,
        check_steps(chosen["steps"]),
        check_seed(chosen["seed"]),
        (*options, *["--resume"] * resume),
    )


def _optimizer(chosen: dict[str, Any]) -> gdx.Transform:
    name, storage = chosen["optimizer"], chosen["storage"]
    if storage not in STORAGE:
        raise ValueError(f"--storage is {storage!r}; choose from {', '.join(STORAGE)}")
    given = {field: chosen[field] for field in HYPERPARAMETERS if field in chosen}
    tx = optimizer_with("digits", name, given).replace(**given)
    first, second = STORAGE[storage]
    moments = {"mu_dtype": first, "nu_dtype": second, "accumulator_dtype": first}
    held = {field: format for field, format in moments.items() if hasattr(tx, field)}
    if first is not None and not held:
        raise ValueError(f"--storage does not apply to {name}, which has no state; choose another --optimizer")
    return tx.replace(**held)


def _check_checkpoints(folder: Path, resume: bool) -> Path:
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(
            f"--checkpoints is {str(folder)!r}, but {str(there)!r} is no folder that can be written; give another one"
        )
    found = _has_checkpoints(folder)
    if resume and not found:
        raise ValueError(f"--resume: there is no checkpoint in {str(folder)!r}; leave it out to begin a run there")
    if found and not resume and processes.place() is None:
        raise ValueError(
            f"--checkpoints is {str(folder)!r}, where a run has left checkpoints; "
            f"go on with it by --resume, or give another folder"
        )
    return folder


def _has_checkpoints(folder: Path) -> bool:
    return folder.exists() and any(path.name.isdecimal() for path in folder.iterdir())


def run(plan: Plan) -> int:
    """Starts the processes and waits for them; in one of them, does its part.

    Returns:
      The exit code: 0, 1 where a process failed or the loss diverged, 2 for a wrong input, 130 after Ctrl-C.
    """
    if processes.place() is not None:
        return processes.join(lambda: _train(plan))
    command = [sys.executable, "-m", "gdx", "train", *plan.options]
    ended = processes.run(command, plan.processes, devices=plan.devices // plan.processes)
    if ended.reason:
        print(f"python -m gdx train: {ended.reason}", file=sys.stderr)
    if ended.code in (1, 130) and _has_checkpoints(plan.checkpoints):
        print(f"go on from the newest checkpoint with: {plan.again}", file=sys.stderr)
    return ended.code


def _train(plan: Plan) -> int:
    mesh = jax.make_mesh((plan.devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    problem = digits()
    console = show.console()
    console.quiet = jax.process_index() > 0
    tx = gdx.sharding.shard_state(plan.tx, mesh)
    params = _put(problem.start(jax.random.key(plan.seed)), mesh)
    state, step = tx.init(params), 0
    advance = _compiled(problem, tx, params, state)
    data = _put((problem.train, problem.test), mesh)
    extra = {"seed": plan.seed, "batch_size": plan.batch_size}
    with Checkpoints(plan.checkpoints) as checkpoints, _interrupts() as interrupted:
        if plan.resume:
            step, params, state = _restored(checkpoints, tx, params, state, extra, plan)
        here, whole = _bytes(state)
        console.print(
            f"{problem.title}; {plan.name} from step {step} to {plan.steps}; devices: {plan.devices}, in processes: "
            f"{plan.processes}, each with {here:,} of the {whole:,} bytes of state",
            soft_wrap=True,
        )
        stream = itertools.islice(
            batches(TRAINING_IMAGES, plan.batch_size, np.random.default_rng(plan.seed)), step, None
        )
        begin, reports, saved = time.perf_counter(), [], step
        with show.progress(console, [plan.name], plan.steps) as update:
            while step < plan.steps:
                # the same ends of chunks in every run, resumed or not: their programs may differ in rounding
                length = min(CHUNK - step % CHUNK, plan.steps - step)
                chunk = np.stack(list(itertools.islice(stream, length)))
                params, state, metrics = advance(params, state, _put(chunk, mesh, None, "data"), *data)
                step += length
                reports.append(
                    Report(step, {k: float(v) for k, v in metrics.items()}, time.perf_counter() - begin, 1, None)
                )
                update(plan.name, reports)
                if reports[-1].diverged:
                    console.print(f"step {step}: the loss is not finite; nothing was saved since step {saved}")
                    return 1
                stop = _agreed(bool(interrupted), mesh)
                if step % plan.every == 0 or step == plan.steps or stop:
                    checkpoints.save(step, tx, params, state, extra=extra)
                    saved = step
                    console.print(f"checkpoint of step {step}: {plan.checkpoints}", soft_wrap=True)
                if stop:
                    break
        checkpoints.wait()
    return 130 if step < plan.steps else 0


def _restored(
    checkpoints: Checkpoints, tx: gdx.Transform, params: Any, state: Any, extra: dict[str, int], plan: Plan
) -> tuple[int, Any, Any]:
    """The newest checkpoint, of the same run.

    Raises:
      Refused: it cannot be read, is of other options, or has all steps already.
    """
    try:
        step, params, state, saved = checkpoints.restore(tx, params, state, allow=plan.allow)
    except CheckpointError as error:
        raise processes.Refused(re.sub(r"pass allow=\[.*\]$", _as_option, str(error))) from error
    for name, value in extra.items():
        if saved[name] != value:
            raise processes.Refused(
                f"--{name.replace('_', '-')} is {value}; the checkpoint was saved with {saved[name]}"
            )
    if step >= plan.steps:
        raise processes.Refused(f"--steps is {plan.steps}; the newest checkpoint is of step {step}, expected more")
    return step, params, state


def _as_option(found: re.Match) -> str:
    return "give --allow " + ",".join(re.findall(r"'(\w+)'", found[0])).replace("_", "-")


def _compiled(problem: Problem, tx: gdx.Transform, params: Any, state: Any) -> Callable[..., Any]:
    """A chunk of steps, after which parameters and state are where they were."""

    def advance(params: Any, state: Any, chunk: Any, train: Any, test: Any) -> tuple[Any, Any, Any]:
        def loss(params: Any, examples: jax.Array) -> jax.Array:
            return problem.loss(params, tuple(column[examples] for column in train))

        params, state, _ = gdx.train(loss, tx, params, chunk, state=state)
        return params, state, problem.metrics(params, train, test)

    places = jax.tree.map(lambda x: x.sharding, (params, state))
    return jax.jit(advance, donate_argnums=(0, 1), out_shardings=(*places, None))


def _put(tree: Any, mesh: jax.sharding.Mesh, *axes: str | None) -> Any:
    """Arrays that every process has, on the mesh, split along these axes."""
    sharding = jax.NamedSharding(mesh, jax.P(*axes))

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def _agreed(flag: bool, mesh: jax.sharding.Mesh) -> bool:
    """Whether any process says so: they get a signal at different times, and have to stop at the same step."""
    return bool(_any(_put(np.full(mesh.size, flag), mesh, "data")))


@jax.jit
def _any(flags: jax.Array) -> jax.Array:
    return jnp.any(flags)


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects Ctrl-C instead of raising it in the middle of a step."""
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield came
    finally:
        signal.signal(signal.SIGINT, before)


def _bytes(state: Any) -> tuple[int, int]:
    """Of the state on one device, and altogether."""
    leaves = jax.tree.leaves(state)
    return sum(x.addressable_shards[0].data.nbytes for x in leaves), sum(x.nbytes for x in leaves)
