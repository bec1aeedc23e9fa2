"""Measures the edges of a loss's spectrum, derives the best learning rates from them, and holds these to it."""

import argparse
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdx
from gdx import curvature, plot
from gdx.compat import enable_x64
from gdx.demo import terminal
from gdx.demo.problems import SURFACES, cross_entropy, load

EXTRAS = ("demo",)
KEEPS = False
EXAMPLES = """\
The digits network, with tanh for relu, is first trained with an L2 penalty. Even then its smallest eigenvalue is
just below 0, for hidden units can be mixed at no cost: what remains of the theory is shown.

examples:
  python -m gdx curvature
  python -m gdx curvature --data rosenbrock --steps 2000
  python -m gdx curvature --data digits --penalty 0.1 --output digits.png
"""
PROBLEMS = (*reversed(SURFACES), "digits")
TRAINING_STEPS = 1000
PENALTY = 0.01
FAMILY = {"gradient_descent": gdx.gradient_descent, "momentum": gdx.momentum, "nesterov": gdx.nesterov}
NO_MINIMUM = """to contract to, and no formula for the best rate
applies; shown is 1 / largest, where gradient descent is certain to lower the loss"""
DISTANCE = 1e-4  # at which a run starts: small enough that the curvature is that of its centre
EXACT = 1e-11  # below it, in float64, distances are rounding


class Found(NamedTuple):
    """What was found out about one problem; runs and best rates by the optimizer's name, those that theory has."""

    title: str
    parameters: int
    edges: curvature.Edges
    density: curvature.Density
    best: dict[str, curvature.BestRate]
    distances: dict[str, np.ndarray]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, names = parser.add_argument, f"comma separated, from {','.join(PROBLEMS)} (default: all)"
    add("--data", action="extend", type=terminal.several(PROBLEMS), metavar="NAMES", help=names)
    penalty = f"L2 penalty of the digits network (default: {PENALTY})"
    add("--penalty", type=terminal.in_range(float, 0, 1e6), metavar="X", help=penalty)
    terminal.add_common(parser, 400, "gdx-curvature.png", images=0, least=2)


def check(arguments: argparse.Namespace) -> None:
    arguments.data = list(dict.fromkeys(arguments.data or PROBLEMS))
    if arguments.penalty is not None and "digits" not in arguments.data:
        raise ValueError(f"--penalty does not apply to {' and '.join(arguments.data)}; use it with digits")
    arguments.penalty = PENALTY if arguments.penalty is None else arguments.penalty


def run(arguments: argparse.Namespace) -> int:
    """Measures each problem, prints the tables and writes the picture."""
    from matplotlib.figure import Figure

    console = terminal.console()
    with enable_x64(True):
        with terminal.progress(console, 1, *arguments.data) as update:
            found = {name: investigate(name, arguments, update) for name in arguments.data}
        _print_tables(console, found)
        for name, result in found.items():
            if not result.best["gradient_descent"].convex:
                console.print(f"{name}: the smallest eigenvalue is not positive: there is no minimum {NO_MINIMUM}")
        figure = Figure(figsize=(5.6 * len(found), 8.4), layout="constrained")
        for (upper, lower), result in zip(figure.subplots(2, len(found), squeeze=False).T, found.values()):
            plot.spectral_density(result.density, upper, edges=result.edges)
            upper.set_title(result.title, fontsize="medium")
            _draw_distances(lower, result)
    terminal.save(console, figure, arguments.output)
    return 0


def investigate(name: str, arguments: argparse.Namespace, update: terminal.Update) -> Found:
    """Edges, density, best rates and measured distances of a problem, in float64."""
    keys = jax.random.split(jax.random.key(arguments.seed), 3)
    if name == "digits":
        title, loss, center = _trained_digits(keys[0], arguments.penalty)
    else:
        problem = load(name)
        title, loss, center = problem.title, problem.loss, jnp.asarray(SURFACES[name].minimum)
    hessian = curvature.Hessian(loss, center, jnp.zeros((1, 0)))  # its one batch is all data

    def told(done: float) -> None:
        update(name, done, "edges of the spectrum")

    edges = curvature.spectrum_edges(hessian, keys[1], rounds=20, tolerance=1e-4, progress=told)
    density = curvature.spectral_density(hessian, keys[2], probes=4)
    low, high = edges.smallest, edges.largest
    best, distances = {}, {}
    for key, factory in FAMILY.items():
        rate = curvature.best_learning_rate(low.value, high.value, factory)
        if rate.convex or key == "gradient_descent":
            best[key] = rate
            distances[key] = walk(loss, optimizer(key, rate), center, (low.vector, high.vector), arguments.steps)
    return Found(title, sum(p.size for p in jax.tree.leaves(center)), edges, density, best, distances)


def _trained_digits(key: jax.Array, penalty: float) -> tuple[str, Any, Any]:
    """Title, loss and trained parameters of the digits network with an L2 penalty, in float64."""
    problem = load("digits")
    whole = problem.start(key), problem.train
    start, data = jax.tree.map(lambda x: x.astype(float) if x.dtype == np.float32 else x, whole)

    def loss(params: Any, batch: Any) -> jax.Array:
        # with tanh for relu, at whose corners a Hessian says little of what follows
        return cross_entropy(params, data, jnp.tanh) + 0.5 * penalty * optax.tree.norm(params, squared=True)

    steps = jnp.zeros(TRAINING_STEPS)
    params = jax.jit(lambda start: gdx.train(loss, gdx.nesterov(0.1, 0.95), start, steps).params)(start)
    return f"digits network with tanh, L2 penalty {penalty:g}, after {TRAINING_STEPS} steps", loss, params


def optimizer(name: str, rate: curvature.BestRate) -> gdx.Transform:
    return FAMILY[name](*(rate[:1] if name == "gradient_descent" else rate[:2]))


def walk(loss: Any, tx: gdx.Transform, center: Any, ends: Any, steps: int) -> np.ndarray:
    """How far a run that starts beside the center, along both edges, is from one that starts there; by step."""

    def step(runs: Any, _: Any) -> tuple[Any, jax.Array]:
        runs = jax.vmap(lambda run: gdx.train(loss, tx, run[0], jnp.zeros(1), state=run[1])[:2])(runs)
        return runs, optax.tree.norm(jax.tree.map(lambda p: p[0] - p[1], runs[0]))

    scale = DISTANCE / np.sqrt(2)
    starts = jax.tree.map(lambda p, low, high: jnp.stack([p, p + scale * (low + high)]), center, *ends)
    runs = starts, jax.vmap(tx.init)(starts)
    return np.append(DISTANCE, jax.jit(lambda runs: jax.lax.scan(step, runs, None, steps)[1])(runs))


def predicted(result: Found, name: str, steps: int) -> np.ndarray:
    """The same on a quadratic whose curvatures are the edges."""
    curvatures, tx = jnp.array([edge.value for edge in result.edges[:2]]), optimizer(name, result.best[name])
    return walk(lambda x, _: 0.5 * jnp.sum(curvatures * x**2), tx, jnp.zeros(2), jnp.eye(2), steps)


def fewest_steps(rho: float, power: int) -> int:
    """How many steps show a contraction rho by step, of distances that go like (1 + b k)^power rho^k, b about 1 - rho.

    That the factor is not quite k^power changes the 1 - rho that is measured in n steps by a part of
    2 / (x (1 + x)), x = n (1 - rho): by 5 % at x = 6.
    """
    return math.ceil(6 / (1 - rho)) if power else 2


def contraction(distances: np.ndarray, power: int) -> float:
    """The contraction rho by step, of distances k^power rho^k, over the later half of those that are not rounding."""
    end = int(np.argmin(np.append(distances > EXACT, False))) - 1
    if end < 2:
        return float(distances[1] / distances[0])
    middle = end // 2
    ratio = distances[end] / distances[middle] * (middle / end) ** power
    return float(ratio ** (1 / (end - middle)))


def _print_tables(console: Any, found: dict[str, Found]) -> None:
    """The edges of each spectrum, then the best rates, with predicted and measured contraction."""
    edges_rows, rates_rows = [], []
    for name, (_, parameters, edges, _, rates, runs) in found.items():
        ends = [text for edge in edges[:2] for text in (f"{edge.value:.4g}", f"{edge.error:.0e}")]
        products = f"{edges.products}{'' if edges.converged else ' (not converged)'}"
        edges_rows.append([name, str(parameters), *ends, products])
        for optimizer, best in rates.items():
            # the best momentum gives the slowest modes double roots, and these distances like k rho^k
            power = int(optimizer != "gradient_descent")
            momentum = f"{best.momentum:.4f}" if power else "-"
            fewest, distances = fewest_steps(float(best.contraction), power), runs[optimizer]
            measured = f"{contraction(distances, power):.4f}" if len(distances) > fewest else f"needs {fewest} steps"
            predicted = f"{best.contraction:.4f}"
            rates_rows.append([name, optimizer, f"{best.learning_rate:.4g}", momentum, predicted, measured])
    headers = ["problem", "parameters", "smallest eigenvalue", "error", "largest", "error", "products"]
    terminal.table(console, headers, edges_rows)
    headers = ["problem", "optimizer", "best rate", "momentum", "predicted contraction", "measured"]
    terminal.table(console, headers, rates_rows)


def _draw_distances(ax: Any, result: Found) -> None:
    """Measured distances, and beside each the predicted one."""
    exact = {name: np.where(np.cumprod(d > EXACT), d, np.nan) for name, d in result.distances.items()}
    plot.loss_curves({name: d[np.isfinite(d)] for name, d in exact.items()}, ax)
    for name, distances in exact.items():
        label = "predicted" if name == list(exact)[-1] else None
        curve = predicted(result, name, int(np.isfinite(distances).sum()) - 1)
        ax.plot(curve, color="black", linestyle=":", linewidth=1.2, label=label)
    ax.set_ylabel("distance of two runs")
    ax.legend(handlelength=3.5)
