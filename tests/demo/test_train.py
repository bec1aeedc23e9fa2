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
from gdx.demo import problems, processes, train
from gdx.demo.loop import batches
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
    return train._train(train.plan(parser.parse_args(shlex.split(options))))


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
    stream = batches(problems.TRAINING_IMAGES, problems.BATCH_SIZE, np.random.default_rng(0))
    examples = np.stack(list(itertools.islice(stream, steps)))
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


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(capsys):
    with started("--devices 2 --steps 1000000 --every 20 --optimizer sgd --checkpoints 'my run'") as process:
        until(process, "checkpoint of step 40")
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    last = int(output.splitlines()[-1].split()[3].rstrip(":")) if "checkpoint" in output else 40
    step, params, _ = kept("my run", "sgd")
    assert step == last and step % train.CHUNK == 0
    assert_close(params, plain("sgd", step)[0])
    (again,) = [line for line in errors.splitlines() if "go on" in line]
    again = again.partition(": ")[2].replace("--steps=1000000", f"--steps={step + 20}")
    assert again.startswith("python -m gdx train ") and again.endswith("--resume")
    assert here(again.removeprefix("python -m gdx train ")) == 0
    assert f"from step {step} to {step + 20}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        (
            "--devices 3 --processes 2",
            "which 2 processes cannot share equally; expected a positive multiple of 2",
        ),
        ("--devices 0", "which 1 process cannot share equally; expected a positive multiple of 1"),
        ("--processes 0", "--processes is 0; expected at least 1"),
        ("--devices 3", "--batch-size is 64, which 3 devices cannot share equally; expected a multiple of 3"),
        ("--batch-size 2000", "expected 1 to 1437"),
        ("--every 30", "--every is 30; expected a multiple of 20"),
        ("--steps 0", "expected at least 1"),
        ("--seed -1", "expected 0 to 4294967295"),
        ("--optimizer lion", "choose from gradient_descent, sgd"),
        ("--optimizer adam --momentum 0.5", "choose --optimizer sgd, momentum or nesterov"),
        ("--learning-rate -1", "expected a finite number >= 0"),
        ("--storage int8", "choose from float32, bfloat16, 8-bit"),
        ("--storage 8-bit --optimizer gradient_descent", "choose another --optimizer"),
        ("--checkpoints file", "but 'file' is no folder that can be written; give another one"),
        ("--checkpoints file/below/it", "--checkpoints is 'file/below/it', but 'file' is no folder"),
        ("--checkpoints file/below --resume", "--checkpoints is 'file/below', but 'file' is no folder"),
        ("--checkpoints link", "but 'link' is no folder"),
        ("--checkpoints locked/below", "but 'locked' is no folder that can be written"),
        ("--checkpoints used", "where a run has left checkpoints; go on with it by --resume"),
        ("--checkpoints empty --resume", "there is no checkpoint in 'empty'"),
        ("--checkpoints missing --resume", "there is no checkpoint in 'missing'"),
        ("--device 2", "unrecognized arguments"),
    ],
)
def test_a_wrong_option_says_what_is_allowed_before_any_process_starts(options, allowed, capsys, monkeypatch, folder):
    (folder / "file").touch()
    (folder / "link").symlink_to("nowhere")
    (folder / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")  # root may write anywhere
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
    plans: list[train.Plan] = []
    monkeypatch.setattr(train, "run", lambda plan: plans.append(plan) or 0)
    options = "--devices=8 --optimizer=adam --learning-rate=0.5 --b1=0.7 --storage=8-bit --seed=3"
    assert main(["train", *options.split()]) == 0
    (plan,) = plans
    first, second = train.STORAGE["8-bit"]
    assert plan.tx == gdx.adam(0.5, b1=0.7, mu_dtype=first, nu_dtype=second)
    assert (plan.devices, plan.processes, plan.seed, plan.steps) == (8, 1, 3, 2000)
    assert plan.again == f"python -m gdx train {options} --resume"


def workers(process: subprocess.Popen) -> list[int]:
    return [int(text) for text in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


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
