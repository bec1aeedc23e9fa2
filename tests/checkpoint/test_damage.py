"""Whatever happens to its files, a checkpoint is restored as it was saved, or refused with one kind of error.

The damage is done in a process of its own: where Orbax cannot read one array, it leaves the reading of others to the
garbage collector, which complains.
"""

import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

import gdx
from gdx.checkpoint import CheckpointError, Checkpoints
from gdx.checkpoint.manifest import digest
from tests.contract.table import assert_same_bits

TX = gdx.adam(0.01, mu_dtype=gdx.storage.SignedFourthRoot8())


def run(step: int) -> tuple:
    """Parameters and state of a step, the same in every process."""
    w, b = (
        jax.random.normal(key, shape) for key, shape in zip(jax.random.split(jax.random.key(step)), [(64, 256), (16,)])
    )
    params = {"w": w, "b": b}
    return params, TX.update(params, TX.init(params))[1]


def changes(file: Path, generator: random.Random) -> Iterator[tuple[str, bytes | None]]:
    """What may become of a file: a changed bit, a cut, nothing."""
    content = file.read_bytes()
    for place in sorted({0, len(content) - 1, *(generator.randrange(len(content)) for _ in range(6))}):
        flipped = content[place] ^ (1 << generator.randrange(8))
        yield f"changed {place}", content[:place] + bytes([flipped]) + content[place + 1 :]
    yield "cut in half", content[: len(content) // 2]
    yield "empty", b""
    yield "missing", None


def outcome(folder: Path, expected: tuple) -> str:
    params, state = run(0)
    before = jax.tree.map(np.array, (params, state))
    try:
        with Checkpoints(folder) as checkpoints:
            restored = checkpoints.restore(TX, params, state)
        assert_same_bits(tuple(restored), expected)
        return "the same"
    except CheckpointError as error:
        return f"refused: {error}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    finally:
        assert_same_bits(before, jax.tree.map(np.array, (params, state)))


def damage_files(folder: Path) -> None:
    with Checkpoints(folder / "whole") as checkpoints:
        checkpoints.save(2, TX, *run(2), extra=[1])
    expected = (2, *run(2), [1])
    assert outcome(folder / "whole", expected) == "the same"
    generator = random.Random(0)
    for file in sorted(path for path in (folder / "whole").rglob("*") if path.is_file() and path.stat().st_size):
        content = file.read_bytes()
        for what, changed in changes(file, generator):
            file.unlink() if changed is None else file.write_bytes(changed)
            name = str(file.relative_to(folder / "whole"))
            print(json.dumps([name, len(content), what, outcome(folder / "whole", expected)]), flush=True)
            file.write_bytes(content)


def damage_folders(folder: Path) -> None:
    import orbax.checkpoint as ocp

    with Checkpoints(folder / "whole") as checkpoints:
        checkpoints.save(2, TX, *run(2))

    def report(name: str) -> None:
        print(json.dumps([name, 0, "", outcome(folder / name, ())]), flush=True)

    def copy(name: str) -> Path:
        return Path(shutil.copytree(folder / "whole", folder / name))

    report("no folder")
    assert not (folder / "no folder").exists()
    (folder / "a file").write_text("hello")
    report("a file")
    (folder / "nothing in it").mkdir()
    report("nothing in it")
    (folder / "empty step" / "3").mkdir(parents=True)
    report("empty step")
    (folder / "other files" / "3" / "arrays").mkdir(parents=True)
    (folder / "other files" / "3" / "arrays" / "readme.txt").write_text("hello")
    report("other files")
    shutil.rmtree(copy("no arrays") / "2" / "arrays")
    report("no arrays")
    shutil.rmtree(copy("no manifest") / "2" / "manifest")
    report("no manifest")
    (copy("another step") / "2").rename(folder / "another step" / "7")
    report("another step")
    manifest = copy("another format") / "2" / "manifest" / "metadata"
    changed = json.loads(manifest.read_text()) | {"format": 99}
    manifest.write_text(json.dumps({**changed, "digest": digest(changed)}))
    report("another format")
    manifest = copy("another extra") / "2" / "manifest" / "metadata"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"extra": 1}))
    report("another extra")
    with ocp.CheckpointManager(folder / "of Orbax alone") as manager:
        manager.save(3, args=ocp.args.StandardSave(run(2)[0]))
    report("of Orbax alone")
    with Checkpoints(folder / "arrays of another run") as checkpoints:
        checkpoints.save(2, TX, *run(3))
    shutil.rmtree(folder / "arrays of another run" / "2" / "arrays")
    shutil.copytree(folder / "whole" / "2" / "arrays", folder / "arrays of another run" / "2" / "arrays")
    report("arrays of another run")


def fill_the_disk(folder: Path) -> None:
    """Two steps are saved, two fail, and then two are saved again."""
    import resource
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(folder, keep=2) as checkpoints:
        for step, limit in enumerate((soft, soft, 10_000, 10_000, soft, soft)):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
            try:
                checkpoints.save(step, TX, *run(step))
                checkpoints.wait()
                failed = None
            except Exception as error:
                failed = str(error)
            kept = sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())
            print(json.dumps([failed, checkpoints.steps, kept]), flush=True)


def reported(function: str, folder: Path) -> list[list]:
    code = f"from tests.checkpoint.test_damage import *; {function}(Path({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_no_changed_byte_is_taken_for_what_was_saved(tmp_path):
    reports = reported("damage_files", tmp_path)
    for name, _, what, result in reports:
        # some of Orbax's own files are of no use any more
        assert result == "the same" or result.startswith("refused: restore: "), (name, what, result)
    in_manifest = [result for name, _, _, result in reports if name == "2/manifest/metadata"]
    in_data = [result for _, size, _, result in reports if size > 10_000]
    assert len(in_manifest) >= 9 and "the same" not in in_manifest
    assert len(in_data) >= 9 and in_data.count("the same") <= len(in_data) // 4
    assert any("is not what was saved" in result for result in in_data)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    results = {name: result for name, _, _, result in reported("damage_folders", tmp_path)}
    assert len(results) == 12
    for name, result in results.items():
        assert result.startswith("refused: "), (name, result)
    assert "there is no checkpoint in" in results["no folder"]
    assert "is no directory" in results["a file"]
    assert "its manifest cannot be read" in results["of Orbax alone"]
    for name in ("another step", "another extra"):
        assert "its manifest is not what was saved" in results[name]
    assert "has format 99; this version of gdx reads 2" in results["another format"]
    assert "params/b is not what was saved" in results["arrays of another run"]


def test_steps_are_what_is_on_disk_after_a_write_that_failed(tmp_path):
    """And `keep` counts them all."""
    failed, steps, kept = zip(*reported("fill_the_disk", tmp_path))
    assert ["File too large" in (error or "") for error in failed] == [False, False, True, True, False, False]
    assert list(steps) == list(kept) == [[0], [0, 1], [0, 1], [0, 1], [1, 4], [4, 5]]


def content(step: int) -> tuple:
    """Parameters and state of a step, without JAX."""
    generator = np.random.default_rng(step)
    return {"w": generator.normal(size=(256, 256))}, (generator.integers(9, size=(4, 256), dtype=np.int32),)


def save_when_told(folder: Path) -> None:
    """Saves one step after the other, and notes those that are whole."""
    sys.stdin.readline()
    with Checkpoints(folder / "run") as checkpoints:
        step = max(checkpoints.steps, default=0)
        while True:
            step += 1
            checkpoints.save(step, TX, *content(step))
            if step % 2:
                checkpoints.wait()
                print(step, flush=True)


@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.soak)])
def test_the_newest_checkpoint_restores_after_a_kill_at_any_moment(kills, tmp_path):
    code = f"from tests.checkpoint.test_damage import *; save_when_told(Path({str(tmp_path)!r}))"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    generator, unfinished, newest = random.Random(0), 0, 0
    waiting: list[subprocess.Popen] = []
    for left in range(kills, 0, -1):
        while len(waiting) < min(left, 3):  # the next ones start while this one works
            waiting.append(subprocess.Popen([sys.executable, "-c", code], text=True, bufsize=1, **pipes))
        with waiting.pop(0) as process:
            process.stdin.write("go\n")
            whole = int(process.stdout.readline())
            time.sleep(generator.uniform(0, 0.3))
            process.kill()
            whole = max([whole, *map(int, process.stdout.read().split())])
        unfinished += any("tmp" in path.name for path in (tmp_path / "run").iterdir())
        with Checkpoints(tmp_path / "run") as checkpoints:
            step, params, state, _ = checkpoints.restore(TX, *content(0))
        assert step >= whole > newest
        assert_same_bits((params, state), content(step))
        newest = step
    assert unfinished > 0
