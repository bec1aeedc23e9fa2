"""What the README shows works as shown."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
HERE = re.escape(PROJECT["urls"]["Repository"].removeprefix("https://github.com/"))
HERE = rf"https://(?:github\.com/{HERE}/blob|raw\.githubusercontent\.com/{HERE})/main/"
LINKS = sorted(set(re.findall(r"\]\(([^)\s]+)\)", README)))
HEADINGS = re.findall(r"^#+ (.*)$", README, re.MULTILINE)


def test_the_examples_run_one_after_the_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) == 4 and jax.device_count() == 8
    namespace: dict = {"__name__": "readme"}
    with jax.numpy_dtype_promotion("standard"):  # as a reader's session has it
        for block in BLOCKS:
            exec(compile(block, "README.md", "exec"), namespace)


def test_the_examples_run_on_one_device(tmp_path):
    program = "\n".join([*BLOCKS, "assert jax.device_count() == 1"] * 2)  # a second time too
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=env, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_your_own_link_takes_twelve_lines():
    (example,) = [block for block in BLOCKS if "(gdx.Leafwise)" in block]
    assert len([line for line in example.splitlines() if line.strip()]) <= 12


@pytest.mark.parametrize("link", LINKS)
def test_links_lead_somewhere_from_a_package_index_too(link):
    assert re.match("https://|#", link), "a package index has none of the files"
    if link.startswith("#"):
        anchors = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in HEADINGS]
        assert link[1:] in anchors
    if (path := re.sub(HERE, "", link)) != link:
        assert (ROOT / path).exists()


def test_is_short():
    assert len(README.splitlines()) <= 150


def test_the_versions_are_those_that_the_package_asks_for():
    said = re.search(r"runs on Python (\S+) to (\S+) with jax (\S+) or newer and optax (\S+) or newer", README)
    asked = dict(requirement.split(">=") for requirement in PROJECT["dependencies"])
    assert said[1] == PROJECT["requires-python"].removeprefix(">=")
    assert f"Programming Language :: Python :: {said[2]}" == max(
        kind for kind in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", kind)
    )
    assert (said[3], said[3], said[4]) == (asked["jax"], asked["jaxlib"], asked["optax"])
    assert set(re.findall(r"keeps a jax of (\S+) or newer", README)) == {asked["jax"]}
    assert f"with Python {said[1]} or newer" in README
