"""`python -m gdx`: the commands of the library; without a command's name, the demo."""

import argparse
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import gdx
from gdx.demo.terminal import interrupted
from gdx.extra import MissingExtra, require

# Each is a module of gdx.demo with add_arguments(parser) and run(arguments), which returns the exit code, and whose
# docstring is its help; whether it looks at `interrupted` as it goes, and ends with what there is; and its extras.
COMMANDS = {
    "demo": ("command", True, ["demo"]),
    "sweep": ("sweep", False, ["demo"]),
    "learn": ("learn", True, ["demo"]),
    "curvature": ("curvature", False, ["demo"]),
    "train": ("processes", True, ["checkpoint", "demo"]),
}
DEFAULT = "demo"


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Examples as they are written, and the defaults."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the arguments after the program's name; None for those of this process.

    Returns:
      The exit code: 0, 1 where an extra is missing or a file cannot be written, 130 after Ctrl-C.

    Raises:
      SystemExit: 2 for a wrong option, also one that gdx itself refuses; 0 after --help and --version.
    """
    options = list(sys.argv[1:] if argv is None else argv)
    name = options.pop(0) if options and not options[0].startswith("-") else DEFAULT
    module, keeps, extras = COMMANDS.get(name, COMMANDS[DEFAULT])
    command = importlib.import_module(f"gdx.demo.{module}")
    description, _, epilog = str(command.__doc__).partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m gdx" if name == DEFAULT else f"python -m gdx {name}",
        usage=f"%(prog)s{' [command]' if name == DEFAULT else ''} [options]",
        description=f"{description}\n\ncommands: {', '.join(COMMANDS)}; without one, {DEFAULT}",
        epilog=epilog,
        formatter_class=Help,
        allow_abbrev=False,
    )
    if name not in COMMANDS:
        parser.error(f"{name!r} is no command; choose from {', '.join(COMMANDS)}")
    parser.add_argument("--version", action="version", version=f"gdx {gdx.__version__}")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all that is random")
    parser.set_defaults(options=options)
    parser._negative_number_matcher = re.compile(r"-\.?\d")  # -1e-3 too is a number, and no option
    command.add_arguments(parser)
    try:
        arguments = parser.parse_args(options)
        require(*extras)
        return _run(command.run, keeps, arguments)
    except (ValueError, TypeError, OverflowError) as error:
        parser.error(str(error))
    except (MissingExtra, OSError) as error:
        print(f"python -m gdx: {error}", file=sys.stderr)
        return 1


def _run(command: Callable[[Any], int], keeps: bool, arguments: argparse.Namespace) -> int:
    """Runs the command beside the main thread, which takes Ctrl-C at once: one that is busy in XLA would lose it."""

    def take(number: int, frame: Any) -> None:
        if not keeps or interrupted.is_set():
            os.write(1, b"\x1b[?25h\n" if os.isatty(1) else b"")  # the cursor, which a progress bar hides
            os._exit(130)
        interrupted.set()

    interrupted.clear()
    # in the background of a shell Ctrl-C is ignored; the last one is how several processes are told of it
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
    before = {number: signal.signal(number, take) for number in numbers if signal.getsignal(number) != signal.SIG_IGN}
    try:
        running = ThreadPoolExecutor(1).submit(command, arguments)
        # the system may hand a signal to a thread of XLA's: Python then calls `take` only when this one wakes
        while not running.done():
            wait([running], timeout=0.1)
        return running.result() or 130 * interrupted.is_set()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
