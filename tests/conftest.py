"""Strict JAX for every test: eight host devices, no implicit promotion of dtypes or ranks."""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"

import hypothesis
import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

collect_ignore = ["golden"]  # needs torch

# compiling makes the first example of each program slow, and failures must repeat from one run to the next
hypothesis.settings.register_profile("gdx", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("gdx")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the long tests too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--soak"):
        for item in items:
            if "soak" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long: run with --soak"))
