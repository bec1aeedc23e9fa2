"""Groups by path: which leaf is in which, that each is trained as by its own optimizer, and what is refused."""

import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gdx
from tests.contract.table import assert_same_bits

PARAMS = {
    "embed": jnp.linspace(-1.0, 1.0, 12).reshape(3, 4),
    "layer": {"kernel": jnp.linspace(0.5, 2.0, 16).reshape(4, 4), "bias": jnp.ones(4), "none": None},
    "norm": [jnp.ones(4), jnp.zeros(4)],
    "old": jnp.ones(3),
}
CHANGES = {
    "bias|norm": {"weight_decay": 0.0},
    "^embed": {"learning_rate": gdx.times(0.1), "b1": 0.8},
    "^old": None,
}
FACTORS = {"a number": 1e-2, "a schedule": gdx.schedules.linear_schedule(1e-2, 0.0, 10)}
RATES = {**FACTORS, "a function": lambda count: 1e-2 / (1 + count)}


def loss(params, target):
    return sum(jnp.sum((leaf - target) ** 2) for leaf in jax.tree.leaves(params))


def trained(tx, params=PARAMS, steps=5, passed=True):
    targets = jnp.linspace(0.0, 1.0, steps)

    def run(tx, params):
        return gdx.train(loss, tx, params, targets)

    done = jax.jit(run)(tx, params) if passed else jax.jit(lambda params: run(tx, params))(params)
    return done.params


@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize("kind", RATES)
def test_each_group_has_the_bits_of_its_own_optimizer(kind, passed):
    rate = RATES[kind]
    small = (lambda count: jnp.float32(0.1) * rate(count)) if callable(rate) else np.float32(rate) * np.float32(0.1)
    adamw = gdx.adamw(rate, weight_decay=0.1)
    found = trained(gdx.groups(adamw, CHANGES), passed=passed)
    own = {
        "embed": (PARAMS["embed"], adamw.replace(learning_rate=small, b1=0.8)),
        "layer": (PARAMS["layer"]["kernel"], adamw),
        "norm": (PARAMS["norm"], adamw.replace(weight_decay=0.0)),
    }
    for name, (params, tx) in own.items():
        expected = trained(tx, params, passed=passed and not callable(small))
        assert_same_bits(found[name]["kernel"] if name == "layer" else found[name], expected)
    assert_same_bits(found["old"], PARAMS["old"])


INNER = {
    "adamw": lambda: gdx.adamw(1e-2),
    "sgd": lambda: gdx.sgd(0.1, 0.9),
    "optax's": lambda: gdx.value(optax.lion)(1e-2),
    "at random": lambda: gdx.adamw(1e-2, mu_dtype=gdx.storage.StochasticBfloat16(), weight_decay=0.1),
    "rounded": lambda: gdx.chain(gdx.sgd(1e-3, 0.9), gdx.round_stochastically(0)),
}


@pytest.mark.parametrize("kind", INNER)
def test_groups_in_which_nothing_differs_have_the_bits_of_none(kind):
    tx = INNER[kind]()
    params = jax.tree.map(lambda x: x.astype("bfloat16"), PARAMS) if kind == "rounded" else PARAMS
    same = {"kernel": {"learning_rate": tx.hyperparams["learning_rate"]}, "norm": {"learning_rate": gdx.times(1.0)}}
    with jax.numpy_dtype_promotion("standard"):
        assert_same_bits(trained(gdx.groups(tx, same), params), trained(tx, params))


def test_the_state_is_as_large_as_without_groups_and_frozen_leaves_less():
    def size(tx):
        return sum(x.size for x in jax.tree.leaves(jax.eval_shape(tx.init, PARAMS)))

    tx = gdx.groups(gdx.adamw(1e-2), CHANGES)
    assert size(tx) - 3 == size(gdx.adamw(1e-2)) - 1 - 2 * PARAMS["old"].size  # three counts for one


def test_the_first_pattern_counts_and_paths_are_spelled_alike_everywhere():
    class Module(eqx.Module):
        layers: list
        scale: jax.Array

    tree = {
        "m": Module([jnp.ones(1), jnp.ones(2)], jnp.ones(3)),
        "model": nnx.state(nnx.Linear(2, 2, rngs=nnx.Rngs(0))),
    }
    changes = {"^m/layers/1$": {"learning_rate": 2.0}, "^m/layers": None, "kernel$": gdx.sgd(3.0)}
    tx = gdx.groups(gdx.sgd(1.0), changes)
    ones = jax.tree.map(jnp.ones_like, tree)
    updates, _ = tx.update(ones, tx.init(tree), tree)
    found = [float(jnp.mean(u)) for u in jax.tree.leaves(updates["m"])]
    assert found == [0.0, -2.0, -1.0]
    assert [float(jnp.mean(u)) for u in jax.tree.leaves(updates["model"])] == [-1.0, -3.0]
    with pytest.raises(ValueError, match=r"'value' matches no path.*m/scale, model/bias, model/kernel$"):
        gdx.groups(gdx.sgd(1.0), {"value": None}).init(tree)  # flax's box of an array, no layer of the model


def test_is_a_value():
    tx = gdx.groups(gdx.adamw(1e-2, weight_decay=0.1), CHANGES)
    assert tx == gdx.groups(gdx.adamw(1e-2, weight_decay=0.1), CHANGES) == pickle.loads(pickle.dumps(tx))
    assert jax.jit(lambda tx: tx)(tx) == tx and hash(tx) == hash(pickle.loads(pickle.dumps(tx)))
    assert eval(repr(tx), {**vars(gdx)}) == tx
    names = ("bias|norm.weight_decay", "^embed.learning_rate.factor", "^embed.b1")
    assert [tx.hyperparams[name] for name in ("learning_rate", "weight_decay", *names)] == [0.01, 0.1, 0.0, 0.1, 0.8]
    changed = tx.replace(learning_rate=1.0, **{"bias|norm.weight_decay": 0.5, "^embed.learning_rate": 0.3})
    assert changed.hyperparams["learning_rate"] == 1.0 and "^embed.learning_rate.factor" not in changed.hyperparams
    assert [member.hyperparams["learning_rate"] for member in changed.members[:2]] == [1.0, 0.3]
    assert changed.members[0].hyperparams["weight_decay"] == 0.5
    other = dict(reversed(CHANGES.items()))
    assert gdx.groups(gdx.adamw(1e-2, weight_decay=0.1), other) != tx  # the first that matches counts


def test_one_program_for_all_numbers():
    traced = []

    @jax.jit
    def run(tx, params):
        traced.append(tx)
        return trained(tx, params)

    tx = gdx.groups(gdx.adamw(1e-2), CHANGES)
    for changes in ({}, {"learning_rate": 0.1}, {"^embed.learning_rate.factor": 0.2}, {"^embed.b1": 0.5}):
        run(tx.replace(**changes), PARAMS)
    assert len(traced) == 1


def test_is_swept_and_learnt():
    tx = gdx.groups(gdx.adamw(1e-2), CHANGES)
    batch = gdx.stack([tx, tx.replace(**{"^embed.learning_rate.factor": 0.5}), tx.replace(learning_rate=0.1)])
    assert gdx.labels(batch)[1] == {"learning_rate": 0.01, "^embed.learning_rate.factor": 0.5}
    targets = jnp.zeros(5)
    swept = gdx.sweep(loss, batch, PARAMS, targets)
    for member, losses in zip(gdx.unstack(batch), swept.losses, strict=True):
        np.testing.assert_allclose(gdx.train(loss, member, PARAMS, targets).losses, losses, rtol=1e-5)

    def final(tx):
        return gdx.train(loss, tx, PARAMS, targets).losses[-1]

    slopes = jax.jit(jax.grad(final))(tx)
    for name in ("learning_rate", "^embed.learning_rate.factor", "^embed.b1", "bias|norm.weight_decay"):
        value = tx.hyperparams[name]
        high, low = (final(tx.replace(**{name: value + step})) for step in (1e-2 * value + 1e-3, 0.0))
        found = float(slopes.hyperparams[name])
        assert found == pytest.approx(float(high - low) / (1e-2 * value + 1e-3), rel=0.1, abs=2e-2), name


def test_schedules_are_read_where_they_are():
    rate, b1 = gdx.schedules.linear_schedule(1.0, 0.0, 10), gdx.schedules.linear_schedule(0.9, 0.8, 10)
    tx = gdx.groups(
        gdx.adamw(rate),
        {
            "embed": {"learning_rate": gdx.times(0.1)},
            "kernel": {"b1": b1},
            "bias": gdx.sgd(rate),
            "norm": {"learning_rate": gdx.times(rate)},
        },
    )
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = tx.update(PARAMS, state, PARAMS)
    found = {name: float(x) for name, x in gdx.hyperparams_in_use(tx, state).items()}
    assert found["learning_rate"] == pytest.approx(0.7) and found["embed.learning_rate.factor"] == pytest.approx(0.1)
    assert found["norm.learning_rate.factor"] == pytest.approx(0.7)
    assert found["embed.learning_rate"] == pytest.approx(0.07) and found["norm.learning_rate"] == pytest.approx(0.49)
    assert found["kernel.b1"] == pytest.approx(0.87) and found["bias.learning_rate"] == pytest.approx(0.7)


def test_a_multiple_is_read_through_any_nesting_and_in_jit():
    changes = {"bias": {"learning_rate": gdx.times(0.25), "weight_decay": gdx.times(2.0)}}
    for rate in (0.4, gdx.schedules.constant_schedule(0.4)):
        inner = gdx.groups(gdx.adamw(rate), changes)
        for tx in (inner, gdx.chain(optax.clip(1.0), gdx.skip_spikes(inner)), gdx.watch(gdx.chain(inner))):
            found = jax.jit(gdx.hyperparams_in_use)(tx, tx.init(PARAMS))
            assert found["bias.learning_rate"] == pytest.approx(0.1)
            assert found["bias.weight_decay"] == pytest.approx(2e-4)
            assert found["bias.learning_rate.factor"] == 0.25 and found["learning_rate"] == pytest.approx(0.4)


def test_range_test_scales_all_rates_together():
    tx = gdx.groups(gdx.sgd(0.1), {"norm": {"learning_rate": 0.05}, "embed": {"learning_rate": gdx.times(0.5)}})
    found = gdx.range_test(loss, tx, PARAMS, jnp.zeros(10))
    assert 0.1 < found.suggested < 1  # the edge of this loss is at 1


SMALL = {"mu_dtype": gdx.storage.SignedFourthRoot8(), "nu_dtype": gdx.storage.FourthRoot8()}


def test_few_bits_are_warned_of_only_where_they_hold_nothing_at_all():
    params = {"w": jnp.ones((64, 128)), "b": jnp.ones(128)}
    tx = gdx.groups(gdx.adamw(1e-2, **SMALL), {"b": {"weight_decay": 0.0}})
    state = tx.init(params)  # pytest makes errors of warnings
    assert sum(x.nbytes for x in jax.tree.leaves(state)) < 2.1 * 64 * 128 + 8 * 128 + 16
    found = gdx.describe(tx, params)
    assert [leaf.path for leaf in found.whole] == ["[0][0].mu['b']", "[0][0].nu['b']"]
    with pytest.warns(UserWarning, match=r"^groups: no leaf fits its storage format, so all stay whole"):
        tx.init({"w": jnp.ones(3), "b": jnp.ones(2)})


@pytest.mark.parametrize("outside", [True, False])
def test_over_a_mesh(outside):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    params = {"w": jnp.ones((64, 128)), "b": jnp.ones(128), "old": jnp.ones(8)}
    changes = {"b": {"weight_decay": 0.0}, "old": None}
    tx = gdx.adamw(1e-2, weight_decay=0.1)

    def shard(tx):
        return gdx.sharding.shard_state(tx, mesh)

    sharded = shard(gdx.groups(tx, changes)) if outside else gdx.groups(shard(tx), changes)
    there = jax.device_put(params, jax.NamedSharding(mesh, jax.P()))
    state = sharded.init(there)
    mus = [x for x in jax.tree.leaves(state) if x.shape == (64, 128)]
    assert len(mus) == 2 and all(x.sharding.shard_shape(x.shape) != x.shape for x in mus)
    updates, _ = jax.jit(sharded.update)(there, state, there)
    alone = gdx.groups(tx, changes)
    expected, _ = jax.jit(alone.update)(params, alone.init(params), params)
    assert_same_bits(updates, expected)


def test_a_checkpoint_compares_each_group(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    tx = gdx.groups(gdx.adamw(1e-2), CHANGES)
    state = tx.init(PARAMS)
    with gdx.checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tx, PARAMS, state)
        checkpoints.wait()
        _, params, restored, _ = checkpoints.restore(tx, PARAMS, state)
        assert_same_bits((params, restored), (PARAMS, state))
        for name in ("^embed.learning_rate.factor", "bias|norm.weight_decay"):
            with pytest.raises(gdx.checkpoint.CheckpointError, match=rf"{name.replace('|', '.')[1:]} is 0\.7, saved"):
                checkpoints.restore(tx.replace(**{name: 0.7}), PARAMS, state)
        with pytest.raises(gdx.checkpoint.CheckpointError, match="patterns"):
            checkpoints.restore(gdx.groups(gdx.adamw(1e-2), {**CHANGES, "kernel": None}), PARAMS, state)


@pytest.mark.parametrize("around", [lambda tx: gdx.chain(gdx.value(optax.clip)(1.0), tx), optax.apply_if_finite])
def test_inside_others(around):
    tx = gdx.groups(gdx.adamw(1e-2), CHANGES)
    tx = around(tx, 3) if around is optax.apply_if_finite else around(tx)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS)
    assert float(jnp.abs(updates["layer"]["kernel"]).min()) > 0 and float(jnp.abs(updates["old"]).max()) == 0


def test_a_mask_is_that_of_all_parameters():
    mask = jax.tree.map(lambda p: p.ndim > 1, PARAMS)
    tx = gdx.groups(gdx.adamw(1e-2, weight_decay=0.5, mask=mask), {"embed": {"weight_decay": 0.1}})
    by_function = gdx.adamw(1e-2, weight_decay=0.5, mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params))
    assert_same_bits(trained(tx), trained(gdx.groups(by_function, {"embed": {"weight_decay": 0.1}})))


ADAMW = gdx.adamw(1e-2)
WRONG = {
    "no changes": (lambda: gdx.groups(ADAMW, {}), ValueError, r"groups: there are no changes; expected at least one"),
    "a list": (
        lambda: gdx.groups(ADAMW, [("a", None)]),
        TypeError,
        r"groups: changes is \[.*expected a dict from patt",
    ),
    "a class": (lambda: gdx.groups(gdx.adamw, CHANGES), TypeError, r"groups: tx is <class.*expected a transform"),
    "optax's": (lambda: gdx.groups(optax.sgd(0.1), CHANGES), TypeError, r"groups: .*gdx\.value\(optax\.lion\)"),
    "no pattern": (lambda: gdx.groups(ADAMW, {"(": None}), ValueError, r"the pattern '\(' is no regular expression"),
    "an index": (lambda: gdx.groups(ADAMW, {0: None}), TypeError, r"the pattern 0 is no regular expression"),
    "a number": (
        lambda: gdx.groups(ADAMW, {"a": 0.1}),
        TypeError,
        r"the change at 'a' is 0\.1; expected a dict of hyp",
    ),
    "an empty dict": (lambda: gdx.groups(ADAMW, {"a": {}}), ValueError, r"the change at 'a' is empty; expected"),
    "another name": (
        lambda: gdx.groups(ADAMW, {"a": {"lr": 0.1}}),
        ValueError,
        r"at 'a': .*did you mean learning_rate",
    ),
    "out of range": (
        lambda: gdx.groups(ADAMW, {"a": {"b1": 1.0}}),
        ValueError,
        r"groups: the change at 'a': .*b1 is 1\.",
    ),
    "a text": (lambda: gdx.groups(ADAMW, {"a": {"b1": "x"}}), TypeError, r"groups: the change at 'a': .*b1 is 'x'"),
    "too many times": (
        lambda: gdx.groups(ADAMW, {"a": {"b1": gdx.times(2.0)}}),
        ValueError,
        r"groups: the change at 'a': adamw: b1 is 1\.79",
    ),
    "times nothing": (
        lambda: gdx.groups(gdx.sgd(0.1), {"a": {"momentum": gdx.times(2.0)}}),
        ValueError,
        r"the change at 'a': momentum is None; give a number",
    ),
    "times a mask": (
        lambda: gdx.groups(ADAMW, {"a": {"mask": gdx.times(2.0)}}),
        ValueError,
        r"the change at 'a': mask is None; give a number",
    ),
    "patterns of another number": (
        lambda: gdx.groups(ADAMW, CHANGES).replace(patterns=["a"]),
        ValueError,
        r"groups: patterns is \('a',\); expected 3, one for each change$",
    ),
    "one of them none": (
        lambda: gdx.groups(ADAMW, {"a": None}).replace(patterns=["("]),
        ValueError,
        r"the pattern '\(' is no regular expression",
    ),
    "a pattern for what has no path": (
        lambda: gdx.groups(ADAMW, {"a": None}).init(jnp.ones(3)),
        ValueError,
        r"the pattern 'a' matches no path; .*The paths are the root$",
    ),
    "a pattern for nothing": (
        lambda: gdx.groups(ADAMW, {"head": None}).init(PARAMS),
        ValueError,
        r"the pattern 'head' matches no path; .*The paths are embed, layer/bias, layer/kernel, norm/0, norm/1, old$",
    ),
    "a hidden pattern": (
        lambda: gdx.groups(ADAMW, {"layer": None, "bias": {"b1": 0.5}}).init(PARAMS),
        ValueError,
        r"the pattern 'bias' matches 'layer/bias', which 'layer' has taken; expected",
    ),
    "another state": (
        lambda: gdx.groups(ADAMW, CHANGES).update(PARAMS, ADAMW.init(PARAMS), PARAMS),
        TypeError,
        r"^groups: the state is a tuple of 3.*, expected a tuple of 4",
    ),
    "no parameters": (
        lambda: gdx.groups(ADAMW, CHANGES).update(PARAMS, gdx.groups(ADAMW, CHANGES).init(PARAMS)),
        ValueError,
        r"update needs the parameters",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_refuses(case):
    call, error, words = WRONG[case]
    with pytest.raises(error, match=words):
        call()
