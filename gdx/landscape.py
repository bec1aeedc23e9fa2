"""The loss around parameters: along a line, over a plane, and under random perturbations.

Scale matters: a relu network computes the same with one layer doubled and the next one halved, while the loss then
changes half as fast along the first. Filter-normalised directions do not see the difference (Li et al., 2018).

>>> import gdx, jax, jax.numpy as jnp, numpy as np
>>> bowl, keys = lambda p: jnp.sum(p**2), jax.random.split(jax.random.key(0))
>>> line = gdx.landscape.line(bowl, jnp.ones(3), jnp.zeros(3), np.linspace(0, 1, 5))  # from ones to zeros
>>> directions = tuple(gdx.landscape.filter_normalised_direction(key, jnp.ones(3)) for key in keys)
>>> heights = gdx.landscape.plane(bowl, jnp.ones(3), directions, np.arange(-2, 3), np.arange(9))
>>> line.shape, heights.shape
((5,), (9, 5))

A grid is one program, which evaluates a few points at a time; `plot.loss_line` and `plot.loss_plane` draw.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gdx.arguments import check_function, check_key, number
from gdx.checks import check_floating
from gdx.fields import is_real, refuse, to_integer
from gdx.numerics import accurate, compute_dtype
from gdx.trees import paths

Measure = Callable[[Any], Any]
"""What is looked at: a function from parameters to a scalar, or to a tree of arrays such as loss and accuracy."""


def line(measure: Measure, start: Any, end: Any, positions: Any, *, chunk_size: int | None = 16) -> Any:
    r"""What a function of the parameters is along the line through two of them:

    $$ f((1 - \alpha) \, \theta_0 + \alpha \, \theta_1) $$

    Compiled once for each measure and set of shapes, so define that function once.

    Args:
      measure: the function, such as the loss on all of the training data.
      start, end: $\theta_0$ and $\theta_1$, trees of floating-point arrays.
      positions: $\alpha$, of shape (points,): 0 is the start, 1 the end.
      chunk_size: how many points are evaluated at the same time, which bounds the memory; None for all.

    Returns:
      What measure returns, each array with a leading axis of points.

    Raises:
      ValueError: start and end differ in structure or shapes, positions have another shape, or chunk_size is less
        than 1.

    Source: Goodfellow, Vinyals & Saxe, Qualitatively Characterizing Neural Network Optimization Problems (2015).

    >>> import gdx, jax.numpy as jnp
    >>> gdx.landscape.line(lambda x: jnp.sum(x**2), jnp.zeros(2), jnp.ones(2), [0.0, 0.5, 1.0, 2.0]).tolist()
    [0.0, 0.5, 2.0, 8.0]
    """
    check_floating("landscape.line: start", start)
    check_floating("landscape.line: end", end)
    _check_alike("line", "start", start, "end", end)
    direction = jax.tree.map(lambda a, b: accurate(b) - accurate(a), start, end)
    return _evaluate("line", measure, start, (direction,), {"positions": positions}, chunk_size)


def plane(
    measure: Measure, origin: Any, directions: tuple[Any, Any], x: Any, y: Any, *, chunk_size: int | None = 16
) -> Any:
    r"""What a function of the parameters is over a grid of the plane that two directions span:

    $$ f(\theta + x_i \, d_1 + y_j \, d_2) $$

    Args:
      measure, chunk_size: as in `line`.
      origin: $\theta$, a tree of floating-point arrays.
      directions: $d_1$ and $d_2$, such as two of `filter_normalised_direction`.
      x, y: the coordinates along each of them, of shapes (columns,) and (rows,).

    Returns:
      What measure returns, each array with leading axes (rows, columns), as pictures take it.

    Raises:
      ValueError: the directions differ from the origin in structure or shapes, x or y has another shape, or
        chunk_size is less than 1.

    Source: Li et al., Visualizing the Loss Landscape of Neural Nets (2018), section 3.

    >>> import gdx, jax.numpy as jnp
    >>> axes = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
    >>> gdx.landscape.plane(lambda p: p[0] - p[1], jnp.zeros(2), axes, [1.0, 2.0, 3.0], [0.0, 1.0]).tolist()
    [[1.0, 2.0, 3.0], [0.0, 1.0, 2.0]]
    """
    if not isinstance(directions, tuple | list) or len(directions) != 2:
        refuse("landscape.plane: directions", directions, "two of them, each a tree like the origin")
    check_floating("landscape.plane: origin", origin)
    for i, direction in enumerate(directions):
        check_floating(f"landscape.plane: direction {i}", direction)
        _check_alike("plane", "origin", origin, f"direction {i}", direction)
    return _evaluate("plane", measure, origin, tuple(reversed(directions)), {"y": y, "x": x}, chunk_size)


def normal_direction(key: jax.Array, params: Any) -> Any:
    """A tree like the parameters of independent standard normal numbers (real ones, in at least float32).

    >>> import gdx, jax, jax.numpy as jnp
    >>> direction = gdx.landscape.normal_direction(jax.random.key(0), {"w": jnp.ones((50, 20), "bfloat16")})
    >>> direction["w"].dtype, round(jnp.std(direction["w"]).item(), 1)
    (dtype('float32'), 1.0)
    """
    check_key("landscape: key", key)
    check_floating("landscape: the parameter", params)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(key, max(len(leaves), 1))
    draws = [jax.random.normal(k, jnp.shape(p), jnp.finfo(compute_dtype(p)).dtype) for k, p in zip(keys, leaves)]
    return jax.tree.unflatten(structure, draws)


def filter_normalised_direction(key: jax.Array, params: Any) -> Any:
    r"""A normal direction with each of its filters as long as the parameters' filter:

    $$ d_f \leftarrow \frac{d_f}{|d_f|} |\theta_f| $$

    A filter is what makes one output: in an array of two or more axes all that has one index along the last one
    (an input-by-output matrix, a height-width-input-output kernel). Biases and other arrays with fewer axes are not
    moved, as in the paper.

    Args:
      key: a random key.
      params: $\theta$, a tree of floating-point arrays.

    Source: Li et al., Visualizing the Loss Landscape of Neural Nets (2018), section 4.

    >>> import gdx, jax, jax.numpy as jnp
    >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 2.0]]), "bias": jnp.ones(2)}
    >>> direction = gdx.landscape.filter_normalised_direction(jax.random.key(0), params)
    >>> [f"{length:.3f}" for length in jnp.linalg.norm(direction["kernel"], axis=0)], direction["bias"].tolist()
    (['5.000', '2.000'], [0.0, 0.0])
    """

    def normalised(d: jax.Array, p: jax.Array) -> jax.Array:
        if d.ndim < 2:
            return jnp.zeros_like(d)
        lengths, wanted = _filter_lengths(d), _filter_lengths(accurate(p))
        return d * (wanted / jnp.where(lengths > 0, lengths, 1))

    return jax.tree.map(normalised, normal_direction(key, params), params)


class Rise(NamedTuple):
    """By how much random perturbations raise the loss.

    Attributes:
      mean: the mean over the samples.
      error: its standard error.
    """

    mean: jax.Array
    error: jax.Array


def random_rise(
    loss: Callable[[Any], jax.Array],
    params: Any,
    key: jax.Array,
    radius: float,
    *,
    direction: Callable[[jax.Array, Any], Any] = filter_normalised_direction,
    samples: int = 64,
    chunk_size: int | None = 16,
) -> Rise:
    r"""The mean rise of the loss under random perturbations:

    $$ E_d[L(\theta + \rho \, d)] - L(\theta) $$

    With `normal_direction`, $\rho$ is the standard deviation of each parameter's perturbation, and at a
    minimum the rise is about $\frac{1}{2} \rho^2 \operatorname{tr} \nabla^2 L$. With filter-normalised directions
    it is the length of a filter's perturbation relative to the filter. Each sample is paired with its mirror image
    $-d$, which takes the slope out of the mean.

    Args:
      loss: a function from parameters to a real scalar.
      params: $\theta$, a tree of floating-point arrays.
      key: a random key: compare parameters under the same one.
      radius: $\rho$.
      direction: draws $d$ from a key and the parameters.
      samples: how many pairs are drawn, at least 2.
      chunk_size: how many pairs are evaluated at the same time, which bounds the memory; None for all.

    Raises:
      ValueError: radius is not positive, samples is less than 2 or chunk_size less than 1.

    >>> import gdx, jax, jax.numpy as jnp
    >>> bowl = lambda theta: 2.0 * jnp.sum(theta**2)  # the trace of its Hessian is 400
    >>> found = gdx.landscape.random_rise(
    ...     bowl, jnp.zeros(100), jax.random.key(0), 0.1, direction=gdx.landscape.normal_direction
    ... )
    >>> bool(abs(found.mean - 2.0) < 4 * found.error), bool(found.error < 0.1)
    (True, True)
    """
    name = "landscape.random_rise"
    check_function(f"{name}: loss", loss, "the parameters")
    check_floating(f"{name}: the parameter", params)
    check_key(f"{name}: key", key)
    number(f"{name}: radius", radius, "more than 0", above=0)
    check_function(f"{name}: direction", direction, "a random key", "the parameters")
    to_integer(f"{name}: samples", samples, minimum=2)
    value = jax.eval_shape(loss, params)
    if not hasattr(value, "dtype") or value.shape != () or not jnp.issubdtype(value.dtype, np.floating):
        raise TypeError(f"{name}: loss returned {value}; expected a real scalar")
    chunk = _chunk("random_rise", chunk_size, samples)
    return _random_rise(loss, direction, chunk, params, jax.random.split(key, samples), radius)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _random_rise(
    loss: Callable[[Any], jax.Array], direction: Callable, chunk: int, params: Any, keys: jax.Array, radius: Any
) -> Rise:
    def rise(key: jax.Array) -> jax.Array:
        d = direction(key, params)
        return (loss(_moved(params, (d,), (radius,))) + loss(_moved(params, (d,), (-radius,)))) / 2

    rises = jax.lax.map(rise, keys, batch_size=chunk) - loss(params)
    return Rise(jnp.mean(rises), jnp.std(rises, ddof=1) * (1 / np.sqrt(len(keys))))


def _evaluate(
    name: str, measure: Measure, origin: Any, directions: tuple, axes: dict[str, Any], chunk_size: int | None
) -> Any:
    """What measure returns at each point of a grid, with a leading axis for each direction."""
    check_function(f"landscape.{name}: measure", measure, "the parameters")
    for label, values in axes.items():
        if not is_real(values):
            refuse(f"landscape.{name}: {label}", values, "real numbers, (points,)")
    coordinates = {label: jnp.asarray(values, jnp.result_type(float)) for label, values in axes.items()}
    for label, values in coordinates.items():
        if values.ndim != 1 or not values.size:
            raise ValueError(f"landscape.{name}: {label} has shape {values.shape}; expected (points,), at least one")
    grid = jnp.stack(jnp.meshgrid(*coordinates.values(), indexing="ij"), axis=-1)
    points = grid.reshape(-1, len(directions))
    found = _measured(measure, _chunk(name, chunk_size, len(points)), origin, directions, points)
    return jax.tree.map(lambda leaf: leaf.reshape(*grid.shape[:-1], *leaf.shape[1:]), found)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _measured(measure: Measure, chunk: int, origin: Any, directions: tuple, points: jax.Array) -> Any:
    return jax.lax.map(lambda point: measure(_moved(origin, directions, point)), points, batch_size=chunk)


def _moved(params: Any, directions: tuple, steps: Any) -> Any:
    """The parameters moved by so many steps along each direction, added up in at least float32, in their own dtype."""

    def moved(p: jax.Array, *ds: jax.Array) -> jax.Array:
        p = jnp.asarray(p)
        with jax.numpy_dtype_promotion("standard"):  # steps and directions are of different precisions
            shift = sum(jnp.asarray(step, jnp.finfo(compute_dtype(p)).dtype) * d for step, d in zip(steps, ds))
            return (accurate(p) + shift).astype(p.dtype)

    return jax.tree.map(moved, params, *directions)


def _filter_lengths(p: jax.Array) -> jax.Array:
    squares = p.real**2 + p.imag**2 if jnp.iscomplexobj(p) else p * p
    return jnp.sqrt(jnp.sum(squares, axis=tuple(range(p.ndim - 1)), keepdims=True))


def _chunk(name: str, chunk_size: int | None, points: int) -> int:
    if chunk_size is None:
        return points
    return min(to_integer(f"landscape.{name}: chunk_size", chunk_size, minimum=1), points)


def _check_alike(name: str, ours: str, a: Any, theirs: str, b: Any) -> None:
    """Raises unless two trees have the same structure and shapes."""
    structure: Any = jax.tree.structure(a)
    if structure != jax.tree.structure(b):
        differing = sorted(set(paths(a)) ^ set(paths(b)))[:3]
        where = f"at {', '.join(differing)}" if differing else "in their containers"
        raise ValueError(f"landscape.{name}: {ours} and {theirs} differ {where}; expected trees of one structure")
    for path, p, q in zip(paths(a), jax.tree.leaves(a), jax.tree.leaves(b)):
        if np.shape(p) != np.shape(q):
            raise ValueError(
                f"landscape.{name}: {ours} at {path} has shape {np.shape(p)}, {theirs} {np.shape(q)}; "
                f"expected trees of the same shapes"
            )
