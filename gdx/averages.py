"""The average of the parameters along the way, kept beside any optimizer."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx.checks import check_state, one_of, require_params
from gdx.fields import Scalar, hyperparameter, static, to_integer
from gdx.leafwise import Leafwise
from gdx.mesh import as_placed, types_of, untyped
from gdx.numerics import compute_dtype, uncontracted
from gdx.storage.blocks import Blocks, is_packed
from gdx.storage.formats import Format, StochasticBfloat16, moment_like, to_storage
from gdx.transform import Transform, to_transform
from gdx.trees import paths, unboxed


class Mean(NamedTuple):
    """An average.

    Attributes:
      count: int32 scalar, the number of updates so far.
      average: a tree like the parameters.
    """

    count: jax.Array  # type: ignore[assignment]
    average: Any


class CompensatedMean(NamedTuple):
    """The mean of all parameters, in float32 or float64.

    Attributes:
      count: int32 scalar, the number of updates so far.
      average: a tree like the parameters.
      compensation: what rounding has left out of it, in bfloat16.
    """

    count: jax.Array  # type: ignore[assignment]
    average: Any
    compensation: Any


class AverageState(NamedTuple):
    """State of `average_parameters`. What is in `mean` lacks the newest parameters: read it by `read_average`.

    Attributes:
      total: the sum of the weights so far: that of the start is what it lacks to 1. Where there is no decay, the
        number of parameters averaged.
      rest: what rounding has left out of it.
      weight: that of the newest parameters in the average; 0 if they are not to be in it.
      mean: `CompensatedMean` or `Mean`: the average of those before.
      inner_state: that of the transform inside.
    """

    total: jax.Array
    rest: jax.Array
    weight: jax.Array
    mean: Any
    inner_state: Any


class averaging(Leafwise):
    """Moves an average towards what it is given, by this weight."""

    State: ClassVar[Any] = Mean

    weight: Scalar = hyperparameter()
    dtype: np.dtype | Format | None = static(default=None)

    @property
    def formats(self) -> tuple[Any, ...]:
        return (self.dtype,)

    def start(self, p: jax.Array) -> tuple[Any, ...]:
        return (moment_like(p, self.dtype),)

    def step(self, shared: Any, g: jax.Array, p: Any, *moments: Any, **dither: Any) -> tuple[jax.Array, ...]:
        (average,) = moments
        return g, average + uncontracted(self.weight * (g - average))


class compensated_averaging(averaging):
    """The same, with what rounding leaves out added in the next step."""

    State: ClassVar[Any] = CompensatedMean

    @property
    def formats(self) -> tuple[Any, ...]:
        return self.dtype, jnp.dtype(jnp.bfloat16)

    def start(self, p: jax.Array) -> tuple[Any, ...]:
        return moment_like(p, self.dtype), moment_like(p, jnp.bfloat16)

    def step(self, shared: Any, g: jax.Array, p: Any, *moments: Any, **dither: Any) -> tuple[jax.Array, ...]:
        average, compensation = moments
        change = uncontracted(self.weight * ((g - average) - compensation))
        return g, *_compensated_sum(average, change, compensation)


def _compensated_sum(x: jax.Array, change: jax.Array, rest: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A number after a change, and what rounding has left out of it, now and before."""
    change = change + rest
    moved = x + change
    return moved, change - (moved - x)


def _to_format(label: str, value: Any) -> np.dtype | Format | None:
    """Converts the field that says how the average is kept."""
    expected = "gdx.storage.StochasticBfloat16(), a dtype of 32 bits or more, or None"
    value = to_storage(label, value, expected=expected)
    if isinstance(value, Format):
        # the reader has to know it from what is stored
        moves = value.stochastic and isinstance(value, StochasticBfloat16 | Blocks)
    else:
        moves = value is None or value.itemsize >= 4
    if not moves:
        raise ValueError(
            f"{label} is {value}: rounded to nearest, an average stands still where it should move by less than half "
            f"a unit in its last place; expected {expected}"
        )
    return value


def _link(weight: Any, decay: Any, dtype: Any) -> averaging:
    # each step moves a mean of n by 1 / n: in float32 it would soon stand still
    is_compensated = decay is None and not isinstance(dtype, Format)
    return (compensated_averaging if is_compensated else averaging)(weight, dtype)


class average_parameters(Transform):
    r"""Averages the parameters that a transform makes. Its updates pass unchanged.

    $$ \bar\theta_n = \bar\theta_{n-1} + w_n (\theta_n - \bar\theta_{n-1}), \qquad
       w_n = \begin{cases} (1 - \beta_n) / W_n, \quad W_n = \beta_n W_{n-1} + 1 - \beta_n & \text{with a decay} \\
       1 / n & \text{without} \end{cases} $$

    with $W_0 = 0$, where $\theta_1$ are the parameters after the first step that counts. With a decay that is the
    exponential average $\beta \bar\theta + (1 - \beta) \theta$, corrected by the weight $1 - W_n$ that its start still
    has: after one step it is the parameters. Without, it is the mean of all of them (Polyak and Ruppert's), whose error
    under noise is asymptotically the least there is, $\operatorname{tr}(H^{-1} S H^{-1}) / n$ for a Hessian $H$ and
    the covariance $S$ of the gradients, whatever the learning rate; the last parameters keep an error that the
    learning rate sets.

    What counts are the parameters that each `update` is given, and the newest ones when the average is read, by
    `read_average`. So it is of what they really were, also where a link rounds them, or something else moves them.

    State: `AverageState(total, rest, weight, mean, inner_state)`. The average takes 4 bytes per parameter, 6 without
    decay, and 2 with `StochasticBfloat16`. In a loop on two CPU cores a step of AdamW with 10M parameters takes 1.6
    times as long with it, 2 times in that format, and 3 times without decay, where the compiler makes copies.

    Args:
      tx: the transform, gdx's or optax's.
      decay: $\beta$ in [0, 1); the average spans about $1 / (1 - \beta)$ steps. None for the mean of all.
      start: how many steps are made before the first that counts. Until then the average is the parameters.
      every: of so many steps each, the first counts.
      dtype: in which the average is kept: None for float32, or the parameter's where that is wider. Without decay what
        rounding leaves out of it is kept too, in bfloat16, so that it stays exact for a million steps and more; with
        one, it no longer moves where its relative distance from the parameters is below $2^{-25} / (1 - \beta)$. Or a
        format of `gdx.storage` that rounds at random: where that has a number each $u$, and parameters are $d$ from the
        average, this one has an error of about $\sqrt{u d / 2}$, but hardly less than $u / 2$, however long it is.

    Raises:
      TypeError: tx is no transform, or start or every no integer.
      ValueError: decay is outside [0, 1), start negative, or every less than 1; dtype is one that rounds to nearest in
        less than 32 bits; or update is called without parameters.

    Limits: around `optax.MultiSteps` each mini-batch is a step; put it inside, `MultiSteps(average_parameters(tx), 4)`.
    `gdx.sweep` keeps no states; to sweep a decay, `jax.vmap(lambda tx: gdx.train(...))(batch)` and then `read_average`.

    Sources: Ruppert, Efficient estimations from a slowly convergent Robbins-Monro process (1988); Polyak & Juditsky,
    Acceleration of stochastic approximation by averaging (1992); Kingma & Ba (2014), section 7.2, for the corrected
    exponential average.

    >>> import gdx, jax, jax.numpy as jnp
    >>> noisy = lambda theta, noise: jnp.sum(0.5 * theta**2 + noise * theta)  # least at 0
    >>> noise = jax.random.normal(jax.random.key(0), (2000, 10))
    >>> tx = gdx.average_parameters(gdx.sgd(0.5), decay=None, start=100)
    >>> params, state, *_ = gdx.train(noisy, tx, jnp.ones(10), noise)
    >>> average = gdx.read_average(state, params)
    >>> bool(jnp.linalg.norm(average) < 0.1 * jnp.linalg.norm(params))
    True
    """

    tx: Transform = dataclasses.field(metadata={"convert": to_transform})
    decay: Scalar | None = hyperparameter(default=0.999, minimum=0, below=1, optional=True)
    start: int = static(default=0, convert=functools.partial(to_integer, minimum=0), kw_only=True)
    every: int = static(default=1, convert=functools.partial(to_integer, minimum=1), kw_only=True)
    dtype: np.dtype | Format | None = static(default=None, convert=_to_format, kw_only=True)

    def init_tree(self, params: optax.Params) -> AverageState:
        total, rest, weight = (jnp.zeros([], jnp.result_type(float)) for _ in range(3))
        mean = _link(0.0, self.decay, self.dtype)._init(params)
        return AverageState(total, rest, weight, mean, self.tx._init(params))

    def update_tree(
        self, updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, AverageState]:
        check_state(self, state, AverageState)
        updates, inner_state = self.tx._update(updates, state.inner_state, params, extra_args)
        if jax.tree.leaves(updates):
            require_params(self, params)
        moved = _moved(state._replace(inner_state=None), params, self.decay, self.start, self.every, self.dtype)
        return updates, moved._replace(inner_state=inner_state)

    def _counts(self, state: Any) -> Iterator[tuple[Any, Any]]:
        if self.has_schedule:
            yield ("decay",), state.count
            state = state.inner_state
        check_state(self, state, AverageState)
        for path, count in self.tx._counts(state.inner_state):
            yield ("tx", *path), count


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _moved(state: AverageState, params: Any, decay: Any, start: int, every: int, dtype: Any) -> AverageState:
    """The state with these parameters in the mean, and the weight that the next ones will have."""

    def move() -> Any:
        return _link(state.weight, decay, dtype)._update(params, state.mean, None, {})[1]

    def keep() -> Any:
        return state.mean._replace(count=optax.safe_increment(state.mean.count))

    mean = move() if (start, every) == (0, 1) else jax.lax.cond(state.weight > 0, move, keep)
    new = jnp.ones_like(state.total) if decay is None else 1 - decay
    change = new if decay is None else uncontracted(new * ((1 - state.total) - state.rest))
    total, rest = _compensated_sum(state.total, change, state.rest)
    counts = (mean.count > start) & ((mean.count - (start + 1)) % every == 0)
    now, before = (total, rest, new / total), (state.total, state.rest, jnp.zeros_like(total))
    total, rest, weight = (jnp.where(counts, x, y) for x, y in zip(now, before))
    return AverageState(total, rest, weight, mean, None)


def read_average(state: Any, params: optax.Params) -> optax.Params:
    """The average that `average_parameters` keeps, with the newest parameters in it, in their dtypes.

    Args:
      state: a state with one such average in it, however deep; also of a batch of optimizers, with a leading axis.
      params: the parameters after the step that returned this state, in flax's boxes or without. The average is where
        they are on a mesh. What `optax.masked` or `gdx.groups` keep from the average is returned as it is.

    Raises:
      ValueError: there is no average in the state, or several; or params is not what it is the average of.

    >>> import gdx, jax.numpy as jnp
    >>> tx, params = gdx.average_parameters(gdx.sgd(1.0), decay=0.5), jnp.zeros(())
    >>> state = tx.init(params)
    >>> for _ in range(2):
    ...     updates, state = tx.update(jnp.ones(()), state, params)
    ...     params += updates
    >>> params.item(), f"{gdx.read_average(state, params):.3f}"  # -1 has half the weight of -2
    (-2.0, '-1.667')
    """
    made_by = "gdx.average_parameters(tx)"
    total, _, weight, mean, _ = one_of("read_average", state, AverageState, "average", made_by)
    averages = jax.tree.leaves(mean.average, is_leaf=_is_leaf)
    structure: Any = jax.tree.structure(mean.average, is_leaf=_is_leaf)
    rests = [None] * len(averages) if isinstance(mean, Mean) else structure.flatten_up_to(mean.compensation)
    try:
        kept = structure.flatten_up_to(unboxed(params))
        is_like = all(_is_masked(x) or np.shape(p) == x.shape for p, x in zip(kept, averages))
    except ValueError:
        is_like = False
    if not is_like:
        raise ValueError(
            f"read_average: params has leaves at {', '.join(list(paths(params))[:5])} with shapes "
            f"{[np.shape(p) for p in jax.tree.leaves(params)[:5]]}, unlike the average in the state; expected the "
            f"parameters that the last update's updates were added to"
        )
    read = _read
    for _ in range(total.ndim):
        read = jax.vmap(read)
    weight = jnp.where(total > 0, weight, 1)  # before the first that counts

    def of_leaf(p: Any, average: Any, rest: Any) -> Any:
        if _is_masked(average):
            return p
        p = jnp.asarray(p)
        types = types_of(p)
        return as_placed(untyped(read, types.mesh, types)(weight, p, average, rest), p)

    read_tree = jax.tree.unflatten(structure, map(of_leaf, kept, averages, rests))
    return jax.tree.unflatten(jax.tree.structure(params), jax.tree.leaves(read_tree))


def _is_masked(x: Any) -> bool:
    return x is None or isinstance(x, optax.MaskedNode)


def _is_leaf(x: Any) -> bool:
    return _is_masked(x) or is_packed(x)


def _read(weight: jax.Array, p: jax.Array, average: Any, rest: jax.Array | None) -> jax.Array:
    average = average.decode() if is_packed(average) else average
    dtype = compute_dtype(p, average)
    wide, average = p.astype(dtype), average.astype(dtype)
    apart = average - wide if rest is None else (average - wide) + rest.astype(dtype)
    # exactly the parameters where they have all the weight
    return (wide + uncontracted((1 - weight).astype(dtype) * apart)).astype(p.dtype)
