"""What curvature costs, in gradients, and how exact it is: against dense eigensolvers on three small networks.

    python -m benchmarks curvature [--rounds 11] [--quick]

The cost is that of a network with 1.3 million parameters on one batch of 256 images, as the median of the ratios of
interleaved timings, with quartiles. Besides its products with a vector, Lanczos costs its reorthogonalisation.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from benchmarks.measure import came_out, interleaved, ratio, table
from gdx import curvature
from gdx.compat import enable_x64
from gdx.demo.problems import cross_entropy, logits, network

KEY = jax.random.key(0)
WIDTHS, BATCH = (784, 1024, 512, 10), 256
SMALL_WIDTHS, SMALL_BATCH = (64, 64, 10), 64  # --quick


def on_logits(z: jax.Array, batch: Any) -> jax.Array:
    """The cross-entropy of outputs, rather than of parameters."""
    labels = jax.nn.one_hot(batch[1], z.shape[-1], dtype=z.dtype)
    return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(z), axis=-1))


def of_images(params: Any, batch: Any) -> jax.Array:
    return logits(params, batch[0])


def time_costs(widths: tuple[int, ...], size: int, rounds: int) -> Iterator[tuple]:
    """The time of each function, relative to one gradient on the same data."""
    params = network(KEY, widths)
    data = jax.random.normal(KEY, (1, size, widths[0])), jax.random.randint(KEY, (1, size), 0, widths[-1])
    batch = jax.tree.map(lambda x: x[0], data)
    hessian = curvature.Hessian(cross_entropy, params, data)
    gauss_newton = curvature.GaussNewton(of_images, on_logits, params, data)
    sharpness = curvature.init_sharpness(params, KEY)
    one_round = partial(curvature.spectrum_edges, krylov_size=16, rounds=1)
    density = partial(curvature.spectral_density, krylov_size=16, probes=1)
    trace = partial(curvature.trace, samples=8)
    work: dict[str, tuple[int, Callable, tuple]] = {
        "gradient": (0, jax.grad(cross_entropy), (params, batch)),
        "Hessian times a vector": (1, lambda operator, v: operator(v), (hessian, params)),
        "Gauss-Newton times a vector": (1, lambda operator, v: operator(v), (gauss_newton, params)),
        "spectrum_edges, a round of 16": (18, one_round, (hessian, KEY)),
        "spectral_density, a probe of 16": (16, density, (hessian, KEY)),
        "trace, 8 samples": (8, trace, (hessian, KEY)),
        "update_sharpness, 2 products": (2, partial(curvature.update_sharpness, products=2), (sharpness, hessian)),
        "update_sharpness, 4 products": (4, curvature.update_sharpness, (sharpness, hessian)),
    }

    def blocking(function: Callable, arguments: tuple) -> Callable[[], None]:
        compiled = jax.jit(function)
        return lambda: (jax.block_until_ready(compiled(*arguments)), None)[1]

    seconds = interleaved({name: blocking(f, arguments) for name, (_, f, arguments) in work.items()}, rounds)
    for name, (products, _, _) in work.items():
        if products:
            cost = ratio(seconds, name, "gradient")
            yield name, products, cost, round(cost.median / products, 1)


def tanh_network(params: Any, batch: Any) -> jax.Array:
    hidden = jnp.tanh(batch[0] @ params[0]["weights"] + params[0]["biases"][None, :])
    return on_logits(hidden @ params[1]["weights"] + params[1]["biases"][None, :], batch)


def squared_errors(params: Any, batch: Any) -> jax.Array:
    return jnp.mean((logits(params, batch[0]) - jax.nn.one_hot(batch[1], 4, dtype=jnp.float32)) ** 2)


def measure_errors() -> Iterator[tuple]:
    """Errors in float32, relative to the largest absolute eigenvalue of the dense matrix in float64."""
    networks = {
        "relu, cross-entropy": (cross_entropy, (12, 16, 4)),
        "tanh, cross-entropy": (tanh_network, (12, 24, 4)),
        "deep relu, squared errors": (squared_errors, (12, 10, 10, 10, 4)),
    }
    for name, (loss, widths) in networks.items():
        params = network(KEY, widths)
        data = jax.random.normal(KEY, (4, 32, widths[0])), jax.random.randint(KEY, (4, 32), 0, widths[-1])
        hessian = curvature.Hessian(loss, params, data)
        spectrum = dense_spectrum(loss, params, data)
        scale = np.max(np.abs(spectrum))
        edges = curvature.spectrum_edges(hessian, KEY, tolerance=1e-4)
        tracked = curvature.init_sharpness(params, KEY)
        for _ in range(5):
            tracked = curvature.update_sharpness(tracked, hessian)
        trace = curvature.trace(hessian, KEY, samples=64)
        density = curvature.spectral_density(hessian, KEY, probes=16)
        yield (
            f"{name}, {len(spectrum)} parameters",
            f"{abs(float(edges.smallest.value) - spectrum[0]) / scale:.0e}",
            f"{abs(float(edges.largest.value) - spectrum[-1]) / scale:.0e}",
            int(edges.products),
            f"{abs(float(tracked.value) - spectrum[-1]) / scale:.0e}",
            f"{(float(trace.value) - spectrum.sum()) / float(trace.error):+.1f}",
            f"{transport(density, spectrum) / scale:.0e}",
        )


def dense_spectrum(loss: Callable, params: Any, data: Any) -> np.ndarray:
    """All eigenvalues of the Hessian, by float64 products with unit vectors."""
    flat, back = ravel_pytree(params)
    with enable_x64(True):
        wide = jax.tree.map(lambda x: x.astype(float) if x.dtype == jnp.float32 else x, data)

        def mean_loss(v: jax.Array) -> jax.Array:
            tree = jax.tree.map(lambda leaf: leaf.astype(float), back(flat))
            _, unravel = ravel_pytree(tree)
            return jnp.mean(jax.lax.map(lambda batch: loss(unravel(v), batch), wide))

        return np.linalg.eigvalsh(np.asarray(jax.jit(jax.hessian(mean_loss))(flat.astype(float))))


def transport(density: curvature.Density, spectrum: np.ndarray) -> float:
    """The mean distance by which mass must be moved from the density to the spectrum (Wasserstein's)."""
    nodes, weights = (np.asarray(x, float).ravel() for x in density)
    every = np.sort(np.concatenate([nodes, spectrum]))
    order = np.argsort(nodes)
    ours = np.append(0, np.cumsum(weights[order]))[np.searchsorted(nodes[order], every[:-1], "right")] / weights.sum()
    exact = np.searchsorted(spectrum, every[:-1], "right") / len(spectrum)
    return float(np.sum(np.abs(ours - exact) * np.diff(every)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds (default: 11)")
    parser.add_argument("--quick", action="store_true", help="a small network: whether it runs, not what it costs")
    args = parser.parse_args()
    widths, size = (SMALL_WIDTHS, SMALL_BATCH) if args.quick else (WIDTHS, BATCH)
    count = sum(n * m + m for n, m in itertools.pairwise(widths))
    print(f"Cost in gradients; {count:,} parameters, one batch of {size}\n")
    rows = list(time_costs(widths, size, args.rounds))
    print(table(["", "products", "gradients", "for each product"], rows), "\n")
    print(came_out("gradients for each product", 3, {name: each for name, _, _, each in rows}), "\n")
    print("Error in float32, in units of the largest absolute eigenvalue; of the trace in standard errors\n")
    header = ["network", "smallest", "largest", "products", "tracker", "trace", "density"]
    print(table(header, measure_errors()))
