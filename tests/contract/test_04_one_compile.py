"""Promise 4: one compile for any change of any hyperparameter's value."""

import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.contract.table import another, every_case, gradients, one_step, tree


@every_case
def test_one_trace_and_one_text_for_all_values(row, settings):
    traces = []

    @jax.jit
    def step(tx, params, state, g):
        traces.append(1)
        return one_step(tx, params, state, g)

    tx, params, g = row.make(**settings), row.tree(), jax.tree.map(lambda g: g[0], gradients(1))
    state = tx.init(params)
    step(tx, params, state, g)
    texts = {step.lower(tx, params, state, g).as_text()}
    for name, value in tx.hyperparams.items():
        for spelling in (float, np.float16, np.float64, jax.numpy.float32, jax.numpy.bfloat16):
            changed = tx.replace(**{name: spelling(another(name, value))})
            step(changed, params, state, g)
            texts.add(step.lower(changed, params, state, g).as_text())
    assert len(traces) == 1
    assert len(texts) == 1


PROGRAM = """
import sys, jax, jax.numpy as jnp, gdx
missed = []
jax.monitoring.register_event_listener(lambda event, **_: missed.append(event) if "cache_misses" in event else None)
tx, params = gdx.adamw(float(sys.argv[1])), {"w": jnp.ones((3, 5))}
state = jax.jit(tx.init)(params)
jax.jit(lambda tx, g, state, params: tx.update(g, state, params))(tx, params, state, params)
print(len(missed))
"""


def test_a_second_process_with_another_rate_compiles_nothing(tmp_path):
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    def misses(learning_rate: str) -> int:
        command = [sys.executable, "-c", PROGRAM, learning_rate]
        return int(
            subprocess.run(command, env={**os.environ, **cache}, capture_output=True, text=True, check=True).stdout
        )

    assert misses("0.1") > 0
    assert misses("0.2") == 0


@pytest.mark.parametrize("first", [0.1, 1])
def test_calls_of_the_first_and_later_steps_are_one_program(first):
    """No weak type, dtype or sharding of the state changes after the first step."""
    from gdx import adamw

    step = jax.jit(lambda *args: one_step(*args))
    tx, params, g = adamw(first), tree(), jax.tree.map(lambda g: g[0], gradients(1))
    state = tx.init(params)
    for _ in range(3):
        params, state = step(tx, params, state, g)
    assert step._cache_size() == 1
