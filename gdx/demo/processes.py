"""Trains on digits with the optimizer's state spread over devices and processes, and checkpoints to go on from.

The devices are simulated on the CPU. Each takes an equal part of every batch and keeps an equal part of the
optimizer's state. --resume goes on with any devices, and with the hyperparameters that are given.

examples:
  python -m gdx train --devices 8
  python -m gdx train --devices 2 --processes 2 --checkpoints run
  python -m gdx train --devices 2 --checkpoints run --epochs 180 --resume
"""

# JAX itself notices a process that is gone only by its heartbeat, and then aborts the others, which nothing in them
# can catch; one that raises an error waits for the others as it leaves, and they for it. So the processes are
# watched from outside: `together` starts them, and each calls `join` first of all.

import argparse
import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import gdx
from gdx.checkpoint import Checkpoints
from gdx.compat import initialize_distributed
from gdx.demo import terminal
from gdx.demo.problems import BATCH_SIZE, OPTIMIZERS, digits

PROCESS = "GDX_PROCESS"  # in the environment: its number, how many there are, and where they meet
SILENCE = 10  # seconds without a sign of life, after which JAX takes a process for gone


def add_arguments(parser: argparse.ArgumentParser) -> None:
    count = terminal.positive(int)
    terminal.add(parser, "devices", count, 1, "of each process")
    terminal.add(parser, "processes", count, 1, "each with its devices")
    parser.add_argument("--optimizer", choices=OPTIMIZERS["digits"], default="adamw", help="of the family")
    terminal.add_hyperparameters(parser, float, "X")
    terminal.add(parser, "checkpoints", Path, "gdx-checkpoints", "their folder", "DIR")
    terminal.add(parser, "every", count, 10, "epochs between two checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    terminal.add(parser, "batch-size", count, BATCH_SIZE, "images per step")
    terminal.add(parser, "epochs", count, 90, "in all")


def run(arguments: argparse.Namespace) -> int:
    """Starts the processes and waits for them; in one of them, does its part."""
    tx = arguments.tx = OPTIMIZERS["digits"][arguments.optimizer].replace(**terminal.hyperparameters(arguments))
    if PROCESS in os.environ:
        return join(lambda: train(arguments))
    folder, total = arguments.checkpoints, arguments.processes * arguments.devices
    if arguments.batch_size % total:
        raise ValueError(f"--batch-size is {arguments.batch_size}; expected a multiple of {total}, the devices")
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()  # permissions alone do not say whether files can be made there
    if arguments.resume:  # what is wrong shows before any process starts
        params = digits().start(jax.random.key(0))
        with Checkpoints(folder) as checkpoints:
            restored(checkpoints, tx, params, tx.init(params), arguments)
    elif has_checkpoints(folder):
        raise ValueError(f"{str(folder)!r} has the checkpoints of a run; go on by --resume, or give another folder")
    command = ["-m", "gdx", "train", *arguments.options]
    code, reason = together([sys.executable, *command], arguments.processes, arguments.devices)
    if reason:
        print(f"python -m gdx train: {reason}", file=sys.stderr)
    if code and has_checkpoints(folder):
        again = shlex.join(["python", *(word for word in command if word != "--resume"), "--resume"])
        print(f"go on from the newest checkpoint with: {again}", file=sys.stderr)
    return code


def has_checkpoints(folder: Path) -> bool:
    return any(path.name.isdecimal() for path in folder.iterdir())


def restored(checkpoints: Checkpoints, tx: Any, params: Any, state: Any, arguments: argparse.Namespace) -> Any:
    """Step, parameters and state of the newest checkpoint, in which only the given hyperparameters may be others."""
    *found, saved = checkpoints.restore(tx, params, state, allow=list(terminal.hyperparameters(arguments)))
    if saved != (given := {name: getattr(arguments, name) for name in saved}):
        raise ValueError(f"the checkpoint was saved with {saved}; got {given}")
    return found


def train(arguments: argparse.Namespace) -> int:
    """One process's part."""
    console, problem, size, folder = terminal.console(), digits(), arguments.batch_size, arguments.checkpoints
    console.quiet = jax.process_index() > 0
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx, key = gdx.sharding.shard_state(arguments.tx, mesh), jax.random.key(arguments.seed)
    params = jax.device_put(problem.start(key), jax.NamedSharding(mesh, jax.P()))
    step, state = 0, tx.init(params)

    def epoch(params: Any, state: Any, batches: jax.Array) -> Any:
        params, state, *_ = gdx.train(problem.loss_on, tx, params, batches, state=state)
        return params, state, problem.evaluate(params)

    # after an epoch parameters and state are where they were
    out_shardings = (*jax.tree.map(lambda x: x.sharding, (params, state)), None)
    advance = jax.jit(epoch, donate_argnums=(0, 1), out_shardings=out_shardings)
    with Checkpoints(folder) as checkpoints, terminal.progress(console) as bars:
        if arguments.resume:
            step, params, state = restored(checkpoints, tx, params, state, arguments)
        done, stop = step // (steps := len(problem.train[0]) // size), False
        held = gdx.describe(arguments.tx, params, mesh)
        console.print(
            f"{problem.title}; {arguments.optimizer} from epoch {done} to {arguments.epochs}; devices: "
            f"{jax.device_count()}, in processes: {jax.process_count()}, each with {held.nbytes_per_device:,} of the "
            f"{held.nbytes:,} bytes of state"
        )
        task = bars.add_task(arguments.optimizer, total=arguments.epochs, completed=done, text="")
        while done < arguments.epochs and not stop:
            batches = gdx.noise.epochs(jax.random.fold_in(key, done), problem.train, size)
            batches = jax.device_put(np.asarray(batches), jax.NamedSharding(mesh, jax.P(None, "data")))
            params, state, metrics = advance(params, state, batches)
            done += 1
            bars.update(task, completed=done, text=terminal.status(metrics))
            if not np.isfinite(metrics["loss"]):
                console.print(f"epoch {done}: the loss is not finite, and nothing of it is saved")
                return 1
            # processes get a signal at different times, and have to stop at the same step
            stop = multihost_utils.process_allgather(terminal.interrupted.is_set()).any()
            if stop or done % arguments.every == 0 or done == arguments.epochs:
                extra = {"seed": arguments.seed, "batch_size": size}  # what makes the batches
                checkpoints.save(done * steps, tx, params, state, extra=extra)
                console.print(f"checkpoint of epoch {done}: {folder}")
        checkpoints.wait()
    return 0


def join(main: Callable[[], int]) -> int:
    """Runs `main`, which returns the exit code, as this process's part, with JAX's distributed runtime.

    An error ends the process at once, without waiting for the others, and so does the end of the one that watches.
    """
    number, count, address = os.environ[PROCESS].split(",")
    threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    # Gloo prints lines, which would break the progress bar: what is not Python's goes nowhere
    out = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(out):
        os.dup2(nowhere.fileno(), 1)
        try:
            timeouts = {"heartbeat_timeout_seconds": SILENCE, "shutdown_timeout_seconds": SILENCE}
            initialize_distributed(address, int(count), int(number), initialization_timeout=60, **timeouts)
            code = main()
            jax.distributed.shutdown()
            return code
        except BaseException:
            traceback.print_exc()
            out.flush()
            os._exit(1)


def together(command: Sequence[str], count: int, devices: int) -> tuple[int, str]:
    """Runs a program that calls `join` in so many processes, each with so many devices, until all end or one fails.

    Then it ends the others. Ctrl-C is passed on to all, as SIGUSR1: JAX's runtime takes SIGTERM for itself.

    Returns:
      The exit code: 0; 130 if they were told to stop; 1 if one failed. And which failed.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    told, codes, members = False, list[int | None](), []
    for number in range(count):
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, PROCESS: f"{number},{count},{address}"}
        # a session of its own: Ctrl-C reaches only the process that watches, which passes it on
        members.append(subprocess.Popen(command, stdin=subprocess.PIPE, env=env, start_new_session=True))
    try:
        while not codes or (None in codes and {*codes} <= {None, 0, 130}):
            time.sleep(0.1)
            codes = [member.poll() for member in members]
            if terminal.interrupted.is_set() and not told:
                told = True
                for member in members:
                    member.send_signal(signal.SIGUSR1)
    finally:
        for member in members:
            member.kill()
            member.communicate()
    if terminal.interrupted.is_set():
        return 130, ""
    # first those that were ended, for then the others fail too
    failed = sorted((code, number) for number, code in enumerate(codes) if code)
    said = [f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with {code}" for code, _ in failed]
    return bool(failed), "\n".join(f"process {number} of {count} {why}" for (_, number), why in zip(failed, said))
