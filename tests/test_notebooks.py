"""The notebooks: saved with their pictures, and each runs from top to bottom in a kernel of its own."""

import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import jax
import nbformat
import pytest

from tests.notebooks import METADATA, NOTEBOOKS, ROOT, execute, read

LARGEST = 600_000  # bytes


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


def code_cells(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def check_outputs(notebook: nbformat.NotebookNode) -> None:
    """Every cell ran, in order, without an error or a warning, and something was drawn."""
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert any(kind.startswith("image/") for output in outputs for kind in output.get("data", {}))


def test_there_are_notebooks():
    assert NOTEBOOKS


def test_is_saved_as_it_ran(path):
    check_outputs(read(path))


def test_is_saved_without_what_changes_by_itself(path):
    notebook = read(path)
    assert notebook.metadata == METADATA
    assert not any(cell.metadata for cell in notebook.cells)
    assert [cell.id for cell in notebook.cells] == [f"cell-{i}" for i in range(len(notebook.cells))]
    assert path.stat().st_size < LARGEST


def setup_of(path: Path) -> str:
    """The first cell, which makes `import gdx` work."""
    return next(cell.source for cell in code_cells(read(path)) if "import gdx" in cell.source)


def test_starts_with_the_same_cells(path):
    cells = [cell.source for cell in read(path).cells]
    at = cells.index(setup_of(path))
    first = [cell.source for cell in read(NOTEBOOKS[0]).cells]
    assert cells[at - 1 : at + 1] == first[1:3]
    # only the notebook on eight devices has something before it: what XLA has to know before jax looks for devices
    flags = "--xla_force_host_platform_device_count=8" in cells[at - 2]
    assert at == (4 if flags else 2)
    assert flags == path.stem.startswith("6_") == bool(re.search("jax_platforms", "".join(cells), re.IGNORECASE))


# a kernel whose pip says what it is given, and puts gdx and Orbax where the environment has its packages
KERNEL = """
import os, sys
from IPython.core.interactiveshell import InteractiveShell

def pip(line):
    print("pip", line)
    for name, source in {installs!r}.items():
        os.symlink(source, os.path.join({packages!r}, name))

shell = InteractiveShell.instance()
sys.path.insert(0, "")
shell.register_magic_function(pip, magic_name="pip")
done = shell.run_cell({cell!r})
print("error", done.error_in_exec) if done.error_in_exec else print("gdx", sys.modules["gdx"].__file__)
"""
PIP = rf'pip install -q "(.*)\[notebooks\]" "jax=={version("jax")}"\n'


class Environment:
    """The packages of this one, without gdx."""

    def __init__(self, folder: Path):
        self.packages = folder / "packages"
        self.packages.mkdir()
        self.uploads = folder / "content"
        self.uploads.mkdir()
        for parent in {Path(jax.__file__).parents[1], Path(nbformat.__file__).parents[1]}:
            for package in parent.iterdir():
                if "gdx" not in package.name and package.suffix != ".pth":
                    (self.packages / package.name).symlink_to(package)

    def run(self, here: Path, *installs: Path) -> str:
        """What the first cell prints."""
        cell = setup_of(NOTEBOOKS[0]).replace("/content", str(self.uploads))
        program = KERNEL.format(
            cell=cell, packages=str(self.packages), installs={path.name: str(path) for path in installs}
        )
        env = {"PYTHONPATH": str(self.packages), "JAX_PLATFORMS": "cpu", "HOME": str(self.uploads.parent)}
        done = subprocess.run(
            [sys.executable, "-S", "-P", "-c", program], capture_output=True, text=True, env=env, cwd=here, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path)


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    (tmp_path / "elsewhere").mkdir()
    return tmp_path / "elsewhere"


def test_where_gdx_is_installed(environment, elsewhere):
    (environment.packages / "gdx").symlink_to(ROOT / "gdx")
    found = environment.run(elsewhere)
    assert found == f"[CpuDevice(id=0)]\n\ngdx {environment.packages / 'gdx' / '__init__.py'}\n"


# the checkout's own name is that of the package: from the folder above, Python finds a gdx without anything in it
@pytest.mark.parametrize("start", ["gdx", "gdx/notebooks", "gdx/notebooks/deeper", "."])
def test_in_a_checkout(start, environment, elsewhere):
    checkout = elsewhere / "gdx"
    (checkout / "notebooks" / "deeper").mkdir(parents=True)
    (checkout / "gdx").symlink_to(ROOT / "gdx")
    assert "pip" not in (found := environment.run(elsewhere / start))
    assert Path(found.split("\ngdx ")[1].strip()).resolve() == ROOT / "gdx" / "__init__.py"


@pytest.mark.parametrize("missing", ["orbax", "optax"])
def test_what_a_checkout_misses_is_installed(missing, environment, elsewhere):
    (elsewhere / "gdx").symlink_to(ROOT / "gdx")
    package = (environment.packages / missing).readlink()
    (environment.packages / missing).unlink()
    assert re.match(PIP, found := environment.run(elsewhere, package))[1] == str(elsewhere)
    assert f"gdx {elsewhere}" in found


@pytest.mark.parametrize("place", ["beside the notebook", "uploaded"])
def test_the_newest_wheel(place, environment, elsewhere):
    folder = elsewhere if place == "beside the notebook" else environment.uploads
    wheels = [folder / f"gdx_jax-0.{i}.0-py3-none-any.whl" for i in (10, 9)]
    for i, wheel in enumerate(wheels):
        zipfile.ZipFile(wheel, "w").close()
        os.utime(wheel, (i, i))
    (folder / "gdx_jax-0.10.0-py3-none-any (1).whl").touch()  # no name that pip takes
    (folder / "gdx_jax-0.11.0-py3-none-any.whl").write_text("what is left of a download")
    (elsewhere / "gdx").mkdir()  # no package
    assert re.match(PIP, found := environment.run(elsewhere, ROOT / "gdx"))[1] == str(wheels[0])
    assert f"gdx {environment.packages}" in found


def test_from_the_package_index(environment, elsewhere):
    assert re.match(PIP, found := environment.run(elsewhere, ROOT / "gdx"))[1] == "gdx-jax"
    assert f"gdx {environment.packages}" in found


def test_otherwise_it_says_what_to_do(environment, elsewhere):
    found = environment.run(elsewhere)
    assert re.match(PIP, found)[1] == "gdx-jax"
    assert re.search(r"error No module named 'gdx'. Put a whole wheel .* run this cell again", found)


def test_tells_what_to_try_next(path):
    last = read(path).cells[-1]
    assert last.cell_type == "markdown"
    assert last.source.startswith("## What to try next")


@pytest.mark.soak
def test_runs(path):
    notebook = read(path)
    where = nbformat.v4.new_code_cell("gdx.__file__")
    notebook.cells.append(where)
    execute(notebook)
    check_outputs(notebook)
    assert where.outputs[0].data["text/plain"] == repr(str(ROOT / "gdx" / "__init__.py"))
