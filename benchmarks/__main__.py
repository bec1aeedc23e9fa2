"""Measures: `python -m benchmarks NAME [options]`; with `--save` what it prints is kept in benchmarks/README.md."""

import argparse
import contextlib
import datetime
import importlib
import io
import os
import platform
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).parent
NAMES = [
    "accuracy",
    "bad_inputs",
    "curvature",
    "flows",
    "functions",
    "groups",
    "noise",
    "sharding",
    "slopes",
    "step",
    "storage",
    "sweep",
    "width",
]
LIBRARIES = ["jax", "optax", "torch", "libtpu", "jax-cuda12-plugin"]


class Tee(io.StringIO):
    """Text that is shown too."""

    def write(self, text: str) -> int:
        sys.__stdout__ and sys.__stdout__.write(text)
        return super().write(text)


def surroundings() -> str:
    """When, with which versions, and on what."""
    versions = [f"Python {platform.python_version()}"]
    for library in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):
            versions.append(f"{library} {version(library)}")
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text() if cpuinfo.exists() else "")
    processor = model[1] if model else platform.processor()
    return f"{datetime.date.today()}, {', '.join(versions)}, {os.cpu_count()} cores of {processor}"


def save(title: str, command: str, output: str) -> None:
    """Puts a section in the place of the one of this title, or at the end."""
    path = HERE / "README.md"
    text, section = path.read_text(), f"## {title}\n\n`{command}`, {surroundings()}.\n\n```\n{output.strip()}\n```\n"
    old = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    path.write_text(text.replace(old[0], section + "\n") if old else f"{text.rstrip()}\n\n{section}")


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--save", metavar="TITLE", nargs="?", const="", help="keep it, under this title or its name")
    args, options = parser.parse_known_args()
    sys.argv = [f"python -m benchmarks {args.name}", *options]
    with contextlib.redirect_stdout(Tee()) as output:
        importlib.import_module(f"benchmarks.{args.name}").main()
    if args.save is not None:
        lines = [line.rstrip() for line in output.getvalue().splitlines()]
        save(args.save or args.name, " ".join(sys.argv), "\n".join(lines))


if __name__ == "__main__":
    main()
