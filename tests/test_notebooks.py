"""The notebooks: saved with their pictures, and each runs from top to bottom in a kernel of its own."""

from pathlib import Path

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


def test_starts_with_the_same_cells():
    starts = {tuple(cell.source for cell in read(path).cells[1:3]) for path in NOTEBOOKS}
    ((about, setup),) = starts
    assert "import gdx" in about
    assert "import gdx" in setup


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
