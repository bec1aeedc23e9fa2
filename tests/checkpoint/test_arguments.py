"""What checkpoints take and refuse, before anything is written."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from gdx.checkpoint import Checkpoints

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
