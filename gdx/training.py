"""Training in one compiled program: many steps of one optimizer, or of a whole batch of them."""

import functools
import math
import reprlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx.arguments import check_function
from gdx.checks import check_state_like
from gdx.fields import is_concrete, is_number, text, to_bool, to_integer, uncalled
from gdx.mesh import as_placed, types_of, untyped
from gdx.population import labels, members_of, stack, to_scores
from gdx.surroundings import Surroundings
from gdx.transform import Transform, all_within
from gdx.trees import check_arrays, leading_axis
from gdx.values import names_of
from gdx.watching import Watched, read_watch, watch, watch_state

Loss = Callable[[Any, Any], jax.Array]
"""The loss of parameters on a batch of data: a function that returns a real scalar."""

Progress = Callable[[float, float, int], None]
"""Called now and then with the fraction of the work that is done, in (0, 1], and of the members now at work the
least loss and how many of their losses are infinite or NaN."""

REPORTS = 100


class Trained(NamedTuple):
    """Where a training run ended.

    Attributes:
      params: the parameters after the last step.
      state: the optimizer's state there.
      losses: of shape (steps,): the loss on each batch, before the step that it makes.
      watched: what the one `gdx.watch` in the optimizer measured in these steps: a `gdx.Watched` with a leading axis
        of measurements. None where there is none.
    """

    params: Any
    state: Any
    losses: jax.Array
    watched: Watched | None = None


def train(
    loss: Loss, tx: optax.GradientTransformation, params: Any, batches: Any, *, state: Any = None, remat: bool = False
) -> Trained:
    r"""Takes one step for each batch, in one `lax.scan`:

    $$ \theta_{t+1} = \theta_t + u_t, \qquad (u_t, s_{t+1}) = \mathrm{update}(\nabla L(\theta_t; B_t), s_t, \theta_t) $$

    A pure function: compile it with `jax.jit`, closing over `loss`, so that a call, which for a small
    model costs more than a step, is paid once for all of them. With the optimizer as an argument one
    program serves every learning rate, and `jax.grad` of what comes after gives the slope in every
    hyperparameter: `remat=True` then keeps the parameters and state of every $\sqrt{K}$-th of the $K$
    steps and computes the others again.

    With a `gdx.watch` in the optimizer, it collects what that measures. In `jax.jit` there is room for a measurement
    in each `every` steps that are begun: where fewer were made, as may be if the state to go on from is an argument,
    the last ones have the step -1. (A watch that only a function of optax's knows of is not seen.)

    Called outside `jax.jit` it returns parameters that are on a mesh as they were there, also where the compiler
    would leave them split as the state is (`gdx.sharding.shard_state` says what to do inside).

    Args:
      loss: the loss of parameters on one batch, a real scalar.
      tx: the optimizer, gdx's or optax's.
      params: the parameters to start from.
      batches: a tree of arrays with a leading axis of steps. What is large is better left to the loss: let the
        batches be indices of examples, or random keys.
      state: the optimizer's state to go on from; None for a new one.
      remat: whether the derivative through it keeps memory for $\sqrt{K}$ steps rather than for $K$.

    Raises:
      TypeError: loss is no function of two or returns something else than a real scalar; tx is no transform; params or
        batches hold something else than arrays, or batches is a list; the state is that of another transform, or in
        other dtypes; remat is neither True nor False.
      ValueError: the leaves of batches do not have one leading axis in common; the state has other shapes.

    >>> import gdx, jax, jax.numpy as jnp
    >>> bowl = lambda theta, batch: jnp.sum((theta - batch) ** 2)
    >>> def final(tx):
    ...     return gdx.train(bowl, tx, jnp.ones(2), jnp.zeros((16, 2)), remat=True).losses[-1]
    >>> bool(jax.grad(final)(gdx.sgd(0.1)).learning_rate < 0)
    True
    """
    _check_call("train", loss, tx, params, batches)
    start = jax.tree.map(jnp.asarray, params)
    scan = _rematerialised_scan if to_bool("train: remat", remat) else jax.lax.scan
    given, own = state, None
    if given is None:
        state = tx.init(start)
    else:  # optax's transforms take that of another, or in other dtypes
        check_arrays("train: state", given)
        own = jax.eval_shape(tx.init, start)
        check_state_like(tx, given, own)
    try:
        carry = (start, state), _no_curves(tx, state, _steps_of(batches))
        ((params, state), (_, curves)), losses = scan(_collecting(training_step(loss, tx)), carry, batches)
    except TypeError as error:
        if given is not None and "carry" in str(error):
            check_state_like(tx, given, own, dtypes=True)
        raise
    return Trained(jax.tree.map(as_placed, params, start), state, losses, _shown(curves))


def _no_curves(tx: Any, state: Any, steps: int) -> tuple[Any, Any]:
    """The number of measurements so far, and room for all, and for what is none; None where nothing is watched."""
    found = [inner for inner in all_within(tx) if isinstance(inner, watch)] if isinstance(tx, Transform) else []
    if len(found) != 1:
        return None, None
    room = -(-steps // found[0].every) + 1
    empty = jax.tree.map(lambda x: jnp.zeros((room, *x.shape), x.dtype), read_watch(state))
    return jnp.zeros([], jnp.int32), empty._replace(step=empty.step - 1)


def _collecting(step: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The step, that also writes what is measured in it behind what was measured before."""

    def collecting(carry: Any, batch: Any) -> Any:
        inner, (number, curves) = carry
        if curves is None:
            inner, loss = step(inner, batch)
            return (inner, (None, None)), loss
        count = watch_state(inner[1]).count
        inner, loss = step(inner, batch)
        watched = read_watch(inner[1])
        is_new = watched.step == count
        at = jnp.where(is_new, number, curves.step.size - 1)
        curves = jax.tree.map(lambda curve, x: curve.at[at].set(x), curves, watched)
        return (inner, (number + is_new.astype(number.dtype), curves)), loss

    return collecting


def _shown(curves: Any) -> Any:
    """The measurements that were made, as far as that can be read here."""
    if curves is None:
        return None
    curves = jax.tree.map(lambda x: x[:-1], curves)
    made = curves.step >= 0
    return jax.tree.map(lambda x: x[np.asarray(made)], curves) if is_concrete(made) else curves


class Sweep(NamedTuple):
    """What became of each member of a batch of optimizers.

    Attributes:
      optimizers: the batch.
      losses: of shape (members, steps): the loss on each batch of data, before the step that it makes.
      final: what `evaluate` made of each member's final parameters, with a leading axis of members.
    """

    optimizers: Transform
    losses: jax.Array
    final: Any

    @property
    def diverged(self) -> jax.Array:
        """Of shape (members,): whether the last loss or a number in final is infinite or NaN."""
        finite = jnp.ones(len(self.losses), bool)
        for leaf in jax.tree.leaves((self.losses[:, -1:], self.final)):
            finite &= jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))
        return ~finite

    @property
    def labels(self) -> list[dict[str, float]]:
        """What tells the members apart, as `gdx.labels`."""
        return labels(self.optimizers)

    def ranking(self, score: Any) -> list[int]:
        """The members from the least score to the largest; those that diverged are left out.

        Args:
          score: of shape (members,), such as `sweep.final["loss"]`.

        Raises:
          TypeError: score is no real numbers.
          ValueError: score has another shape.
        """
        score = to_scores("ranking", score, len(self.losses), "member, as in sweep.losses[:, -1]")
        score = np.where(self.diverged, np.nan, score)
        return [int(i) for i in np.argsort(score, stable=True) if np.isfinite(score[i])]


def sweep(
    loss: Loss,
    optimizers: Transform,
    params: Any,
    batches: Any,
    *,
    evaluate: Callable[[Any], Any] | None = None,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Trains with every member of a batch of optimizers, from the same start on the same data, in one program.

    The program is compiled once for each loss, evaluate, progress and set of shapes: define those functions once, and
    another grid of as many points compiles nothing. What they use of the code around them is constant in it: another
    value there compiles anew, but one that changes deep inside of an object is not seen. Pass it in batches. A member
    that diverges becomes infinite or NaN and touches no other. Where the batch is sharded over a mesh along its axis
    of members, so is all of the work.

    Args:
      loss: the loss of parameters on one batch of data, a real scalar.
      optimizers: a batch, from `gdx.stack` or `gdx.grid`.
      params: the parameters that every member starts from.
      batches: a tree of arrays with a leading axis of steps, the same for all members; see `gdx.train`.
      evaluate: what to keep of a member's final parameters, a function of them; None for all of them.
      chunk_size: how many members are trained at the same time, which bounds the memory; None for all.
        The last chunk is filled up with copies of the last member.
      progress: called about 100 times while it runs, with the fraction that is done and, of the members
        at work, the least loss and how many have diverged.

    Raises:
      TypeError: loss, evaluate or progress has no hash or is no function of so many arguments; evaluate returns
        something else than arrays; optimizers is none of gdx's, or chunk_size no integer; as `gdx.train`.
      ValueError: optimizers is no batch, chunk_size is less than 1, or the leaves of batches do not
        have one leading axis in common.

    >>> import gdx, jax.numpy as jnp
    >>> bowl = lambda theta, batch: jnp.sum((theta - batch) ** 2)
    >>> batch = gdx.grid(gdx.sgd, learning_rate=[0.01, 0.5, 1e3])
    >>> result = gdx.sweep(bowl, batch, jnp.ones(2), jnp.zeros((99, 2)), chunk_size=2)
    >>> result.diverged.tolist(), result.ranking(result.losses[:, -1])
    ([False, False, True], [1, 0])
    """
    _check_call("sweep", loss, optimizers, params, batches)
    if not isinstance(optimizers, Transform):
        raise TypeError(
            f"sweep: optimizers is {reprlib.repr(optimizers)}; expected a batch of gdx's, as in "
            f"gdx.grid(gdx.adamw, learning_rate=[1e-3, 1e-2]); gdx.value(optax.lion) takes optax's there"
        )
    members = members_of(optimizers)
    chunk = members if chunk_size is None else min(to_integer("sweep: chunk_size", chunk_size, minimum=1), members)
    evaluate = _keep if evaluate is None else evaluate
    check_function("sweep: evaluate", evaluate, "the final parameters")
    if progress is not None:
        check_function("sweep: progress", progress, "the fraction that is done", "the least loss", "how many diverged")
    for name, function in (("loss", loss), ("evaluate", evaluate), ("progress", progress)):
        try:
            hash(function)
        except TypeError:
            raise TypeError(
                f"sweep: {name} is {reprlib.repr(function)}, which has no hash, by which compiled programs are found; "
                f"wrap it in a function, such as lambda *arguments: {name}(*arguments)"
            ) from None
    around = Surroundings(loss, evaluate, progress)
    return Sweep(optimizers, *_sweep(loss, evaluate, progress, around, chunk, optimizers, params, batches))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _sweep(
    loss: Loss,
    evaluate: Callable[[Any], Any],
    progress: Progress | None,
    around: Surroundings,
    size: int,
    optimizers: Transform,
    params: Any,
    batches: Any,
) -> tuple[jax.Array, Any]:
    optimizers, params = jax.tree.map(jnp.asarray, (optimizers, params))
    train_all = functools.partial(_train_all, loss, evaluate, progress, size)
    along = types_of(jax.tree.leaves(optimizers)[0])
    # vmap cannot carry the axis of members through a scan that is typed with it
    return untyped(train_all, along.mesh, along)(optimizers, params, batches)


def _train_all(
    loss: Loss,
    evaluate: Callable[[Any], Any],
    progress: Progress | None,
    size: int,
    optimizers: Transform,
    params: Any,
    batches: Any,
) -> tuple[jax.Array, Any]:
    """Losses and what is kept of the final parameters, for each member."""
    members, steps = members_of(optimizers), _steps_of(batches)
    chunks = -(-members // size)

    def run(chunk: jax.Array, tx: Transform, is_copy: jax.Array) -> tuple[jax.Array, Any]:
        step, data = training_step(loss, tx), batches
        if progress is not None:
            step = _reporting(step, progress, is_copy, before=chunk * steps, total=chunks * steps)
            data = jnp.arange(1, steps + 1), batches
        (end, _), losses = jax.lax.scan(step, (params, tx.init(params)), data)
        return losses, _arrays_of(evaluate(end))

    run_all = jax.vmap(run, (None, 0, 0))
    if chunks == 1:
        return run_all(jnp.zeros([], jnp.int32), optimizers, jnp.zeros(members, bool))
    numbers = np.arange(size * chunks)

    def split(leaf: jax.Array) -> jax.Array:
        filled = leaf[np.minimum(numbers, members - 1)] if members < size * chunks else leaf
        # member i is in chunk i % chunks, so that an axis of members that is sharded is so in every chunk
        return filled.reshape(size, chunks).T

    def joined(leaf: jax.Array) -> jax.Array:
        return leaf.swapaxes(0, 1).reshape(size * chunks, *leaf.shape[2:])[:members]

    are_copies = jnp.asarray(numbers >= members).reshape(size, chunks).T
    by_chunk = jnp.arange(chunks), jax.tree.map(split, optimizers), are_copies
    return jax.tree.map(joined, jax.lax.map(lambda chunk: run_all(*chunk), by_chunk))


class RangeTest(NamedTuple):
    """Loss against learning rate after a few steps.

    Attributes:
      learning_rates: of shape (points,), ascending.
      losses: of shape (points,): the mean loss of the last tenth of the steps; inf where the run diverged.
      start: the loss before the first step.
      edge: the rate from which on training fails: the geometric mean of the last rate that ends below
        `start` and the next, of those from the best rate upwards; inf if none fails.
      suggested: the rate with the least loss.
    """

    learning_rates: np.ndarray
    losses: np.ndarray
    start: float
    edge: float
    suggested: float


def range_test(
    loss: Loss,
    tx: Transform,
    params: Any,
    batches: Any,
    *,
    low: float = 1e-5,
    high: float = 10.0,
    points: int = 48,
    chunk_size: int | None = None,
    progress: Progress | None = None,
) -> RangeTest:
    """Finds the learning rates that train: one short run for each, all in one program.

    Smith's test raises the rate during one run, so that each rate meets parameters that the ones before
    have made. Here every rate starts from `params`, which costs no more where runs share a program.
    The best rate of a short run is an upper estimate for a long one, which ends with smaller steps.

    Args:
      loss, params, batches, chunk_size, progress: as in `gdx.sweep`; a few dozen steps do.
      tx: the optimizer, whose `learning_rate` is replaced. Of several learning rates the largest is meant, and the
        others keep their ratios to it.
      low, high: the smallest and the largest rate; the others lie between them at equal ratios.
      points: how many rates are tried, at least 2.

    Raises:
      TypeError: tx is none of gdx's; points is no integer; as `gdx.train`.
      ValueError: tx is a batch, or has no hyperparameter called learning_rate, or several that are not numbers with
        ratios; low and high are not numbers with 0 < low < high;
        points is less than 2; the loss is not finite at the start; no rate ends below the loss that it started from.

    Source: Smith, Cyclical Learning Rates for Training Neural Networks (2017), section 3.3.

    >>> import gdx, jax.numpy as jnp
    >>> bowl = lambda theta, batch: 2 * jnp.sum(theta**2)  # its curvature is 4, so that 0.25 is best and 0.5 the edge
    >>> found = gdx.range_test(bowl, gdx.gradient_descent(0.1), jnp.ones(2), jnp.zeros((20, 1)), points=99)
    >>> 0.24 < found.suggested < 0.26, 0.45 < found.edge < 0.55
    (True, True)
    """
    _check_call("range_test", loss, tx, params, batches)
    if not isinstance(tx, Transform):
        raise TypeError(f"range_test: tx is {reprlib.repr(tx)}; expected one of gdx's optimizers, such as gdx.sgd(0.1)")
    if not (is_number(low) and is_number(high) and 0 < low < high < math.inf):
        raise ValueError(f"range_test: low is {low!r} and high is {high!r}; expected numbers, 0 < low < high")
    rates = np.geomspace(low, high, to_integer("range_test: points", points, minimum=2))
    ratios = _ratios(tx)
    batch = stack(tx.replace(**{name: ratio * rate for name, ratio in ratios.items()}) for rate in rates)
    result = sweep(loss, batch, params, batches, evaluate=_nothing, chunk_size=chunk_size, progress=progress)
    history = np.asarray(result.losses, float)
    start = float(history[0, 0])
    if not math.isfinite(start):
        raise ValueError(
            f"range_test: the loss is {start} at the start, before any step; expected params and batches where it is "
            f"finite"
        )
    losses = np.where(result.diverged, np.inf, history[:, -max(history.shape[1] // 10, 1) :].mean(axis=1))
    best = int(np.argmin(losses))
    if not losses[best] < start:
        raise ValueError(
            f"range_test: no learning rate from {low:g} to {high:g} ends below the loss of the start, {start:g}; "
            f"try others, or give batches of more steps"
        )
    fails = np.flatnonzero(~(losses[best:] < start))
    edge = math.sqrt(rates[best + fails[0] - 1] * rates[best + fails[0]]) if len(fails) else math.inf
    return RangeTest(rates, losses, start, edge, float(rates[best]))


def _ratios(tx: Transform) -> dict[str, float]:
    """Each learning rate's ratio to the largest, by name."""
    found = {name: x.value for name, x in names_of(tx).items() if name.split(".")[-1] == "learning_rate"}
    shown = ", ".join(f"{name}={text(x)}" for name, x in found.items())
    if not found:
        raise ValueError(
            f"range_test: {tx!r} has no learning_rate to try; give it one, as in "
            f"gdx.chain(tx, gdx.scale_by_learning_rate(0.1))"
        )
    if any(map(np.ndim, found.values())):
        raise ValueError(f"range_test: tx is a batch, of {shown}; expected one optimizer, as in gdx.unstack(tx)[0]")
    if len(found) == 1:
        return dict.fromkeys(found, 1.0)
    if not all(map(is_number, found.values())) or not any(found.values()):
        raise ValueError(
            f"range_test: tx has {shown}; expected numbers, not all 0, to keep their ratios to the largest"
        )
    return {name: x / max(found.values()) for name, x in found.items()}


def _keep(params: Any) -> Any:
    return params


def _arrays_of(evaluated: Any) -> Any:
    """What evaluate returned, as arrays."""
    try:
        if evaluated is not None:
            return jax.tree.map(jnp.asarray, evaluated)
    except TypeError:
        pass
    raise TypeError(
        f"sweep: evaluate returned {reprlib.repr(evaluated)}; expected an array or number, or a tree of such"
    )


def _nothing(params: Any) -> tuple:
    return ()


def _check_call(name: str, loss: Any, tx: Any, params: Any, batches: Any) -> None:
    """Raises where an argument is not of its kind, or stands in the place of another."""
    usage = f"{name}(loss, {'optimizers' if name == 'sweep' else 'tx'}, params, batches)"
    check_function(f"{name}: loss", loss, "the parameters", "a batch", mend=f", as in {usage}")
    if isinstance(tx, type) or not (hasattr(tx, "init") and hasattr(tx, "update")):
        mend = uncalled(tx) if isinstance(tx, type) else f", as in {usage}"
        if isinstance(tx, list | tuple):
            mend = "; train several as one batch, as in gdx.sweep(loss, gdx.stack(optimizers), params, batches)"
        raise TypeError(f"{name}: {reprlib.repr(tx)} is no optimizer; expected one such as gdx.sgd(0.1){mend}")
    check_arrays(f"{name}: params", params)
    if isinstance(batches, list):
        raise TypeError(
            f"{name}: batches is a list of {len(batches)}; expected arrays with a leading axis of steps. Make them of "
            f"the batches: jax.tree.map(lambda *x: jnp.stack(x), *batches)"
        )
    check_arrays(f"{name}: batches", batches)
    leading_axis(f"{name}: batches:", batches, "steps", least=1, mend=f", as in {usage}")


def _steps_of(batches: Any) -> int:
    return leading_axis("batches:", batches, "steps", least=1)


def training_step(loss: Loss, tx: optax.GradientTransformation) -> Callable[[Any, Any], Any]:
    """One training step, as `jax.lax.scan` takes it: the carry is the parameters and the state."""
    tx = optax.with_extra_args_support(tx)

    def scalar(params: Any, batch: Any) -> jax.Array:
        value = loss(params, batch)
        if not (
            jax.tree_util.all_leaves([value])
            and np.shape(value) == ()
            and jnp.issubdtype(jnp.result_type(value), np.floating)
        ):
            kinds = jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(np.shape(x))}", value)
            raise TypeError(
                f"the loss returned {kinds}; expected a real scalar: of several losses their mean, as in "
                f"jnp.mean(losses), of a loss and something else the loss alone"
            )
        return value

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        value, gradients = jax.value_and_grad(scalar)(params, batch)
        # JAX's derivative in a complex number is the conjugate of the direction in which the loss rises
        gradients = optax.tree.conj(gradients)
        # what some of optax's ask for: reduce_on_plateau, polyak_sgd, lbfgs
        asked = {"value": value, "grad": gradients, "value_fn": lambda params: loss(params, batch)}
        updates, state = tx.update(gradients, state, params, **asked)
        # a link that rounds parameters returns how far they move in float32, which strict promotion would refuse
        with jax.numpy_dtype_promotion("standard"):
            return (optax.apply_updates(params, updates), state), value

    return step


def _rematerialised_scan(step: Callable[[Any, Any], Any], carry: Any, batches: Any) -> Any:
    """`jax.lax.scan`, whose derivative keeps the carry of every sqrt(steps)-th step and computes the others again."""
    steps = _steps_of(batches)
    length = math.isqrt(steps)
    whole = steps // length * length

    @jax.checkpoint
    def segment(carry: Any, batches: Any) -> Any:
        # inside a segment, what a step computes on its way is not kept either
        return jax.lax.scan(jax.checkpoint(step), carry, batches)

    segments = jax.tree.map(lambda x: x[:whole].reshape(steps // length, length, *x.shape[1:]), batches)
    carry, losses = jax.lax.scan(segment, carry, segments)
    if whole == steps:
        return carry, losses.ravel()
    carry, rest = segment(carry, jax.tree.map(lambda x: x[whole:], batches))
    return carry, jnp.concatenate([losses.ravel(), rest])


def _reporting(
    step: Callable, progress: Progress, is_copy: jax.Array, *, before: jax.Array, total: int
) -> Callable[[Any, Any], Any]:
    """The step, that calls `progress` about `REPORTS` times in all, and once for all lanes of `vmap` but copies."""
    every = max(total // REPORTS, 1)

    def call(done: Any, least: Any, diverged: Any) -> None:
        progress(float(done) / total, float(least), int(diverged))

    @jax.custom_batching.custom_vmap
    def report(done: jax.Array, loss: jax.Array, is_copy: jax.Array) -> tuple:
        return ()

    @report.def_vmap
    def report_all(size: int, batched: Any, done: jax.Array, losses: jax.Array, are_copies: jax.Array) -> tuple:
        finite = jnp.isfinite(losses)
        least = jnp.min(jnp.where(finite, losses, jnp.inf))
        jax.debug.callback(call, done, least, jnp.sum(~finite & ~are_copies))
        return (), ()

    def reporting(carry: Any, inputs: Any) -> Any:
        number, batch = inputs
        carry, loss = step(carry, batch)
        done = before + number
        jax.lax.cond((done % every == 0) | (done == total), report, lambda *_: (), done, loss, is_copy)
        return carry, loss

    return reporting
