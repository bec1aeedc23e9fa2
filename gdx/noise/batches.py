"""Mini-batches as indices of examples: shuffled epochs, and draws with replacement."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdx.arguments import check_key
from gdx.fields import is_concrete, refuse, to_integer
from gdx.trees import leading_axis


class Batches(NamedTuple):
    """Batches of which some are filled up.

    Attributes:
      examples: int32 of shape (steps, batch_size): the indices of the examples in each batch.
      weights: float32 of the same shape: 1, and 0 where an index only fills the batch up.
    """

    examples: jax.Array
    weights: jax.Array


def epochs(key: jax.Array, data: Any, batch_size: int, number: int = 1) -> jax.Array:
    """Batches of shuffled epochs: sampling without replacement. What is left over of an epoch is dropped.

    Each epoch of $N$ examples has $\\lfloor N / B \\rfloor$ batches, and is shuffled anew, so that what
    is dropped differs from one to the next. Sizes are static: it can be called in `jax.jit`, for one epoch at a time
    in `jax.lax.scan`, and under `jax.vmap` with many keys.

    Args:
      key: a random key; the same key gives the same batches.
      data: a tree of arrays with a leading axis of examples in common, or the number of examples.
      batch_size: $B$, the number of examples in a batch.
      number: how many epochs.

    Returns:
      int32 of shape (number * (N // batch_size), batch_size): indices of examples, as `gdx.train` takes them.

    Raises:
      ValueError: batch_size is not in 1 to N, or number is less than 1, or the leaves of data differ in length.
      TypeError: one of them is no integer.

    >>> import gdx, jax
    >>> batches = gdx.noise.epochs(jax.random.key(0), 10, batch_size=3, number=2)
    >>> batches.shape, len(set(batches[:3].ravel().tolist()))
    ((6, 3), 9)
    """
    size = _check_sizes("epochs", key, data, batch_size, number=number)
    steps = size // batch_size
    return _permutations(key, size, number)[:, : steps * batch_size].reshape(number * steps, batch_size)


def padded_epochs(key: jax.Array, data: Any, batch_size: int, number: int = 1) -> Batches:
    r"""Batches of shuffled epochs in which every example occurs: the last one of an epoch is filled up.

    What fills it up repeats an example with weight 0, so take the weighted mean of the examples' losses,
    `jnp.average(losses, weights=weights)`. Its gradient is that of the $r = N \bmod B$ examples left over:
    unbiased, and as noisy as a batch of $r$ is; that of `value_and_grad` too, which weighs its micro-batches.

    Args:
      key, data, batch_size, number: as in `epochs`.

    Returns:
      `Batches(examples, weights)` of ceil(N / batch_size) steps for each epoch.

    Raises:
      ValueError, TypeError: as in `epochs`.

    >>> import gdx, jax, jax.numpy as jnp
    >>> data = jnp.arange(10.0)
    >>> def loss(theta, batch):
    ...     return jnp.average((theta - data[batch.examples]) ** 2, weights=batch.weights)
    >>> batches = gdx.noise.padded_epochs(jax.random.key(0), data, batch_size=4, number=20)
    >>> batches.weights[2].tolist()
    [1.0, 1.0, 0.0, 0.0]
    >>> gdx.train(loss, gdx.sgd(0.1), jnp.zeros(()), batches).losses.shape
    (60,)
    """
    size = _check_sizes("padded_epochs", key, data, batch_size, number=number)
    steps = -(-size // batch_size)
    filled = jnp.concatenate([jnp.arange(size), jnp.zeros(steps * batch_size - size, int)])
    examples = _permutations(key, size, number)[:, filled].reshape(number * steps, batch_size)
    weights = (jnp.arange(steps * batch_size) < size).astype(jnp.float32).reshape(steps, batch_size)
    return Batches(examples, jnp.tile(weights, (number, 1)))


def with_replacement(key: jax.Array, data: Any, batch_size: int, steps: int = 1) -> jax.Array:
    """Batches whose examples are all drawn independently.

    Args:
      key, data, batch_size: as in `epochs`. A batch larger than the data is refused here too: it
        would cost more than the exact gradient.
      steps: how many batches.

    Returns:
      int32 of shape (steps, batch_size): indices of examples.

    Raises:
      ValueError, TypeError: as in `epochs`.

    In a scan, of which every step has a key of its own:

    >>> import gdx, jax, jax.numpy as jnp
    >>> data = jnp.arange(10.0)
    >>> def loss(theta, key):
    ...     examples = gdx.noise.with_replacement(key, data, batch_size=4)[0]
    ...     return jnp.mean((theta - gdx.noise.take(data, examples)) ** 2)
    >>> keys = jax.random.split(jax.random.key(0), 50)
    >>> gdx.train(loss, gdx.sgd(0.1), jnp.zeros(()), keys).losses.shape
    (50,)
    """
    size = _check_sizes("with_replacement", key, data, batch_size, steps=steps)
    return jax.random.randint(key, (steps, batch_size), 0, size, jnp.int32)


def take(data: Any, examples: jax.Array) -> Any:
    """The examples with these indices, of every leaf.

    Raises:
      ValueError: the leaves of data do not have one leading axis in common.
      IndexError: an index that can be read here is out of range (JAX itself would take the nearest example).

    >>> import gdx, jax.numpy as jnp
    >>> images, labels = gdx.noise.take((jnp.zeros((9, 8, 8)), jnp.arange(9)), jnp.array([2, 7]))
    >>> images.shape, labels.tolist()
    ((2, 8, 8), [2, 7])
    """
    size = leading_axis("noise.take:", data, "examples")
    if not jnp.issubdtype(getattr(examples, "dtype", type(examples)), np.integer):
        refuse("noise.take: examples", examples, "an array of integers, the indices of examples")
    if is_concrete(examples) and np.size(examples) and not 0 <= np.min(examples) <= np.max(examples) < size:
        raise IndexError(
            f"noise.take: examples are {np.min(examples)} to {np.max(examples)}; expected 0 to {size - 1}, the indices "
            f"of the data's {size} examples"
        )
    return jax.tree.map(lambda column: jnp.asarray(column)[examples], data)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _permutations(key: jax.Array, size: int, number: int) -> jax.Array:
    order = jnp.arange(size, dtype=jnp.int32)
    return jax.vmap(lambda key: jax.random.permutation(key, order))(jax.random.split(key, number))


def examples_in(label: str, data: Any) -> int:
    """The number of examples, which data may be itself."""
    is_number = isinstance(data, int | np.integer) and not isinstance(data, bool)
    return int(data) if is_number else leading_axis(label, data, "examples")


def _check_sizes(name: str, key: Any, data: Any, batch_size: int, **counts: int) -> int:
    """The number of examples; raises unless batches of this size can be drawn from them with this key."""
    check_key(f"noise.{name}: key", key)
    size = examples_in(f"noise.{name}:", data)
    for label, value in {"batch_size": batch_size, **counts}.items():
        if to_integer(f"noise.{name}: {label}", value) < 1:
            raise ValueError(f"noise.{name}: {label} is {value}; expected at least 1")
    if size < 1:
        raise ValueError(f"noise.{name}: data has {size} examples; expected at least 1")
    if batch_size > size:
        raise ValueError(
            f"noise.{name}: batch_size is {batch_size}, more than the data's {size} examples; expected 1 to {size}"
        )
    return size
