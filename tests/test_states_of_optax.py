"""States are optax's: a run goes on from the other library's checkpoint, in either direction."""

import functools
import pickle

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import gdx
from tests.contract.table import gradients, one_step, tree


def rate(count):
    return 0.01 / (1 + 0.1 * count)


def mask_of(params):
    return {name: name != "b" for name in params}


MASK = {"w": True, "b": False, "s": True}
# names and arguments that both libraries have
ARGUMENTS = {
    "sgd": [
        {},
        {"momentum": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.9, "accumulator_dtype": "bfloat16"},
    ],
    "adam": [{}, {"nesterov": True}, {"mu_dtype": "bfloat16"}, {"b1": 0.8, "b2": 0.99, "eps_root": 1e-8}],
    "adamw": [
        {},
        {"mask": MASK},
        {"mask": mask_of},
        {"nesterov": True, "mu_dtype": "bfloat16"},
        {"weight_decay": 0.1, "mask": MASK},
        {"weight_decay": rate},
        {"weight_decay": rate, "mask": MASK},
    ],
}
RATES = {"constant": 0.01, "scheduled": rate, "a schedule of optax's": optax.cosine_decay_schedule(0.1, 20)}
CASES = {
    f"{name}-{i}-{kind}": (name, {"learning_rate": learning_rate, **arguments})
    for name, several in ARGUMENTS.items()
    for i, arguments in enumerate(several)
    for kind, learning_rate in RATES.items()
}
every = pytest.mark.parametrize("case", CASES)


def pair(case):
    name, arguments = CASES[case]
    return getattr(gdx, name)(**arguments), getattr(optax, name)(**arguments)


def after(tx, steps, params=None, state=None, first=0):
    params = tree() if params is None else params
    state = tx.init(params) if state is None else state
    gs = gradients(20)
    step = jax.jit(lambda params, state, g: one_step(tx, params, state, g))
    with jax.numpy_dtype_promotion("standard"):
        for t in range(first, first + steps):
            params, state = step(params, state, jax.tree.map(lambda g: g[t], gs))  # noqa: B023
    return params, state


@functools.cache
def begun(case, library, steps):
    """A run that has met no other library."""
    return after(pair(case)[library], steps)


@every
def test_has_the_structure_and_dtypes_of_optaxs(case):
    ours, theirs = (tx.init(tree()) for tx in pair(case))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(ours)] == [(x.shape, x.dtype) for x in jax.tree.leaves(theirs)]


def by_flax(state, target):
    return flax.serialization.from_bytes(target, flax.serialization.to_bytes(state))


def by_pickle(state, target):
    return pickle.loads(pickle.dumps(state))


def by_orbax(path):
    def through(state, target):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path / "state", state)
            checkpointer.wait_until_finished()
            return checkpointer.restore(path / "state", target)

    return through


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("-scheduled")])
@pytest.mark.parametrize("way", ["flax", "pickle", "orbax"])
@pytest.mark.parametrize("direction", ["from optax", "to optax"])
def test_a_run_goes_on(case, way, direction, tmp_path):
    through = {"flax": by_flax, "pickle": by_pickle, "orbax": by_orbax(tmp_path)}[way]
    first, then = (1, 0) if direction == "from optax" else (0, 1)
    params, state = begun(case, first, 3)
    then = pair(case)[then]
    restored = through(state, then.init(params))
    found, end = after(then, 3, params, restored, first=3)
    expected, _ = begun(case, 0, 6)
    # optax rounds its corrections; and a step of gdx's reads moments in few bits as they are stored
    tolerance = 5e-3 if "bfloat16" in CASES[case][1].values() else 2e-4
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected)):
        np.testing.assert_allclose(a, b, rtol=10 * tolerance, atol=tolerance)
    assert {int(x) for x in jax.tree.leaves(end) if jnp.issubdtype(x.dtype, jnp.integer)} <= {6}
