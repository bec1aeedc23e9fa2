"""What the demo minimises: a small network's loss on handwritten digits, or a function of the plane."""

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdx
from gdx.extra import needs

Arrays = tuple[Any, ...]
Metrics = OrderedDict[str, jax.Array]  # JAX keeps its order, in which the metrics are shown


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

    def batches(self, seed: int, batch_size: int | None = None) -> Iterator[np.ndarray]:
        """Endless batches of examples for `loss_on`: shuffled epochs, which drop what does not fill a batch."""
        for epoch in itertools.count():
            key, size = jax.random.fold_in(jax.random.key(seed), epoch), batch_size or BATCH_SIZE
            yield from np.asarray(gdx.noise.epochs(key, self.train, size)) if self.train else np.zeros((99, 0))

    def advance(self, tx: gdx.Transform, params: Any, state: Any, batches: Any) -> tuple[Any, Any, Metrics]:
        """Parameters, state and metrics after a step for each batch: to be compiled."""
        params, state, *_ = gdx.train(self.loss_on, tx, params, batches, state=state)
        return params, state, self.evaluate(params)


def stacked(batches: Iterator[np.ndarray], steps: int) -> np.ndarray:
    """The next of these batches, one for each step, as `gdx.train` takes them."""
    return np.stack(list(itertools.islice(batches, steps)))


@dataclass(frozen=True)
class Surface:
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


def _family(rates: Sequence[float], decay: float) -> dict[str, gdx.Transform]:
    descent, sgd, momentum, nesterov, adam, adamw = rates
    return {
        "gradient_descent": gdx.gradient_descent(descent),
        "sgd": gdx.sgd(sgd, momentum=0.9),
        "momentum": gdx.momentum(momentum),
        "nesterov": gdx.nesterov(nesterov),
        "adam": gdx.adam(adam),
        "adamw": gdx.adamw(adamw, weight_decay=decay),
    }


OPTIMIZERS = {
    "digits": _family((0.5, 0.02, 0.05, 0.1, 2e-3, 2e-3), decay=0.1),
    "quadratic": _family((0.18, 0.01, 0.03, 0.03, 0.3, 0.2), decay=0.5),
    "rosenbrock": _family((1e-3, 2e-4, 5e-4, 1e-3, 0.05, 0.2), decay=1e-3),
}
STEPS = {"digits": 2000, "quadratic": 200, "rosenbrock": 2000}
BATCH_SIZE = 64
TRAINING_IMAGES = 1437  # of the 1797; known before they are loaded, to check the batch size


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
    parts = train_test_split(*columns, train_size=TRAINING_IMAGES, stratify=labels, random_state=0)
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
