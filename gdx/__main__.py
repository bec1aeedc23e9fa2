"""`python -m gdx`: the commands of the library; without a command's name, the demo."""

import argparse
import importlib
import re
import sys
from collections.abc import Sequence

import gdx
from gdx.extra import MissingExtra, require

# A command is a module with EXTRAS, EXAMPLES, add_arguments(parser), plan(arguments) and run(plan). What plan
# raises as ValueError or TypeError is a wrong option; run returns the exit code.
COMMANDS = {
    "demo": "gdx.demo.command",
    "sweep": "gdx.demo.sweep",
    "learn": "gdx.demo.learn",
    "curvature": "gdx.demo.curvature",
    "train": "gdx.demo.train",
}
DEFAULT = "demo"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
      argv: the arguments after the program's name; None for those of this process.

    Returns:
      The exit code: 0, 1 where an extra is missing or a file cannot be written, 130 after Ctrl-C.

    Raises:
      SystemExit: 2 for a wrong option, 0 after --help and --version.
    """
    name, options = _split(list(sys.argv[1:] if argv is None else argv))
    try:
        command = importlib.import_module(COMMANDS.get(name, COMMANDS[DEFAULT]))
        parser = argparse.ArgumentParser(
            prog="python -m gdx" if name == DEFAULT else f"python -m gdx {name}",
            usage=f"%(prog)s{' [command]' if name == DEFAULT else ''} [options]",
            description=f"{command.__doc__}\ncommands: {', '.join(COMMANDS)}; without one, {DEFAULT}",
            epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        if name not in COMMANDS:
            parser.error(f"{name!r} is no command; choose from {', '.join(COMMANDS)}")
        parser.add_argument("--version", action="version", version=f"gdx {gdx.__version__}")
        command.add_arguments(parser)
        try:
            plan = command.plan(parser.parse_args(options))
        except (ValueError, TypeError) as error:
            parser.error(str(error))
        require(*command.EXTRAS)
        return command.run(plan)
    except KeyboardInterrupt:
        return 130
    except (MissingExtra, OSError) as error:
        print(f"python -m gdx: {error}", file=sys.stderr)
        return 1


def _split(argv: list[str]) -> tuple[str, list[str]]:
    """The command's name and its options, with negative numbers joined to theirs: argparse would take them for one."""
    options: list[str] = []
    for word in argv:
        if re.match(r"-\.?\d", word) and options and re.fullmatch(r"--[\w-]+", options[-1]):
            options[-1] += f"={word}"
        else:
            options.append(word)
    if options and not options[0].startswith("-"):
        return options[0], options[1:]
    return DEFAULT, options


if __name__ == "__main__":
    sys.exit(main())
