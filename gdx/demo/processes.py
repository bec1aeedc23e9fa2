"""Several processes of one program on this machine, which end together: started, watched, and told to stop.

JAX itself notices a process that is gone only by its heartbeat, and then aborts the others, which nothing in them
can catch; one that raises an error waits for the others as it leaves, and they for it. So the processes are
watched from outside: `run` starts them, and each calls `join` first of all.
"""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from gdx.compat import initialize
from gdx.extra import MissingExtra

BEAT = 0.5  # seconds between two signs of life
SILENCE = 10.0  # seconds without one, after which a process counts as stopped
START = 120.0  # seconds until the first one
GRACE = 2.0  # seconds for the others to say what went wrong with them too
# longer than SILENCE, so that it is known which process stopped, and not only that another was aborted
TIMEOUTS: dict[str, Any] = {
    "initialization_timeout": 60,
    "heartbeat_timeout_seconds": 14,
    "shutdown_timeout_seconds": 14,
}
PLACE = "GDX_PROCESS"  # of a process: its number, how many there are, where they meet, where its signs of life go


class Ended(NamedTuple):
    """How a group of processes ended.

    Attributes:
      code: 0; 130 if they were told to stop and did; 2 or 1 as the first one that failed.
      reason: what went wrong with that one.
    """

    code: int
    reason: str = ""


class Refused(ValueError):
    """A wrong input that shows only when the work begins."""


class _Place(NamedTuple):
    number: int
    size: int
    address: str
    pipe: int


def place() -> _Place | None:
    """Which process of a group this is; None if it is none."""
    text = os.environ.get(PLACE)
    if text is None:
        return None
    number, size, address, pipe = text.split(",")
    return _Place(int(number), int(size), address, int(pipe))


def join(main: Callable[[], int]) -> int:
    """Runs `main` as this process's part, with JAX's distributed runtime if there are others.

    An error ends the process at once, without waiting for the others. Ctrl-C is left to `main`: the terminal's
    does not come here, but what `run` passes on does.

    Args:
      main: returns the exit code, or raises `Refused`, which `run` gets to know as 2.
    """
    here = place()
    assert here is not None
    threading.Thread(target=_beat, args=[here.pipe], daemon=True).start()
    try:
        if here.size > 1:
            initialize(here.address, here.size, here.number, **TIMEOUTS)
        code = main()
        if here.size > 1:
            jax.distributed.shutdown()
        return code
    except KeyboardInterrupt:
        os._exit(130)
    except BaseException as error:
        is_clear = isinstance(error, Refused | MissingExtra)
        if not is_clear:
            traceback.print_exc()
        _tell(here.pipe, str(error) if is_clear else f"{type(error).__name__}: {error}")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(2 if isinstance(error, Refused) else 1)


def _beat(pipe: int) -> None:
    while True:
        _tell(pipe, "")
        time.sleep(BEAT)


def _tell(pipe: int, text: str) -> None:
    """Sends an error and when it was; without one, a sign of life. Ends the process if nobody listens."""
    try:
        os.write(pipe, f"{time.time()} {' '.join(text.split())[:2000]}\n".encode() if text else b"\n")
    except OSError:
        os._exit(1)


def run(command: Sequence[str], count: int, *, devices: int) -> Ended:
    """Runs a program in several processes until all have ended, or one fails: then it ends the others.

    Noticed are a process that exits with an error, is killed, or shows no sign of life for 10 seconds. SIGINT
    (Ctrl-C) and SIGTERM are passed on to all as SIGINT; a second one kills them.

    Args:
      command: the program, which calls `join`, and its arguments.
      count: how many processes.
      devices: how many devices of the CPU each of them has.
    """
    address = f"127.0.0.1:{_free_port()}"
    members = [_Member(command, _Place(number, count, address, 0), devices) for number in range(count)]
    try:
        with _signals_to(members) as signals:
            if _watch(members):
                stopped = any(member.process.returncode for member in members)
                return Ended(130 if stopped else 0)
            if not any(member.is_silent for member in members):
                _watch(members, until=time.monotonic() + GRACE)
            if signals:
                return Ended(130, "killed before it could end well")
            return min((member for member in members if member.has_failed), key=_Member.rank).ended()
    finally:
        for member in members:
            member.end()


class _Member:
    """One of the processes, as seen from outside."""

    def __init__(self, command: Sequence[str], place: _Place, devices: int):
        self.place = place
        self.pipe, end = os.pipe()
        env = {
            **os.environ,
            PLACE: ",".join(map(str, place._replace(pipe=end))),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        }
        # a session of its own: Ctrl-C reaches only the process that watches, which passes it on
        self.process = subprocess.Popen(command, env=env, pass_fds=[end], start_new_session=True)
        os.close(end)
        os.set_blocking(self.pipe, False)
        self.last = time.monotonic() + START - SILENCE
        self.said = b""

    def listen(self) -> bool:
        """Takes in what the process has sent; False when it has closed its end."""
        received = os.read(self.pipe, 1 << 16)
        self.last = time.monotonic()
        self.said += received.strip(b"\n") + b"\n"
        return bool(received)

    @property
    def is_silent(self) -> bool:
        return self.process.poll() is None and time.monotonic() - self.last > SILENCE

    @property
    def has_failed(self) -> bool:
        return self.is_silent or self.process.poll() not in (None, 0, 130)

    @property
    def told(self) -> tuple[float, str] | None:
        """When and with what error it ended, if it said so."""
        lines = [line for line in self.said.decode(errors="replace").splitlines() if line]
        if not lines:
            return None
        at, _, text = lines[-1].partition(" ")
        return float(at), text

    def rank(self) -> tuple[int, float]:
        """Low for a failure that may be the cause of the others': without a process, the rest fail too."""
        if self.is_silent:
            return 0, 0
        if self.process.returncode == -signal.SIGABRT:  # JAX has noticed that another is gone
            return 3, 0
        return (2, self.told[0]) if self.told else (1, 0)

    def ended(self) -> Ended:
        code = self.process.returncode
        who = f"process {self.place.number} of {self.place.size}"
        if self.is_silent:
            return Ended(1, f"{who} showed no sign of life for {SILENCE:g} seconds")
        if self.told:
            return Ended(2, self.told[1]) if code == 2 else Ended(1, f"{who} failed: {self.told[1]}")
        if code < 0:
            return Ended(1, f"{who} was ended by {signal.Signals(-code).name}")
        return Ended(1, f"{who} failed: exit code {code}")

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        os.close(self.pipe)


def _watch(members: Sequence[_Member], until: float | None = None) -> bool:
    """Returns True when all have ended well; False when one fails, or when it is so late."""
    with selectors.DefaultSelector() as selector:
        for member in members:
            selector.register(member.pipe, selectors.EVENT_READ, member)
        while until is None or time.monotonic() < until:
            for key, _ in selector.select(BEAT / 2):
                if not key.data.listen():
                    selector.unregister(key.fileobj)
            if until is None and any(member.has_failed for member in members):
                return False
            if all(member.process.poll() is not None for member in members):
                return until is None
    return False


@contextlib.contextmanager
def _signals_to(members: Sequence[_Member]) -> Iterator[list[int]]:
    """Passes signals on; yields those that came."""
    came: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        came.append(number)
        for member in members:
            if member.process.poll() is None:
                # one that has not begun would only print where it was
                member.process.send_signal(signal.SIGINT if len(came) == 1 and member.said else signal.SIGKILL)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
