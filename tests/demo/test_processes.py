"""Processes that end together, whatever becomes of one of them."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gdx.demo import processes
from gdx.demo.processes import run
from gdx.demo.terminal import interrupted

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, sys, time
import jax
from gdx.demo.processes import PROCESS, Refused, join

def everyone():
    from jax.experimental import multihost_utils
    return multihost_utils.process_allgather(jax.numpy.float32(jax.process_index())).tolist()

def main():
    number = int(os.environ[PROCESS].split(",")[0])
    {body}
    return 0

sys.exit(join(main))
"""


def program(body: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(body=body.replace("\n", "\n    "))]


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield
    interrupted.clear()


def is_alive(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_they_work_together(capfd):
    body = "assert everyone() == [0, 1] and jax.device_count() == 4 and jax.local_device_count() == 2"
    assert run(program(body), 2, devices=2) == (0, "")


def test_one_alone_needs_no_distributed_runtime(capfd):
    assert run(program("assert jax.process_count() == 1 and jax.device_count() == 3"), 1, devices=3) == (0, "")


FAILURES = {
    "raises": ("raise KeyError('no such thing')", 1, "process 1 of 2 failed: KeyError: 'no such thing'"),
    "refuses": ("raise Refused('--steps is wrong')", 2, "--steps is wrong"),
    "exits": ("os._exit(7)", 1, "process 1 of 2 failed: 7"),
    "dies": ("os.kill(os.getpid(), signal.SIGKILL)", 1, "process 1 of 2 was ended by SIGKILL"),
    "stops": ("os.kill(os.getpid(), signal.SIGSTOP)", 1, "process 1 of 2 showed no sign of life for 10 seconds"),
}


@pytest.mark.parametrize(
    "kind",
    ["raises", "dies", *(pytest.param(k, marks=pytest.mark.soak) for k in ("refuses", "exits", "stops"))],
)
@pytest.mark.parametrize("others", ["wait in Python", pytest.param("wait for it", marks=pytest.mark.soak)])
def test_one_failure_ends_all_within_15_seconds(kind, others, tmp_path, capfd):
    deed, code, reason = FAILURES[kind]
    notes = tmp_path / "notes"
    waiting = "time.sleep(600)" if others == "wait in Python" else "everyone()"
    body = f"""everyone()
open({str(notes)!r} + str(number), 'w').write(f'{{time.time()}} {{os.getpid()}}')
if number == 1:
    time.sleep(0.5)
    {deed}
{waiting}"""
    ended, said = run(program(body), 2, devices=1)
    seconds = time.time() - max(float((tmp_path / f"notes{n}").read_text().split()[0]) for n in range(2))
    assert ended == code and said.splitlines()[0] == reason
    # to notice; the grace for the others and this machine's other work come on top
    assert seconds < 15 + processes.GRACE
    assert not any(is_alive(int((tmp_path / f"notes{n}").read_text().split()[1])) for n in range(2))


def test_ctrl_c_reaches_all(capfd):
    body = """came = []
signal.signal(signal.SIGUSR1, lambda *_: came.append(1))
everyone()
print("begun", number, flush=True)
while not came: time.sleep(0.05)
sys.stdout.flush(); os._exit(130)"""
    threading.Timer(15, interrupted.set).start()
    assert run(program(body), 2, devices=1) == (130, "")
    assert sorted(capfd.readouterr().out.split()) == ["0", "1", "begun", "begun"]


def test_they_end_when_nobody_watches_any_more(tmp_path):
    body = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    watcher = f"from gdx.demo.processes import run; run({program(body)!r}, 1, devices=1)"
    process = subprocess.Popen([sys.executable, "-c", watcher])
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    while is_alive(int((tmp_path / "pid").read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_no_pipe_stays_open(capfd):
    before = len(os.listdir("/proc/self/fd"))
    run(program("os._exit(1)"), 2, devices=1)
    assert len(os.listdir("/proc/self/fd")) == before and threading.active_count() < 100
