"""Guards: steps that would harm a run are not made."""

import dataclasses
import reprlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx.arguments import check_not_traced
from gdx.checks import check_alike, check_state
from gdx.fields import Scalar, hyperparameter, is_number, static, to_bool, to_integer, to_word
from gdx.numerics import by_itself, either, norm, uncontracted
from gdx.transform import Transform, cast_like, to_transform, widened


class SpikesState(NamedTuple):
    """State of `skip_spikes`.

    Attributes:
      count: int32 scalar, how many steps were made and are in the averages: what schedules of its own are called with.
      mean, deviation: of the recent norms (or losses), in the default float dtype.
      skipped: int32 scalar, how many steps were not made.
      in_a_row: int32 scalar, how many steps, up to now, were spikes one after the other.
      let_through: int32 scalar, how many spikes were made all the same, after too many in a row.
      inner_state: that of the transform inside, as if it had never seen what was skipped.
    """

    count: jax.Array  # type: ignore[assignment]
    mean: jax.Array
    deviation: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array
    let_through: jax.Array
    inner_state: Any


class skip_spikes(Transform):
    r"""Does not make a step whose gradient is not finite, or far larger than the recent ones.

    With the gradient's norm $x = |g|_2$ over all leaves, a step is a spike if $x$ is not finite, or, after
    `warmup_steps` steps,

    $$ x > m + k s, $$

    where $m$ and $s$ are mean and standard deviation of the norms of the steps made so far, with weights that
    fall by $\beta$ from each to the one before. After $n$ steps, with $d = x_n - m_{n-1}$,

    $$ w_n = \frac{1 - \beta}{1 - \beta^n}, \qquad m_n = m_{n-1} + w_n d, \qquad
       s_n^2 = (1 - w_n) (s_{n-1}^2 + w_n d^2). $$

    As deviation counts at least $10^{-6} |m|$: after norms that were all alike, one that is larger by 1 % is a spike,
    and one that is larger by a rounding is none.

    A skipped step leaves everything as it was, bit for bit: parameters (its updates are -0.0, which changes no number
    that it is added to), moments, counts, schedules and these averages. The run goes on as one that never saw the
    batch. A step that is made has the updates of `tx` alone, bit for bit. It belongs around a whole optimizer: what
    comes after it in a chain, such as decay, is not skipped.

    After `most` skips in a row it gives up: further spikes are made as they are, until there is a step that is no
    spike. So what is NaN for good is seen in the loss, and a norm that is larger for good enters the averages.
    `check_spikes(state)` raises an error then.

    State: `SpikesState`, six scalars and the state of `tx`. `optax.tree.get(state, "skipped")` reads from that of any
    chain how many steps were skipped. Cost: the gradient is read once more for its norm, and the updates are written
    before they are added, 4 bytes of memory per parameter (8 with `clip`); the state is updated in place. That is 3.3
    times the time of a step of AdamW alone on a CPU, 1.6 times in 8 bits, as with `optax.apply_if_finite` (5.3 and 2.0
    with `clip`). Called outside `jax.jit`, it waits for the norm.

    Limits: `optax.MultiSteps` keeps a NaN in its sum for ever, so the guard goes around it. A norm within a rounding of
    the limit may be judged otherwise in another program (a batch, a mesh), which adds it up in another order, and a
    clipped step has the last bits of its norm. Slopes take the norm and the limit as constants, and are NaN where a
    skipped step's loss is: 0 times NaN. Before jax 0.12 parameters differ from those of `tx` alone by the rounding of
    the update, which is there added in one fused multiply-add. Inside `jax.shard_map` gradients have to be the same on
    every device: average them before.

    Args:
      tx: the optimizer, gdx's or optax's.
      threshold: $k$, so many standard deviations above the mean; at least 0.001.
      decay: $\beta$ in [0, 1); the averages span about $1 / (1 - \beta)$ steps.
      warmup_steps: before so many steps were made, at least 2, only what is not finite is skipped.
      most: so many spikes in a row are skipped, at least 1.
      clip: whether a finite spike is made instead, scaled down to the norm $m + k s$; that norm enters the averages.
      of: "gradient", or "value" for the loss in the place of the norm; `update` then takes it as a keyword, `value=`,
        as `gdx.train` passes it. What is not finite is skipped in either of them.

    Raises:
      TypeError: tx is no transform; `update` is called without a real scalar `value=` where that is judged.
      ValueError: a number is out of its range; clip=True where the loss is judged; gradients differ between devices
        inside `jax.shard_map`.

    Sources: a run's recent mean and deviation as the measure, 6 deviations: `SkipStepOptimizer` of OLMo-core (OLMo et
    al., 2 OLMo 2 Furious, 2024), which keeps the last 128. Averages with decaying weights, the warm-up, clipping to the
    limit and averaging what was clipped: Kumar et al., ZClip (2025), with 2.5 deviations and $\beta = 0.97$. The exact
    weighted deviation: Finch, Incremental calculation of weighted mean and variance (2009).

    >>> import gdx, jax.numpy as jnp, optax
    >>> tx = gdx.skip_spikes(gdx.adamw(0.1))
    >>> params = jnp.ones(3)
    >>> state = tx.init(params)
    >>> for gradient in (jnp.ones(3), jnp.array([1.0, jnp.nan, 1.0]), jnp.ones(3)):
    ...     updates, state = tx.update(gradient, state, params)
    ...     params = optax.apply_updates(params, updates)
    >>> state.skipped.item(), optax.tree.get(state.inner_state[0], "count").item(), bool(jnp.isfinite(params).all())
    (1, 2, True)
    >>> tx.replace(threshold=3.0)
    skip_spikes(tx=adamw(learning_rate=0.1), threshold=3.0)
    """

    tx: Transform = dataclasses.field(metadata={"convert": to_transform})
    threshold: Scalar = hyperparameter(default=6.0, minimum=1e-3)
    decay: Scalar = hyperparameter(default=0.99, minimum=0, below=1)
    warmup_steps: int = static(default=64, convert=lambda label, value: to_integer(label, value, minimum=2))
    most: int = static(default=10, convert=lambda label, value: to_integer(label, value, minimum=1))
    clip: bool = static(default=False, convert=to_bool)
    of: str = static(default="gradient", convert=lambda label, value: to_word(label, value, "gradient", "value"))

    def validate(self) -> None:
        if self.clip and self.of == "value":
            raise ValueError("skip_spikes: clip=True needs of='gradient': a gradient has no norm like a usual loss")

    def _init(self, params: optax.Params) -> SpikesState:
        # each an array of its own, or the state could not be donated
        none, zero = lambda: jnp.zeros([], jnp.int32), lambda: jnp.zeros([], jnp.result_type(float))
        return SpikesState(none(), zero(), zero(), none(), none(), none(), self.tx._init(params))

    def _update(self, updates: Any, state: Any, params: Any, extra_args: dict[str, Any]) -> tuple[Any, SpikesState]:
        check_state(self, state, SpikesState)
        updates = jax.tree.map(widened, updates)
        value = extra_args.get("value")
        if self.of == "gradient":
            value = 0.0
        elif not is_number(value):
            raise TypeError(
                f"skip_spikes: of='value' judges the loss, and value is {reprlib.repr(value)}; expected a real scalar, "
                f"as in update(gradients, state, params, value=loss)"
            )
        check_alike(self, "gradients or loss", (updates, value), "judge")
        inner_state, like = state.inner_state, params if isinstance(params, optax.LookaheadParams) else updates
        given = self.at(state.count), updates, value, state._replace(inner_state=())
        is_made, factor, scalars = _judged(*jax.lax.stop_gradient(given))

        def made() -> tuple[Any, Any]:
            gradients = either(factor < 1, clipped, lambda: updates) if self.clip else updates
            new, new_state = self.tx._update(gradients, inner_state, params, extra_args)
            # of a batch, where the condition is a selection, it would be added in one fused multiply-add
            return jax.tree.map(lambda u, x: by_itself(cast_like(u, x)), new, like), new_state

        def clipped() -> Any:
            return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates)

        def skipped() -> tuple[Any, Any]:
            # what -0.0 is added to keeps its bits; 0.0 would make 0.0 of -0.0
            return jax.tree.map(lambda x: -jnp.zeros_like(x), like), inner_state

        new, new_state = either(is_made, made, skipped)
        return new, scalars._replace(inner_state=new_state)

    def _counts(self, state: Any) -> Iterator[tuple[Any, Any]]:
        check_state(self, state, SpikesState)
        for name, value in self._hyperparameters():
            if callable(value):
                yield (name,), state.count
        for path, count in self.tx._counts(state.inner_state):
            yield ("tx", *path), count


# in one program also where a step is none, so that no NaN is seen on the way
@jax.jit
def _judged(tx: skip_spikes, updates: Any, value: Any, state: SpikesState) -> tuple[jax.Array, jax.Array, SpikesState]:
    """Whether the step is made, what its gradient is multiplied by, and the state's scalars after it."""
    count, mean, deviation, skipped, in_a_row, let_through, _ = state
    size = norm(updates, jnp.where(mean > 0, mean, 1) if tx.of == "gradient" else jnp.ones_like(mean))
    x = size if tx.of == "gradient" else jnp.asarray(value, mean.dtype)
    is_finite = jnp.isfinite(size) & jnp.isfinite(x)
    # at least a rounding of the mean: norms that were all alike are none that any larger one is far above
    limit = mean + uncontracted(tx.threshold * jnp.maximum(deviation, 1e-6 * jnp.abs(mean)))
    is_above = (count >= tx.warmup_steps) & (x > limit)
    factor = jnp.ones_like(size)
    if tx.clip:
        factor = jnp.where(is_finite & is_above, limit / size, 1)
        x, is_above = jnp.where(is_above, limit, x), jnp.zeros_like(is_above)
    is_usual = is_finite & ~is_above
    is_made = is_usual | (in_a_row >= tx.most)

    is_measured, next_count = is_made & is_finite, optax.safe_increment(count)
    # at the first step rounding could leave it above 1
    weight = jnp.minimum((1 - tx.decay) / -jnp.expm1(next_count.astype(mean.dtype) * jnp.log1p(tx.decay - 1)), 1)
    distance = x - mean
    new_mean = mean + uncontracted(weight * distance)
    # no squares, which would overflow or vanish before the norms do; of two zeros `hypot` divides one by the other
    change = jnp.sqrt(weight) * distance
    is_still = (deviation == 0) & (change == 0)
    new_deviation = jnp.where(is_still, 0, jnp.sqrt(1 - weight) * jnp.hypot(jnp.where(is_still, 1, deviation), change))
    return (
        is_made,
        factor,
        SpikesState(
            jnp.where(is_measured, next_count, count),
            jnp.where(is_measured, new_mean, mean),
            jnp.where(is_measured, new_deviation, deviation),
            jnp.where(is_made, skipped, optax.safe_increment(skipped)),
            jnp.where(is_usual, 0, optax.safe_increment(in_a_row)),
            jnp.where(is_made & ~is_usual, optax.safe_increment(let_through), let_through),
            (),
        ),
    )


def check_spikes(state: Any) -> None:
    """Raises an error once `skip_spikes` has given up: for between the steps, outside of compiled functions.

    Args:
      state: that of an optimizer with `skip_spikes` anywhere in it, or of a batch of these.

    Raises:
      RuntimeError: spikes were made as they are, after too many in a row.
      TypeError: the state has no `skip_spikes` in it, or is traced.

    >>> import gdx, jax.numpy as jnp
    >>> tx = gdx.skip_spikes(gdx.sgd(0.1), most=1)
    >>> _, state = tx.update(jnp.full(2, jnp.nan), tx.init(jnp.ones(2)))
    >>> gdx.check_spikes(state)
    >>> _, state = tx.update(jnp.full(2, jnp.nan), state)
    >>> gdx.check_spikes(state)
    Traceback (most recent call last):
    RuntimeError: skip_spikes: gave up: so many spikes were made as they are: 1 (2 in a row up to now, 1 skipped). ...
    """
    check_not_traced("check_spikes", state)
    counts = [*zip(*(_all(state, name) for name in ("let_through", "in_a_row", "skipped")))]
    if not counts:
        raise TypeError(f"check_spikes: the state, {reprlib.repr(state)}, has no skip_spikes in it")
    for let_through, in_a_row, skipped in counts:
        if let_through:
            raise RuntimeError(
                f"skip_spikes: gave up: so many spikes were made as they are: {let_through} ({in_a_row} in a row up to "
                f"now, {skipped} skipped). Go back to a checkpoint, with a smaller learning rate, other data "
                f"or a larger threshold"
            )


def _all(state: Any, name: str) -> list[int]:
    """The largest of a batch, at each place in the state."""
    return [np.max(x) for _, x in optax.tree.get_all_with_path(state, name)]
