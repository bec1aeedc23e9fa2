"""What the demo minimises: a small network's loss on handwritten digits, or a function of the plane."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdx
from gdx.extra import needs

Arrays = tuple[Any, ...]
Metrics = OrderedDict[str, jax.Array]  # JAX keeps its order, in which the metrics are shown
BATCH_SIZE = 64


@dataclass(frozen=True, eq=False)
class Problem:
    """A loss, its data (() where there are none) and its starting point, from a random key.

    A batch is a tuple of arrays with a leading axis of examples. The metrics of parameters are the loss on all training
    data, and the test accuracy or the distance to the minimum; in tables they have the headers.
    """

    title: str
    headers: tuple[str, ...]
    start: Callable[[jax.Array], Any]
    loss: Callable[[Any, Arrays], jax.Array]
    evaluate: Callable[[Any], Metrics]
    train: Arrays = ()
    test: Arrays = ()

    def loss_on(self, params: Any, examples: jax.Array) -> jax.Array:
        """The loss on the training examples with these indices."""
        return self.loss(params, gdx.noise.take(self.train, examples) if self.train else ())

    def batches(self, seed: int, steps: int, size: int = BATCH_SIZE) -> jax.Array:
        """A batch of examples for each step of `loss_on`, from shuffled epochs."""
        if not self.train:
            return jnp.zeros((steps, 0))
        number = -(-steps // max(len(self.train[0]) // size, 1))
        return gdx.noise.epochs(jax.random.key(seed), self.train, size, number)[:steps]


class Surface(NamedTuple):
    """A function of the plane: where it is started, where it is smallest, and what a picture shows of it."""

    function: Callable[[Any], jax.Array]
    formula: str
    start: tuple[float, float]
    minimum: tuple[float, float]
    limits: tuple[tuple[float, float], tuple[float, float]]


def rosenbrock(point: jax.Array) -> jax.Array:
    """A curved valley, flat along its floor."""
    x, y = point
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


def quadratic(point: jax.Array) -> jax.Array:
    """A straight valley, ten times as steep across as along."""
    x, y = point
    return 0.5 * (x**2 + 10 * y**2)


SURFACES = {
    "rosenbrock": Surface(
        rosenbrock, "(1 - x)^2 + 100 (y - x^2)^2", (-0.6, 1.6), (1.0, 1.0), ((-1.7, 1.5), (-0.6, 1.9))
    ),
    "quadratic": Surface(quadratic, "(x^2 + 10 y^2) / 2", (-4.0, 2.0), (0.0, 0.0), ((-4.4, 2.0), (-2.0, 2.3))),
}


def _family(rates: tuple[float, ...], decay: float) -> dict[str, gdx.Transform]:
    descent, sgd, momentum, nesterov, adam, adamw = rates
    optimizers = (
        gdx.gradient_descent(descent),
        gdx.sgd(sgd, momentum=0.9),
        gdx.momentum(momentum),
        gdx.nesterov(nesterov),
        gdx.adam(adam),
        gdx.adamw(adamw, weight_decay=decay),
    )
    return {type(tx).__name__: tx for tx in optimizers}


OPTIMIZERS = {
    "digits": _family((0.5, 0.02, 0.05, 0.1, 2e-3, 2e-3), decay=0.1),
    "quadratic": _family((0.18, 0.01, 0.03, 0.03, 0.3, 0.2), decay=0.5),
    "rosenbrock": _family((1e-3, 2e-4, 5e-4, 1e-3, 0.05, 0.2), decay=1e-3),
}
STEPS = {"digits": 2000, "quadratic": 200, "rosenbrock": 2000}


def load(name: str) -> Problem:
    """The problem of that name; a function of the plane is one without data."""
    if name == "digits":
        return digits()
    surface = SURFACES[name]

    def evaluate(point: jax.Array) -> Metrics:
        distance = jnp.linalg.norm(point - jnp.array(surface.minimum, point.dtype))
        return OrderedDict(loss=surface.function(point), distance=distance)

    return Problem(
        title=f"{name}: {surface.formula}",
        headers=("loss", "distance to minimum"),
        start=lambda key: jnp.array(surface.start, float),
        loss=lambda point, batch: surface.function(point),
        evaluate=evaluate,
    )


def digits() -> Problem:
    """A network with one hidden layer on 8x8 images of handwritten digits, one fifth of them for testing."""
    with needs("demo"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    images, labels = load_digits(return_X_y=True)
    columns = (images / 16).astype(np.float32), labels.astype(np.int32)
    parts = train_test_split(*columns, test_size=0.2, stratify=labels, random_state=0)
    train_images, test_images, train_labels, test_labels = map(jnp.asarray, parts)
    train, test = (train_images, train_labels), (test_images, test_labels)

    def evaluate(params: Any) -> Metrics:
        hits = jnp.argmax(logits(params, test_images), axis=-1) == test_labels
        return OrderedDict(loss=cross_entropy(params, train), accuracy=jnp.mean(hits, dtype=test_images.dtype))

    return Problem(
        title=f"digits: {len(train_labels)} images to train on and {len(test_labels)} to test",
        headers=("training loss", "test accuracy"),
        start=lambda key: network(key, (images.shape[1], 128, 10)),
        loss=cross_entropy,
        evaluate=evaluate,
        train=train,
        test=test,
    )


def network(key: jax.Array, widths: tuple[int, ...]) -> list[dict[str, jax.Array]]:
    """Weights (He et al., 2015) and zero biases of a network with these layer widths, in float32."""
    keys = jax.random.split(key, len(widths) - 1)
    return [
        {
            "weights": jax.random.normal(k, (n, m), jnp.float32) * jnp.sqrt(jnp.float32(2 / n)),
            "biases": jnp.zeros(m, jnp.float32),
        }
        for k, n, m in zip(keys, widths, widths[1:])
    ]


def logits(params: list[dict[str, jax.Array]], images: jax.Array, activation: Any = jax.nn.relu) -> jax.Array:
    """The network's output for each image, before softmax."""
    *hidden, last = params
    for layer in hidden:
        images = activation(images @ layer["weights"] + layer["biases"][None, :])
    return images @ last["weights"] + last["biases"][None, :]


def cross_entropy(params: Any, batch: Arrays, activation: Any = jax.nn.relu) -> jax.Array:
    """The mean cross-entropy of the network's predictions on a batch of images and labels."""
    images, labels = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(params, images, activation), labels))
