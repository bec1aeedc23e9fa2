"""A program with a terminal for its output."""

import contextlib
import os
import pty
import re
import subprocess
from collections.abc import Iterator, Sequence


@contextlib.contextmanager
def started(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen, int]]:
    """Its process, and the file of what the terminal shows."""
    screen, tty = pty.openpty()
    env = {**os.environ, "COLUMNS": "100", "TERM": "xterm"}
    process = subprocess.Popen(command, stdout=tty, stderr=subprocess.PIPE, text=True, env=env)
    os.close(tty)
    try:
        yield process, screen
    finally:
        process.kill()
        process.communicate()
        os.close(screen)


def shown(screen: int, until: str = r"\Z.") -> str:
    """What the terminal shows, up to what matches, or to its end."""
    text = ""
    with contextlib.suppress(OSError):  # what a closed terminal gives at its end
        while not re.search(until, text) and (received := os.read(screen, 1 << 16)):
            text += received.decode(errors="replace")
    return text
