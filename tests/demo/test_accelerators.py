"""Where JAX leaves a GPU or TPU unused, the notebooks say so."""

import jax
import pytest

from gdx.demo.accelerators import unused


@pytest.fixture(autouse=True)
def nothing_asked_for(monkeypatch):
    monkeypatch.delenv("TPU_ACCELERATOR_TYPE", raising=False)
    jax.config.update("jax_platforms", None)
    yield
    jax.config.update("jax_platforms", "cpu")


@pytest.mark.parametrize(("file", "extra"), [("nvidia0", "cuda12"), ("accel3", "tpu")])
def test_says_how_to_use_it(file, extra, tmp_path):
    (tmp_path / file).touch()
    assert f'%pip install "jax[{extra}]=={jax.__version__}"' in unused(tmp_path)


def test_a_tpu_that_shows_in_the_environment_only(tmp_path, monkeypatch):
    monkeypatch.setenv("TPU_ACCELERATOR_TYPE", "v5litepod-1")
    assert "jax[tpu]" in unused(tmp_path)


def test_is_silent_where_all_is_well(tmp_path, monkeypatch):
    (tmp_path / "nvidiactl").touch()  # the driver without a GPU
    (tmp_path / "accel").mkdir()
    assert unused(tmp_path) == ""
    (tmp_path / "nvidia0").touch()
    assert unused(tmp_path)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert unused(tmp_path) == ""


def test_is_silent_where_the_cpu_was_asked_for(tmp_path):
    (tmp_path / "nvidia0").touch()
    jax.config.update("jax_platforms", "cpu")
    assert unused(tmp_path) == ""
