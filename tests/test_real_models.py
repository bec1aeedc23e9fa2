"""Losses with aux, state and random keys, modules, seeds, evaluation and halving, against loops written out."""

import dataclasses
import functools
import signal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gdx
from gdx.progress import BAR
from tests.contract.table import assert_same_bits

STEPS, SEEDS = 12, 3
IMAGES = jnp.asarray(np.random.default_rng(0).standard_normal((48, 6, 6, 1)), "float32")
LABELS = jnp.asarray(np.random.default_rng(1).integers(0, 4, 48))
BATCHES = jnp.asarray(np.random.default_rng(2).integers(0, 48, (STEPS, 16)))
KEYS = jax.random.split(jax.random.key(0), SEEDS)
loose = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-5)
close = functools.partial(jax.tree.map, loose)


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# A network with a running mean, noise and aux, as plain functions.


def init(key):
    return {"w": jax.random.normal(key, (36, 4)) / 6, "b": jnp.zeros(4)}


def loss(params, mean, batch):
    examples, key = batch
    x = IMAGES[examples].reshape(-1, 36)
    x = (x - mean) * jax.random.bernoulli(key, 0.8, x.shape).astype(x.dtype)
    logits = x @ params["w"] + params["b"][None]
    return cross_entropy(logits, LABELS[examples]), 0.9 * mean + 0.1 * x.mean(), {"logits": logits[0]}


def batches_of(key):
    return jax.random.permutation(key, BATCHES, axis=0), jax.random.split(key, STEPS)


START, BEGIN, DATA = init(KEYS[0]), jnp.zeros(()), batches_of(KEYS[0])


def by_hand(tx, params, mean, data):
    """Parameters, means, losses and aux after each step."""
    state, rows = tx.init(params), []

    @jax.jit
    def step(tx, params, state, mean, batch):
        def first(params):
            value, *others = loss(params, mean, batch)
            return value, others

        (value, (mean, aux)), gradients = jax.value_and_grad(first, has_aux=True)(params)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, mean, value, aux

    for i in range(STEPS):
        params, state, mean, value, aux = step(tx, params, state, mean, jax.tree.map(lambda x: x[i], data))  # noqa: B023
        rows.append((params, mean, value, aux))
    return jax.tree.map(lambda *x: jnp.stack(x), *rows)


def score(params, mean):
    return {"norm": jnp.sum(params["w"] ** 2), "mean": mean, "has weights": jnp.any(params["w"] != 0)}


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("jitted", [False, True])
def test_a_loss_with_state_keys_and_aux(jitted, remat):
    tx = gdx.adamw(0.05)
    run = functools.partial(gdx.train, loss, model_state=BEGIN, evaluate=score, every=5, remat=remat)
    found = (jax.jit(run) if jitted else run)(tx, START, DATA)
    params, means, losses, aux = by_hand(tx, START, BEGIN, DATA)
    close((found.params, found.model_state), jax.tree.map(lambda x: x[-1], (params, means)))
    close((found.losses, found.aux), (losses, aux))
    rows = [4, 9, 11]
    assert found.evaluated.step.tolist() == [5, 10, 12]
    close(found.evaluated.value["mean"], means[np.array(rows)])
    close(found.evaluated.value["norm"], jnp.sum(params["w"] ** 2, axis=(1, 2))[np.array(rows)])


def test_a_resumed_run_is_the_uninterrupted_one():
    tx = gdx.adamw(gdx.schedules.linear_schedule(0.1, 0.0, 12))
    run = jax.jit(lambda p, s, m, data: gdx.train(loss, tx, p, data, state=s, model_state=m))
    first, second = jax.tree.map(lambda x: x[:5], DATA), jax.tree.map(lambda x: x[5:], DATA)
    whole = run(START, tx.init(START), BEGIN, DATA)
    half = run(START, tx.init(START), BEGIN, first)
    rest = run(half.params, half.state, half.model_state, second)
    assert_same_bits((rest.params, rest.state, rest.model_state), (whole.params, whole.state, whole.model_state))
    joined = jax.tree.map(lambda x, y: jnp.concatenate([x, y]), (half.losses, half.aux), (rest.losses, rest.aux))
    assert_same_bits(joined, (whole.losses, whole.aux))


GRID = gdx.grid(gdx.adamw, learning_rate=[0.001, 0.01, 0.1], weight_decay=[0.0, 0.1])


@pytest.mark.parametrize("chunk_size", [None, 4])
def test_a_sweep_over_seeds_is_the_runs_alone(chunk_size):
    made = {"model_state": lambda key: jax.random.uniform(key), "keys": KEYS, "evaluate": score, "every": 5}
    found = gdx.sweep(loss, GRID, init, batches_of, chunk_size=chunk_size, **made)
    assert found.evaluated.step.tolist() == [5, 10, 12]
    assert found.losses.shape == (6, SEEDS, STEPS) and found.aux["logits"].shape == (6, SEEDS, STEPS, 4)
    scores = np.zeros((6, SEEDS))
    for i, tx in enumerate(gdx.unstack(GRID)):
        for j, key in enumerate(KEYS):
            params, means, losses, aux = by_hand(tx, init(key), jax.random.uniform(key), batches_of(key))
            loose(found.losses[i, j], losses)
            loose(found.aux["logits"][i, j], aux["logits"])
            end = score(*jax.tree.map(lambda x: x[-1], (params, means)))
            close(jax.tree.map(lambda x: x[i, j], found.final), end)  # noqa: B023
            for row, step in enumerate([5, 10, 12]):
                then = score(*jax.tree.map(lambda x: x[step - 1], (params, means)))  # noqa: B023
                close(jax.tree.map(lambda x: x[i, j, row], found.evaluated.value), then)  # noqa: B023
            scores[i, j] = losses[-1]
    mean, error = found.mean(found.losses[..., -1])
    loose(mean, scores.mean(axis=1))
    loose(error, scores.std(axis=1, ddof=1) / np.sqrt(SEEDS))
    assert found.ranking(found.losses[..., -1]) == np.argsort(scores.mean(axis=1)).tolist()
    # what is no function is the same for all seeds
    same = gdx.sweep(loss, GRID, START, batches_of, model_state=BEGIN, keys=KEYS)
    loose(same.losses[2, 0], by_hand(gdx.unstack(GRID)[2], START, BEGIN, DATA)[2])


def bowl(theta, batch):
    return jnp.sum(theta**2) + batch


@pytest.mark.parametrize("keys", [None, KEYS])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_halving_drops_the_worse_half(keys, chunk_size):
    rates = np.random.default_rng(0).permutation(np.geomspace(1e-3, 0.6, 16)).tolist()
    rates[5] = 1e30  # it diverges
    grid = gdx.grid(gdx.sgd, learning_rate=rates)
    start = jnp.ones(3) if keys is None else lambda key: 1 + jax.random.uniform(key, 3)
    run = functools.partial(gdx.sweep, bowl, grid, start, jnp.zeros(9), keys=keys, chunk_size=chunk_size)
    whole, found = run(), run(halve=2, evaluate=lambda theta: {"theta": theta, "whole": jnp.int32(7)}, every=2)
    losses = np.nan_to_num(np.asarray(whole.losses, float), nan=1e9, posinf=1e9).reshape(16, -1, 9).clip(max=1e9)
    alive, steps = np.arange(16), np.full(16, 3)
    for part in (slice(1, 3), slice(4, 6)):
        means = losses[alive, :, part].mean(axis=(1, 2))
        alive = np.sort(alive[np.argsort(means)[: len(alive) // 2]])
        steps[alive] += 3
    assert found.steps.tolist() == steps.tolist() and whole.steps.tolist() == [9] * 16
    assert sorted(found.ranking(found.losses[..., -1])) == alive.tolist()
    assert np.flatnonzero(found.diverged.reshape(16, -1).all(axis=1)).tolist() == [5]
    for i, made in enumerate(steps):
        np.testing.assert_allclose(found.losses[i, ..., :made], whole.losses[i, ..., :made], rtol=1e-5)
        assert np.all(np.isnan(found.losses[i, ..., made:]))
        number = {3: 1, 6: 3, 9: 5}[int(made)]  # after steps 2, 4, 6, 8 and 9
        value, count = found.evaluated.value["theta"][i], found.evaluated.value["whole"][i]
        assert np.all(count[..., :number] == 7) and np.all(count[..., number:] == 0)
        assert np.all(np.isnan(value[..., number:, :])) and value.shape[-2:] == (5, 3)
        if made == 9:
            np.testing.assert_allclose(found.final["theta"][i], whole.final[i], rtol=1e-5)
            np.testing.assert_array_equal(value[..., -1, :], found.final["theta"][i])


@pytest.mark.parametrize("progress", [False, lambda *_: None], ids=["whole", "in parts"])
def test_halving_where_jax_looks_for_nan(progress):
    grid = gdx.grid(gdx.sgd, learning_rate=[0.001, 0.1, 0.01, 0.2])
    with jax.debug_nans(True):
        found = gdx.sweep(bowl, grid, jnp.ones(3), jnp.zeros(6), halve=1, progress=progress)
        assert not found.diverged.any() and found.steps.tolist() == [3, 6, 3, 6]
        assert found.ranking(np.asarray(found.losses)[:, -1]) == [3, 1]


# Modules with batch normalisation and dropout.


class Flax(nnx.Module):
    def __init__(self, key):
        rngs = nnx.Rngs(key)
        self.conv = nnx.Conv(1, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.head = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.relu(self.norm(self.conv(x))).mean(axis=(1, 2))))


def in_flax(model, batch):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        return cross_entropy(model(IMAGES[batch[0]]), LABELS[batch[0]])


class Equinox(eqx.Module):
    conv: eqx.nn.Conv2d
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.conv = eqx.nn.Conv2d(1, 4, 3, use_bias=False, key=keys[0])
        self.norm = eqx.nn.BatchNorm(4, "batch", mode="batch")
        self.dropout = eqx.nn.Dropout(0.2)
        self.head = eqx.nn.Linear(4, 4, key=keys[1])

    def __call__(self, x, state, key):
        x, state = self.norm(self.conv(x), state)
        return self.head(self.dropout(jax.nn.relu(x).mean(axis=(1, 2)), key=key)), state


def in_equinox(model, state, batch):
    examples, key = batch
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        logits, state = jax.vmap(model, (0, None, None), (0, None), axis_name="batch")(
            jnp.moveaxis(IMAGES[examples], -1, 1), state, key
        )
    return cross_entropy(logits, LABELS[examples]), state


def flax_by_hand(tx, model, data):
    """nnx's own way: a model that is changed in place."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = []
    for i in range(STEPS):
        batch = jax.tree.map(lambda x: x[i], data)  # noqa: B023
        value, gradients = nnx.value_and_grad(in_flax)(model, batch)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            optimizer.update(model, gradients)
        losses.append(value)
    return jnp.stack(losses)


def test_a_module_of_flax_is_trained_as_it_trains_itself():
    tx, model = gdx.adamw(0.02), Flax(KEYS[1])
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    found = gdx.train(in_flax, tx, model, DATA, evaluate=lambda model: model.norm.mean[...], every=6)
    assert_same_bits(nnx.to_pure_dict(nnx.state(model, nnx.Param)), nnx.to_pure_dict(before))
    loose(found.losses, flax_by_hand(tx, model, DATA))
    close(*(nnx.to_pure_dict(nnx.state(m, (nnx.Param, nnx.BatchStat))) for m in (found.params, model)))
    loose(found.evaluated.value[-1], model.norm.mean[...])


def equinox_by_hand(tx, model, state, data):
    params, fixed = eqx.partition(model, eqx.is_inexact_array)
    opt_state, losses = tx.init(params), []

    @eqx.filter_jit
    def step(params, opt_state, state, batch):
        def first(params):
            return in_equinox(eqx.combine(params, fixed), state, batch)

        (value, state), gradients = eqx.filter_value_and_grad(first, has_aux=True)(params)
        updates, opt_state = tx.update(gradients, opt_state, params)
        return eqx.apply_updates(params, updates), opt_state, state, value

    for i in range(STEPS):
        params, opt_state, state, value = step(params, opt_state, state, jax.tree.map(lambda x: x[i], data))  # noqa: B023
        losses.append(value)
    return eqx.combine(params, fixed), state, jnp.stack(losses)


def test_a_module_of_equinox_is_trained():
    tx = gdx.adamw(0.02)
    model, state = eqx.nn.make_with_state(Equinox)(KEYS[1])
    found = gdx.train(in_equinox, tx, model, DATA, model_state=state)
    expected, end, losses = equinox_by_hand(tx, model, state, DATA)
    loose(found.losses, losses)
    close(eqx.filter(found.params, eqx.is_array), eqx.filter(expected, eqx.is_array))
    close(found.model_state, end)
    assert found.params.dropout.p == 0.2 and jax.tree.structure(found.params) == jax.tree.structure(model)


@pytest.mark.parametrize("library", ["flax", "equinox"])
def test_a_network_is_swept_over_rate_decay_and_seeds(library):
    if library == "flax":
        found = gdx.sweep(in_flax, GRID, Flax, batches_of, keys=KEYS, halve=1)
    else:
        make = eqx.nn.make_with_state(Equinox)
        begin = lambda key: make(key)[1]  # noqa: E731
        found = gdx.sweep(in_equinox, GRID, lambda key: make(key)[0], batches_of, model_state=begin, keys=KEYS, halve=1)
    best = found.ranking(found.losses[..., -1])[0]
    for i, j in ((best, 2), (0, 1)):
        tx, key, made = gdx.unstack(GRID)[i], KEYS[j], int(found.steps[i])
        if library == "flax":
            losses = flax_by_hand(tx, Flax(key), batches_of(key))
        else:
            losses = equinox_by_hand(tx, *make(key), batches_of(key))[2]
        loose(found.losses[i, j, :made], losses[:made])
    assert found.steps.tolist().count(STEPS) == 3


@pytest.mark.parametrize("library", ["flax", "equinox"])
def test_a_new_head_is_trained_on_a_body_that_was_saved(library, tmp_path):
    tx = gdx.adamw(0.02)
    if library == "flax":
        trained = gdx.train(in_flax, tx, Flax(KEYS[0]), DATA)
        saved, state = nnx.state(trained.params), trained.state
        other = Flax(KEYS[1])
        other.head = nnx.Linear(4, 5, rngs=nnx.Rngs(7))
        target = nnx.state(other)
    else:
        model, begin = eqx.nn.make_with_state(Equinox)(KEYS[0])
        trained = gdx.train(in_equinox, tx, model, DATA, model_state=begin)
        saved, state = eqx.filter(trained.params, eqx.is_array), trained.state
        other = eqx.tree_at(lambda m: m.head, model, eqx.nn.Linear(4, 5, key=KEYS[1]))
        target = eqx.filter(other, eqx.is_array)
    with gdx.checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(STEPS, tx, saved, state)
        found = checkpoints.restore_params(target, skip=["^head/"])
    assert len(found.skipped) == 2 and all(path.startswith("head/") for path in found.skipped)
    if library == "flax":
        nnx.update(other, found.params)
        assert_same_bits(other.conv.kernel[...], trained.params.conv.kernel[...])
        assert_same_bits(other.norm.mean[...], trained.params.norm.mean[...])
        assert_same_bits(other.head.kernel[...], target["head"]["kernel"][...])
        on = gdx.train(in_flax, tx, other, DATA)
    else:
        other = eqx.combine(found.params, other)
        assert_same_bits(other.conv.weight, trained.params.conv.weight)
        assert_same_bits(other.head.weight, target.head.weight)
        on = gdx.train(in_equinox, tx, other, DATA, model_state=trained.model_state)
    assert np.all(np.isfinite(on.losses)) and on.losses[-3:].mean() < on.losses[:3].mean()


def test_a_module_is_described_by_what_is_trained():
    model, module = Flax(KEYS[0]), Equinox(KEYS[0])
    for whole, params in ((model, nnx.state(model, nnx.Param)), (module, eqx.filter(module, eqx.is_inexact_array))):
        found = gdx.describe(gdx.adam(0.1), whole)
        assert found == gdx.describe(gdx.adam(0.1), params)
        assert found.parameters == sum(x.size for x in jax.tree.leaves(params))


# Progress and interruption.


@pytest.mark.parametrize("jitted", [False, True])
def test_train_tells_how_far_it_is(jitted):
    calls = []
    run = functools.partial(gdx.train, bowl, gdx.sgd(0.1), progress=lambda *call: calls.append(call))
    found = (jax.jit(run) if jitted else run)(jnp.ones(3), jnp.zeros(250))
    jax.effects_barrier()
    done = [call[0] for call in calls]
    assert done == sorted(done) and done[-1] == 1 and 100 <= len(done) <= 130 and calls[-1][1:] == (found.losses[-1], 0)
    assert_same_bits(
        found.losses, jax.jit(functools.partial(gdx.train, bowl, gdx.sgd(0.1)))(jnp.ones(3), jnp.zeros(250)).losses
    )


@pytest.mark.parametrize("has_rich", [True, False])
def test_a_bar_is_shown(has_rich, monkeypatch, capsys):
    if not has_rich:
        monkeypatch.setitem(__import__("sys").modules, "rich.progress", None)
    gdx.train(bowl, gdx.sgd(0.1), jnp.ones(3), jnp.zeros(20), progress=True)
    gdx.sweep(bowl, gdx.grid(gdx.sgd, learning_rate=[0.1, 1e30]), jnp.ones(3), jnp.zeros(20), progress=True)
    jax.effects_barrier()
    jax.jit(lambda start: gdx.train(bowl, gdx.sgd(0.1), start, jnp.zeros(20), progress=True).losses)(jnp.ones(3))
    jax.effects_barrier()
    assert BAR._rich is None  # no bar stays open
    shown = "".join(capsys.readouterr())
    assert "100%" in shown and "loss 0.0006" in shown and "1 diverged" in shown


def test_what_there_is_is_kept_when_it_is_interrupted():
    def stop(done, least, diverged):
        if done >= 0.5:
            raise KeyboardInterrupt

    tx, batches = gdx.watch(gdx.adamw(0.1), 4), jnp.arange(40.0)
    run = functools.partial(gdx.train, bowl, tx, jnp.ones(3), evaluate=lambda theta: theta[0], every=8)
    with pytest.warns(UserWarning, match=r"train: interrupted after 0\.5 of the steps; what they made is returned"):
        found = run(batches, progress=stop)
    expected = run(batches[:20])
    assert_same_bits(found[:3], expected[:3])
    assert found.watched.step.tolist() == expected.watched.step.tolist() == [0, 4, 8, 12, 16]
    assert found.evaluated.step.tolist() == [8, 16] and expected.evaluated.step.tolist() == [8, 16, 20]

    def at_once(theta, batch):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gdx.train(at_once, tx, jnp.ones(3), batches, progress=stop)


def pressed_at(fraction):
    """Ctrl-C, in the middle of what waits for a part."""

    def progress(done, least, diverged):
        if done >= fraction:
            signal.raise_signal(signal.SIGINT)

    return progress


def test_a_sweep_in_parts_keeps_what_there_is():
    traced = []

    def counted(*arguments):
        traced.append(1)
        return loss(*arguments)

    made = {"model_state": jax.random.uniform, "keys": KEYS, "evaluate": score, "every": 4, "chunk_size": 4}
    whole = gdx.sweep(loss, GRID, init, batches_of, **made)
    found = gdx.sweep(counted, GRID, init, batches_of, progress=lambda *_: None, **made)
    close(found[1:], whole[1:])
    traced.clear()
    with pytest.warns(UserWarning, match=r"sweep: interrupted after 0\.417 of the steps; what they made is returned"):
        found = gdx.sweep(counted, GRID, init, batches_of, progress=pressed_at(0.4), **made)
    assert not traced  # the programs are found again
    # chunks of members 0, 2, 4 with a copy, and of 1, 3, 5
    assert found.steps.tolist() == [10, 0] * 3 and found.losses.shape == (6, SEEDS, 10)
    is_made = np.arange(10) < np.asarray(found.steps)[:, None, None]
    cut = whole.losses[:, :, :10], whole.aux["logits"][:, :, :10]
    loose(found.losses, np.where(is_made, cut[0], np.nan))
    loose(found.aux["logits"], np.where(is_made[..., None], cut[1], 0))
    params, means, *_ = by_hand(gdx.unstack(GRID)[2], init(KEYS[1]), jax.random.uniform(KEYS[1]), batches_of(KEYS[1]))
    end = jax.tree.map(lambda x: x[int(found.steps[2]) - 1], (params, means))
    close(jax.tree.map(lambda x: x[2, 1], found.final), score(*end))
    assert not found.diverged.any() and np.isnan(found.final["mean"][1]).all()
    assert found.evaluated.step.tolist() == [4, 8] and np.isnan(found.evaluated.value["mean"][1]).all()
    loose(found.evaluated.value["mean"][::2], whole.evaluated.value["mean"][::2, :, :2])
    assert found.final["has weights"][:2, 0].tolist() == [True, False]
    assert set(found.ranking(found.losses[..., 0])) == set(np.flatnonzero(found.steps).tolist())


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_halving_in_parts(chunk_size):
    rates = np.random.default_rng(0).permutation(np.geomspace(1e-3, 0.6, 16)).tolist()
    rates[5] = 1e30
    grid = gdx.grid(gdx.sgd, learning_rate=rates)
    run = functools.partial(gdx.sweep, bowl, grid, jnp.ones(3), jnp.zeros(9), chunk_size=chunk_size, halve=2)
    whole, found = run(), run(progress=lambda *_: None)
    assert_same_bits(tuple(found), tuple(whole))
    with pytest.warns(UserWarning, match="sweep: interrupted"):
        found = run(progress=pressed_at(0.7))
    steps = np.asarray(found.steps)
    assert sorted(steps) == ([3] * 8 + [6] * 4 + [7] * 4 if chunk_size is None else [3] * 10 + [6] * 6)
    assert np.all(steps <= whole.steps)
    is_made = np.arange(found.losses.shape[-1]) < steps[:, None]
    np.testing.assert_array_equal(found.losses, np.where(is_made, whole.losses[:, : found.losses.shape[-1]], np.nan))
    dropped = whole.steps == 3
    np.testing.assert_array_equal(found.final[dropped], whole.final[dropped])
    at_once = lambda theta, batch: signal.raise_signal(signal.SIGINT)  # noqa: E731
    with pytest.raises(KeyboardInterrupt):
        gdx.sweep(at_once, grid, jnp.ones(3), jnp.zeros(9), progress=True)


def test_keys_of_members_without_steps_are_nobodys():
    evaluate = lambda theta: {"key": jax.random.key(7), "theta": theta}  # noqa: E731
    run = functools.partial(gdx.sweep, bowl, GRID, jnp.ones(3), jnp.zeros(9), chunk_size=3, evaluate=evaluate)
    with pytest.warns(UserWarning, match="sweep: interrupted"):
        found = run(progress=pressed_at(0.3))
    words, whole = (np.asarray(jax.random.key_data(x.final["key"])) for x in (found, run()))
    assert found.steps.tolist() == [6, 0] * 3
    np.testing.assert_array_equal(words, np.where(found.steps[:, None] > 0, whole, 0))


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_range_test_that_was_interrupted_suggests_nothing(chunk_size):
    run = functools.partial(gdx.range_test, bowl, gdx.sgd(0.1), jnp.ones(3), jnp.zeros(9), points=4, low=0.1, high=0.2)
    with pytest.raises(KeyboardInterrupt, match=r"range_test: interrupted after 0\.[78]\d* of the steps, which"):
        run(chunk_size=chunk_size, progress=pressed_at(0.7))


def that_writes(model, batch):
    model.seen = nnx.Intermediate(model.norm.mean[...])
    return in_flax(model, batch)


class WithSet(eqx.Module):
    w: jax.Array
    names: set = dataclasses.field(default_factory=set)


MAKERS = {"params": init, "batches": batches_of, "model_state": jax.random.uniform}
ON_HOST = gdx.sharding.offload_state(gdx.sgd(0.1))
REFUSED = {
    "arrays beside a module": (
        lambda: gdx.train(in_flax, gdx.sgd(0.1), [Flax(KEYS[0]), jnp.ones(2)], DATA),
        TypeError,
        r"train: params is .* at \[1\], beside modules of flax nnx, .*; expected modules alone: make it an nnx\.Param",
    ),
    "a state that was not said": (
        lambda: gdx.train(loss, gdx.sgd(0.1), START, DATA),
        TypeError,
        r"expected a function of the parameters and a batch, .* needs train\(\.\.\., model_state=\.\.\.\)",
    ),
    "every alone": (
        lambda: gdx.train(bowl, gdx.sgd(0.1), jnp.ones(3), BATCHES, every=3),
        ValueError,
        "every is 3 without",
    ),
    "every alone in a sweep": (
        lambda: gdx.sweep(bowl, GRID, jnp.ones(3), jnp.zeros(9), every=3),
        ValueError,
        "^sweep: every is 3 without",
    ),
    "a number taken out of what is evaluated": (
        lambda: gdx.train(bowl, gdx.sgd(0.1), jnp.ones(3), jnp.zeros(9), evaluate=lambda theta: float(theta[0])),
        TypeError,
        "^train: evaluate takes numbers out of arrays while it is compiled, .*; expected functions of jax.numpy",
    ),
    "a number taken out of the loss": (
        lambda: gdx.sweep(lambda p, b: bowl(np.asarray(p), b), GRID, jnp.ones(3), jnp.zeros(9)),
        TypeError,
        "^sweep: loss takes numbers out of arrays while it is compiled",
    ),
    "a module with functions, evaluated": (
        lambda: gdx.train(bowl, gdx.sgd(0.1), jnp.ones(3), jnp.zeros(9), evaluate=lambda theta: {"a": [theta, abs]}),
        TypeError,
        r"^train: evaluate returned .* at \['a'\]\[1\]; expected an array or number",
    ),
    "another state": (
        lambda: gdx.train(
            lambda p, s, b: (bowl(p, 0.0), s[None]), gdx.sgd(0.1), jnp.ones(3), BATCHES, model_state=BEGIN
        ),
        TypeError,
        r"was given the model_state \['float32\[\]'\] and returned \['float32\[1\]'\]; expected the same tree",
    ),
    "no state": (
        lambda: gdx.train(lambda p, s, b: bowl(p, 0.0), gdx.sgd(0.1), jnp.ones(3), BATCHES, model_state=BEGIN),
        TypeError,
        r"the loss returned float32\[\]; expected \(a real scalar, model_state\) or",
    ),
    "aux that is no array": (
        lambda: gdx.train(lambda p, b: (bowl(p, 0.0), "a"), gdx.sgd(0.1), jnp.ones(3), BATCHES),
        TypeError,
        "the aux that the loss returned is 'a' at the root; expected arrays",
    ),
    "a loss without state": (
        lambda: gdx.train(lambda p, b: bowl(p, 0.0), gdx.sgd(0.1), jnp.ones(3), BATCHES, model_state=BEGIN),
        TypeError,
        "expected a function of the parameters and the model_state and a batch",
    ),
    "functions without keys": (
        lambda: gdx.sweep(loss, GRID, init, DATA, model_state=BEGIN),
        TypeError,
        "sweep: params is .* at the root; expected arrays, or with keys=",
    ),
    "keys that are none": (
        lambda: gdx.sweep(loss, GRID, init, DATA, model_state=BEGIN, keys=3),
        TypeError,
        r"sweep: keys is 3; expected random keys, one for each seed, such as jax\.random\.split",
    ),
    "variables that appear": (
        lambda: gdx.train(that_writes, gdx.sgd(0.1), Flax(KEYS[0]), DATA),
        TypeError,
        r"train: the loss made or removed \['seen'\].* in the module, as self\.sow .*`return loss, nnx\.pop\(",
    ),
    "variables that appear in a sweep": (
        lambda: gdx.sweep(that_writes, GRID, Flax, DATA, keys=KEYS),
        TypeError,
        r"sweep: the loss made or removed \['seen'\]",
    ),
    "what has no hash": (
        lambda: gdx.sweep(bowl, GRID, WithSet(jnp.ones(3)), BATCHES),
        TypeError,
        r"sweep: params has something without a hash at \.names .*; expected arrays .* by a function of a key",
    ),
    **{
        f"{name} that a function made": (
            lambda name=name: gdx.sweep(loss, GRID, **{**MAKERS, name: lambda key: {"x": "a"}}, keys=KEYS),
            TypeError,
            rf"^sweep: {name} by its function of a key is 'a' at \['x'\]; expected arrays",
        )
        for name in MAKERS
    },
    "a batch of one axis": (
        lambda: gdx.sweep(bowl, gdx.adam(0.1), jnp.ones(3), BATCHES),
        ValueError,
        r"^sweep: adam\.learning_rate has shape \(\); expected a batch",
    ),
    "what a swept loss returned": (
        lambda: gdx.sweep(lambda p, b: p, GRID, jnp.ones(3), BATCHES),
        TypeError,
        r"^sweep: the loss returned float32\[3\]; expected .* is a state of the model: sweep\(\.\.\., model_state=",
    ),
    "too much halving": (
        lambda: gdx.sweep(loss, GRID, START, DATA, model_state=BEGIN, halve=3),
        ValueError,
        "halve is 3 for 6 members and 12 steps; expected at least 8 members and 4 steps",
    ),
    "halving on the host": (
        lambda: gdx.sweep(bowl, gdx.stack([ON_HOST] * 2), jnp.ones(3), jnp.zeros(6), halve=1),
        ValueError,
        "halve is 1 for states in the host's memory, .*; expected halve=0, or optimizers without",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    run, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        run()
