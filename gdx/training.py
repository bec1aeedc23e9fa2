"""Training in one compiled program: many steps of one optimizer."""

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
from gdx.checks import check_state_like, no_values
from gdx.fields import is_concrete, refuse, to_integer, uncalled
from gdx.mesh import as_placed
from gdx.modules import Parts, take_apart
from gdx.numerics import either
from gdx.progress import Progress, reporting, say_interrupted, shown, steps_between, to_progress
from gdx.rematerialising import rematerialised_scan
from gdx.transform import Transform, all_within
from gdx.trees import check_arrays, is_array, kinds, leading_axis, path_text, paths
from gdx.watching import Watched, read_watch, watch, watch_state

Loss = Callable[..., Any]
"""The loss of parameters on a batch of data: a function that returns a real scalar, or a tuple of one and of what is
to be kept beside it."""


class Evaluated(NamedTuple):
    """What was evaluated in a run.

    Attributes:
      step: int32, of shape (evaluations,): how many steps were made before each.
      value: what `evaluate` returned, with a leading axis of evaluations.
    """

    step: jax.Array
    value: Any


class Trained(NamedTuple):
    """Where a training run ended.

    Attributes:
      params: the parameters after the last step; of a module, the module.
      state: the optimizer's state there.
      losses: of shape (steps,): the loss on each batch, before the step that it makes.
      watched: what the one `gdx.watch` in the optimizer measured in these steps: a `gdx.Watched` with a leading axis
        of measurements. None where there is none.
      model_state: the state of the model after the last step; None where none was given.
      aux: what the loss returned beside the loss, with a leading axis of steps; None where it is the loss alone.
      evaluated: what `evaluate` returned, a `gdx.Evaluated`; None without it.
    """

    params: Any
    state: Any
    losses: jax.Array
    watched: Watched | None = None
    model_state: Any = None
    aux: Any = None
    evaluated: Evaluated | None = None


def train(
    loss: Loss,
    tx: optax.GradientTransformation,
    params: Any,
    batches: Any,
    *,
    state: Any = None,
    model_state: Any = None,
    evaluate: Callable[..., Any] | None = None,
    every: int | None = None,
    progress: Progress | bool = False,
    remat: bool | int = False,
) -> Trained:
    r"""Takes one step for each batch, in one `lax.scan`:

    $$ \theta_{t+1} = \theta_t + u_t, \qquad (u_t, s_{t+1}) = \mathrm{update}(\nabla L(\theta_t; B_t), s_t, \theta_t) $$

    A pure function: compile it with `jax.jit`, closing over `loss`, so that a call, which for a small
    model costs more than a step, is paid once for all of them. With the optimizer as an argument one
    program serves every learning rate, and `jax.grad` of what comes after gives the slope in every
    hyperparameter. `gdx.metasmoothness` says whether to trust it.

    Slopes through long runs: `remat=True` keeps the parameters and state of 30 steps, however many there are, and
    makes the steps between them again. With $s$ states that are kept, and the smallest $r$ with
    $\binom{s + r}{s} \ge K$, that takes $r K - \binom{s + r}{r - 1}$ steps ahead, the fewest that are possible, and
    then each of the $K$ once more with its derivative: 3.4 K for 10,000 steps. (On the digits, 1,000 steps took 6 times
    as long as without slopes, as with every step kept, in a hundredth of the memory: `python -m benchmarks slopes`.)
    Second derivatives are by forward over reverse, as `jax.hessian` takes them; forward mode alone, and reverse over
    reverse, JAX refuses. For one hyperparameter forward mode is cheaper, `jax.jacfwd` with `remat=False`: there 3 times
    a run without slopes, for two 6 times, in the memory of so many more runs.

    Losses as they are: a loss may return a tuple, of which the first is the loss and the second is kept of each step,
    as `aux`. What a model learns without slopes, such as batch statistics, is `model_state`: the loss takes it after
    the parameters and returns it after the loss, `(loss, model_state)` or `(loss, model_state, aux)`. Random keys are
    part of the batches: `batches = (examples, jax.random.split(key, steps))`, so that a run that goes on from a
    checkpoint goes on with the same ones.

    Modules as they are: of an equinox module its floating-point arrays are trained, and of a module of flax nnx its
    `nnx.Param`s, while what it writes into itself (batch statistics, the counts of its random numbers) is carried on.
    Loss and evaluate are given the module, and the module comes back; the one that was passed stays as it was. A state
    to go on from is made of the parameters alone: `tx.init(nnx.state(model, nnx.Param))`, or
    `tx.init(eqx.filter(model, eqx.is_inexact_array))`.

    With a `gdx.watch` in the optimizer, it collects what that measures. In `jax.jit` there is room for a measurement
    in each `every` steps that are begun: where fewer were made, as may be if the state to go on from is an argument,
    the last ones have the step -1. (A watch that only a function of optax's knows of is not seen.)

    Called outside `jax.jit` it returns parameters that are on a mesh as they were there, also where the compiler
    would leave them split as the state is (`gdx.sharding.shard_state` says what to do inside); and with `progress` it
    runs in about 100 parts, between which Ctrl-C ends it: then it warns and returns the steps that were made, and what
    was evaluated in them (not at the end, which was not reached). Before the first part it is KeyboardInterrupt. Inside
    `jax.jit` Ctrl-C is JAX's, and a bar that was open then goes on with the next run.

    Args:
      loss: the loss of parameters on one batch, a real scalar, as above.
      tx: the optimizer, gdx's or optax's.
      params: the parameters to start from, or a module.
      batches: a tree of arrays with a leading axis of steps. What is large is better left to the loss: let the
        batches be indices of examples, or random keys.
      state: the optimizer's state to go on from; None for a new one.
      model_state: arrays that the loss is given and returns, and that are not trained; None for a loss without.
      evaluate: a function of the parameters (and the model_state, if there is one) that returns arrays to keep.
      every: each how many steps to evaluate, besides the end; None for the end alone.
      progress: True for a bar (by rich, if that is there); or a function that is called about 100 times, see
        `gdx.training.Progress`.
      remat: False for a derivative that keeps what it needs of every step; True for one that keeps the parameters and
        state of 30 of them; or of how many, at least 1, of which the start is one.

    Raises:
      TypeError: loss is no function of so many, or returns something else; tx is no transform; params or batches hold
        something else than arrays, or batches is a list; the state is that of another transform, or in other dtypes;
        the loss returns another model_state than it was given; evaluate or progress is no function of so many; remat is
        neither a switch nor an integer.
      ValueError: the leaves of batches do not have one leading axis in common; the state has other shapes; every or
        remat is less than 1; every is given without evaluate.

    Source: Griewank and Walther, Algorithm 799: Revolve (2000), for what is kept.

    >>> import gdx, jax, jax.numpy as jnp
    >>> bowl = lambda theta, batch: jnp.sum((theta - batch) ** 2)
    >>> def final(tx):
    ...     return gdx.train(bowl, tx, jnp.ones(2), jnp.zeros((16, 2)), remat=True).losses[-1]
    >>> bool(jax.grad(final)(gdx.sgd(0.1)).learning_rate < 0)
    True

    With a state of the model that counts the batches, and the largest parameter after each 8 steps:

    >>> counting = lambda theta, count, batch: (bowl(theta, batch), count + 1)
    >>> trained = gdx.train(counting, gdx.sgd(0.1), jnp.ones(2), jnp.zeros((16, 2)), model_state=0, every=8,
    ...                     evaluate=lambda theta, count: jnp.max(theta))
    >>> int(trained.model_state), trained.evaluated.step.tolist(), trained.evaluated.value.round(3).tolist()
    (16, [8, 16], [0.168..., 0.028...])
    """
    check_call("train", loss, tx, params, batches, model_state)
    steps = steps_of(batches)
    start, rest, parts = take_apart("train: params", params)
    start, variables = jax.tree.map(jnp.asarray, (start, (rest, model_state)))
    scan: Any = jax.lax.scan
    if not isinstance(remat, bool | np.bool_ | int | np.integer):
        refuse("train: remat", remat, "True, False or an integer >= 1")
    if not isinstance(remat, bool | np.bool_):
        scan = functools.partial(rematerialised_scan, states=to_integer("train: remat", remat, minimum=1))
    elif remat:
        scan = rematerialised_scan
    period = to_period("train", every, evaluate) or steps
    told = to_progress("train: progress", progress)
    given, own = state, None
    if given is None:
        state = tx.init(start)
    else:  # optax's transforms take that of another, or in other dtypes
        check_arrays("train: state", given)
        own = jax.eval_shape(tx.init, start)
        check_state_like(tx, given, own)
    step, kept = _watching(training_step(loss, tx, parts)), [_curves(tx, state, steps)]
    if evaluate is not None:
        check_evaluate("train", evaluate, model_state)
        step, rows = evaluating(step, evaluation("train", evaluate, parts), period, steps)
        kept.append(rows(start, variables))
    try:
        carry, data = (start, state, variables), (jnp.arange(1, steps + 1), batches)
        is_traced = not all(map(is_concrete, jax.tree.leaves((carry, data, tx))))
        run: Callable[[Any, Any], Any] = functools.partial(scan, step)
        if told is not None and is_traced:
            run = functools.partial(scan, reporting(step, told, steps))
        elif told is not None:
            run = _in_parts(run, told, steps)
        ((params, state, (rest, model_state)), *kept), (losses, aux) = run((carry, *kept), data)
    except TypeError as error:
        if given is not None and "carry" in str(error):
            check_state_like(tx, given, own, dtypes=True)
        raise
    say_interrupted("train", len(losses) / steps)
    model = parts.join(jax.tree.map(as_placed, params, start), rest)
    watched, *evaluated = map(_made, kept)
    return Trained(model, state, losses, watched, model_state, aux, Evaluated(*evaluated[0]) if evaluated else None)


class Rows(NamedTuple):
    """Rows that steps have filled: how many, and room for all and for one that counts for nothing."""

    number: jax.Array
    rows: Any


def _room(row: Any, size: int) -> Rows:
    return Rows(jnp.zeros([], jnp.int32), jax.tree.map(lambda x: jnp.zeros((size + 1, *x.shape), x.dtype), row))


def _filled(rows: Rows, row: Any, is_new: jax.Array) -> Rows:
    size = jax.tree.leaves(rows.rows)[0].shape[0]
    at = jnp.where(is_new, rows.number, size - 1)
    return Rows(
        rows.number + is_new.astype(rows.number.dtype), jax.tree.map(lambda x, y: x.at[at].set(y), rows.rows, row)
    )


def _made(rows: Rows | None) -> Any:
    """The rows that were filled, as far as that can be read here."""
    if rows is None:
        return None
    size = int(rows.number) if is_concrete(rows.number) else -1
    return jax.tree.map(lambda x: x[:size], rows.rows)


def _curves(tx: Any, state: Any, steps: int) -> Rows | None:
    """Room for what is watched; None where nothing is."""
    found = [inner for inner in all_within(tx) if isinstance(inner, watch)] if isinstance(tx, Transform) else []
    if len(found) != 1:
        return None
    room = _room(read_watch(state), -(-steps // found[0].every))
    return room._replace(rows=room.rows._replace(step=room.rows.step - 1))


def _watching(step: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """The step, that also keeps what is measured in it."""

    def watching(carry: Any, inputs: Any) -> Any:
        inner, curves, *others = carry
        if curves is None:
            inner, out = step(inner, inputs)
        else:
            count = watch_state(inner[1]).count
            inner, out = step(inner, inputs)
            watched = read_watch(inner[1])
            curves = _filled(curves, watched, watched.step == count)
        return (inner, curves, *others), out

    return watching


def check_evaluate(name: str, evaluate: Any, model_state: Any) -> None:
    """Raises where it cannot be called so."""
    also = () if model_state is None else ("the model_state",)
    check_function(f"{name}: evaluate", evaluate, "the parameters", *also)


def to_period(name: str, every: Any, evaluate: Any) -> int:
    """Each how many steps to evaluate; 0 for the end alone."""
    if evaluate is None and every is not None:
        raise ValueError(
            f"{name}: every is {every!r} without evaluate; expected evaluate=..., what to keep every n steps"
        )
    return 0 if every is None else to_integer(f"{name}: every", every, minimum=1)


def evaluation(name: str, evaluate: Callable[..., Any] | None, parts: Parts) -> Callable[[Any, Any], Any]:
    """What is to be kept of parameters and variables, as arrays: the parameters themselves where nothing else is."""

    def evaluated(params: Any, variables: Any) -> Any:
        if evaluate is None:
            return jax.tree.map(jnp.asarray, params)
        found = called(f"{name}: evaluate", evaluate, *arguments_of(parts, params, variables))
        if found is None or not all(map(is_array, jax.tree.leaves(found))):
            leaves = jax.tree_util.tree_leaves_with_path(found)
            at = "".join([f" at {path_text(path)}" for path, x in leaves if path and not is_array(x)][:1])
            raise TypeError(
                f"{name}: evaluate returned {reprlib.repr(found)}{at}; expected an array or number, or a tree of such"
            )
        return jax.tree.map(jnp.asarray, found)

    return evaluated


def called(label: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns, or an error that says which function takes a traced array for a number of Python's."""
    with no_values(
        f"{label} takes numbers out of arrays while it is compiled, as float, int, if and numpy do; expected functions "
        f"of jax.numpy, jnp.where and jax.lax.cond in it"
    ):
        return function(*arguments)


def evaluating(step: Any, evaluation: Any, every: int, steps: int) -> tuple[Any, Any]:
    """The step, that also evaluates after each `every` steps and after the last; and the room that this takes."""

    def rows(params: Any, variables: Any) -> Rows:
        row = jax.eval_shape(lambda *x: (jnp.zeros([], jnp.int32), evaluation(*x)), params, variables)
        return _room(row, -(-steps // every))

    def evaluating(carry: Any, inputs: Any) -> Any:
        *before, evaluated = carry
        (inner, *others), out = step(tuple(before), inputs)
        number, (params, _, variables) = inputs[0], inner
        is_new = (number % every == 0) | (number == steps)
        nothing = jax.tree.map(lambda x: x[-1], evaluated.rows)
        row = either(is_new, lambda: (number.astype(jnp.int32), evaluation(params, variables)), lambda: nothing)
        return (inner, *others, _filled(evaluated, row, is_new)), out

    return evaluating, rows


def _in_parts(run: Callable[[Any, Any], Any], progress: Progress, steps: int) -> Callable[[Any, Any], Any]:
    """The run in parts, with progress after each; interrupted, it ends with what there is."""

    def in_parts(carry: Any, data: Any) -> Any:
        size, compiled = steps_between(steps), jax.jit(run)
        done: tuple[Any, list[Any]] = carry, []
        try:
            with shown(progress):
                for begin in range(0, steps, size):
                    carry, out = compiled(done[0], jax.tree.map(lambda x: x[begin : begin + size], data))  # noqa: B023
                    loss = float(out[0][-1])
                    # in one assignment: an interruption comes before it or after it
                    done = carry, [*done[1], out]
                    progress(min(begin + size, steps) / steps, loss, int(not math.isfinite(loss)))
        except KeyboardInterrupt:
            if not done[1]:
                raise
        carry, outs = done
        return carry, jax.tree.map(lambda *x: jnp.concatenate(x), *outs)

    return in_parts


def check_call(name: str, loss: Any, tx: Any, params: Any, batches: Any, model_state: Any = None) -> None:
    """Raises where an argument is not of its kind, or stands in the place of another."""
    usage = f"{name}(loss, {'optimizers' if name == 'sweep' else 'tx'}, params, batches)"
    between = () if model_state is None else ("the model_state",)
    mend = f", as in {usage}"
    if not between:
        mend += f". A loss that takes a state of the model between them needs {name}(..., model_state=...)"
    check_function(f"{name}: loss", loss, "the parameters", *between, "a batch", mend=mend)
    if isinstance(tx, type) or not (hasattr(tx, "init") and hasattr(tx, "update")):
        mend = uncalled(tx) if isinstance(tx, type) else f", as in {usage}"
        if isinstance(tx, list | tuple):
            mend = "; train several as one batch, as in gdx.sweep(loss, gdx.stack(optimizers), params, batches)"
        raise TypeError(f"{name}: {reprlib.repr(tx)} is no optimizer; expected one such as gdx.sgd(0.1){mend}")
    check_arrays(f"{name}: params", take_apart(f"{name}: params", params)[0])
    check_arrays(f"{name}: model_state", model_state)
    if isinstance(batches, list):
        raise TypeError(
            f"{name}: batches is a list of {len(batches)}; expected arrays with a leading axis of steps. Make them of "
            f"the batches: jax.tree.map(lambda *x: jnp.stack(x), *batches)"
        )
    check_arrays(f"{name}: batches", batches)
    leading_axis(f"{name}: batches:", batches, "steps", least=1, mend=f", as in {usage}")


def steps_of(batches: Any) -> int:
    return leading_axis("batches:", batches, "steps", least=1)


def arguments_of(parts: Parts, params: Any, variables: Any) -> tuple:
    """The model, and its state if it has one."""
    rest, model_state = variables
    model = parts.join(params, rest)
    return (model,) if model_state is None else (model, model_state)


TREE = Parts("tree")


def training_step(
    loss: Loss, tx: optax.GradientTransformation, parts: Parts = TREE, name: str = "train"
) -> Callable[[Any, Any], Any]:
    """One training step, as `jax.lax.scan` takes it.

    The carry is the parameters, the state, and the rest of the model with its model_state; the inputs are the number
    of the step and the batch; what comes out is the loss and aux.
    """
    tx = optax.with_extra_args_support(tx)

    def value_of(params: Any, variables: Any, batch: Any) -> tuple[jax.Array, Any]:
        model, *model_state = arguments_of(parts, params, variables)
        value, given_back, aux = _returned(name, called(f"{name}: loss", loss, model, *model_state, batch), model_state)
        rest = parts.rest_of(model, variables[0])
        if new := sorted({*paths(rest)} ^ {*paths(variables[0])}):
            raise TypeError(
                f"{name}: the loss made or removed {new[0]} in the module, as self.sow does; expected a module that "
                f"keeps its variables: take them out again in the loss, and `return loss, nnx.pop(model, "
                f"nnx.Intermediate)` keeps them as aux"
            )
        return value, ((rest, given_back), aux)

    def step(carry: Any, inputs: Any) -> Any:
        (params, state, before), (_, batch) = carry, inputs
        (value, (variables, aux)), gradients = jax.value_and_grad(value_of, has_aux=True)(params, before, batch)
        # JAX's derivative in a complex number is the conjugate of the direction in which the loss rises
        gradients = optax.tree.conj(gradients)
        # what some of optax's ask for: reduce_on_plateau, polyak_sgd, lbfgs
        asked = {"value": value, "grad": gradients, "value_fn": lambda params: value_of(params, before, batch)[0]}
        updates, state = tx.update(gradients, state, params, **asked)
        # a link that rounds parameters returns how far they move in float32, which strict promotion would refuse
        with jax.numpy_dtype_promotion("standard"):
            return (optax.apply_updates(params, updates), state, variables), (value, aux)

    return step


def _returned(name: str, returned: Any, model_state: list[Any]) -> tuple[jax.Array, Any, Any]:
    """Loss, model_state and aux, of what a loss returned that was given this model_state, if any."""
    value, *others = returned if isinstance(returned, tuple) else (returned,)
    if not (
        jax.tree_util.all_leaves([value])
        and np.shape(value) == ()
        and is_array(value)
        and jnp.issubdtype(jnp.result_type(value), np.floating)
        and len(model_state) <= len(others) <= len(model_state) + 1
    ):
        got = jax.tree.map(lambda x: f"{jnp.result_type(x)}{list(np.shape(x))}" if is_array(x) else repr(x), returned)
        wanted = "a real scalar or (a real scalar, aux)"
        mend = f". What a step needs of the one before is a state of the model: {name}(..., model_state=...)"
        if model_state:
            wanted, mend = "(a real scalar, model_state) or (a real scalar, model_state, aux)", ""
        raise TypeError(
            f"{name}: the loss returned {got}; expected {wanted}: of several losses their mean, as in "
            f"jnp.mean(losses){mend}"
        )
    found: dict[str, Any] = dict.fromkeys(("model_state", "aux"))
    for part, x in zip(("model_state", "aux") if model_state else ("aux",), others):
        check_arrays(f"{name}: the {part} that the loss returned", x)
        found[part] = jax.tree.map(jnp.asarray, x)
    if model_state:
        before, after = (kinds(x) for x in (*model_state, found["model_state"]))
        if before != after:
            raise TypeError(
                f"{name}: the loss was given the model_state {reprlib.repr(before[1])} and returned "
                f"{reprlib.repr(after[1])}; expected the same tree, shapes and dtypes"
            )
    return jnp.asarray(value), found["model_state"], found["aux"]
