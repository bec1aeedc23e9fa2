"""The six optimizers against their formulas, their own other forms, and torch."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from gdx.compat import contracts_all, enable_x64
from tests import oracle
from tests.contract.table import history

ADAM = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}
CASES = [
    (gdx.gradient_descent, {"learning_rate": 0.1}),
    (gdx.sgd, {"learning_rate": 0.1}),
    (gdx.sgd, {"learning_rate": 0.1, "momentum": 0.9}),
    (gdx.sgd, {"learning_rate": 0.03, "momentum": 0.5, "nesterov": True}),
    (gdx.momentum, {"learning_rate": 0.1, "momentum": 0.9}),
    (gdx.nesterov, {"learning_rate": 0.1, "momentum": 0.9}),
    (gdx.adam, {"learning_rate": 1e-2, **ADAM}),
    (gdx.adam, {"learning_rate": 1e-2, **ADAM, "b2": 0.99999}),
    (gdx.adam, {"learning_rate": 1e-2, "b1": 0.0, "b2": 0.0, "eps": 1e-3, "eps_root": 1e-6}),
    (gdx.adam, {"learning_rate": 1e-2, **ADAM, "nesterov": True}),
    (gdx.adamw, {"learning_rate": 1e-2, **ADAM, "weight_decay": 0.1}),
    (gdx.adamw, {"learning_rate": 1e-2, **ADAM, "weight_decay": 0.1, "nesterov": True}),
    (gdx.adamw, {"learning_rate": 1e-2, **ADAM, "weight_decay": 1e-2, "schedule_multiplier": 0.5}),
]
IDS = [f"{factory.__name__}-{i}" for i, (factory, _) in enumerate(CASES)]
THETA = np.array([1.0, -2.0, 3.0, 0.5, 1e-3, -1.0, 0.25, 2.0])


def linear(count):
    """A schedule that any hyperparameter can follow: from 1 to 1/2 over 1,000 steps, exactly in float32."""
    return 1 - count * (1 / 2048)


@pytest.mark.parametrize(("factory", "settings"), CASES, ids=IDS)
def test_float64_matches_the_oracle(factory, settings):
    gradients = oracle.gradients(1000)
    expected = np.stack(list(oracle.trajectory(getattr(oracle, factory.__name__), THETA, gradients, **settings)))
    with enable_x64(True):
        found = np.asarray(history(factory(**settings), jnp.asarray(THETA), jnp.asarray(gradients)))
    np.testing.assert_allclose(found, expected.astype(float), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("factory", "settings"), CASES, ids=IDS)
def test_float32_stays_within_the_rounding_bound(factory, settings):
    """The bound is that of `oracle.Rounded`: every operation rounded once, errors adding up at their worst."""
    gradients = oracle.gradients(1000).astype(np.float32)
    rounded = {k: v if isinstance(v, bool) else np.float32(v) for k, v in settings.items()}
    step, theta = getattr(oracle, factory.__name__), THETA.astype(np.float32)
    bounded = list(oracle.trajectory(step, theta, gradients, oracle.Rounded, **rounded))
    found = np.asarray(history(factory(**settings), jnp.asarray(theta), jnp.asarray(gradients)))
    error, bound = abs(found - np.stack([b.value for b in bounded])), np.stack([b.error for b in bounded])
    assert np.all(error <= bound)
    # and the bound says something: it is small beside the way travelled
    travelled = np.cumsum(abs(np.diff(found, axis=0, prepend=theta[None])), axis=0) + abs(theta)
    assert np.median(bound / travelled) < 2e-3


@pytest.mark.parametrize(
    "kind", ["learning_rate", "momentum", "weight_decay", "b1", "b2", "eps", "schedule_multiplier"]
)
def test_schedules_match_the_oracle(kind):
    factory, settings = {
        "momentum": (gdx.momentum, {"learning_rate": 0.1, "momentum": 0.9}),
    }.get(kind, (gdx.adamw, {"learning_rate": 1e-2, **ADAM, "weight_decay": 0.1, "schedule_multiplier": None}))
    base = settings[kind] or 1.0
    settings = {**settings, kind: lambda count: base * linear(count)}
    gradients = oracle.gradients(200)
    expected = np.stack(list(oracle.trajectory(getattr(oracle, factory.__name__), THETA, gradients, **settings)))
    with enable_x64(True):
        found = history(factory(**settings), jnp.asarray(THETA), jnp.asarray(gradients))
    np.testing.assert_allclose(np.asarray(found), expected.astype(float), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("inside", "nesterov"), [(gdx.momentum, False), (gdx.nesterov, True)])
def test_the_rate_inside_the_velocity_differs_from_sgd_only_under_a_schedule(inside, nesterov):
    gradients = jnp.asarray(oracle.gradients(50).astype(np.float32))
    theta = jnp.asarray(THETA.astype(np.float32))

    def both(learning_rate):
        outside = gdx.sgd(learning_rate, momentum=0.9, nesterov=nesterov)
        return history(inside(learning_rate, 0.9), theta, gradients), history(outside, theta, gradients)

    np.testing.assert_allclose(*both(0.125), rtol=2e-5, atol=1e-6)
    found, other = both(lambda count: 0.125 * linear(16 * count))
    assert np.max(abs(found - other)[:, 1]) > 0.1


def test_nesterov_is_the_textbook_method_at_its_look_ahead_point():
    """phi <- phi + v, v <- mu v - eta grad L(phi + mu v), on a quadratic whose gradient is known."""
    eta, mu, curvature = 0.05, 0.9, np.array([1.0, 5.0, 20.0])
    phi, v, look_ahead = np.ones(3), np.zeros(3), []
    for _ in range(100):
        look_ahead.append(phi + mu * v)
        v = mu * v - eta * curvature * (phi + mu * v)
        phi = phi + v
    with enable_x64(True):
        tx, theta = gdx.nesterov(eta, mu), jnp.ones(3)
        state, found = tx.init(theta), []
        for _ in range(100):
            found.append(np.asarray(theta))
            updates, state = tx.update(curvature * theta, state)
            theta = optax.apply_updates(theta, updates)
    np.testing.assert_allclose(found, look_ahead, rtol=1e-12, atol=1e-14)


def test_adamw_decays_the_parameters_and_not_the_gradient():
    tx = gdx.adamw(0.1, weight_decay=0.5)
    params = {"w": jnp.full(3, 4.0), "b": jnp.full(3, 2.0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    np.testing.assert_allclose(updates["w"], -0.1 * 0.5 * 4.0, rtol=1e-6)
    for mask in ({"w": True, "b": False}, lambda params: jax.tree.map(lambda p: np.bool_(p[0] > 2), params)):
        masked = tx.replace(mask=mask)
        updates, _ = masked.update(zeros, masked.init(params), params)
        assert np.all(np.asarray(updates["w"]) != 0)
        assert np.all(np.asarray(updates["b"]) == 0)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_moving_over_from_optax_is_an_import_change(name):
    """Same keywords, same state, same trajectory to within rounding."""
    settings = {"sgd": {"momentum": 0.9, "nesterov": True}}.get(name, {"b1": 0.8, "eps_root": 1e-9, "nesterov": True})
    ours, theirs = getattr(gdx, name)(1e-2, **settings), getattr(optax, name)(1e-2, **settings)
    theta = jnp.asarray(THETA.astype(np.float32))
    assert jax.tree.structure(ours.init(theta)) == jax.tree.structure(theirs.init(theta))
    gradients = jnp.asarray(np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32))
    with jax.numpy_dtype_promotion("standard"):  # optax.adam multiplies by its integer count
        expected = history(theirs, theta, gradients)
    np.testing.assert_allclose(history(ours, theta, gradients), expected, rtol=1e-4, atol=1e-5)


def test_sgd_refuses_nesterov_without_momentum():
    with pytest.raises(ValueError, match=r"sgd: nesterov=True needs momentum"):
        gdx.sgd(0.1, nesterov=True)
    with pytest.raises(ValueError, match=r"sgd: nesterov=True needs momentum"):
        gdx.sgd(0.1).replace(nesterov=True)


TORCH = np.load(Path(__file__).parent / "golden" / "torch.npz", allow_pickle=False)


@pytest.mark.parametrize("case", json.loads(str(TORCH["cases"])), ids=lambda case: case["name"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-10), ("float32", 5e-5)])
def test_matches_torch(case, dtype, tolerance):
    """tests/golden/make_torch.py wrote these trajectories; torch's own 1 - b^t loses digits, hence the tolerances."""
    options = dict(case["arguments"])
    settings = {"learning_rate": options.pop("lr")}
    if "betas" in options:
        settings["b1"], settings["b2"] = options.pop("betas")
    if case["optimizer"] == "AdamW":
        settings["weight_decay"] = 0.01
    factory = {"SGD": gdx.sgd, "Adam": gdx.adam, "AdamW": gdx.adamw}[case["optimizer"]]
    with enable_x64(dtype == "float64"):
        start, gradients = (jnp.asarray(TORCH[key].astype(dtype)) for key in ("start", "gradients"))
        found = np.asarray(history(factory(**{**settings, **options}), start, gradients))
    expected = TORCH[f"{case['name']}/{dtype}"]
    np.testing.assert_allclose(found[TORCH["steps"] - 1], expected, rtol=tolerance, atol=tolerance)


def test_the_bits_are_those_of_the_first_version():
    from tests.golden.make_bits import trajectories

    name = "bits_contracted.npz" if contracts_all() else "bits_separate.npz"
    golden = np.load(Path(__file__).parent / "golden" / name)
    found = trajectories()
    assert found.keys() == {*golden}
    different = {name: int(np.sum(found[name].view("u4") != golden[name].view("u4"))) for name in golden}
    assert not any(different.values()), different
