"""Mini-batches and the noise of their gradients: how it falls with the batch size, and how large a batch is worth it.

With $g_i$ the gradient of example $i$, $G = E[g_i]$ and $\\Sigma = \\operatorname{Cov}[g_i]$, the gradient of a
mini-batch of $B$ examples is an unbiased estimate of $G$ with

$$ E|g_B - G|^2 = \\frac{\\operatorname{tr}\\Sigma}{B} \\quad\\text{(with replacement)}, \\qquad
   \\frac{\\operatorname{tr}\\Sigma}{B} \\, \\frac{N - B}{N - 1} \\quad\\text{(without, from $N$ examples)}. $$

The noise scale $\\operatorname{tr}\\Sigma / |G|^2$ is the batch size at which noise and gradient are equally large.

How large a batch is worth it? `measure_noise` measures the noise scale for next to nothing beside any run: take it to
see how noise grows over training, or to compare runs. It predicts the critical batch size, at which twice the examples
of small batches are needed, where noise limits the learning rate of large batches and the curvature is alike in all
directions; elsewhere it is off by an order of magnitude and more. `critical_batch_size` measures that, by training
branches at several batch sizes: take it before a batch size is decided on.

Batches are indices of examples, which `gdx.train` takes; the loss picks them out.

>>> import gdx, jax, jax.numpy as jnp
>>> data = jax.random.normal(jax.random.key(0), (100, 3))
>>> def loss(theta, examples):  # the mean loss on the examples with these indices
...     return jnp.mean(jnp.sum((gdx.noise.take(data, examples) - theta[None]) ** 2, axis=1))
>>> batches = gdx.noise.epochs(jax.random.key(1), data, batch_size=20, number=2)  # two epochs, shuffled
>>> batches.shape, gdx.train(loss, gdx.sgd(0.05), jnp.ones(3), batches).losses.shape
((10, 20), (10,))

`epochs` drops what is left over of an epoch, `padded_epochs` fills the last batch up with examples of weight 0, and
`with_replacement` draws each example by itself. All take a key and work in `jit`, `vmap` and `scan`.

`measure_noise` is a link that measures the noise scale while training and changes nothing: see its example. A step with
it takes 0.97 to 1.08 times as long as one of as many micro-batches without, from 300,000 parameters on, and 1.5 times
at 10,000 (`python -m benchmarks noise --quick`). Under `optax.MultiSteps` and on a mesh it is fed by hand.
"""

from gdx.noise.batches import Batches, epochs, padded_epochs, take, with_replacement
from gdx.noise.critical import CriticalBatchSize, critical_batch_size
from gdx.noise.estimates import Noise, estimate, of_gradients
from gdx.noise.measuring import MicroBatches, NoiseState, measure_noise, value_and_grad

__all__ = [
    "Batches",
    "CriticalBatchSize",
    "MicroBatches",
    "Noise",
    "NoiseState",
    "critical_batch_size",
    "epochs",
    "estimate",
    "measure_noise",
    "of_gradients",
    "padded_epochs",
    "take",
    "value_and_grad",
    "with_replacement",
]
