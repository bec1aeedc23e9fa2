"""Promise 12: parameters may be any pytree of floating-point arrays."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

import gdx
from tests.contract.table import every_row, one_step

SHAPES = [(), (1,), (3,), (0,), (2, 0), (2, 3), (1, 2, 1)]
leaves = st.builds(lambda shape: np.full(shape, 0.5, np.float32), st.sampled_from(SHAPES))
trees = st.recursive(
    leaves | st.none(),
    lambda children: (
        st.lists(children, max_size=3)
        | st.tuples(children, children)
        | st.dictionaries(st.sampled_from("abc"), children, max_size=3)
        | st.builds(lambda a, b: Pair(a, b), children, children)
    ),
    max_leaves=6,
)


class Pair(NamedTuple):
    first: Any
    second: Any


class Module(eqx.Module):
    weight: jax.Array
    inner: Any
    name: str = eqx.field(static=True, default="module")


def check(tx, params):
    state = tx.init(params)
    new_params, new_state = one_step(tx, params, state, jax.tree.map(lambda p: p + 1, params))
    assert jax.tree.structure(new_params) == jax.tree.structure(params)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)
    for old, new in zip(jax.tree.leaves(params), jax.tree.leaves(new_params)):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
        assert not old.size or np.any(old != new)


@every_row
@hypothesis_settings(max_examples=12)
@given(params=trees)
def test_drawn_trees(row, params):
    check(row.tx, params)


NAMED = {
    "a leaf": jnp.ones(3),
    "nothing": None,
    "an empty tree": {"a": {}, "b": []},
    "an equinox module": Module(jnp.ones(2), {"x": Module(jnp.ones(()), None)}),
    "an equinox network": eqx.filter(eqx.nn.MLP(2, 1, 4, 1, key=jax.random.key(0)), eqx.is_inexact_array),
    "an nnx state": nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param),
    "complex numbers": {"z": jnp.array([1 + 2j, 3 - 1j], jnp.complex64), "x": jnp.ones(2)},
    "several dtypes": {"a": jnp.ones(2, "bfloat16"), "b": jnp.ones(2, "float16"), "c": jnp.ones(2)},
}


@every_row
@pytest.mark.parametrize("name", NAMED)
def test_named_trees(row, name):
    check(row.tx, NAMED[name])


@every_row
def test_python_floats_count_as_scalars(row):
    params, _ = one_step(row.tx, {"a": 1.0}, row.tx.init({"a": 1.0}), {"a": 0.5})
    assert params["a"].shape == ()


@every_row
def test_a_leaf_of_more_than_two_to_the_31_elements(row):
    huge = jax.ShapeDtypeStruct((2**31 + 16,), np.float32)
    shapes = jax.eval_shape(lambda p: one_step(row.tx, p, row.tx.init(p), p), huge)
    assert shapes[0].shape == huge.shape
    assert all(leaf.shape in ((), huge.shape) for leaf in jax.tree.leaves(shapes))


def test_complex_parameters_follow_optax():
    """The second moment is that of |g|^2: a complex number is scaled, not turned."""
    g = jnp.array([3 + 4j, -1j], jnp.complex64)
    tx = gdx.scale_by_adam(eps=0.0)
    state = tx.init(g)
    updates, state = tx.update(g, state)
    np.testing.assert_allclose(updates, np.asarray(g) / abs(np.asarray(g)), rtol=1e-6)
    np.testing.assert_allclose(state.nu, 0.001 * abs(np.asarray(g)) ** 2, rtol=1e-4)
    assert state.nu.dtype == np.float32
