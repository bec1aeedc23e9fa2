"""Strict JAX for every test: eight host devices, no implicit promotion of dtypes or ranks."""

import gc
import itertools
import os
import tempfile
from pathlib import Path

# a small program is compiled faster whole than in the parts that many threads could compile
FLAGS = "--xla_force_host_platform_device_count=8 --xla_cpu_parallel_codegen_split_count=1"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
# what thousands of tests keep is large, and to look through all of it for garbage takes seconds
gc.set_threshold(20_000, 50, 100)

import hypothesis
import jax
import pytest

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# most of a test's time is XLA's: what this process has compiled once, it reads back when another function is the same
# program; a folder for each process, since one may read what another is about to write
PROGRAMS = tempfile.TemporaryDirectory(prefix="gdx-programs-", ignore_cleanup_errors=True)
jax.config.update("jax_compilation_cache_dir", PROGRAMS.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

collect_ignore = ["golden"]  # needs torch

# compiling makes the first example of each program slow, and failures must repeat from one run to the next
hypothesis.settings.register_profile("gdx", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("gdx")


MAPS = Path("/proc/self/maps")
TESTS = itertools.count(1)


@pytest.fixture(autouse=True)
def _room_for_programs():
    """A compiled program takes three memory maps or more; Linux gives a process 65,530, beyond which XLA crashes."""
    yield
    if next(TESTS) % 20 == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="run the long tests too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--soak"):
        for item in items:
            if "soak" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long: run with --soak"))
