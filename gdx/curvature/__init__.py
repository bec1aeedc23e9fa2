"""The curvature of a loss: products with its Hessian, its spectrum, and what that says about learning rates.

An operator, such as `Hessian(loss, params, batches)`, is a symmetric linear map and a value; `spectrum_edges`,
`spectral_density` and `trace` take any of them.

>>> import gdx, jax, jax.numpy as jnp
>>> valley = lambda theta, batch: 0.5 * (theta[0] ** 2 + 10 * theta[1] ** 2)
>>> hessian = gdx.curvature.Hessian(valley, jnp.array([4.0, 2.0]), batches=jnp.zeros(1))
>>> edges = gdx.curvature.spectrum_edges(hessian, jax.random.key(0))
>>> best = gdx.curvature.best_learning_rate(edges.smallest.value, edges.largest.value)
>>> round(best.learning_rate.item(), 3), round(best.contraction.item(), 3)
(0.182, 0.818)
"""

from gdx.curvature.operators import GaussNewton, Hessian, Operator, Preconditioned, adam_preconditioned
from gdx.curvature.rates import BestRate, best_learning_rate, stability_edge
from gdx.curvature.spectrum import (
    Density,
    Edge,
    Edges,
    Progress,
    Trace,
    spectral_density,
    spectrum_edges,
    trace,
)
from gdx.curvature.tracking import SharpnessState, init_sharpness, update_sharpness

__all__ = [
    "BestRate",
    "Density",
    "Edge",
    "Edges",
    "GaussNewton",
    "Hessian",
    "Operator",
    "Preconditioned",
    "Progress",
    "SharpnessState",
    "Trace",
    "adam_preconditioned",
    "best_learning_rate",
    "init_sharpness",
    "spectral_density",
    "spectrum_edges",
    "stability_edge",
    "trace",
    "update_sharpness",
]
