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
from tests.screen import shown, started

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
    for rate, loss, distance, seconds in table.values():
        assert float(rate) > 0 and float(loss) < 1e-3 and float(distance) < 0.1 and float(seconds) < 60
    assert is_png(folder / "gdx-demo.png")


def test_digits_plain_lines_and_the_same_numbers_again(capsys, folder):
    texts = []
    for names in ("adam sgd adam", "adam"):
        options = f"--steps 30 --output some.png --optimizers {names}"
        assert main(options.split()) == 0
        texts.append(capsys.readouterr().out)
    assert "\x1b" not in texts[0] and "\r" not in texts[0]
    assert "digits: 1437 images to train on and 360 to test; 30 steps, seed 0" in texts[0]
    assert re.search(r"^adam .* 100% loss [\d.]+, accuracy [\d.]+ % ", texts[0], re.MULTILINE)
    first, second = map(rows, texts)
    assert list(first) == ["adam", "sgd"]
    assert first["adam"][:3] == second["adam"][:3]
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
    optimizers = command.chosen(plan)
    for name, tx in optimizers.items():
        assert type(tx).__name__ == name
        for field, value in tx.hyperparams.items():
            assert value == given.get(field, value)
    assert optimizers["sgd"].hyperparams["momentum"] == 0.8


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ("--optimizers sgd adagrad", "invalid choice: 'adagrad' (choose from "),
        ("--learning-rate -1e-3", "learning_rate is -0.001; expected a finite number >= 0"),
        ("--learning-rate fast", "invalid float value"),
        ("--momentum 1.5", "expected a finite number in [0, 1)"),
        ("--optimizers adam --momentum 0.5", "adam.replace: 'momentum' is unknown; choose from learning_rate, b1"),
        ("--batch-size 0", "it is 0; expected more than 0"),
        (
            "--optimizers sgd --batch-size 1438",
            "batch_size is 1438, more than the data's 1437 examples; expected 1 to 1437",
        ),
        ("--steps 0", "it is 0; expected more than 0"),
        ("--steps 1.5", "invalid number value: '1.5'"),
        ("--seed 99999999999999999999", "too large"),
        ("--output demo.gif", "ends in .png, .pdf, .svg"),
        ("--data mnist", "choose from"),
        ("--step 3", "unrecognized arguments"),
        ("swep", "choose from demo"),
    ],
)
def test_a_wrong_option_says_what_is_allowed_before_any_step(options, allowed, capsys, monkeypatch):
    monkeypatch.setattr(gdx, "train", lambda *_, **__: pytest.fail("a step was made"))
    with pytest.raises(SystemExit) as exit_:
        main(options.split())
    assert exit_.value.code == 2
    assert allowed in capsys.readouterr().err


@pytest.mark.parametrize(
    ("output", "why"),
    [
        ("missing/demo.png", "No such file or directory: 'missing/demo.png'"),
        ("/proc/demo.png", "'/proc/demo.png'"),
        ("folder.png", "Is a directory: 'folder.png'"),
    ],
)
def test_a_picture_that_cannot_be_written_is_refused_before_any_work(output, why, capsys, monkeypatch, folder):
    (folder / "folder.png").mkdir()
    monkeypatch.setattr(command, "load", lambda name: pytest.fail("the data were loaded"))
    assert main(["--output", output]) == 1
    output = capsys.readouterr()
    assert why in output.err and output.out == ""


def test_a_picture_stays_until_the_next_is_there(capsys, folder):
    (folder / "gdx-demo.png").write_text("an old one")
    with pytest.raises(SystemExit):
        main(["--momentum", "1"])
    assert (folder / "gdx-demo.png").read_text() == "an old one"
    (folder / "gdx-demo.png").unlink()
    with pytest.raises(SystemExit):
        main(["--momentum", "1"])
    assert list(folder.iterdir()) == []


def interrupt() -> None:
    """What the terminal does at Ctrl-C, in the middle of a command, where the system hands it to the busiest thread."""
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)
    assert terminal.interrupted.wait(5)


def test_ctrl_c_keeps_what_there_is(capsys, monkeypatch, folder):
    train = command.train

    def interrupted(problem, tx, *options):
        for report in train(problem, tx, *options):
            if report[0] == 100 and type(tx).__name__ == "sgd":
                interrupt()
            yield report

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(command, "train", interrupted)
    assert main(["--data", "rosenbrock", "--steps", "600"]) == 130
    text = capsys.readouterr().out
    assert "interrupted at step 100 of sgd" in text
    assert list(rows(text)) == ["gradient_descent", "sgd"]
    assert is_png(folder / "gdx-demo.png")
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_the_first_step(capsys, monkeypatch, folder):
    console = terminal.console
    monkeypatch.setattr(terminal, "console", lambda: interrupt() or console())
    assert main(["--data", "quadratic"]) == 130
    assert "interrupted before the first step" in capsys.readouterr().out
    assert is_png(folder / "gdx-demo.png")


def command_line(options: str) -> list[str]:
    return [sys.executable, "-m", "gdx", *options.split()]


def test_ctrl_c_ends_at_once_what_keeps_nothing(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    sweep, curvature = "sweep --data quadratic --steps 2000000", "curvature --data rosenbrock --steps 20000000"
    with started(command_line(sweep)) as first, started(command_line(curvature)) as second:
        for process, screen in (first, second):
            text = shown(screen, r"[1-9]\d*%")
            assert process.poll() is None, text
            time.sleep(1)
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=5)
            assert (process.returncode, errors) == (130, "")
            assert shown(screen).endswith("\x1b[?25h\r\n")  # the cursor is there again


def test_ctrl_c_during_imports_says_nothing(folder):
    (folder / "jax.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    done = subprocess.run(command_line("sweep"), capture_output=True, env=env, timeout=30)
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_a_run_that_diverges_is_reported(capsys, folder):
    options = "--data quadratic --learning-rate 0.25 --optimizers gradient_descent adam"
    assert main(options.split()) == 0
    text = capsys.readouterr().out
    assert re.search(r"^gradient_descent .* loss diverged, distance ", text, re.MULTILINE)
    assert rows(text)["gradient_descent"][1] == "diverged"
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
    monkeypatch.setattr(f"gdx.demo.{COMMANDS[name][0]}.run", lambda plan: pytest.fail("the work began"))
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
    assert "\x1b[" in text and "100%" in text and "seconds" in text


def test_text_is_ascii_where_the_output_is():
    options = "--data quadratic --optimizers adam --steps 2"
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command_line(options), capture_output=True, env=env)
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

    monkeypatch.setitem(__main__.COMMANDS, "other", ("command", True, []))
    monkeypatch.setattr(command, "run", lambda plan: 7)
    assert main(["other", "--steps", "1"]) == 7
    assert main([]) == 7
