"""Arguments of another kind, shape or place: refused by name, before anything is computed from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gdx
from gdx import curvature, landscape, noise

KEY, ONE, X, TX = jax.random.key(0), jnp.ones(2), [0.0, 1.0], gdx.adam(0.1)


def bowl(p):
    return jnp.sum(p**2)


def loss(p, batch):
    return jnp.mean((p - batch) ** 2)


HESSIAN = curvature.Hessian(loss, ONE, jnp.zeros(1))
DENSITY = curvature.Density(jnp.ones((2, 2)), jnp.ones((2, 2)) / 2)
NOISE = noise.Noise(jnp.array(2.0), jnp.array(100.0))
STATE = TX.update(ONE, TX.init(ONE), ONE)[1]
SHARPNESS = curvature.init_sharpness(ONE, KEY)
AXES = jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])
BATCHES = {"key": KEY, "data": 10, "batch_size": 3}


def product(make):
    return lambda **given: make(**given)(ONE)


def micro_batches(loss, number, params, batch):
    return noise.value_and_grad(loss, number)(params, batch)


CALLS = {
    "landscape.line": (landscape.line, {"measure": bowl, "start": ONE, "end": ONE, "positions": X, "chunk_size": 2}),
    "landscape.plane": (
        landscape.plane,
        {"measure": bowl, "origin": ONE, "directions": AXES, "x": X, "y": X, "chunk_size": 2},
    ),
    "landscape": (landscape.filter_normalised_direction, {"key": KEY, "params": ONE}),
    "landscape.random_rise": (
        landscape.random_rise,
        {
            "loss": bowl,
            "params": ONE,
            "key": KEY,
            "radius": 0.1,
            "direction": landscape.normal_direction,
            "samples": 2,
            "chunk_size": 2,
        },
    ),
    "spectrum_edges": (
        curvature.spectrum_edges,
        {"operator": HESSIAN, "key": KEY, "krylov_size": 2, "rounds": 1, "tolerance": 0.1, "progress": print},
    ),
    "spectral_density": (
        curvature.spectral_density,
        {"operator": HESSIAN, "key": KEY, "krylov_size": 2, "probes": 1, "progress": print},
    ),
    "trace": (curvature.trace, {"operator": HESSIAN, "key": KEY, "samples": 1, "progress": print}),
    "Hessian": (product(curvature.Hessian), {"loss": loss, "params": ONE, "batches": jnp.zeros(1)}),
    "GaussNewton": (
        product(curvature.GaussNewton),
        {"outputs": loss, "loss": loss, "params": ONE, "batches": jnp.zeros(1)},
    ),
    "Preconditioned": (product(curvature.Preconditioned), {"operator": HESSIAN, "scale": ONE}),
    "adam_preconditioned": (curvature.adam_preconditioned, {"operator": HESSIAN, "tx": TX, "state": STATE}),
    "best_learning_rate": (
        curvature.best_learning_rate,
        {"smallest": 1.0, "largest": 9.0, "optimizer": gdx.momentum},
    ),
    "stability_edge": (curvature.stability_edge, {"tx": TX}),
    "init_sharpness": (curvature.init_sharpness, {"params": ONE, "key": KEY}),
    "update_sharpness": (curvature.update_sharpness, {"state": SHARPNESS, "operator": HESSIAN, "products": 2}),
    "Density.at": (DENSITY.at, {"points": X, "width": 0.1}),
    "noise.epochs": (noise.epochs, {**BATCHES, "number": 2}),
    "noise.padded_epochs": (noise.padded_epochs, {**BATCHES, "number": 2}),
    "noise.with_replacement": (noise.with_replacement, {**BATCHES, "steps": 2}),
    "noise.take": (noise.take, {"data": jnp.arange(9.0), "examples": jnp.array([1, 2])}),
    "noise.estimate": (noise.estimate, {"small": 4.0, "big": 1.0, "small_batch": 2, "big_batch": 32}),
    "noise.of_gradients": (noise.of_gradients, {"gradients": jnp.ones((3, 2)), "batch_size": 1}),
    "noise.value_and_grad": (micro_batches, {"loss": loss, "number": 2, "params": ONE, "batch": jnp.ones((4, 2))}),
    "noise.Noise.variance": (NOISE.variance, {"batch_size": 10, "examples": 100}),
    "noise.Noise.within": (NOISE.within, {"examples": 100}),
    "measure_noise": (noise.measure_noise, {"decay": 0.9}),
    "stack": (gdx.stack, {"optimizers": [TX]}),
    "labels": (gdx.labels, {"batch": gdx.stack([TX, TX])}),
    "unstack": (gdx.unstack, {"batch": gdx.stack([TX, TX])}),
}


@pytest.mark.parametrize("name", CALLS)
def test_another_kind_is_refused_by_name(name):
    call, given = CALLS[name]
    for argument in given:
        for wrong in ("a", object(), {"a": "b"}):
            with pytest.raises(
                (TypeError, ValueError), match=rf"(?s)^{name}.*; expected .|^{name}.*, expected .|pass "
            ):
                call(**{**given, argument: wrong})


SILENT = {
    "landscape.line": [{"start": np.arange(2), "end": np.arange(2)}, {"positions": [0.5j]}, {"chunk_size": 2.5}],
    "landscape.plane": [{"origin": np.arange(2)}, {"directions": AXES[:1]}, {"directions": [*AXES, ONE]}, {"x": [1j]}],
    "landscape": [{"params": np.arange(2)}, {"params": True}, {"key": jax.random.split(KEY)}, {"key": 1}],
    "landscape.random_rise": [
        {"params": np.arange(2)},
        {"loss": lambda p: p},
        {"loss": lambda p: jax.lax.complex(jnp.sum(p), jnp.sum(p))},
        {"radius": True},
        {"radius": np.inf},
        {"samples": 2.5},
        {"params": KEY, "key": ONE},
    ],
    "spectrum_edges": [{"tolerance": np.nan}, {"tolerance": np.inf}, {"operator": KEY, "key": HESSIAN}],
    "adam_preconditioned": [{"operator": None}, {"operator": ONE}],
    "Preconditioned": [{"scale": jnp.ones(3)}, {"scale": [ONE]}, {"scale": jnp.ones(())}],
    "best_learning_rate": [{"smallest": True}, {"largest": ONE}, {"smallest": np.nan}],
    "init_sharpness": [{"params": np.arange(2)}, {"params": ()}, {"params": KEY, "key": ONE}],
    "Density.at": [{"width": -1.0}, {"width": 0}, {"width": np.nan}, {"points": 1.0}, {"points": []}, {"points": [1j]}],
    "noise.take": [{"examples": x} for x in (None, True, 2.5, jnp.ones(3), np.ones(9, bool))],
    "noise.estimate": [{"small": 1j}, {"big": True}, {"small_batch": np.nan}, {"small_batch": 32, "big_batch": 2}],
    "noise.of_gradients": [{"gradients": np.ones((3, 2), int)}, {"batch_size": np.nan}, {"batch_size": True}],
    "noise.Noise.variance": [{"batch_size": np.nan}, {"examples": np.nan}, {"batch_size": True}],
    "noise.Noise.within": [{"examples": np.nan}, {"examples": True}],
}


@pytest.mark.parametrize("name", SILENT)
def test_what_gave_a_wrong_result_is_refused_by_name(name):
    call, given = CALLS[name]
    for wrong in SILENT[name]:
        with pytest.raises((TypeError, ValueError), match=rf"(?s)^{name}.*(expected|pass) ."):
            call(**{**given, **wrong})
