"""What the README shows works as shown."""

import re
from pathlib import Path

import jax
import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_examples_run_one_after_the_other():
    assert len(BLOCKS) >= 4
    namespace: dict = {"__name__": "readme"}
    with jax.numpy_dtype_promotion("standard"):  # as a reader's session has it
        for block in BLOCKS:
            exec(compile(block, "README.md", "exec"), namespace)


def test_your_own_transform_takes_fifteen_lines():
    (example,) = [block for block in BLOCKS if "(gdx.Transform)" in block]
    assert len([line for line in example.splitlines() if line.strip()]) <= 15


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([\w./]+)\)", README))))
def test_links_lead_somewhere(path):
    assert (Path(__file__).parents[1] / path).exists()
