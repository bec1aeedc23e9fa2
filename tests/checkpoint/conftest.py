"""An empty folder of checkpoints."""

import pytest

from gdx.checkpoint import Checkpoints


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(tmp_path / "run", keep=2) as checkpoints:
        yield checkpoints
