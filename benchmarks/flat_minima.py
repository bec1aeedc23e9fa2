"""Flat minima, measured: small against large batches, and low against high rates, on handwritten digits.

Run `python -m benchmarks.flat_minima`, with `--picture FILE` for slices of the loss, and `--quick` for a rough look.

A network of 64-32-10 is trained with plain SGD on 500 images, from the same five starts each way, until its loss on
all of them is at most TARGET: what is held equal is the training loss (and the starts), not steps or epochs, because
the Hessian of a cross-entropy vanishes with the loss itself. Every figure is the mean over the starts with its
standard error, of parameters where each run first got to the target. The rise is that of the training loss when
every filter is moved by 0.3 of its length at random; the last two rows are ratios from the same starts, and of the
accuracies the difference.
"""

import argparse
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdx
from benchmarks.measure import table
from gdx import curvature, landscape, noise
from gdx.demo.problems import cross_entropy, digits, logits, network

IMAGES, HIDDEN = 500, 32
SEEDS = 5
TARGET = 0.02
EVERY, MOST = 10, 10_000
RADIUS = 0.3


class Run(NamedTuple):
    """A way to train: SGD with this batch size and learning rate."""

    batch_size: int
    rate: float

    def __str__(self) -> str:
        method = "gradient descent" if self.batch_size == IMAGES else f"SGD, batch {self.batch_size}"
        return f"{method}, rate {self.rate:g}"


SMALL, LARGE, LOW, HIGH = Run(5, 0.1), Run(100, 0.1), Run(IMAGES, 0.1), Run(IMAGES, 1.0)
COMPARED = {"small / full batch": (SMALL, LOW), "high / low rate": (HIGH, LOW)}
MEASURES = ("training loss", "largest eigenvalue", "trace", "rise", "norm", "test loss")


class Data(NamedTuple):
    """Images and labels."""

    images: jax.Array
    labels: jax.Array


def _data() -> tuple[Data, Data]:
    """500 images to train on, and all others."""
    problem = digits()
    columns = [jnp.concatenate(both) for both in zip(problem.train, problem.test)]
    return Data(*(c[:IMAGES] for c in columns)), Data(*(c[IMAGES:] for c in columns))


TRAIN, TEST = _data()


def train_loss(params: Any) -> jax.Array:
    return cross_entropy(params, TRAIN)


def loss_on(params: Any, examples: jax.Array) -> jax.Array:
    return cross_entropy(params, noise.take(TRAIN, examples))


def metrics(params: Any) -> dict[str, jax.Array]:
    """What is drawn along lines."""
    hits = jnp.argmax(logits(params, TEST.images), axis=-1) == TEST.labels
    return {
        "training loss": train_loss(params),
        "test loss": cross_entropy(params, TEST),
        "test accuracy": jnp.mean(hits, dtype=jnp.float32),
    }


class Found(NamedTuple):
    """Where the runs first had the target loss, with a leading axis of starts.

    Attributes:
      params: the parameters there.
      measured: the steps that were taken, and what `flatness` found.
    """

    params: Any
    measured: dict[str, np.ndarray]


@functools.partial(jax.jit, static_argnums=0)
def train(batch_size: int, tx: gdx.Transform, keys: jax.Array) -> tuple[Any, jax.Array]:
    """Trains from each key's start until the training loss is at most the target: the parameters and the steps."""

    def one(key: jax.Array) -> tuple[Any, jax.Array]:
        start_key, batch_key = jax.random.split(key)
        epochs = -(-EVERY // (IMAGES // batch_size))

        def more(carry: tuple) -> tuple:
            params, steps, _ = carry
            batches = noise.epochs(jax.random.fold_in(batch_key, steps), IMAGES, batch_size, epochs)[:EVERY]
            params = gdx.train(loss_on, tx, params, batches).params
            return params, steps + EVERY, train_loss(params)

        def goes_on(carry: tuple) -> jax.Array:
            _, steps, loss = carry
            return (loss > TARGET) & (steps < MOST)

        start = network(start_key, (64, HIDDEN, 10))
        return jax.lax.while_loop(goes_on, more, (start, jnp.int32(0), train_loss(start)))[:2]

    return jax.lax.map(one, keys)  # under vmap, every run would go on until the last is there


@jax.jit
def flatness(params: Any, key: jax.Array) -> dict[str, jax.Array]:
    """Every measure of sharpness at each of the parameters, and what the network is worth there."""

    def one(params: Any) -> dict[str, jax.Array]:
        hessian = curvature.Hessian(loss_on, params, jnp.arange(IMAGES)[None])
        return {
            "largest eigenvalue": curvature.spectrum_edges(hessian, key, tolerance=1e-2).largest.value,
            "trace": curvature.trace(hessian, key, samples=64).value,
            "rise": landscape.random_sharpness(train_loss, params, key, RADIUS).mean,
            "norm": optax.tree.norm(params),
            **metrics(params),
        }

    return jax.lax.map(one, params)


def measure(run: Run, seeds: int) -> Found:
    """Trains from every start, and measures where that ends."""
    params, steps = train(run.batch_size, gdx.sgd(run.rate), jax.random.split(jax.random.key(0), seeds))
    found = {name: np.asarray(values) for name, values in flatness(params, jax.random.key(1)).items()}
    if not np.all(found["training loss"] <= TARGET):
        raise RuntimeError(f"{run} does not get to a training loss of {TARGET} in {MOST} steps")
    return Found(params, {"steps": np.asarray(steps), **found})


def with_error(values: np.ndarray, form: str = ".2f") -> str:
    """The mean with its standard error."""
    return f"{values.mean():{form}} ± {values.std(ddof=1) / np.sqrt(len(values)):{form}}"


def row(run: Run, measured: dict[str, np.ndarray]) -> list[str]:
    return [
        str(run),
        f"{measured['steps'].mean():.0f}",
        *(with_error(measured[name], ".3f" if measured[name].mean() < 1 else ".2f") for name in MEASURES),
        with_error(100 * measured["test accuracy"]),
    ]


def comparison(name: str, one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[str]:
    """The ratios from the same starts; of the accuracies the difference."""
    gain = 100 * (one["test accuracy"] - other["test accuracy"])
    return [name, "", *(with_error(one[key] / other[key]) for key in MEASURES), with_error(gain, "+.2f")]


def picture(found: dict[Run, Found], path: str) -> None:
    """Writes the sharpness with its errors, and slices of the loss between and around the minima."""
    from matplotlib.figure import Figure

    from gdx import plot
    from gdx.plot.style import COLOURS

    figure = Figure(figsize=(14, 8), layout="constrained")
    (bars, *lines), planes = figure.subplots(2, 3)
    for i, here in enumerate(found.values()):
        values = here.measured["largest eigenvalue"]
        bars.plot(values, np.full(len(values), i), "o", color=COLOURS[i], alpha=0.4)
        error = values.std(ddof=1) / np.sqrt(len(values))
        bars.errorbar(values.mean(), i, xerr=error, fmt="D", color=COLOURS[i], capsize=5)
    bars.set_yticks(range(len(found)), [_lines(run) for run in found])
    bars.set_ylim(len(found) - 0.5, -0.5)
    bars.set_xlim(left=0)
    bars.set_xlabel("largest eigenvalue of the Hessian")
    bars.grid(axis="x", alpha=0.3)

    positions = np.linspace(-0.5, 1.5, 41)
    for ax, (one, other) in zip(lines, COMPARED.values()):
        pairs = zip(*(_unstacked(found[run].params) for run in (other, one)))
        along = [landscape.line(metrics, start, end, positions) for start, end in pairs]
        curves = {name: np.stack([at[name] for at in along]) for name in ("training loss", "test loss")}
        plot.loss_line(positions, curves, ax, marks={_lines(other): 0.0, _lines(one): 1.0})
    grid = np.linspace(-1, 1, 31)
    key, levels = jax.random.key(2), np.geomspace(0.02, 2.56, 8)
    for ax, run in zip(planes, (SMALL, LOW, HIGH)):
        origin = _unstacked(found[run].params)[0]
        directions = tuple(landscape.filter_normalised_direction(k, origin) for k in jax.random.split(key))
        heights = landscape.plane(train_loss, origin, directions, grid, grid)
        plot.loss_plane(grid, grid, heights, ax, points={"": (0.0, 0.0)}, levels=levels, name="training loss")
        ax.set_title(str(run), fontsize="medium")
    figure.savefig(path, dpi=110)


def _lines(run: Run) -> str:
    return str(run).replace(", ", "\n")


def _unstacked(params: Any) -> list[Any]:
    return [jax.tree.map(lambda p: p[i], params) for i in range(len(jax.tree.leaves(params)[0]))]  # noqa: B023


def main() -> None:
    """Prints the table, and writes the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", metavar="FILE", help="where to write the slices of the loss")
    parser.add_argument("--quick", action="store_true", help="two starts instead of five")
    args = parser.parse_args()
    found = {run: measure(run, 2 if args.quick else SEEDS) for run in (SMALL, LARGE, LOW, HIGH)}
    header = ("", "steps", *MEASURES, "test accuracy, %")
    compared = [comparison(name, found[one].measured, found[other].measured) for name, (one, other) in COMPARED.items()]
    print(table(header, [*(row(run, here.measured) for run, here in found.items()), *compared]))
    if args.picture:
        picture(found, args.picture)
        print(f"picture: {args.picture}")


if __name__ == "__main__":
    main()
