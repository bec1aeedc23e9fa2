"""`python -m gdx` from its options to its table, its picture and its exit code."""

import argparse
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("sklearn")

import gdx
from gdx.__main__ import COMMANDS, main
from gdx.demo import command, terminal
from gdx.demo.problems import OPTIMIZERS

ROOT = Path(__file__).parents[1]
NAMES = list(OPTIMIZERS["digits"])


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """A runner in the background of a shell ignores it, and so would what it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(text: str) -> dict[str, list[str]]:
    """The table's cells after the optimizer's name."""
    lines = text[text.rindex("─") + 1 :].replace(" %", "%").splitlines()
    return {cells[0]: cells[1:] for cells in map(str.split, lines) if cells and cells[0] in NAMES}


def is_png(path: Path) -> bool:
    from matplotlib.image import imread

    return path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") and imread(path).shape == (810, 1800, 4)


def test_all_optimizers_on_a_function(capsys, folder):
    assert main(["--data", "quadratic"]) == 0
    table = rows(capsys.readouterr().out)
    assert list(table) == NAMES
    for rate, loss, distance, seconds, compilations in table.values():
        assert float(rate) > 0 and float(loss) < 1e-3 and float(distance) < 0.1
        assert compilations == "1" and float(seconds) < 60
    assert is_png(folder / "gdx-demo.png")


def test_digits_plain_lines_and_the_same_numbers_again(capsys, folder):
    options = ["--optimizers", "adam, sgd", "--optimizers", "adam", "--steps", "30", "--output", "some.png"]
    texts = []
    for _ in range(2):
        assert main(options) == 0
        texts.append(capsys.readouterr().out)
    assert "\x1b" not in texts[0] and "\r" not in texts[0]
    assert "digits: 1437 images to train on and 360 to test; 30 steps, seed 0" in texts[0]
    assert re.search(r"^adam: step 30, loss [\d.]+, accuracy [\d.]+ %, \d+ steps/s$", texts[0], re.MULTILINE)
    first, second = map(rows, texts)
    assert list(first) == ["adam", "sgd"]
    assert [cells[:3] for cells in first.values()] == [cells[:3] for cells in second.values()]
    assert all(cells[-1] == "1" for cells in first.values())
    assert float(first["adam"][2].rstrip("%")) > 50
    assert is_png(folder / "some.png")


def test_options_reach_the_optimizers_that_have_them(monkeypatch):
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(command, "run", lambda arguments: seen.append(arguments) or 0)
    options = (
        "--learning-rate 0.5 --momentum 0.8 --b1 0.7 --b2 0.6 --weight-decay 0.3 --batch-size 1437 --steps 7 --seed 3"
    )
    assert main(options.split()) == 0
    (plan,) = seen
    assert (plan.batch_size, plan.steps, plan.seed) == (1437, 7, 3)
    given = {"learning_rate": 0.5, "momentum": 0.8, "b1": 0.7, "b2": 0.6, "weight_decay": 0.3}
    for name, tx in plan.optimizers.items():
        assert type(tx).__name__ == name
        for field, value in tx.hyperparams.items():
            assert value == given.get(field, value)
    assert plan.optimizers["sgd"].hyperparams["momentum"] == 0.8


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        (
            "--optimizers adagrad",
            "it has 'adagrad'; choose from gradient_descent, sgd, momentum, nesterov, adam, adamw",
        ),
        ("--learning-rate -1e-3", "learning_rate is -0.001; expected a finite number >= 0"),
        ("--learning-rate fast", "invalid float value"),
        ("--momentum 1.5", "expected a finite number in [0, 1)"),
        ("--optimizers adam --momentum 0.5", "add one of sgd, momentum, nesterov"),
        ("--batch-size 0", "expected 1 to 1437"),
        ("--batch-size 8 --data quadratic", "use it with digits"),
        ("--batch-size 8 --optimizers gradient_descent", "add sgd"),
        ("--steps 0", "expected at least 1"),
        ("--seed -1", "expected 0 to 4294967295"),
        ("--output missing/demo.png", "no file can be made in 'missing' (No such file or directory)"),
        ("--output /proc/demo.png", "no file can be made in '/proc'"),
        ("--output demo.gif", "ends in .png, .pdf, .svg"),
        ("--output folder.png", "which is no file that can be written"),
        ("--data mnist", "choose from"),
        ("--step 3", "unrecognized arguments"),
        ("swep", "choose from demo"),
    ],
)
def test_a_wrong_option_says_what_is_allowed_before_any_work(options, allowed, capsys, monkeypatch, folder):
    (folder / "folder.png").mkdir()
    monkeypatch.setattr(command, "load", lambda name: pytest.fail("the data were loaded"))
    with pytest.raises(SystemExit) as exit_:
        main(options.split())
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert allowed in output.err and output.out == ""


def interrupt() -> None:
    """What the terminal does at Ctrl-C, in the middle of a command, where the system hands it to the busiest thread."""
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)
    assert terminal.interrupted.wait(5)


def test_ctrl_c_keeps_what_there_is(capsys, monkeypatch, folder):
    train = command.train

    def interrupted(problem, tx, *options):
        for report in train(problem, tx, *options):
            if report.step == 100 and type(tx).__name__ == "sgd":
                interrupt()
            yield report

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(command, "train", interrupted)
    assert main(["--data", "rosenbrock", "--steps", "600"]) == 130
    text = capsys.readouterr().out
    assert "interrupted" in text and "sgd* " in text and "* stopped at step 100" in text
    assert re.search(r"^ *adamw +0.2 +- +- +- +- *$", text, re.MULTILINE)
    assert is_png(folder / "gdx-demo.png")
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_the_first_step(capsys, monkeypatch, folder):
    console = terminal.console
    monkeypatch.setattr(terminal, "console", lambda: interrupt() or console())
    assert main(["--data", "quadratic"]) == 130
    assert "gradient_descent" in capsys.readouterr().out
    assert is_png(folder / "gdx-demo.png")


def started(options: str, **env: str) -> subprocess.Popen:
    command_line, pipe = [sys.executable, "-m", "gdx", *options.split()], subprocess.PIPE
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.Popen(command_line, stdout=pipe, stderr=pipe, text=True, env=env)


@pytest.mark.parametrize(
    "options", ["sweep --data quadratic --steps 2000000", "curvature --data rosenbrock --steps 100000000"]
)
def test_ctrl_c_ends_at_once_what_keeps_nothing(options):
    with started(options) as process:
        while "%" not in process.stdout.readline():
            assert process.poll() is None, process.stderr.read()
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=5)
    assert (process.returncode, errors) == (130, "")


def test_ctrl_c_during_imports_says_nothing(folder):
    (folder / "jax.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)")
    with started("sweep", PYTHONPATH=f"{folder}{os.pathsep}{ROOT}") as process:
        output, errors = process.communicate(timeout=30)
    assert (process.returncode, output, errors) == (130, "", "")


def test_a_run_that_diverges_is_reported(capsys, folder):
    assert main(["--data", "quadratic", "--learning-rate", "0.25", "--optimizers", "gradient_descent,adam"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^gradient_descent: step \d+, diverged$", text, re.MULTILINE)
    assert rows(text)["gradient_descent"][1:3] == ["diverged", "diverged"]
    assert is_png(folder / "gdx-demo.png")


@pytest.mark.parametrize(
    ("name", "package", "extras"),
    [
        ("demo", "matplotlib", "demo"),
        ("sweep", "rich", "demo"),
        ("learn", "sklearn", "demo"),
        ("curvature", "sklearn", "demo"),
        ("train", "orbax.checkpoint", "checkpoint,demo"),
        ("train", "rich", "checkpoint,demo"),
    ],
)
def test_a_missing_package_names_the_extras_before_any_work(name, package, extras, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(f"{COMMANDS[name]}.run", lambda plan: pytest.fail("the work began"))
    assert main([name]) == 1
    output = capsys.readouterr()
    assert output.err == (
        f"python -m gdx: No module named {package!r}; install it with: python -m pip install 'gdx-jax[{extras}]'\n"
    )
    assert output.out == ""


def test_version():
    done = subprocess.run([sys.executable, "-m", "gdx", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"gdx {gdx.__version__}\n"


def test_a_picture_that_cannot_be_written(capsys, monkeypatch):
    def full(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    assert main(["--data", "quadratic", "--steps", "2", "--optimizers", "adam"]) == 1
    assert "No space left on device" in capsys.readouterr().err


def test_a_terminal_shows_bars_and_the_table(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--data", "quadratic", "--optimizers", "adam"]) == 0
    text = capsys.readouterr().out
    assert "\x1b[" in text and "steps/s" in text and "compilations" in text


def test_text_is_ascii_where_the_output_is():
    command_line = [sys.executable, "-m", "gdx", "--data=quadratic", "--optimizers=adam", "--steps=2"]
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command_line, capture_output=True, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and b"adam" in done.stdout


def test_help_ends_with_examples_and_imports_nothing_heavy():
    code = """
import sys
from gdx.__main__ import main
try:
    main(["--help"])
finally:
    assert not {"sklearn", "matplotlib", "rich"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "python -m gdx --data rosenbrock" in done.stdout.splitlines()[-1]
    assert "--weight-decay X" in done.stdout


def test_each_command_is_one_entry(monkeypatch):
    from gdx import __main__

    monkeypatch.setitem(__main__.COMMANDS, "other", "gdx.demo.command")
    monkeypatch.setattr(command, "run", lambda plan: 7)
    assert main(["other", "--steps", "1"]) == 7
    assert main([]) == 7
