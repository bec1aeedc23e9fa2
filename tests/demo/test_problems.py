"""What the demo minimises, and its training runs: the right steps, the same numbers again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("sklearn")

import gdx
from gdx.demo import problems
from gdx.demo.command import train


@pytest.fixture(scope="module")
def digits() -> problems.Problem:
    return problems.digits()


def reports(problem: problems.Problem, tx: gdx.Transform, steps: int, size: int = 64, seed: int = 0) -> list:
    return list(train(problem, tx, steps, size, seed))


def test_the_best_optimizer_reads_digits(digits):
    step, _, metrics = reports(digits, problems.OPTIMIZERS["digits"]["adamw"], problems.STEPS["digits"])[-1]
    assert metrics["accuracy"] >= 0.97 and step == problems.STEPS["digits"]


def test_the_split_is_stratified_and_fixed(digits):
    (images, _), (test_images, test_labels) = digits.train, digits.test
    assert images.shape == (1437, 64) and test_images.shape == (360, 64)
    assert images.dtype == jnp.float32 and float(images.max()) == 1.0
    assert np.bincount(np.asarray(test_labels)).min() >= 34
    np.testing.assert_array_equal(problems.digits().test[1], test_labels)
    assert len(np.unique(np.concatenate([images, test_images]), axis=0)) == 1797


@pytest.mark.parametrize("steps", [1, 121, 127])
def test_takes_exactly_the_steps_asked_for_(steps, digits):
    found = reports(digits, gdx.adam(1e-3), steps, 32, seed=1)
    (first, *_), *_, (last, params, _) = found
    assert (first, last, len(found)) == (0, steps, min(steps, 60) + 1)
    start = digits.start(jax.random.key(1))
    expected = gdx.train(digits.loss_on, gdx.adam(1e-3), start, digits.batches(1, steps, 32)).params
    for x, y in zip(jax.tree.leaves(params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


def test_a_walk_on_the_plane_has_every_point():
    found = reports(problems.load("quadratic"), gdx.gradient_descent(0.1), 3)
    np.testing.assert_allclose(
        [params for _, params, _ in found], [(-4, 2), (-3.6, 0), (-3.24, 0), (-2.916, 0)], atol=1e-6
    )


def test_the_same_seed_gives_the_same_numbers(digits):
    first, again, other = ([metrics for *_, metrics in reports(digits, gdx.adam(1e-3), 20, seed=s)] for s in (1, 1, 2))
    assert first == again and first != other


def test_a_run_that_diverges_ends_there():
    found = reports(problems.load("rosenbrock"), gdx.gradient_descent(1.0), 600)
    assert found[-1][0] < 600
    assert [bool(np.isfinite(metrics["loss"])) for *_, metrics in found] == [True] * (len(found) - 1) + [False]


@pytest.mark.parametrize("data", problems.SURFACES)
@pytest.mark.parametrize("name", problems.OPTIMIZERS["quadratic"])
def test_every_optimizer_descends_each_surface(data, name):
    found = reports(problems.load(data), problems.OPTIMIZERS[data][name], problems.STEPS[data])
    (*_, first), *_, (*_, last) = found
    assert last["distance"] < 0.6
    assert last["loss"] < 1e-2 * first["loss"]


def test_batches_are_epochs(digits):
    first, second = np.asarray(digits.batches(0, 44)).reshape(2, 22, 64)
    for epoch in (first, second):
        assert len(np.unique(epoch)) == epoch.size
    assert not np.array_equal(first, second)
    assert digits.batches(0, 45, 1437).shape == (45, 1437)
