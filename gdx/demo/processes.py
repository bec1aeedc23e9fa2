"""Several processes of one program on this machine that end together: an example, to be read.

JAX itself notices a process that is gone only by its heartbeat, and then aborts the others, which nothing in them
can catch; one that raises an error waits for the others as it leaves, and they for it. So the processes are
watched from outside: `run` starts them, and each calls `join` first of all. Each has a pipe to the one that watches,
into which it writes a sign of life twice a second, and why it fails. Nobody at its other end: then it ends too.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence

import jax

from gdx.compat import initialize_distributed
from gdx.demo.terminal import interrupted

PROCESS = "GDX_PROCESS"  # in the environment: its number, how many there are, where they meet, and its pipe
SILENCE = 10  # seconds without a sign of life, after which a process counts as stopped
START = 120  # seconds until the first one
GRACE = 2  # seconds for the others to say what went wrong with them too
# of JAX: longer, so that it is known which process stopped, and not only that another was aborted
TIMEOUT = SILENCE + 4


class Refused(ValueError):
    """A wrong input that shows only when the work begins."""


def join(main: Callable[[], int]) -> int:
    """Runs `main`, which returns the exit code, as this process's part, with JAX's distributed runtime.

    An error ends the process at once, without waiting for the others: with 2 if it is `Refused`, else with 1.
    """
    number, count, address, pipe = os.environ[PROCESS].split(",")
    threading.Thread(target=_beat, args=[int(pipe)], daemon=True).start()
    # Gloo prints lines, which would break the progress bar: what is not Python's goes nowhere
    out = os.fdopen(os.dup(1), "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(out):
        os.dup2(nowhere.fileno(), 1)
        try:
            if int(count) > 1:
                timeouts = {"heartbeat_timeout_seconds": TIMEOUT, "shutdown_timeout_seconds": TIMEOUT}
                initialize_distributed(address, int(count), int(number), initialization_timeout=60, **timeouts)
            code = main()
            if int(count) > 1:
                jax.distributed.shutdown()
            return code
        except BaseException as error:
            refused = isinstance(error, Refused)
            if not refused:
                traceback.print_exc()
            _tell(int(pipe), str(error) if refused else f"{type(error).__name__}: {error}")
            out.flush()
            os._exit(2 if refused else 1)


def _beat(pipe: int) -> None:
    while True:
        _tell(pipe, "")
        time.sleep(0.5)


def _tell(pipe: int, text: str) -> None:
    try:
        os.write(pipe, f"{' '.join(text.split())[:2000]}\n".encode())
    except OSError:
        os._exit(1)


class _Member:
    """One of the processes, as seen from outside."""

    def __init__(self, command: Sequence[str], number: int, count: int, address: str, devices: int):
        self.name, self.told, self.heard = f"process {number} of {count}", "", time.monotonic() + START - SILENCE
        self.pipe, end = os.pipe()
        os.set_blocking(self.pipe, False)
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        environment = {PROCESS: f"{number},{count},{address},{end}", "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
        # a session of its own: Ctrl-C reaches only the process that watches, which passes it on
        self.process = subprocess.Popen(command, env=os.environ | environment, pass_fds=[end], start_new_session=True)
        os.close(end)

    def failure(self) -> str:
        """What went wrong with it, after taking in what it has sent."""
        code = self.process.poll()
        with contextlib.suppress(BlockingIOError):
            if text := os.read(self.pipe, 1 << 16).decode(errors="replace"):
                self.heard = time.monotonic()
                self.told += text.replace("\n", "")
        if code is None:
            is_silent = time.monotonic() - self.heard > SILENCE
            return f"{self.name} showed no sign of life for {SILENCE} seconds" if is_silent else ""
        if code < 0:
            return f"{self.name} was ended by {signal.Signals(-code).name}"
        return "" if code in (0, 130) else self.told if code == 2 else f"{self.name} failed: {self.told or code}"


def run(command: Sequence[str], count: int, *, devices: int) -> tuple[int, str]:
    """Runs a program in so many processes, each with so many devices, until all have ended, or one fails.

    Then it ends the others. Noticed are a process that exits with an error, is killed, or shows no sign of life for 10
    seconds. Ctrl-C is passed on to all, as SIGUSR1: JAX's runtime takes SIGTERM for itself. The command is a program
    that calls `join`, and its arguments.

    Returns:
      The exit code: 0; 130 if they were told to stop; 2 or 1 if one failed. And what went wrong with each that did.
    """
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    members = [_Member(command, number, count, address, devices) for number in range(count)]
    deadline, passed_on = float("inf"), False
    try:
        while any(member.process.poll() is None for member in members) and time.monotonic() < deadline:
            time.sleep(0.1)
            if interrupted.is_set() and not passed_on:
                passed_on = True
                for member in members:
                    member.process.send_signal(signal.SIGUSR1)
            if any(member.failure() for member in members):
                deadline = min(deadline, time.monotonic() + GRACE)
        failures = {member: text for member in members if (text := member.failure())}
        codes = {member.process.poll() for member in members}
    finally:
        for member in members:
            member.process.kill()
            member.process.wait()
            os.close(member.pipe)
    if codes == {0}:
        return 0, ""
    if interrupted.is_set() or not failures:
        return 130, ""
    # first those that could not say why: when one is gone, the others fail with an error
    reasons = [failures[member] for member in sorted(failures, key=lambda member: bool(member.told))]
    return (2 if 2 in codes else 1), "\n".join(dict.fromkeys(reasons))
