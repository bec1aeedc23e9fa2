"""What checkpoints take and refuse, before anything is written."""

from pathlib import Path
from typing import NamedTuple

import equinox
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import gdx
from gdx.checkpoint import CheckpointError, Checkpoints

PARAMS = {"b": jnp.ones(16)}


@pytest.mark.parametrize(
    ("keep", "error", "said"),
    [
        (0, ValueError, "keep is 0; expected an integer >= 1"),
        (-1, ValueError, "keep is -1; expected an integer >= 1"),
        ("3", TypeError, "keep is '3'; expected an integer"),
        (2.5, TypeError, r"keep is 2\.5; expected an integer"),
        (True, TypeError, "keep is True; expected an integer"),
        (None, TypeError, "keep is None; expected an integer"),
    ],
)
def test_how_many_stay(keep, error, said, tmp_path):
    with pytest.raises(error, match=f"Checkpoints: {said}"):
        Checkpoints(tmp_path, keep=keep)
    assert Checkpoints(tmp_path, keep=np.int8(2)).keep == 2


@pytest.mark.parametrize(
    ("step", "error", "said"),
    [
        (100.0, TypeError, r"step is 100\.0; expected an integer"),
        ("1", TypeError, "step is '1'; expected an integer"),
        (True, TypeError, "step is True; expected an integer"),
        (np.bool_(True), TypeError, r"step is np\.True_; expected an integer"),
        (-1, ValueError, "step is -1; expected an integer >= 0"),
    ],
)
def test_what_is_no_step(step, error, said, checkpoints):
    tx = gdx.sgd(0.1)
    with pytest.raises(error, match=f"save: {said}"):
        checkpoints.save(step, tx, PARAMS, tx.init(PARAMS))
    assert not checkpoints.directory.exists()
    checkpoints.save(1, tx, PARAMS, tx.init(PARAMS))
    with pytest.raises(error, match=f"restore: {said}"):
        checkpoints.restore(tx, PARAMS, tx.init(PARAMS), step=step)


@pytest.mark.parametrize("wrong", [PARAMS, gdx.sgd, optax.adam, None], ids=["params", "class", "function", "None"])
def test_what_is_no_optimizer(wrong, checkpoints):
    tx = gdx.sgd(0.1)
    with pytest.raises(
        TypeError, match=r"save: tx is .*; expected an optimizer, .*order .* is save\(step, tx, params, state\)"
    ):
        checkpoints.save(1, wrong, PARAMS, tx)
    assert not checkpoints.directory.exists()
    checkpoints.save(1, tx, PARAMS, tx.init(PARAMS))
    with pytest.raises(TypeError, match=r"restore: tx is .*; .*order .* is restore\(tx, params, state\)"):
        checkpoints.restore(wrong, PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize("make", [int, np.int64, np.array, jnp.int32])
def test_a_step_is_an_integer_of_any_kind(make, checkpoints):
    tx = gdx.sgd(0.1)
    checkpoints.save(make(3), tx, PARAMS, tx.init(PARAMS))
    assert checkpoints.restore(tx, PARAMS, tx.init(PARAMS), step=make(3)).step == 3
    assert checkpoints.steps == [3]


@pytest.mark.parametrize("allow", ["learning_rate", b"b1", None, 5])
def test_what_may_differ_is_a_sequence_of_names(allow, checkpoints):
    tx, other = gdx.adamw(0.01), gdx.adamw(0.02)
    checkpoints.save(1, tx, PARAMS, tx.init(PARAMS))
    with pytest.raises(TypeError, match=r"restore: allow is .*; expected a sequence of names, .*\['learning_rate'\]"):
        checkpoints.restore(other, PARAMS, other.init(PARAMS), allow=allow)
    checkpoints.restore(other, PARAMS, other.init(PARAMS), allow=iter(["learning_rate"]))


@pytest.mark.parametrize("used", [True, False])
def test_nothing_is_saved_after_the_end(used, tmp_path):
    """It would be lost: what writes in the background is gone."""
    tx = gdx.sgd(0.1)
    with Checkpoints(tmp_path / "run") as checkpoints:
        if used:
            checkpoints.save(1, tx, PARAMS, tx.init(PARAMS))
    checkpoints.close()
    with pytest.raises(
        ValueError, match=r"save: these Checkpoints of .*run are closed, .* make new ones: Checkpoints\("
    ):
        checkpoints.save(2, tx, PARAMS, tx.init(PARAMS))
    assert checkpoints.steps == [1] * used
    if used:
        assert checkpoints.restore(tx, PARAMS, tx.init(PARAMS)).step == 1
    checkpoints.close()


@pytest.mark.parametrize(
    ("directory", "error"),
    [
        ("", ValueError),
        ("gs://bucket/run", ValueError),
        ("s3:/bucket", ValueError),
        (Path("gs://bucket/run"), ValueError),
        ("a\0b", ValueError),
        (Path("a\0b"), ValueError),
        ("~nosuchuser/x", ValueError),
        (Path("~nosuchuser"), ValueError),
        (None, TypeError),
        (b"run", TypeError),
        (3, TypeError),
    ],
    ids=repr,
)
def test_what_is_no_directory(directory, error, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=r"Checkpoints: directory is .*; expected a path of the file system"):
        Checkpoints(directory)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["/proc/run", "file/run", "a" * 300, "/".join(["a" * 200] * 30)], ids=len)
def test_a_directory_that_cannot_be_made(place, tmp_path):
    (tmp_path / "file").write_text("hello")
    tx = gdx.sgd(0.1)
    said = rf"{place} cannot be made \(.*Error: .*; give Checkpoints one that"
    with Checkpoints(tmp_path / place) as checkpoints:
        with pytest.raises(CheckpointError, match=said):
            checkpoints.save(1, tx, PARAMS, tx.init(PARAMS))
        assert checkpoints.steps == []
        with pytest.raises(CheckpointError, match="restore: there is no checkpoint in "):
            checkpoints.restore(tx, PARAMS, tx.init(PARAMS))


@pytest.mark.parametrize(
    "tx",
    [gdx.adam(0.1), gdx.sgd(0.1), gdx.sgd(0.1, 0.9), optax.adam(0.1), optax.lbfgs()],
    ids=["adam", "sgd", "momentum", "optax's", "lbfgs"],
)
def test_parameters_and_state_in_each_others_place(tx, checkpoints):
    state = tx.init(PARAMS)
    with pytest.raises(TypeError, match=r"save: params is .* of state: .* order .* save\(step, tx, params, state\)"):
        checkpoints.save(1, tx, state, PARAMS)
    assert not checkpoints.directory.exists()
    checkpoints.save(1, tx, PARAMS, (state, PARAMS))  # an average beside it
    checkpoints.save(2, tx, PARAMS, state)
    with pytest.raises(TypeError, match=r"restore: params is .* of state: .* order .* restore\(tx, params, state\)"):
        checkpoints.restore(tx, state, PARAMS)
    checkpoints.restore(tx, PARAMS, jax.eval_shape(tx.init, PARAMS))


def test_what_others_bundle(checkpoints):
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, gdx.adam(0.1), wrt=nnx.Param)
    bundle = TrainState.create(apply_fn=lambda variables, x: x, params=PARAMS, tx=gdx.adam(0.1))
    said = "its tx, params and opt_state, of flax's nnx the optimizer's tx, nnx.state.model. and nnx.state.optimizer.$"
    for wrong in (bundle, optimizer):
        with pytest.raises(TypeError, match=f"(?s)save: tx is .*{said}"):
            checkpoints.save(1, wrong)
        with pytest.raises(TypeError, match=f"(?s)restore: tx is .*{said}"):
            checkpoints.restore(wrong)
        with pytest.raises(TypeError, match=f"save: state is missing.*{said}"):
            checkpoints.save(1, gdx.adam(0.1), wrong)
        with pytest.raises(TypeError, match=f"restore: params is missing.*{said}"):
            checkpoints.restore(gdx.adam(0.1))
    for state in (gdx.adam(0.1).init(PARAMS), None):
        with pytest.raises(TypeError, match=f"save: params is missing.*{said}"):
            checkpoints.save(1, gdx.adam(0.1), None, state)
    for parts in ((bundle.tx, bundle.params, bundle.opt_state), (optimizer.tx, nnx.state(model), nnx.state(optimizer))):
        checkpoints.save(max(checkpoints.steps, default=0) + 1, *parts)
        checkpoints.restore(*parts)


@pytest.mark.parametrize("leaf", [abs, "name", np.datetime64("2000"), b"x"], ids=repr)
def test_a_leaf_that_is_no_array(leaf, checkpoints):
    tx = gdx.sgd(0.1)
    with pytest.raises(TypeError, match=r"save: params/f is .*; expected an array or a number. Leave out"):
        checkpoints.save(1, tx, {**PARAMS, "f": leaf}, tx.init(PARAMS))
    assert not checkpoints.steps
    model = equinox.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    params = equinox.filter(model, equinox.is_array)
    with pytest.raises(TypeError, match=r"save: params/activation is .* as equinox.filter"):
        checkpoints.save(1, tx, model, tx.init(params))
    checkpoints.save(1, tx, params, tx.init(params))


def other_than(leaf, params):
    """Parameters and state of which one leaf is another."""
    state = gdx.adam(0.1).init(params)
    yield {"b": leaf}, state
    yield params, (state[0]._replace(mu={"b": leaf}), state[1])
    yield params, (state, {"average": leaf})


def test_an_array_that_was_donated(checkpoints):
    gone = jnp.ones(16)
    gone.delete()
    for params, state in other_than(gone, PARAMS):
        with pytest.raises(ValueError, match=r"save: (params|state).* was donated or deleted; call this before"):
            checkpoints.save(1, gdx.adam(0.1), params, state)
    assert not checkpoints.steps


def test_what_is_traced(checkpoints):
    @jax.jit
    def save(leaf):
        for params, state in other_than(leaf, PARAMS):
            with pytest.raises(TypeError, match=r"save: (params|state).*, which has no value while jax\.jit traces it"):
                checkpoints.save(1, gdx.adam(0.1), params, state)
        return leaf

    save(jnp.ones(16))
    assert not checkpoints.steps


SIX = [make(0.1) for make in (gdx.gradient_descent, gdx.sgd, gdx.momentum, gdx.nesterov, gdx.adam, gdx.adamw)]
OTHERS = [*SIX, gdx.sgd(0.1, 0.9), *(gdx.chain(optax.clip(1.0), tx) for tx in SIX), optax.adam(0.1), optax.lion(0.1)]


class Average(NamedTuple):
    weights: dict
    state: tuple


@pytest.mark.parametrize("tx", OTHERS, ids=lambda tx: type(tx).__name__)
def test_the_state_of_another_optimizer_or_of_other_parameters(tx, checkpoints):
    """What could not be restored is not saved; what holds the state, and a state of some of the parameters, is."""
    state, other = tx.init(PARAMS), tx.init({"b": jnp.ones(5)})
    arrays, step = jax.tree.leaves(state), 0
    for foreign in (theirs.init(PARAMS) for theirs in OTHERS):
        parts = (foreign, *foreign) if arrays else (foreign,)
        if jax.tree.structure(state) not in map(jax.tree.structure, parts):
            with pytest.raises(TypeError, match=r"save: state is .*, and holds none of .*; expected what tx\.init"):
                checkpoints.save(step, tx, PARAMS, foreign)
    for nothing in (None, (), {}) * bool(arrays):
        with pytest.raises(TypeError, match=r"save: state is .*, and holds none of .*; expected what tx\.init"):
            checkpoints.save(step, tx, PARAMS, nothing)
    for wrong in (other, (other, PARAMS), {"state": other}) * bool(arrays):
        with pytest.raises(ValueError, match=r"save: state has the shape \(5,\) at .*, which tx\.init\(params\) makes"):
            checkpoints.save(step, tx, PARAMS, wrong)
    assert not checkpoints.directory.exists()
    lanes = jax.vmap(tx.init)({"b": jnp.ones((3, 16))})
    for step, (params, legal) in enumerate(
        [
            (PARAMS, state),
            (PARAMS, (state, PARAMS)),
            (PARAMS, (state, jnp.ones(7))),
            ({}, (PARAMS, state)),
            (PARAMS, {"state": state, "average": PARAMS}),
            (PARAMS, nnx.state(nnx.Optimizer(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), tx, wrt=nnx.Param))),
            ({"trained": PARAMS, "statistics": jnp.ones(7)}, state),
            ((PARAMS, Average({}, ())), state),
            ({"b": jnp.ones((3, 16))}, lanes),
            *([(PARAMS, Average(PARAMS, state)), (PARAMS, (state, other))] * bool(arrays)),
        ]
    ):
        checkpoints.save(step, tx, params, legal)
        checkpoints.restore(tx, params, legal)
