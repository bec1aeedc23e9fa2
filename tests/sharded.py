"""Runs of a few steps on a mesh and off it, for the tests of sharding."""

import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gdx
from tests.contract.table import one_step

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
both_kinds = pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["automatic", "explicit"])

BLOCKS = {"block": 64, "minimum_size": 1}
EIGHT_BIT = {"mu_dtype": gdx.storage.SignedFourthRoot8(**BLOCKS), "nu_dtype": gdx.storage.FourthRoot8(**BLOCKS)}
BFLOAT16 = {"mu_dtype": "bfloat16", "nu_dtype": gdx.storage.StochasticBfloat16()}

# the element-wise family, with the dtype of the parameters
ELEMENTWISE = {
    "momentum": (gdx.momentum(0.1, 0.9), "float32"),
    "8bit momentum": (gdx.momentum(0.1, 0.9, accumulator_dtype=EIGHT_BIT["mu_dtype"]), "float32"),
    "8bit sgd": (gdx.sgd(0.1, 0.9, True, EIGHT_BIT["mu_dtype"]), "float32"),
    "adamw": (gdx.adamw(optax.linear_schedule(1e-2, 0.0, 10)), "float32"),
    "8bit": (gdx.adamw(1e-2, **EIGHT_BIT), "float32"),
    "stochastic": (gdx.chain(gdx.adamw(1e-2, **BFLOAT16), gdx.round_stochastically()), "bfloat16"),
    "corrected": (gdx.chain(gdx.momentum(0.1, 0.9), gdx.round_with_correction()), "bfloat16"),
    "compensated": (gdx.chain(gdx.momentum(0.1, 0.9), gdx.round_with_compensation()), "bfloat16"),
    "master": (gdx.chain(gdx.momentum(0.1, 0.9), gdx.round_with_master()), "bfloat16"),
}
CASES = [(name, AUTO, 8) for name in ELEMENTWISE] + [(name, EXPLICIT, 8) for name in ("adamw", "8bit", "stochastic")]
every_case = pytest.mark.parametrize(("name", "kind", "count"), CASES)

SHAPES = {"w": (64, 512), "stack": (3, 16, 64), "wide": (3, 1024), "odd": (7,), "s": ()}
FEW = {"w": (16, 64), "wide": (3, 64), "odd": (7,)}


def make_mesh(count=8, kind=AUTO):
    return jax.make_mesh((count,), ("data",), axis_types=(kind,), devices=jax.devices()[:count])


def make_params(dtype="float32", seed=0, shapes=SHAPES):
    random = np.random.default_rng(seed)
    return {name: jnp.asarray(random.standard_normal(shape).astype("float32"), dtype) for name, shape in shapes.items()}


def put(tree, mesh, specs=None):
    """A copy on the mesh, so that donating it takes nothing from the original."""
    place = lambda name: NamedSharding(mesh, (specs or {}).get(name, P()))  # noqa: E731
    return {name: jax.device_put(np.array(x), place(name)) for name, x in tree.items()}


def step_of(tx):
    return jax.jit(functools.partial(one_step, tx), donate_argnums=(0, 1))


class Run(NamedTuple):
    """Three steps, and the program that made them."""

    start: Any
    params: Any
    state: Any
    text: str


def run(tx, params, gradients):
    start = tx.init(params)
    compiled = step_of(tx).lower(params, start, gradients[0]).compile()
    held = jax.tree.map(lambda x: x.sharding, start)
    state = start
    for g in gradients:
        params, state = compiled(params, state, g)
    return Run(held, params, state, compiled.as_text())


@functools.cache
def sharded_run(name, kind, count):
    tx, dtype = ELEMENTWISE[name]
    mesh = make_mesh(count, kind)
    params, *gradients = (put(make_params(dtype, seed), mesh) for seed in range(4))
    return run(gdx.sharding.shard_state(tx, mesh), params, gradients)


@functools.cache
def unsharded_run(name):
    tx, dtype = ELEMENTWISE[name]
    params, *gradients = (make_params(dtype, seed) for seed in range(4))
    return run(tx, params, gradients)


def on_device(tree):
    """Bytes of the arrays of a tree on the first device."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def collectives(text):
    """The collective operations of a compiled program, each with its number of elements."""
    operations = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    return [
        (operation, max(math.prod(map(int, filter(None, d.split(",")))) for d in re.findall(r"\[([\d,]*)\]", shape)))
        for shape, operation in re.findall(rf"= (.*?) ({operations})(?:-start)?\(", text)
    ]
