"""An optimizer as texts that tell it from any other."""

import functools
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from gdx.checkpoint.describe import describe


def halved(tx):
    return optax.MultiSteps(tx, 2)


OPTIMIZERS = [
    "gdx.adamw(1e-3)",
    "gdx.adamw(2e-3)",
    "gdx.adamw(1e-3, b1=0.8)",
    "gdx.adamw(1e-3, mu_dtype='bfloat16')",
    "gdx.adamw(1e-3, mu_dtype=gdx.storage.SignedFourthRoot8())",
    "gdx.adamw(1e-3, mu_dtype=gdx.storage.SignedFourthRoot8(block=128))",
    "gdx.adam(1e-3)",
    "gdx.chain(gdx.adamw(1e-3))",
    "gdx.chain(gdx.adamw(1e-3), gdx.sgd(0.1))",
    "gdx.chain(gdx.sgd(0.1), gdx.adamw(1e-3))",
    "gdx.chain(optax.clip(1.0), gdx.sgd(0.1))",
    "gdx.value(halved)(gdx.sgd(0.1))",
    "gdx.value(halved)(gdx.sgd(0.2))",
    "gdx.value(optax.MultiSteps)(gdx.sgd(0.2), 2)",
    "gdx.value(optax.MultiSteps)(gdx.sgd(0.2), 3)",
    "gdx.value(optax.lion)(0.1)",
    "gdx.value(optax.lion)(0.2)",
    "gdx.value(optax.lion)(0.2, b1=0.8)",
    "gdx.chain(gdx.value(optax.clip)(1.0), gdx.sgd(0.1))",
    "gdx.chain(gdx.value(optax.clip)(2.0), gdx.sgd(0.1))",
    "gdx.sgd(gdx.schedules.linear_schedule(0.1, 0.0, transition_steps=300))",
    "gdx.sgd(gdx.schedules.linear_schedule(0.1, 0.0, transition_steps=400))",
    "gdx.sgd(gdx.schedule(optax.linear_schedule)(0.1, 0.0, transition_steps=300))",
    "gdx.sgd(gdx.schedule(optax.linear_schedule)(0.1, 0.0, transition_steps=400))",
    "gdx.sgd(optax.linear_schedule(0.1, 0.0, 300))",
    "gdx.sgd(optax.linear_schedule(0.1, 0.0, 400))",
    "gdx.grid(gdx.sgd, learning_rate=[0.1, 0.2])",
    "gdx.grid(gdx.sgd, learning_rate=[0.1, 0.3])",
    "optax.adam(0.1)",
    "optax.chain(optax.clip(1.0), gdx.sgd(0.1))",
    "optax.chain(optax.clip(1.0), gdx.sgd(0.2))",
    "optax.chain(optax.masked(gdx.sgd(0.1), True), gdx.adamw(1e-3))",
    "optax.chain(optax.masked(gdx.sgd(0.1), True), gdx.adamw(2e-3))",
    "optax.chain(gdx.adamw(1e-3), optax.masked(gdx.sgd(0.1), True))",
    "gdx.chain(optax.masked(gdx.sgd(0.1), True), gdx.sgd(0.1))",
    "gdx.chain(optax.masked(gdx.sgd(0.2), True), gdx.sgd(0.1))",
    "halved(gdx.sgd(0.1))",
    "halved(gdx.sgd(0.2))",
    "optax.partition({'a': gdx.sgd(0.1), 'b': gdx.sgd(0.2)}, {'w': 'a'})",
    "optax.partition({'a': gdx.sgd(0.2), 'b': gdx.sgd(0.1)}, {'w': 'a'})",
    "optax.apply_if_finite(gdx.sgd(0.1), 3)",
    "optax.apply_if_finite(gdx.sgd(0.2), 3)",
]


def made(text: str):
    return eval(text, {"gdx": gdx, "optax": optax, "halved": halved})


def test_any_two_differ():
    described = [describe(made(text)) for text in OPTIMIZERS]
    for i, first in enumerate(described):
        assert first == describe(made(OPTIMIZERS[i]))
        assert all(first != second for second in described[:i])


def test_another_process_says_the_same():
    code = "from tests.checkpoint.test_describe import *\nfor t in OPTIMIZERS: print(describe(made(t)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(describe(made(text))) for text in OPTIMIZERS]
    assert "0x" not in done.stdout


@pytest.mark.parametrize("value", [1e-3, np.float32(1e-3), jnp.float32(1e-3), jnp.bfloat16(1e-3)])
def test_a_number_is_what_enters_the_program(value):
    assert describe(gdx.sgd(value))["learning_rate"] == str(float(str(np.float32(value))))


def test_the_names_are_those_of_the_hyperparameters():
    tx = gdx.chain(gdx.adamw(1e-3), gdx.sgd(0.1, 0.9))
    assert set(tx.hyperparams) <= set(describe(tx))


def test_strict_dtypes_do_not_keep_schedules_from_being_looked_at():
    with jax.numpy_dtype_promotion("strict"):
        assert "with values" in describe(gdx.sgd(optax.cosine_decay_schedule(0.1, 100)))["learning_rate"]


def test_places_do_not_count():
    mesh = jax.make_mesh((8,), ("data",))
    tx = gdx.adamw(1e-3)
    assert describe(gdx.sharding.shard_state(tx, mesh)) == describe(tx)
    assert describe(gdx.sharding.shard_state(optax.adam(1e-3), mesh)) == describe(optax.adam(1e-3))
    chained = gdx.chain(gdx.sharding.shard_state(tx, mesh), optax.clip(1.0))
    assert describe(chained) == describe(gdx.chain(tx, optax.clip(1.0)))
    chained = optax.chain(gdx.sharding.shard_state(tx, mesh), optax.clip(1.0))
    assert describe(chained) == describe(optax.chain(tx, optax.clip(1.0)))


def test_functions_of_ones_own_are_looked_into_as_far_as_they_go():
    """Round a circle, past a variable that has no value, and not into other objects."""
    model = types.SimpleNamespace(tx=gdx.adam(0.1))

    def mine(*containers):
        def update(updates, state, params=None):
            return containers, model, unset, update

        if not containers:
            unset = None
        return optax.GradientTransformation(model.tx.init, functools.partial(update))

    assert describe(mine(1)) == {"optimizer": "<optax partial>"}
    assert describe(mine([{"a": gdx.sgd(0.1).update}])) == {"optimizer": "<optax partial>(sgd)"} | {
        name: text for name, text in describe(gdx.sgd(0.1)).items() if name != "optimizer"
    }
