"""Runs notebooks from top to bottom and saves them as the tests want them: `python -m tests.notebooks [NAMES]`.

All of them, or those whose names contain one of the given words.
"""

import base64
import io
import os
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# twice the longest that one may take on a quiet machine
SECONDS = 180


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def execute(notebook: nbformat.NotebookNode) -> None:
    """Runs every cell, in a kernel of its own that has one device; the first cell finds this checkout of gdx."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "XLA_FLAGS")}
    env |= {"JAX_PLATFORMS": "cpu"}
    client = NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": ROOT / "notebooks"}}
    )
    client.execute(env=env)


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Takes out what changes by itself, and makes pictures small."""
    notebook.metadata = nbformat.from_dict(METADATA)
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i}", nbformat.NotebookNode()
        outputs: list[nbformat.NotebookNode] = []
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and outputs and outputs[-1].get("name") == output.name:
                outputs[-1].text += output.text
                continue
            if "image/png" in output.get("data", {}):
                output.data["image/png"] = _with_few_colours(output.data["image/png"])
            outputs.append(output)
        if cell.cell_type == "code":
            cell.outputs = outputs


def _with_few_colours(data: str) -> str:
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    if picture.mode == "P" or getattr(picture, "is_animated", False):
        return data
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture, mask=picture.getchannel("A") if "A" in picture.getbands() else None)
    small = io.BytesIO()
    white.quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return base64.b64encode(small.getvalue()).decode()


def main() -> None:
    words = sys.argv[1:]
    for path in NOTEBOOKS:
        if not words or any(word in path.name for word in words):
            notebook, begin = read(path), time.perf_counter()
            execute(notebook)
            tidy(notebook)
            nbformat.write(notebook, path)
            print(f"{path.name}: {time.perf_counter() - begin:.0f} s, {path.stat().st_size:,} bytes", flush=True)


if __name__ == "__main__":
    main()
