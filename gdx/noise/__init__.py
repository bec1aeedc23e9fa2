"""Mini-batches and the noise of their gradients: how it falls with the batch size, and how large a batch is worth it.

With $g_i$ the gradient of example $i$, $G = E[g_i]$ and $\\Sigma = \\operatorname{Cov}[g_i]$, the gradient of a
mini-batch of $B$ examples is an unbiased estimate of $G$ with

$$ E|g_B - G|^2 = \\frac{\\operatorname{tr}\\Sigma}{B} \\quad\\text{(with replacement)}, \\qquad
   \\frac{\\operatorname{tr}\\Sigma}{B} \\, \\frac{N - B}{N - 1} \\quad\\text{(without, from $N$ examples)}. $$

The noise scale $\\operatorname{tr}\\Sigma / |G|^2$ is the batch size at which noise and gradient are equally large.
"""

from gdx.noise.batches import Batches, epochs, padded_epochs, take, with_replacement
from gdx.noise.estimates import Noise, estimate, of_gradients
from gdx.noise.measuring import MicroBatches, NoiseState, measure_noise, value_and_grad

__all__ = [
    "Batches",
    "MicroBatches",
    "Noise",
    "NoiseState",
    "epochs",
    "estimate",
    "measure_noise",
    "of_gradients",
    "padded_epochs",
    "take",
    "value_and_grad",
    "with_replacement",
]
