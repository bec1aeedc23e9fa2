"""Measures the edges of a loss's spectrum, derives the best learning rates from them, and holds these to it.

Two runs start beside each other, apart along both edges of the spectrum: shown is how the distance between them
goes on, and what is predicted, which is that on a quadratic with these edges. The digits network, with tanh for relu,
is first trained with an L2 penalty. Even then its smallest eigenvalue is just below 0, for hidden units can be mixed
at no cost.

examples:
  python -m gdx curvature
  python -m gdx curvature --data rosenbrock --steps 2000
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdx
from gdx import curvature, plot
from gdx.compat import enable_x64
from gdx.demo import terminal
from gdx.demo.problems import SURFACES, Problem, cross_entropy, load

PROBLEMS = (*reversed(SURFACES), "digits")
TRAINING_STEPS = 1000
PENALTY = 0.01
FAMILY = gdx.gradient_descent, gdx.momentum, gdx.nesterov
NO_MINIMUM = """to contract to, and no formula for the best rate
applies; shown is 1 / largest, where gradient descent is certain to lower the loss"""
DISTANCE = 1e-6  # at which two runs start: small enough that the curvature is that of where they are
EXACT = 1e-12  # below it, in float64, distances are rounding


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ", ".join(PROBLEMS)
    parser.add_argument("--data", nargs="+", choices=PROBLEMS, default=PROBLEMS, metavar="NAME", help=names)
    terminal.add(parser, "steps", terminal.positive(int), 400, "of the two runs")
    terminal.add(parser, "output", terminal.picture, "gdx-curvature.png", "the picture", "FILE")


def run(arguments: argparse.Namespace) -> int:
    """Measures each problem, prints the tables and writes the picture."""
    from matplotlib.figure import Figure

    console, names = terminal.console(), list(dict.fromkeys(arguments.data))
    figure = Figure(figsize=(5.6 * len(names), 8.4), layout="constrained")
    with enable_x64(True), terminal.progress(console) as bars:
        axes = figure.subplots(2, len(names), squeeze=False).T
        found = [examine(name, arguments, bars, *pair) for name, pair in zip(names, axes)]
    headers = ["problem", "parameters", "smallest eigenvalue", "error", "largest", "error", "products"]
    terminal.table(console, headers, [edges for edges, _ in found])
    headers = ["problem", "optimizer", "best rate", "momentum", "factor", "step", "predicted distance", "measured"]
    terminal.table(console, headers, [row for _, rates in found for row in rates])
    for name in [edges[0] for edges, rates in found if len(rates) == 1]:
        console.print(f"{name}: the smallest eigenvalue is not positive: there is no minimum {NO_MINIMUM}")
    terminal.save(console, figure, arguments.output)
    return 0


def examine(name: str, arguments: argparse.Namespace, bars: Any, upper: Any, lower: Any) -> tuple[list, list[list]]:
    """Draws the spectrum of a problem and the distances of two runs on it; the rows of both tables."""
    task = bars.add_task(name, total=1, text="edges of the spectrum")
    keys = jax.random.split(jax.random.key(arguments.seed), 3)
    problem = load(name)
    if name == "digits":
        title, loss, center = trained(problem, keys[0])
    else:
        title, loss, center = problem.title, problem.loss, jnp.asarray(SURFACES[name].minimum)
    hessian = curvature.Hessian(loss, center, jnp.zeros((1, 0)))  # its one batch is all data

    def told(done: float) -> None:
        bars.update(task, completed=done)

    edges = curvature.spectrum_edges(hessian, keys[1], rounds=20, tolerance=1e-4, progress=told)
    density = curvature.spectral_density(hessian, keys[2], probes=4)
    plot.spectral_density(density, upper, edges=edges).set_title(title, fontsize="medium")
    ends = [text for edge in edges[:2] for text in (f"{edge.value:.4g}", f"{edge.error:.0e}")]
    products = f"{edges.products}{'' if edges.converged else ' (not converged)'}"
    rows, measured, values = [], {}, (edges.smallest.value, edges.largest.value)
    for factory in FAMILY:
        rate = curvature.best_learning_rate(*values, factory)
        is_plain = factory is gdx.gradient_descent
        if rate.convex or is_plain:
            tx = factory(*rate[: 1 if is_plain else 2])
            predicted, distances = distances_of(tx, loss, center, edges, arguments.steps)
            measured[factory.__name__] = distances
            lower.plot(predicted, color="black", linestyle=":", linewidth=1.2, zorder=3)
            cells = [f"{x:.3g}" for x in (*rate[:3], predicted[-1], distances[-1])]
            rows.append([name, factory.__name__, *cells[:3], str(len(distances) - 1), *cells[3:]])
    plot.loss_curves(measured, lower).set_ylabel("distance of two runs (dotted: predicted)")
    return [name, str(sum(p.size for p in jax.tree.leaves(center))), *ends, products], rows


def trained(problem: Problem, key: jax.Array) -> tuple[str, Any, Any]:
    """Title, loss and trained parameters of the digits network with an L2 penalty, in float64."""
    whole = problem.start(key), problem.train
    start, data = jax.tree.map(lambda x: x.astype(float) if x.dtype == np.float32 else x, whole)

    def loss(params: Any, batch: Any) -> jax.Array:
        # with tanh for relu, at whose corners a Hessian says little of what follows
        return cross_entropy(params, data, jnp.tanh) + 0.5 * PENALTY * optax.tree.norm(params, squared=True)

    steps = jnp.zeros(TRAINING_STEPS)
    params = jax.jit(lambda start: gdx.train(loss, gdx.nesterov(0.1, 0.95), start, steps).params)(start)
    return f"digits network with tanh, L2 penalty {PENALTY:g}, after {TRAINING_STEPS} steps", loss, params


def distances_of(
    tx: gdx.Transform, loss: Any, center: Any, edges: curvature.Edges, steps: int
) -> tuple[np.ndarray, np.ndarray]:
    """How far two runs are from each other by step, predicted and measured, as far as this is more than rounding."""
    (low, *ends), (high, *others) = (edge[:2] for edge in edges[:2])
    curvatures = jnp.array([low, high])
    predicted = walk(lambda x, _: 0.5 * jnp.sum(curvatures * x**2), tx, jnp.zeros(2), jnp.eye(2), steps)
    predicted = predicted[: np.argmin(np.append(predicted > EXACT, False))]
    return predicted, walk(loss, tx, center, ends + others, len(predicted) - 1)


def walk(loss: Any, tx: gdx.Transform, center: Any, ends: Any, steps: int) -> np.ndarray:
    """How far a run that starts beside the center, along both edges, is from one that starts there; by step."""

    def apart(runs: Any, batch: Any) -> jax.Array:
        total = loss(runs[0], batch) + loss(runs[1], batch)
        distance = optax.tree.norm(jax.tree.map(jnp.subtract, *runs))
        # the slopes of both losses, and the distance for a value
        return (total - jax.lax.stop_gradient(total)) + jax.lax.stop_gradient(distance)

    scale = DISTANCE / np.sqrt(2)
    beside = jax.tree.map(lambda p, low, high: p + scale * (low + high), center, *ends)
    return np.asarray(gdx.train(apart, tx, (center, beside), jnp.zeros(steps + 1)).losses)
