"""The compiled training loop: one compilation per run, the right steps, the same numbers again."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from gdx.compat import unregister_event_duration_listener
from gdx.demo import problems
from gdx.demo.loop import Report, batches, train


@pytest.fixture(scope="module")
def digits() -> problems.Problem:
    pytest.importorskip("sklearn")
    return problems.digits()


@pytest.fixture
def compiled() -> list[str]:
    """The functions that XLA compiles during the test."""
    names: list[str] = []

    def listen(event: str, seconds: float, **kwargs: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(kwargs.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    unregister_event_duration_listener(listen)


def last(reports: list[Report]) -> Report:
    return reports[-1]


def test_the_best_optimizer_reads_digits(digits):
    tx = problems.OPTIMIZERS["digits"]["adamw"]
    report = last(list(train(digits, tx, steps=problems.STEPS["digits"], batch_size=problems.BATCH_SIZE, seed=0)))
    assert report.metrics["accuracy"] >= 0.97
    assert report.step == problems.STEPS["digits"] and report.compilations == 1


def test_the_split_is_stratified_and_fixed(digits):
    (images, _), (test_images, test_labels) = digits.train, digits.test
    assert images.shape == (problems.TRAINING_IMAGES, 64) and test_images.shape == (360, 64)
    assert images.dtype == jnp.float32 and float(images.max()) == 1.0
    assert np.bincount(np.asarray(test_labels)).min() >= 34
    np.testing.assert_array_equal(problems.digits().test[1], test_labels)
    assert len(np.unique(np.concatenate([images, test_images]), axis=0)) == 1797


@pytest.mark.parametrize("steps", [1, 59, 60, 61, 127])
def test_takes_exactly_the_steps_asked_for_in_one_compilation(steps, compiled):
    problem, tx = problems.plane("quadratic"), gdx.momentum(0.03)
    reports = list(train(problem, tx, steps=steps, batch_size=0, seed=0))
    assert reports[0].step == 0 and last(reports).step == steps
    assert last(reports).compilations == 1
    assert sum("advance" in name for name in compiled) == 1

    point = problem.start(jax.random.key(0))
    state = tx.init(point)
    points = []
    for _ in range(steps):
        updates, state = tx.update(jax.grad(problems.quadratic)(point), state, point)
        point = optax.apply_updates(point, updates)
        points.append(point)
    walk = np.concatenate([report.points for report in reports])
    np.testing.assert_allclose(walk, np.stack(points), rtol=1e-4, atol=1e-6)


def test_the_same_seed_gives_the_same_numbers(digits):
    def metrics(seed: int) -> list[dict[str, float]]:
        return [r.metrics for r in train(digits, gdx.adam(1e-3), steps=20, batch_size=32, seed=seed)]

    first = metrics(1)
    assert metrics(1) == first
    assert metrics(2) != first


def test_a_run_that_diverges_ends_there():
    reports = list(train(problems.plane("rosenbrock"), gdx.gradient_descent(1.0), steps=600, batch_size=0, seed=0))
    assert last(reports).diverged and last(reports).step < 600
    assert not any(report.diverged for report in reports[:-1])


@pytest.mark.parametrize("data", problems.SURFACES)
@pytest.mark.parametrize("name", problems.OPTIMIZERS["quadratic"])
def test_every_optimizer_descends_each_surface(data, name):
    tx = problems.OPTIMIZERS[data][name]
    reports = list(train(problems.plane(data), tx, steps=problems.STEPS[data], batch_size=0, seed=0))
    assert last(reports).metrics["distance"] < 0.6
    assert last(reports).metrics["loss"] < 1e-2 * reports[0].metrics["loss"]


def test_batches_pass_over_all_examples():
    stream = batches(10, 5, np.random.default_rng(0))
    first, second = ([next(stream), next(stream)] for _ in range(2))
    assert sorted(np.concatenate(first)) == sorted(np.concatenate(second)) == list(range(10))
    assert not np.array_equal(first, second)
    assert next(batches(10, 10, np.random.default_rng(0))).shape == (10,)
    assert next(batches(0, 0, np.random.default_rng(0))).shape == (0,)
