"""Central flows: predicted against measured losses and sharpness of the small network of notebook 3.

    python -m benchmarks flows [--quick]

The network is 64-32-10 with tanh and squared errors, on 200 handwritten digits in full batches, followed over 500
steps from the start, or from where so many steps have led. Deviations are those of the predicted losses from the
measured ones, each averaged over the same window of steps, relative to the latter. The flow without oscillations is
the optimizer itself in steps of a tenth.
"""

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import gdx
from benchmarks.measure import came_out, table
from gdx import curvature
from gdx.demo.problems import digits, network

WINDOWS = (25, 51, 101, 201)
FINE = 10


def tanh_digits() -> tuple[Any, Any]:
    """The start and the data."""
    images, labels = (column[:200] for column in digits().train)
    start = jax.tree.map(lambda p: 0.5 * p, network(jax.random.key(0), (64, 32, 10)))
    return start, (images - images.mean(axis=0), jax.nn.one_hot(labels, 10))


def squared_error(params: Any, batch: Any) -> jax.Array:
    hidden, last = params
    images, targets = batch
    outputs = jnp.tanh(images @ hidden["weights"] + hidden["biases"]) @ last["weights"] + last["biases"]
    return 0.5 * jnp.mean(jnp.sum((outputs - targets) ** 2, axis=1))


def averaged(losses: Any, window: int) -> np.ndarray:
    return np.convolve(np.asarray(losses, float), np.full(window, 1 / window), "valid")


def follow(start: Any, data: Any, tx: Any, before: int, steps: int, count: int) -> tuple:
    """Measured losses and sharpness, the flow, and the losses of small steps."""

    def train(tx: Any, params: Any, steps: int, state: Any = None) -> gdx.training.Trained:
        return gdx.train(lambda p, _: squared_error(p, data), tx, params, jnp.zeros(steps), state=state)

    batches = jax.tree.map(lambda x: x[None], data)

    def measured(carry: tuple, _: None) -> tuple:
        params, state, sharpness = carry
        run = train(tx, params, 5, state)
        operator: Any = curvature.Hessian(squared_error, run.params, batches)
        if "b2" in tx.hyperparams:
            operator = curvature.adam_preconditioned(operator, tx, run.state)
        sharpness = curvature.update_sharpness(sharpness, operator)
        return (run.params, run.state, sharpness), (run.losses, sharpness.value)

    at = jax.jit(lambda: train(tx, start, before))() if before else None
    params, state = (start, None) if at is None else (at.params, at.state)
    sharpness = curvature.init_sharpness(params, jax.random.key(1))
    carry = params, tx.init(params) if state is None else state, sharpness
    losses, values = jax.jit(lambda carry: jax.lax.scan(measured, carry, None, steps // 5)[1])(carry)
    flow = curvature.central_flow(
        curvature.Hessian(squared_error, params, batches), tx, steps, state=state, count=count
    )
    small = tx.replace(learning_rate=tx.learning_rate / FINE)
    if "b2" in tx.hyperparams:
        small = small.replace(b2=tx.b2 ** (1 / FINE))
        if state is not None:  # its count is that of smaller steps
            state = jax.tree.map(lambda x: x * FINE if jnp.issubdtype(x.dtype, jnp.integer) else x, state)
    fine = jax.jit(lambda: train(small, params, steps * FINE, state))().losses[::FINE]
    return losses.ravel(), np.asarray(values), flow, fine


def rows(runs: list[tuple], steps: int, count: int) -> Iterator[tuple]:
    start, data = tanh_digits()
    for name, tx, before in runs:
        losses, values, flow, fine = follow(start, data, tx, before, steps, count)
        worst = [
            np.max(np.abs(averaged(flow.losses, window) / averaged(losses, window) - 1))
            for window in WINDOWS
            if window < steps
        ]
        other = np.max(np.abs(averaged(fine, WINDOWS[2]) / averaged(losses, WINDOWS[2]) - 1)) if steps > 200 else np.nan
        mean = np.mean(np.asarray(flow.losses, float)) / np.mean(np.asarray(losses, float)) - 1
        last = slice(-20, None)
        edge = 2 / tx.learning_rate
        held = int(np.sum(np.asarray(flow.sharpness[-1]) > 0.999 * edge))
        yield (
            name,
            before,
            *(f"{100 * x:.1f}" for x in worst),
            f"{100 * mean:+.2f}",
            f"{100 * other:.1f}",
            f"{values[last].mean():.4g}",
            f"{np.asarray(flow.sharpness)[-100:, 0].mean():.4g}",
            f"{edge:.4g}",
            f"{held} of {count}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="60 steps of two runs: whether it runs")
    args = parser.parse_args()
    descent = {rate: gdx.gradient_descent(rate) for rate in (0.7, 0.5, 0.35)}
    rmsprop = {rate: gdx.adam(rate, b1=0.0, b2=0.99, eps=1e-6) for rate in (0.002, 0.001)}
    runs = [
        ("gradient descent, 0.7", descent[0.7], 0),
        ("gradient descent, 0.7", descent[0.7], 500),
        ("gradient descent, 0.5", descent[0.5], 500),
        ("gradient descent, 0.35", descent[0.35], 1000),
        ("RMSProp, 0.002", rmsprop[0.002], 0),
        ("RMSProp, 0.001", rmsprop[0.001], 0),
    ]
    steps, count = (60, 2) if args.quick else (500, 8)
    found = list(rows(runs[::4] if args.quick else runs, steps, count))
    print(f"Largest deviation of predicted from measured losses over {steps} steps, in %, averaged over a window;")
    print("that of the mean over all steps; that of the flow without oscillations in windows of 101.")
    print("Sharpness: the mean over the last 100 steps, and how many of the eigenvalues followed are at the edge\n")
    windows = [f"of {window}" for window in WINDOWS if window < steps]
    header = ["", "from step", *windows, "mean", "without", "measured", "predicted", "edge", "at it"]
    print(table(header, found), "\n")
    columns = [*(f"averaged over windows {window}" for window in windows), f"in the mean of {steps} steps"]
    for i, column in enumerate(columns):
        each = {f"{row[0]} from step {row[1]}": abs(float(row[2 + i])) for row in found}
        print(came_out(f"deviation in %, {column}", 5, each))
