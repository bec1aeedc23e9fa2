"""The curvature of a loss: products with its Hessian, its spectrum, and what that says about learning rates.

An operator is a symmetric linear map and a value: `Hessian(loss, params, batches)`, averaged over mini-batches one at a
time; `GaussNewton`, its positive semidefinite part; `adam_preconditioned(hessian, tx, state)`, the Hessian as Adam's
steps see it, whose edge is 38 / learning_rate; `Block(hessian, pattern)`, that of a layer. `spectrum_edges`,
`largest_eigenpairs`, `spectral_density` and `trace` take any of them, under `jax.jit` and on sharded parameters and
data.

>>> import gdx, jax, jax.numpy as jnp
>>> valley = lambda theta, batch: 0.5 * (theta[0] ** 2 + 10 * theta[1] ** 2)
>>> theta, key = jnp.array([4.0, 2.0]), jax.random.key(0)
>>> hessian = gdx.curvature.Hessian(valley, theta, batches=jnp.zeros(1))
>>> hessian(jnp.ones(2)).tolist()  # its product with a vector
[1.0, 10.0]
>>> edges = gdx.curvature.spectrum_edges(hessian, key)  # the ends of its spectrum, with errors
>>> density, (trace, error) = gdx.curvature.spectral_density(hessian, key), gdx.curvature.trace(hessian, key)

What that says of learning rates: the best ones, and the one beyond which training diverges.

>>> best = gdx.curvature.best_learning_rate(edges.smallest.value, edges.largest.value, gdx.momentum)
>>> round(best.learning_rate.item(), 3), round(best.momentum.item(), 3), round(best.contraction.item(), 3)
(0.231, 0.27, 0.519)
>>> bool(edges.largest.value < gdx.curvature.stability_edge(gdx.momentum(best.learning_rate, best.momentum)))
True

Sharpness while training: a few products every n-th step, from where the last ones ended; with `count`, several
eigenvalues.

>>> sharpness = gdx.curvature.init_sharpness(theta, key)
>>> sharpness = jax.jit(gdx.curvature.update_sharpness)(sharpness, hessian)

At the edge training oscillates; `central_flow` predicts the average over that of gradient descent and RMSProp: path,
loss, sharpness, and how far it is thrown about.

It costs about 2 gradients for each product (`python -m benchmarks curvature`), and to keep vectors orthogonal, which
grows with `krylov_size`: at 64 more than the product. On a mesh each device holds the Krylov vectors whole, about 1.25
`krylov_size` + 6 times the parameters.

`python -m gdx curvature` draws spectra beside predicted and measured distances of two runs.
"""

from gdx.curvature.flow import CentralFlow, central_flow
from gdx.curvature.operators import Block, GaussNewton, Hessian, Operator, Preconditioned, adam_preconditioned
from gdx.curvature.rates import BestRate, best_learning_rate, stability_edge
from gdx.curvature.spectrum import (
    Density,
    Edge,
    Edges,
    Eigenpairs,
    Progress,
    Trace,
    largest_eigenpairs,
    spectral_density,
    spectrum_edges,
    trace,
)
from gdx.curvature.tracking import SharpnessState, init_sharpness, update_sharpness

__all__ = [
    "BestRate",
    "Block",
    "CentralFlow",
    "Density",
    "Edge",
    "Edges",
    "Eigenpairs",
    "GaussNewton",
    "Hessian",
    "Operator",
    "Preconditioned",
    "Progress",
    "SharpnessState",
    "Trace",
    "adam_preconditioned",
    "best_learning_rate",
    "central_flow",
    "init_sharpness",
    "largest_eigenpairs",
    "spectral_density",
    "spectrum_edges",
    "stability_edge",
    "trace",
    "update_sharpness",
]
