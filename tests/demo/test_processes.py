"""Processes that end together, whatever becomes of one of them."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("orbax.checkpoint")

from gdx.demo.processes import together
from gdx.demo.terminal import interrupted

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, sys, time
import jax
from gdx.demo.processes import PROCESS, join

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


def test_they_work_together_and_leave_no_pipe_open(capfd):
    before = len(os.listdir("/proc/self/fd"))
    body = "assert everyone() == [0, 1] and jax.device_count() == 4 and jax.local_device_count() == 2"
    assert together(program(body), 2, 2) == (0, "")
    assert len(os.listdir("/proc/self/fd")) == before and threading.active_count() < 100


def test_one_alone(capfd):
    assert together(program("assert jax.process_count() == 1 and jax.device_count() == 3"), 1, 3) == (0, "")


FAILURES = {
    "raises": ("raise KeyError('no such thing')", "process 1 of 2 failed with 1"),
    "exits": ("os._exit(7)", "process 1 of 2 failed with 7"),
    "dies": ("os.kill(os.getpid(), signal.SIGKILL)", "process 1 of 2 was ended by SIGKILL"),
    # JAX says which one it misses, and ends the other
    "stops": ("os.kill(os.getpid(), signal.SIGSTOP)", "process 0 of 2 was ended by SIGABRT"),
}


@pytest.mark.parametrize(
    "kind", ["raises", "dies", *(pytest.param(k, marks=pytest.mark.soak) for k in ("exits", "stops"))]
)
@pytest.mark.parametrize("others", ["wait in Python", pytest.param("wait for it", marks=pytest.mark.soak)])
def test_one_failure_ends_all_within_15_seconds(kind, others, tmp_path, capfd):
    deed, reason = FAILURES[kind]
    notes = tmp_path / "notes"
    waiting = "time.sleep(600)" if others == "wait in Python" else "everyone()"
    body = f"""everyone()
open({str(notes)!r} + str(number), 'w').write(f'{{time.time()}} {{os.getpid()}}')
if number == 1:
    time.sleep(0.5)
    {deed}
{waiting}"""
    ended, said = together(program(body), 2, 1)
    seconds = time.time() - max(float((tmp_path / f"notes{n}").read_text().split()[0]) for n in range(2))
    assert ended == 1 and reason in said.splitlines()
    assert kind != "raises" or "KeyError: 'no such thing'" in capfd.readouterr().err
    # to notice; this machine's other work comes on top
    assert seconds < 17
    assert not any(is_alive(int((tmp_path / f"notes{n}").read_text().split()[1])) for n in range(2))


def test_ctrl_c_reaches_all(tmp_path, capfd):
    body = f"""came = []
signal.signal(signal.SIGUSR1, lambda *_: came.append(1))
everyone()
open({str(tmp_path)!r} + f"/{{number}}", "w").close()
while not came: time.sleep(0.05)
print("told", number, flush=True); os._exit(130)"""

    def interrupt() -> None:
        while len(list(tmp_path.iterdir())) < 2:
            time.sleep(0.05)
        interrupted.set()

    threading.Thread(target=interrupt, daemon=True).start()
    assert together(program(body), 2, 1) == (130, "")
    assert sorted(capfd.readouterr().out.split()) == ["0", "1", "told", "told"]


def test_they_end_when_nobody_watches_any_more(tmp_path):
    body = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    watcher = f"from gdx.demo.processes import together; together({program(body)!r}, 1, 1)"
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
