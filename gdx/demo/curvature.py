"""Measures the edges of a loss's spectrum, derives the best learning rates from them, and holds these to it."""

import argparse
import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdx
from gdx import curvature, plot
from gdx.compat import enable_x64
from gdx.demo import show
from gdx.demo.options import add_output, check_output, check_seed, check_steps
from gdx.demo.problems import SURFACES, Arrays, load
from gdx.extra import needs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console
    from rich.table import Table

EXTRAS = ("demo",)
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
DISTANCE = 1e-4  # at which a run starts: small enough that the curvature is that of its centre
EXACT = 1e-11  # below it, in float64, distances are rounding


@dataclass(frozen=True)
class Plan:
    """The checked options: which problems, for how many steps, and where the picture goes."""

    data: tuple[str, ...]
    penalty: float
    steps: int
    seed: int
    output: Path


class Found(NamedTuple):
    """What was found out about one problem; runs and best rates by the optimizer's name."""

    title: str
    parameters: int
    edges: curvature.Edges
    density: curvature.Density
    best: dict[str, curvature.BestRate]
    distances: dict[str, np.ndarray]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    add = parser.add_argument
    names = ",".join(PROBLEMS)
    add("--data", action="append", metavar="NAMES", help=f"comma separated, from {names} (default: all)")
    add("--penalty", type=float, metavar="X", help=f"L2 penalty of the digits network (default: {PENALTY})")
    add(
        "--steps",
        type=int,
        default=400,
        metavar="N",
        help="measured steps, at least 2; the table says where they are too few (default: 400)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the initial parameters and the estimates (default: 0)")
    add_output(parser, "gdx-curvature.png")


def plan(arguments: argparse.Namespace) -> Plan:
    """Checks the options.

    Raises:
      ValueError: an option is wrong; the message says what is allowed.
    """
    names = [name.strip() for names in arguments.data or [",".join(PROBLEMS)] for name in names.split(",")]
    for name in names:
        if name not in PROBLEMS:
            raise ValueError(f"--data has {name!r}; choose from {', '.join(PROBLEMS)}")
    penalty = PENALTY if arguments.penalty is None else arguments.penalty
    if not 0 <= penalty < np.inf:
        raise ValueError(f"--penalty is {penalty}; expected a finite number >= 0")
    if arguments.penalty is not None and "digits" not in names:
        raise ValueError(f"--penalty does not apply to {' and '.join(names)}; use it with digits")
    if check_steps(arguments.steps) < 2:
        raise ValueError(f"--steps is {arguments.steps}; expected at least 2, for a ratio of two distances")
    return Plan(
        tuple(dict.fromkeys(names)),
        penalty,
        arguments.steps,
        check_seed(arguments.seed),
        check_output(arguments.output),
    )


def run(plan: Plan) -> int:
    """Measures each problem, prints the tables and writes the picture.

    Returns:
      The exit code: 0.

    Raises:
      MissingExtra: the demo extra is not installed.
    """
    with needs("demo"):
        from matplotlib.figure import Figure
    console = show.console()
    found: dict[str, Found] = {}
    with enable_x64(True):
        for name in plan.data:
            with _progress(console, name) as progress:
                found[name] = investigate(name, plan, progress)
        console.print(_edges_table(found))
        console.print(_rates_table(found))
        for name, result in found.items():
            if not result.best["gradient_descent"].convex:
                console.print(
                    f"{name}: the smallest eigenvalue is not positive: there is no minimum to contract to, and no "
                    f"formula for the best rate applies; shown is 1 / largest, where gradient descent is certain to "
                    f"lower the loss"
                )
        figure = Figure(figsize=(5.6 * len(found), 8.4), layout="constrained")
        for (upper, lower), result in zip(figure.subplots(2, len(found), squeeze=False).T, found.values()):
            plot.spectral_density(result.density, upper, edges=result.edges)
            upper.set_title(result.title, fontsize="medium")
            _draw_distances(lower, result)
        figure.savefig(plan.output, dpi=150)
    console.print(f"picture: {plan.output}", soft_wrap=True)
    return 0


def investigate(name: str, plan: Plan, progress: curvature.Progress) -> Found:
    """Edges, density, best rates and measured distances of a problem, in float64."""
    problem = load(name)
    data = jax.tree.map(_in_float64, problem.train)
    title = problem.title
    keys = jax.random.split(jax.random.key(plan.seed), 3)
    if name == "digits":
        title = f"digits network with tanh, L2 penalty {plan.penalty:g}, after {TRAINING_STEPS} steps"
        center = jax.tree.map(_in_float64, problem.start(keys[0]))
    else:
        center = jnp.asarray(SURFACES[name].minimum)

    def loss(params: Any, batch: Arrays) -> jax.Array:
        penalty = sum(jnp.sum(p**2) for p in jax.tree.leaves(params)) if name == "digits" else 0.0
        value = cross_entropy(params, batch) if name == "digits" else problem.loss(params, batch)
        return value + 0.5 * plan.penalty * penalty

    @jax.jit
    def train(tx: gdx.Transform, params: Any, state: Any, steps: Any, data: Arrays) -> gdx.Trained:
        return gdx.train(lambda params, _: loss(params, data), tx, params, steps, state=state)

    if name == "digits":
        tx = gdx.nesterov(0.1, 0.95)
        center = train(tx, center, tx.init(center), jnp.zeros(TRAINING_STEPS), data).params
    # a function of the plane has no data: one empty batch
    batches = jax.tree.map(lambda x: x[None], data) if data else jnp.zeros((1, 0))
    hessian = curvature.Hessian(loss, center, batches)
    edges = curvature.spectrum_edges(hessian, keys[1], rounds=20, tolerance=1e-4, progress=progress)
    density = curvature.spectral_density(hessian, keys[2], probes=4)
    best, distances = {}, {}
    for optimizer, factory in FAMILY.items():
        rate = best[optimizer] = curvature.best_learning_rate(edges.smallest.value, edges.largest.value, factory)
        tx = factory(*(rate[:1] if optimizer == "gradient_descent" else rate[:2]))
        distances[optimizer] = _distances(train, tx, center, edges, plan.steps, data)
    size = sum(p.size for p in jax.tree.leaves(center))
    return Found(title, size, edges, density, best, distances)


def _distances(
    train: Callable[..., gdx.Trained],
    tx: gdx.Transform,
    center: Any,
    edges: curvature.Edges,
    steps: int,
    data: Arrays,
) -> np.ndarray:
    """How far a run that starts beside the center, along both edges, is from one that starts there; by step."""

    def beside(p: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
        return p + DISTANCE * (low + high) / np.sqrt(2)

    @jax.jit
    def walk(tx: gdx.Transform, starts: Any) -> jax.Array:
        def step(runs: Any, _: Any) -> tuple[Any, jax.Array]:
            ends = [train(tx, *run, jnp.zeros(1), data) for run in runs]
            squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), ends[0].params, ends[1].params)
            return [(end.params, end.state) for end in ends], jnp.sqrt(sum(jax.tree.leaves(squares)))

        return jax.lax.scan(step, [(start, tx.init(start)) for start in starts], None, steps)[1]

    start = jax.tree.map(beside, center, edges.smallest.vector, edges.largest.vector)
    return np.append(DISTANCE, walk(tx, [center, start]))


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


def cross_entropy(params: Any, batch: Arrays) -> jax.Array:
    """The loss of the digits network with tanh for relu, at whose corners a Hessian says little of what follows."""
    images, labels = batch
    first, last = params
    hidden = jnp.tanh(images @ first["weights"] + first["biases"][None, :])
    logits = hidden @ last["weights"] + last["biases"][None, :]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def _in_float64(x: jax.Array) -> jax.Array:
    return x.astype(float) if jnp.issubdtype(x.dtype, jnp.floating) else x


@contextlib.contextmanager
def _progress(to: "Console", name: str) -> Iterator[curvature.Progress]:
    """Shows how far the search for the edges is: a bar on a terminal, elsewhere nothing."""
    if not to.is_terminal:
        yield lambda done: None
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.percentage:.0f} %")
    with Progress(*columns, console=to, transient=True) as bars:
        task = bars.add_task(f"{name}: edges of the spectrum", total=1.0)
        yield lambda done: bars.update(task, completed=done)


def _new_table(*headers: str) -> "Table":
    with needs("demo"):
        from rich import box
        from rich.table import Table
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for i, header in enumerate(headers):
        table.add_column(header, justify="right" if i else "left", no_wrap=not i)
    return table


def _edges_table(found: dict[str, Found]) -> "Table":
    table = _new_table("problem", "parameters", "smallest eigenvalue", "error", "largest", "error", "products")
    for name, result in found.items():
        low, high = result.edges.smallest, result.edges.largest
        numbers = [f"{float(low.value):.4g}", f"{float(low.error):.0e}", f"{float(high.value):.4g}"]
        mark = "" if result.edges.converged else " (not converged)"
        table.add_row(
            name, str(result.parameters), *numbers, f"{float(high.error):.0e}", f"{result.edges.products}{mark}"
        )
    return table


def _rates_table(found: dict[str, Found]) -> "Table":
    table = _new_table("problem", "optimizer", "best rate", "momentum", "predicted contraction", "measured")
    for name, result in found.items():
        for optimizer, best in result.best.items():
            if best.convex or optimizer == "gradient_descent":
                momentum = "-" if optimizer == "gradient_descent" else f"{float(best.momentum):.4f}"
                rho, distances = float(best.contraction), result.distances[optimizer]
                # the best momentum gives the slowest modes double roots, and these distances like k rho^k
                power = int(optimizer != "gradient_descent")
                fewest = fewest_steps(rho, power)
                measured = f"{contraction(distances, power):.4f}"
                if len(distances) <= fewest:
                    measured = f"needs {fewest} steps"
                table.add_row(name, optimizer, f"{float(best.learning_rate):.4g}", momentum, f"{rho:.4f}", measured)
    return table


def predicted(result: Found, optimizer: str, steps: int) -> np.ndarray:
    """The distance of two runs, by step, on a quadratic with the edges as its curvatures: the formula, step by step."""
    rate, mu, _, _ = map(float, result.best[optimizer])
    curvatures = np.array([float(result.edges.smallest.value), float(result.edges.largest.value)])
    theta, velocity = np.full(2, DISTANCE / np.sqrt(2)), np.zeros(2)
    distances = [DISTANCE]
    for _ in range(steps):
        push = rate * curvatures * theta
        velocity = mu * velocity - push
        theta = theta + (mu * velocity - push if optimizer == "nesterov" else velocity)
        distances.append(float(np.linalg.norm(theta)))
    return np.array(distances)


def _draw_distances(ax: "Axes", result: Found) -> None:
    """Measured distances, and beside each the predicted one."""
    convex = bool(result.best["gradient_descent"].convex)
    shown = {name: d for name, d in result.distances.items() if convex or name == "gradient_descent"}
    exact = {name: np.where(np.cumprod(d > EXACT), d, np.nan) for name, d in shown.items()}
    plot.loss_curves({name: d[np.isfinite(d)] for name, d in exact.items()}, ax)
    for name, distances in exact.items():
        label = "predicted" if name == list(exact)[-1] else None
        curve = predicted(result, name, int(np.isfinite(distances).sum()) - 1)
        ax.plot(curve, color="black", linestyle=":", linewidth=1.2, label=label)
    ax.set_ylabel("distance of two runs")
    ax.legend(handlelength=3.5)
