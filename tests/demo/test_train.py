"""`python -m gdx train`: the plain run's numbers on any devices and processes, and nothing lost but the steps since."""

import argparse
import contextlib
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("orbax.checkpoint")

import gdx
from gdx.__main__ import main
from gdx.checkpoint import Checkpoints
from gdx.demo import problems, processes, terminal, train
from tests.contract.table import assert_same_bits

ROOT = Path(__file__).parents[2]
# after 60 steps the sums over a batch, added up in another order, were 1.2e-7 apart in the parameters
TOLERANCE = 2e-6


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path


def command(options: str) -> list[str]:
    return [sys.executable, "-m", "gdx", "train", *shlex.split(options)]


def here(options: str) -> int:
    """The command in this process, which stands for the one that would be started."""
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    arguments = parser.parse_args(shlex.split(options))
    train.check(arguments)
    terminal.interrupted.clear()
    return train._train(arguments)


def finished(options: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(options), capture_output=True, text=True, timeout=300)


@contextlib.contextmanager
def started(options: str):
    process = subprocess.Popen(command(options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def until(process: subprocess.Popen, text: str) -> None:
    for line in process.stdout:
        if text in line:
            return
    pytest.fail(f"it ended before {text!r}: {process.stderr.read()}")


def bytes_in(text: str) -> list[int]:
    """Of the state on one device, and of all of it."""
    return [
        int(found.replace(",", "")) for found in re.search(r"each with ([\d,]+) of the ([\d,]+) bytes", text).groups()
    ]


def plain(name: str, steps: int) -> tuple:
    """Parameters and state of one device and nothing sharded."""
    problem, tx = problems.digits(), problems.OPTIMIZERS["digits"][name]
    examples = np.stack(list(itertools.islice(problem.batches(0), steps)))
    start = problem.start(jax.random.key(0))
    return gdx.train(problem.loss_on, tx, start, examples)[:2]


def kept(folder: str, name: str, **options) -> tuple:
    """What a run has saved, on one device."""
    problem, tx = problems.digits(), problems.OPTIMIZERS["digits"][name]
    params = problem.start(jax.random.key(0))
    with Checkpoints(folder) as checkpoints:
        step, params, state, _ = checkpoints.restore(tx, params, tx.init(params), **options)
    return step, params, state


def assert_close(found, expected) -> None:
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=TOLERANCE)


def test_two_processes_end_where_one_does_and_eight_devices_go_on(capsys):
    two = finished("--devices 2 --processes 2 --steps 60 --every 40 --checkpoints two")
    assert two.returncode == 0, two.stderr
    assert "devices: 2, in processes: 2, each with " in two.stdout
    here_bytes, all_bytes = bytes_in(two.stdout)
    assert all_bytes / 2 <= here_bytes < 0.55 * all_bytes
    assert "checkpoint of step 40: two" in two.stdout and "checkpoint of step 60: two" in two.stdout
    expected = plain("adamw", 60)
    step, *run = kept("two", "adamw")
    assert step == 60
    assert_close(run, expected)

    assert here("--devices 8 --steps 80 --every 40 --checkpoints two --resume") == 0
    text = capsys.readouterr().out
    assert "adamw from step 60 to 80; devices: 8, in processes: 1" in text
    assert all_bytes / 8 <= bytes_in(text)[0] < 0.2 * all_bytes
    step, *run = kept("two", "adamw")
    assert step == 80
    assert_close(run, plain("adamw", 80))


@pytest.mark.parametrize("count", [1, 2])
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(count, capsys):
    options = f"--devices 2 --processes {count} --steps 1000000 --every 20 --optimizer sgd --checkpoints 'my run'"
    with started(options) as process:
        until(process, "checkpoint of step 40")
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    last = int(output.splitlines()[-1].split()[3].rstrip(":")) if "checkpoint" in output else 40
    step, params, _ = kept("my run", "sgd")
    assert step == last and step % train.CHUNK == 0
    assert_close(params, plain("sgd", step)[0])
    (again,) = [line for line in errors.splitlines() if "go on" in line]
    again = again.partition(": ")[2].replace("--steps 1000000", f"--steps {step + 20}")
    assert again.startswith("python -m gdx train ") and again.endswith("--resume")
    assert here(again.removeprefix("python -m gdx train ")) == 0
    assert f"from step {step} to {step + 20}" in capsys.readouterr().out


def test_a_terminal_ends_with_loss_and_accuracy_and_nothing_of_gloo():
    import pty

    screen, tty = pty.openpty()
    options = "--processes 2 --steps 40 --checkpoints run"
    process = subprocess.Popen(command(options), stdout=tty, stderr=tty, env={**os.environ, "COLUMNS": "100"})
    os.close(tty)
    text = b""
    with contextlib.suppress(OSError):  # what a closed terminal gives at its end
        while received := os.read(screen, 1 << 16):
            text += received
    os.close(screen)
    assert process.wait(60) == 0, text
    last = text.decode().split("\x1b[2K")[-1]  # after what is erased
    assert re.search(r"loss [\d.]+, accuracy [\d.]+ %, \d+ steps/s", last), text
    assert "Gloo" not in text.decode()


def test_a_resumed_run_counts_its_own_steps(begun, tmp_path, capsys, monkeypatch):
    shutil.copytree(begun, tmp_path / "copy")
    clock = iter(range(10**6))
    monkeypatch.setattr("gdx.demo.terminal.time", argparse.Namespace(perf_counter=lambda: next(clock)))
    assert here("--steps 80 --resume --checkpoints copy") == 0
    last = re.findall(r"step 80, .*, (\d+) steps/s", capsys.readouterr().out)
    assert 0 < int(*last) <= 40  # it takes 40 steps after the first 20, in more than one tick


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ("--devices 3 --processes 2", "--devices is 3; expected a multiple of 2, the number of processes"),
        ("--devices 3", "--batch-size is 64; expected a multiple of 3, the number of devices"),
        ("--every 30", "--every is 30; expected a multiple of 20"),
        ("--optimizer lion", "(choose from "),
        ("--optimizer adam --momentum 0.5", "adam.replace: 'momentum' is unknown; choose from learning_rate, b1"),
        ("--storage int8", "(choose from "),
        ("--storage 8-bit --optimizer gradient_descent", "choose another --optimizer"),
        ("--checkpoints=", "--checkpoints is empty; expected a folder"),
        ("--checkpoints file/below/it", "no file can be made in 'file/below/it' (Not a directory)"),
        ("--checkpoints link", "no file can be made in 'link' ("),
        ("--checkpoints /proc/x", "no file can be made in '/proc/x' (No such file or directory); give another"),
        ("--checkpoints used", "has the checkpoints of a run; go on by --resume, or give another folder"),
        ("--checkpoints empty --resume", "there is no checkpoint in 'empty'"),
        ("--checkpoints missing --resume", "there is no checkpoint in 'missing'"),
    ],
)
def test_a_wrong_option_says_what_is_allowed_before_any_process_starts(options, allowed, capsys, monkeypatch, folder):
    (folder / "file").touch()
    (folder / "link").symlink_to("nowhere")
    (folder / "used" / "20").mkdir(parents=True)
    (folder / "empty").mkdir()
    monkeypatch.setattr("gdx.demo.processes.run", lambda *_, **__: pytest.fail("processes were started"))
    with pytest.raises(SystemExit) as exit_:
        main(["train", *options.split()])
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert allowed in output.err and output.out == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--steps 40 --learning-rate 0.1", r"learning_rate is 0.1, saved 0.002.* give --allow learning-rate$"),
        ("--steps 40 --learning-rate 0.1 --b1 0.8 --allow b1", r"saved 0.002.* give --allow b1,learning-rate$"),
        ("--steps 40 --storage 8-bit", "gdx.storage.convert"),
        ("--steps 20", "--steps is 20; the newest checkpoint is of step 20, expected more"),
        ("--steps 40 --seed 1", "--seed is 1; the checkpoint was saved with 0"),
        ("--steps 40 --batch-size 32", "--batch-size is 32; the checkpoint was saved with 64"),
    ],
)
def test_what_only_the_checkpoint_shows(options, said, begun, capsys):
    with pytest.raises(processes.Refused, match=said):
        here(f"{options} --resume --checkpoints {begun}")


def test_what_may_differ(begun, tmp_path, capsys):
    shutil.copytree(begun, tmp_path / "copy")
    assert here("--steps 40 --learning-rate 0.1 --allow learning-rate --resume --checkpoints copy") == 0


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "begun"
    assert here(f"--steps 20 --every 20 --checkpoints {folder}") == 0
    return folder


def test_options_reach_the_optimizer(monkeypatch):
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(train, "run", lambda arguments: seen.append(arguments) or 0)
    options = "--devices=8 --optimizer=adam --learning-rate=0.5 --b1=0.7 --storage=8-bit --seed=3"
    assert main(["train", *options.split()]) == 0
    (arguments,) = seen
    first, second = train.STORAGE["8-bit"]
    assert arguments.tx == gdx.adam(0.5, b1=0.7, mu_dtype=first, nu_dtype=second)
    assert (arguments.devices, arguments.processes, arguments.seed, arguments.steps) == (8, 1, 3, 2000)
    assert arguments.options == options.split()


def workers(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    return sorted(int(text) for path in children for text in path.read_text().split())


@pytest.mark.soak
@pytest.mark.parametrize(("count", "number"), [(2, signal.SIGKILL), (4, signal.SIGKILL), (4, signal.SIGSTOP)])
def test_a_process_lost_in_the_middle_costs_the_steps_since_the_checkpoint(count, number):
    options = f"--devices 4 --processes {count} --every 20 --checkpoints"
    assert finished(f"{options} whole --steps 140").returncode == 0
    with started(f"{options} cut --steps 140") as process:
        until(process, "checkpoint of step 60")
        os.kill(workers(process)[-1], number)
        begin = time.monotonic()
        _, errors = process.communicate(timeout=60)
        seconds = time.monotonic() - begin
    assert process.returncode == 1 and "go on from the newest checkpoint with" in errors
    assert ("SIGKILL" if number == signal.SIGKILL else "no sign of life") in errors
    assert seconds < 15
    done = finished(f"{options} cut --steps 140 --resume")
    assert done.returncode == 0, done.stderr
    start = int(done.stdout.partition("from step ")[2].split()[0])
    assert start >= 40
    # as if nothing had been
    assert_same_bits(kept("cut", "adamw"), kept("whole", "adamw"))
    assert_close(kept("cut", "adamw")[1:], plain("adamw", 140))


@pytest.mark.soak
@pytest.mark.parametrize("storage", ["bfloat16", "8-bit"])
def test_eight_devices_with_few_bits_read_digits(storage):
    done = finished(f"--devices 8 --steps 400 --storage {storage}")
    assert done.returncode == 0, done.stderr
    accuracy = done.stdout.partition("accuracy ")[2].split()[0]
    assert float(accuracy) > 93
