"""Best rates and edges as numbers; that they are best and edges is shown in tests/test_theory.py."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from gdx.curvature import best_learning_rate, stability_edge

OPTIMIZERS = [gdx.gradient_descent, gdx.momentum, gdx.nesterov]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_equal_eigenvalues_need_one_step(optimizer):
    best = best_learning_rate(4.0, 4.0, optimizer)
    np.testing.assert_allclose(best, [0.25, 0, 0, 1], atol=1e-7)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("smallest", [0.0, -2.0])
def test_without_a_minimum_no_formula_applies(optimizer, smallest):
    best = best_learning_rate(smallest, 8.0, optimizer)
    assert not best.convex and best.momentum == 0
    np.testing.assert_allclose([best.learning_rate, best.contraction], [1 / 8, 1 - smallest / 8])


@pytest.mark.parametrize(("smallest", "largest"), [(-3.0, -1.0), (0.0, 0.0), (2.0, 1.0), (1.0, np.nan)])
def test_no_direction_of_positive_curvature(smallest, largest):
    with pytest.raises(ValueError, match="expected smallest <= largest and largest > 0"):
        best_learning_rate(smallest, largest)


def test_traced_it_is_the_same_and_nan_for_an_error():
    inside = jax.jit(lambda a, b: best_learning_rate(a, b, gdx.nesterov))
    np.testing.assert_allclose(inside(1.0, 9.0), best_learning_rate(1.0, 9.0, gdx.nesterov), rtol=1e-6)
    assert np.isnan(inside(-3.0, -1.0).learning_rate) and np.isnan(inside(-3.0, -1.0).contraction)


def test_another_optimizer_has_no_best_rate():
    with pytest.raises(TypeError, match=r"expected gdx\.gradient_descent, gdx\.momentum or gdx\.nesterov"):
        best_learning_rate(1.0, 2.0, gdx.adam)


def test_adams_edge_is_38_over_the_rate():
    for tx in (gdx.adam(1e-2), gdx.adamw(1e-2), gdx.adam(1e-2, b2=0.99, eps=1.0)):
        np.testing.assert_allclose(stability_edge(tx), 3800, rtol=1e-6)
    np.testing.assert_allclose(stability_edge(gdx.adam(jnp.float32(1e-2), b1=0.0)), 200, rtol=1e-6)


@pytest.mark.parametrize("tx", [gdx.scale_by_adam(), optax.sgd(0.1), gdx.sgd(optax.constant_schedule(0.1))])
def test_what_has_no_edge(tx):
    with pytest.raises(
        TypeError, match=r"stability_edge: tx is .*(expected an optimizer of gdx|replace its schedules)"
    ):
        stability_edge(tx)


@pytest.mark.parametrize("optimizer", [gdx.gradient_descent, gdx.momentum, gdx.nesterov])
@pytest.mark.parametrize("ends", [(9.0, 1.0), (-2.0, -1.0)])
def test_what_is_no_spectrum_is_nan_where_it_is_traced(optimizer, ends):
    best = jax.jit(lambda low, high: best_learning_rate(low, high, optimizer))(*ends)
    assert np.isnan([best.learning_rate, best.momentum, best.contraction]).all() and not best.convex
