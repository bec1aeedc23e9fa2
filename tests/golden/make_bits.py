"""The float32 parameters of the six optimizers after 100 jitted steps, whose bits no change may move.

    python -m tests.golden.make_bits FILE

bits_contracted.npz was made by the first version of gdx with jax 0.10.2, and has the bits of 0.7.2 to 0.11.2;
bits_separate.npz with jax 0.12.0.1, where each product is rounded by itself (see `gdx.compat.contracts_all`).
"""

import functools
import sys

import jax
import numpy as np
import optax

import gdx
from tests.contract.table import gradients, scan, tree

RATES = {"constant": 0.01, "scheduled": optax.linear_schedule(0.02, 0.001, 80)}
OPTIMIZERS = {
    "gradient_descent": gdx.gradient_descent,
    "sgd": lambda rate: gdx.sgd(rate, momentum=0.9, nesterov=True),
    "momentum": gdx.momentum,
    "nesterov": gdx.nesterov,
    "adam": gdx.adam,
    "adamw": lambda rate: gdx.adamw(rate, weight_decay=0.1, nesterov=True),
}


def trajectories() -> dict[str, np.ndarray]:
    """The parameters at the end, flattened, by optimizer and kind of rate."""
    found = {}
    for name, make in OPTIMIZERS.items():
        for kind, rate in RATES.items():
            end = jax.jit(functools.partial(scan, make(rate)))(tree(), gradients(100))
            found[f"{name} {kind}"] = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(end)])
    return found


if __name__ == "__main__":
    np.savez_compressed(sys.argv[1], **trajectories())
