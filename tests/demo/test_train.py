"""`python -m gdx train`: the plain run's numbers on any devices and processes, and nothing lost but the steps since."""

import argparse
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
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn")
pytest.importorskip("rich")
pytest.importorskip("orbax.checkpoint")

import gdx
from gdx.__main__ import main
from gdx.checkpoint import Checkpoints
from gdx.demo import problems, processes
from tests.contract.table import assert_same_bits
from tests.screen import shown, started

ROOT = Path(__file__).parents[2]
EPOCH = 22  # steps
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
    """The command in this process and on its eight devices, which stands for the one that would be started."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(processes.PROCESS, "")
        patch.setattr(processes, "join", lambda train: train())
        return main(["train", *shlex.split(options)])


def finished(options: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(options), capture_output=True, text=True, timeout=300)


def bytes_in(text: str) -> list[int]:
    """Of the state on one device, and of all of it."""
    return [
        int(found.replace(",", "")) for found in re.search(r"each with ([\d,]+) of the ([\d,]+) bytes", text).groups()
    ]


def plain(name: str, epochs: int) -> tuple:
    """Parameters and state of one device and nothing sharded."""
    problem, tx, key = problems.digits(), problems.OPTIMIZERS["digits"][name], jax.random.key(0)
    keys = [jax.random.fold_in(key, epoch) for epoch in range(epochs)]
    examples = jnp.concatenate([gdx.noise.epochs(key, problem.train, 64) for key in keys])
    return gdx.train(problem.loss_on, tx, problem.start(key), examples)[:2]


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
    two = finished("--processes 2 --epochs 3 --every 2 --checkpoints two")
    assert two.returncode == 0, two.stderr
    assert "devices: 2, in processes: 2, each with " in two.stdout
    here_bytes, all_bytes = bytes_in(two.stdout)
    assert all_bytes / 2 <= here_bytes < 0.55 * all_bytes
    assert "checkpoint of epoch 2: two" in two.stdout and "checkpoint of epoch 3: two" in two.stdout
    step, *run = kept("two", "adamw")
    assert step == 3 * EPOCH
    assert_close(run, plain("adamw", 3))

    assert here("--epochs 4 --checkpoints two --resume") == 0
    text = capsys.readouterr().out
    assert "adamw from epoch 3 to 4; devices: 8, in processes: 1" in text
    assert all_bytes / 8 <= bytes_in(text)[0] < 0.2 * all_bytes
    step, *run = kept("two", "adamw")
    assert step == 4 * EPOCH
    assert_close(run, plain("adamw", 4))


@pytest.mark.parametrize("count", [1, 2])
def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(count, capsys):
    options = f"--devices 2 --processes {count} --epochs 1000000 --every 2 --optimizer sgd --checkpoints 'my run'"
    with started(command(options)) as (process, screen):
        text = shown(screen, "checkpoint of epoch 4")
        assert process.poll() is None, text
        process.send_signal(signal.SIGINT)
        text = shown(screen)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    # a terminal ends with loss and accuracy, and nothing of Gloo, after what is erased
    assert re.search(r"loss [\d.]+, accuracy [\d.]+ %", text.split("\x1b[2K")[-1]), text
    assert "Gloo" not in text
    last = int([4, *re.findall(r"checkpoint of epoch (\d+)", text)][-1])
    step, params, _ = kept("my run", "sgd")
    assert step == last * EPOCH
    assert_close(params, plain("sgd", last)[0])
    (again,) = [line for line in errors.splitlines() if "go on" in line]
    again = again.partition(": ")[2].replace("--epochs 1000000", f"--epochs {last + 1}")
    assert again.startswith("python -m gdx train ") and again.endswith("--resume")
    assert here(again.removeprefix("python -m gdx train ")) == 0
    assert f"from epoch {last} to {last + 1}" in capsys.readouterr().out


@pytest.fixture
def no_process(monkeypatch):
    monkeypatch.setattr(processes, "together", lambda *_: pytest.fail("processes were started"))


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ("--devices 3", "--batch-size is 64; expected a multiple of 3, the devices"),
        ("--devices 2 --processes 5", "--batch-size is 64; expected a multiple of 10, the devices"),
        ("--every 0", "it is 0; expected more than 0"),
        ("--optimizer lion", "(choose from "),
        ("--optimizer adam --momentum 0.5", "adam.replace: 'momentum' is unknown; choose from learning_rate, b1"),
        ("--checkpoints used", "has the checkpoints of a run; go on by --resume, or give another folder"),
        ("--checkpoints empty --resume", "there is no checkpoint in "),
        ("--checkpoints missing --resume", "there is no checkpoint in "),
    ],
)
def test_a_wrong_option_says_what_is_allowed_before_any_process_starts(options, allowed, capsys, folder):
    (folder / "used" / "20").mkdir(parents=True)
    (folder / "empty").mkdir()
    with pytest.raises(SystemExit) as exit_:
        main(["train", *options.split()])
    assert exit_.value.code == 2
    output = capsys.readouterr()
    assert allowed in output.err and output.out == ""


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize("name", ["file/below/it", "link", "/proc/x", "/proc"])
def test_a_folder_in_which_no_file_can_be_made_is_refused_before_any_process_starts(name, capsys, folder):
    (folder / "file").touch()
    (folder / "link").symlink_to("nowhere")
    assert main(["train", "--checkpoints", name]) == 1
    output = capsys.readouterr()
    assert name in output.err and output.out == ""


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "begun"
    assert here(f"--epochs 1 --learning-rate 0.01 --checkpoints {folder}") == 0
    return folder


@pytest.mark.usefixtures("no_process")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("", "learning_rate is 0.002, saved 0.01"),
        ("--learning-rate 0.01 --optimizer sgd", "another optimizer"),
        ("--learning-rate 0.01 --seed 1", "was saved with {'seed': 0, 'batch_size': 64}; got {'seed': 1, 'batch_size"),
        ("--learning-rate 0.01 --batch-size 32", "was saved with {'seed': 0, 'batch_size': 64}; got {'seed': 0, 'b"),
    ],
)
def test_what_only_the_checkpoint_shows(options, said, begun, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["train", *options.split(), "--resume", "--checkpoints", str(begun)])
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


def test_a_hyperparameter_that_is_given_may_differ(begun, tmp_path, capsys):
    shutil.copytree(begun, tmp_path / "copy")
    assert here("--epochs 2 --learning-rate 0.1 --b1 0.8 --resume --checkpoints copy") == 0
    assert "from epoch 1 to 2" in capsys.readouterr().out


def test_options_reach_the_optimizer(monkeypatch):
    seen: list[argparse.Namespace] = []
    monkeypatch.setattr(processes, "train", lambda arguments: seen.append(arguments) or 0)
    options = "--devices=8 --optimizer=adam --learning-rate=0.5 --b1=0.7 --seed=3"
    assert here(options) == 0
    (arguments,) = seen
    assert arguments.tx == gdx.adam(0.5, b1=0.7)
    assert (arguments.devices, arguments.processes, arguments.seed, arguments.epochs) == (8, 1, 3, 90)
    assert arguments.options == options.split()


def workers(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task").glob("*/children")
    return sorted(int(text) for path in children for text in path.read_text().split())


@pytest.mark.soak
@pytest.mark.parametrize(("count", "number"), [(2, signal.SIGKILL), (4, signal.SIGKILL), (4, signal.SIGSTOP)])
def test_a_process_lost_in_the_middle_costs_the_steps_since_the_checkpoint(count, number):
    options = f"--devices {4 // count} --processes {count} --every 1 --checkpoints"
    assert finished(f"{options} whole --epochs 7").returncode == 0
    with started(command(f"{options} cut --epochs 7")) as (process, screen):
        shown(screen, "checkpoint of epoch 3")
        os.kill(workers(process)[-1], number)
        begin = time.monotonic()
        _, errors = process.communicate(timeout=60)
        seconds = time.monotonic() - begin
    assert process.returncode == 1 and "go on from the newest checkpoint with" in errors
    assert ("SIGKILL" if number == signal.SIGKILL else "SIGABRT") in errors
    assert seconds < 17
    done = finished(f"{options} cut --epochs 7 --resume")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.partition("from epoch ")[2].split()[0]) >= 2
    # as if nothing had been
    assert_same_bits(kept("cut", "adamw"), kept("whole", "adamw"))
    assert_close(kept("cut", "adamw")[1:], plain("adamw", 7))
