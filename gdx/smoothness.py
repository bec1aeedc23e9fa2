"""Whether slopes in hyperparameters can be trusted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdx.arguments import check_function, number
from gdx.curvature.krylov import to_vector
from gdx.trees import check_arrays, is_array, paths


def metasmoothness(run: Callable[[Any], Any], tx: Any, *, change: float = 1e-3) -> Any:
    r"""How well slopes at neighbouring hyperparameters agree: near 1 they can be trusted, near 0 or below they cannot.

    With $\theta(z)$ what training makes of the hyperparameters $z$, and $h = c \, z_i e_i$ for each of them, it is the
    mean agreement in sign of two differences side by side, weighted by the first:

    $$ S_i = \frac{\sum_j |d_j| \; \mathrm{sign}(d_j) \, \mathrm{sign}(d'_j)}{\sum_j |d_j|}, \qquad
       d = \theta(z) - \theta(z - h), \quad d' = \theta(z - h) - \theta(z - 2h) $$

    in [-1, 1]. Where training is chaotic, as far beyond the edge of stability, the slopes that `jax.grad` finds are
    right for an infinitesimal change, and huge, and say nothing about one of a thousandth. So it is in part where
    gradients jump, as those of relu networks do at their corners: there a larger change agrees better.

    The neighbours are smaller, since what has to stay below 1, as a momentum, has no room above; that of 0 is
    `change`. All are run side by side: for n hyperparameters the time and the memory of 1 + 2 n runs without slopes.
    What is lost in rounding looks like chaos: the influence of an `eps` of 1e-8, or of a learning rate after
    training has converged. There a larger change, or float64, says more.

    Args:
      run: a function of the optimizer that trains and returns arrays, best the trained parameters: of one number alone,
        such as a loss, what is found is 1 or -1. It is mapped by `jax.vmap`.
      tx: the optimizer, or any tree of numbers, at which the slopes are wanted. An array is changed as a whole.
      change: c, how far the neighbours are, as a part of each number; positive, below 0.5, and large beside the
        rounding of its dtype.

    Returns:
      A tree like tx, as slopes are: in the place of each hyperparameter its agreement. NaN where nothing changes at
      all, where training diverges, and for what is no floating-point number.

    Raises:
      TypeError: run is no function of an optimizer, or returns no floating-point array; tx holds no floating-point
        number.
      ValueError: change is not positive or not below 0.5, or below four times the rounding of a hyperparameter's dtype.

    Source: Engstrom et al., Optimizing ML Training with Metagradient Descent (2025): empirical metasmoothness.

    >>> import gdx, jax.numpy as jnp
    >>> wells = lambda theta, batch: jnp.sum((theta**2 - 1) ** 2) / 4  # at a learning rate above 1 no step settles
    >>> start, batches = jnp.linspace(-1.2, 1.2, 256), jnp.zeros(50)
    >>> run = lambda tx: gdx.train(wells, tx, start, batches).params
    >>> smooth, chaotic = (gdx.metasmoothness(run, gdx.gradient_descent(rate)) for rate in (0.02, 1.9))
    >>> bool(smooth.learning_rate > 0.99), bool(chaotic.learning_rate < 0.2)
    (True, True)
    """
    check_function("metasmoothness: run", run, "an optimizer")
    change = number("metasmoothness: change", change, "a positive number below 0.5, such as 1e-3", above=0)
    if change >= 0.5:  # at twice that a number has changed its sign
        raise ValueError(f"metasmoothness: change is {change!r}; expected a positive number below 0.5, such as 1e-3")
    leaves, structure = jax.tree.flatten(tx)
    if not all(map(is_array, leaves)):
        raise TypeError(f"metasmoothness: tx is {tx!r}; expected an optimizer of gdx's, or a tree of numbers")
    values = [jnp.asarray(x) for x in leaves]
    moved = np.array([i for i, x in enumerate(values) if jnp.issubdtype(x.dtype, jnp.floating)], int)
    if not moved.size:
        raise TypeError(f"metasmoothness: tx is {tx!r}; expected hyperparameters that are floating-point numbers")
    names = [*paths(tx)]
    for i in moved:
        least = 4 * float(jnp.finfo(values[i].dtype).eps)
        if change < least:
            raise ValueError(
                f"metasmoothness: change is {change:g} for tx at {names[i]}, in {values[i].dtype}, which rounds such "
                f"neighbours away; expected at least {least:.2g}, or that number in float32"
            )

    def trained(index: jax.Array, part: jax.Array) -> jax.Array:
        """All numbers of the run with one hyperparameter smaller by this part of it."""
        at = values.copy()
        for i in moved:
            x = values[i]
            at[i] = x - jnp.where(index == i, part, 0).astype(x.dtype) * jnp.where(x == 0, -1, x)
        returned = run(jax.tree.unflatten(structure, at))
        check_arrays("metasmoothness: what run returned", returned)
        found = map(jnp.asarray, jax.tree.leaves(returned))
        arrays = [x for x in found if jnp.issubdtype(x.dtype, jnp.inexact)]
        if not arrays:
            raise TypeError("metasmoothness: run returned no floating-point array; expected the trained parameters")
        return to_vector(arrays)

    parts = change * np.repeat([0.0, 1.0, 2.0], [1, len(moved), len(moved)])
    found = jax.vmap(trained)(jnp.asarray([0, *moved, *moved]), jnp.asarray(parts, jnp.result_type(float)))
    once, twice = jnp.split(found[1:], 2)
    first, second = found[:1] - once, once - twice
    agreement = jnp.sum(first * jnp.sign(second), axis=1) / jnp.sum(jnp.abs(first), axis=1)
    whole = [jnp.full((), jnp.nan, agreement.dtype)] * len(values)
    for i, x in zip(moved, agreement):
        whole[i] = x
    return jax.tree.unflatten(structure, whole)
