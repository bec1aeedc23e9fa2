"""Leafwise: what a link gets from giving its formula for one leaf."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx


class Trail(NamedTuple):
    count: jax.Array
    last: dict


class add_last(gdx.Leafwise):
    """Adds the last gradient, weighted; keeps what it was given to look at."""

    State: ClassVar = Trail
    weight: gdx.Scalar = gdx.hyperparameter(default=0.5)
    seen: ClassVar[list] = []

    def start(self, p):
        return (gdx.storage.moment_like(p),)

    def shared(self, count):
        return count

    def step(self, count, g, p, last):
        self.seen.append((count.dtype, g.dtype, None if p is None else p.dtype, last.dtype, self.weight.dtype))
        return g + self.weight * last, g


class doubled(add_last):
    """Overrides the step, which a chain must respect."""

    def step(self, count, g, p, last):
        u, last = super().step(count, g, p, last)
        return 2 * u, last


@pytest.fixture(autouse=True)
def _forget():
    add_last.seen.clear()


def test_start_step_and_state():
    tx, params = add_last(), {"a": jnp.zeros(2), "b": jnp.zeros(())}
    state = tx.init(params)
    assert isinstance(state, Trail)
    for expected in (1.0, 1.5):
        updates, state = tx.update({"a": jnp.ones(2), "b": jnp.ones(())}, state)
        np.testing.assert_array_equal(updates["a"], expected)
    assert state.count == 2


@pytest.mark.parametrize(
    ("leaf", "computed"), [("bfloat16", "float32"), ("float32", "float32"), ("complex64", "complex64")]
)
def test_everything_comes_in_one_dtype(leaf, computed):
    params = jnp.ones(3, leaf)
    tx = add_last()
    tx.update(params, tx.init(params), params)
    real = np.finfo(computed).dtype
    assert add_last.seen == [(real, jnp.dtype(computed), jnp.dtype(computed), jnp.dtype(computed), real)]


def test_each_shape_is_traced_once():
    tx = gdx.chain(add_last(0.25), gdx.scale_by_learning_rate(0.1))
    params = [jnp.ones(3)] * 50 + [jnp.ones(4)] * 50
    for rate in (0.1, 0.2):
        jax.jit(tx.replace(learning_rate=rate).update).lower(params, tx.init(params), params)
    assert len(add_last.seen) == 2


def test_a_chain_respects_an_overridden_step():
    g = jnp.ones(2)
    for tx, expected in ((add_last(), -1.0), (doubled(), -2.0)):
        chained = gdx.chain(tx, gdx.scale_by_learning_rate(1.0))
        updates, _ = chained.update(g, chained.init(g))
        np.testing.assert_array_equal(updates, expected)


def test_a_masked_state_is_optaxs_with_moments_and_a_schedule_too():
    class masked(gdx.scale_by_momentum):
        mask: object = gdx.static(default=True)

    tx, g = masked(lambda count: 0.5), jnp.ones(2)
    state = tx.init(g)
    assert state == optax.MaskedState(gdx.CountedState(0, optax.TraceState(state.inner_state.inner_state.trace)))
    _, after = tx.update(g, tx.update(g, state, g)[1], g)
    assert after.inner_state.count == 2
    np.testing.assert_array_equal(after.inner_state.inner_state.trace, 1.5)
    with pytest.raises(TypeError, match=r"the state is a CountedState, expected MaskedState\(inner_state\)"):
        tx.update(g, state.inner_state)
    with pytest.raises(ValueError, match="masked: update needs the parameters"):
        tx.update(g, state)
    tx, pair = masked(0.5, mask=[True, False]), [g, g]
    _, after = tx.update(pair, tx.init(pair), pair)
    assert [u.tolist() for u in tx.update(pair, after, pair)[0]] == [[1.5, 1.5], [1.0, 1.0]]


def test_one_call_per_leaf_gives_the_bits_of_separate_links():
    links = (gdx.scale_by_adam(), gdx.add_decoupled_weight_decay(0.1), gdx.scale_by_learning_rate(0.1))
    params = {"w": jnp.linspace(-1, 1, 6), "b": jnp.ones(3)}
    fused, separate = gdx.chain(*links), optax.chain(*links)

    def run(tx):
        return jax.jit(lambda p: tx.update(p, tx.init(p), p)[0])(params)

    for a, b in zip(jax.tree.leaves(run(fused)), jax.tree.leaves(run(separate)), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def test_a_chain_rounds_to_the_gradients_dtype_once():
    """Decay of a ten-thousandth of the direction survives beside it, also through a chain in a chain."""
    params, g = jnp.full(3, 1.0, jnp.bfloat16), jnp.full(3, 1.0, jnp.bfloat16)
    inner = gdx.chain(gdx.add_decoupled_weight_decay(1e-4), gdx.scale_by_learning_rate(1.0, flip_sign=False))
    tx = gdx.chain(gdx.chain(inner), subtract_one())
    state = tx.init(params)
    updates, after = tx.update(g, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    np.testing.assert_allclose(np.asarray(updates, np.float32), 1e-4, rtol=1e-2)


class subtract_one(gdx.Leafwise):
    def step(self, shared, g, p):
        return (g - 1,)


class Moment(NamedTuple):
    moment: dict


def link(step, start=lambda self, p: (jnp.zeros_like(p),), **more):
    body = {"State": Moment, "start": start, "step": step, **more}
    return type("mine", (gdx.Leafwise,), body)()


IN_TWO = {"accumulate": lambda self, shared, g, p, m: (g,), "direction": lambda self, shared, g, p, m: m}


def in_few_bits(**parts):
    return link(
        gdx.Leafwise.step,
        **{**IN_TWO, **parts},
        start=lambda self, p: (gdx.storage.moment_like(p, "bfloat16"),),
        formats=property(lambda self: (np.dtype("bfloat16"),)),
    )


RETURNS = {
    "an array for a tuple": (lambda: link(lambda self, shared, g, p, m: g), r"step returned no tuple but float32\[3\]"),
    "no moment": (
        lambda: link(lambda self, shared, g, p, m: (g,)),
        r"step returned a tuple of 1, .* expected a tuple of 2",
    ),
    "a moment too many": (lambda: link(lambda self, shared, g, p, m: (g, m, m)), r"step returned a tuple of 3"),
    "a mean for an update": (
        lambda: link(lambda self, shared, g, p, m: (jnp.mean(g), m)),
        r"step returned a tuple of 2, in the shapes \(\), \(3,\); expected a tuple of 2, in the shapes",
    ),
    "a mean for a moment": (
        lambda: link(lambda self, shared, g, p, m: (g, jnp.mean(m))),
        r"step returned a tuple of 2, in the shapes \(3,\), \(\); expected",
    ),
    "one moment for three": (
        lambda: link(lambda self, shared, g, p, m: (g, m[None])),
        r"step returned .*\(1, 3\); exp",
    ),
    "no tuple at the start": (
        lambda: link(lambda self, shared, g, p, m: (g, m), lambda self, p: jnp.zeros_like(p)),
        r"start returned no tuple but float32\[3\]; expected a tuple of 1, in the shapes \(3,\): the moments of State",
    ),
    "two at the start": (
        lambda: link(lambda self, shared, g, p, m: (g, m), lambda self, p: (p, p)),
        r"start returned a tuple of 2",
    ),
    "none at the start": (
        lambda: link(lambda self, shared, g, p, m: (g, m), lambda self, p: ()),
        r"start returned a tuple of 0, in the shapes of nothing; expected a tuple of 1",
    ),
    "a start without a State": (
        lambda: link(lambda self, shared, g, p, m: (g, m), State=optax.EmptyState),
        r"start returned a tuple of 1, .*; expected a tuple of 0: the moments of State, EmptyState",
    ),
    "a State that is none": (lambda: link(None, State=dict), r"State is <class 'dict'>; expected a NamedTuple"),
    "few bits of another shape": (
        lambda: in_few_bits(accumulate=lambda self, shared, g, p, m: (jnp.mean(g),)),
        r"accumulate returned a tuple of 1, in the shapes \(\); expected",
    ),
    "a mean of few bits": (
        lambda: in_few_bits(direction=lambda self, shared, g, p, m: jnp.mean(m)),
        r"direction returned a tuple of 1, in the shapes \(\); expected",
    ),
}


@pytest.mark.parametrize("case", RETURNS)
def test_what_a_link_of_ones_own_returns_is_checked(case):
    make, words = RETURNS[case]

    def step():
        tx = make()
        return tx.update(jnp.ones(3), tx.init(jnp.ones(3)), jnp.ones(3))

    with pytest.raises(TypeError, match=rf"^mine: {words}"):
        step()


class Velocity(gdx.Leafwise):
    """A link with one moment, in which subclasses go wrong."""

    State: ClassVar = optax.TraceState
    formats: ClassVar = ()

    def start(self, p):
        return (jnp.zeros_like(p),)

    def accumulate(self, shared, g, p, trace):
        return (trace + g,)

    def direction(self, shared, g, p, trace):
        return trace


def wrong(**methods):
    return type("wrong", (Velocity,), methods)


EIGHT, SMALL = gdx.storage.SignedFourthRoot8(), gdx.storage.SignedFourthRoot8(block=8, minimum_size=1)
MISTAKES = {
    "a format in words": (
        {"formats": ("bfloat16",)},
        r"formats has 'bfloat16'; expected a tuple of 1, for trace: each a np\.dtype, a format or None",
    ),
    "a scalar type as format": ({"formats": (jnp.bfloat16,)}, r"formats has <class.*bfloat16'>; expected a tuple of 1"),
    "too many formats": ({"formats": (None, None)}, r"formats is \(None, None\); expected a tuple of 1"),
    "no tuple of formats": ({"formats": EIGHT}, r"formats is storage\.SignedFourthRoot8\(\); expected a tuple of 1"),
    "a start that is a number": (
        {"start": lambda self, p: (0.0,)},
        r"start returned a tuple of 1, in the shapes \(\); expected a tuple of 1, in the shapes \(3,\)",
    ),
    "a start of another shape": (
        {"start": lambda self, p: (jnp.zeros(()),)},
        r"start returned .* \(\); expected .* \(3,\)",
    ),
    "a start in another dtype than the format": (
        {"formats": (np.dtype("bfloat16"),)},
        r"start returned float32\[3\] for trace, which is not how an optimizer with bfloat16 holds it; expected",
    ),
    "a start in another format": (
        {"formats": (None,), "start": lambda self, p: (gdx.storage.moment_like(p, gdx.storage.StochasticBfloat16()),)},
        r"start returned bfloat16\[3\] for trace, which is not how an optimizer without a storage format",
    ),
    "a start in blocks without a format": (
        {"start": lambda self, p: (gdx.storage.moment_like(p, SMALL),)},
        r"start returned Packed.* for trace, which is not how an optimizer without a storage format",
    ),
    "moments in no tuple": (
        {"accumulate": lambda self, shared, g, p, trace: trace + g},
        r"accumulate returned no tuple but float32\[3\]; expected a tuple of 1, in the shapes \(3,\): the new moments",
    ),
    "a direction in a tuple": (
        {"direction": lambda self, shared, g, p, trace: (trace,)},
        r"step returned a tuple of 2, in the shapes None, \(3,\); expected a tuple of 2, in the shapes \(3,\), \(3,\)",
    ),
    "a direction that branches": (
        {"direction": lambda self, shared, g, p, trace: trace if trace[0] > 0 else -trace},
        r"its step needs the value of a number or array, which is traced; decide with jnp\.where .*bool",
    ),
    "a shared that branches": (
        {"shared": lambda self, count: 1 if jnp.ones(()) > 0 else 2},
        r"shared needs the value of a number or array, which is traced; decide with jnp\.where .*bool",
    ),
    "a direction that counts": (
        {"direction": lambda self, shared, g, p, trace: [trace for _ in range(jnp.argmax(g))][-1]},
        r"its step needs the value of a number or array, which is traced; decide with jnp\.where",
    ),
    "a direction of some numbers": (
        {"direction": lambda self, shared, g, p, trace: trace[g > 0]},
        r"its step needs the value of a number or array, which is traced; decide with jnp\.where .*oolean ind",
    ),
    "a direction of numpy's": (
        {"direction": lambda self, shared, g, p, trace: np.sign(np.asarray(trace))},
        r"its step needs the value of a number or array, which is traced; decide with jnp\.where .*numpy",
    ),
    "a complex direction": (
        {"direction": lambda self, shared, g, p, trace: trace * 1j},
        r"step returned complex64\[3\], expected a real array, as what it was given is; take the real part",
    ),
}


def test_a_start_that_takes_a_value_says_so():
    tx = wrong(start=lambda self, p: (jnp.full_like(p, float(p[0])),))()
    tx.init(jnp.ones(3))
    with pytest.raises(TypeError, match=r"^wrong: start needs the value of a number or array, which is traced"):
        jax.jit(tx.init)(jnp.ones(3))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_links_own_mistakes_are_its_own(mistake):
    methods, words = MISTAKES[mistake]
    tx, g = wrong(**methods)(), jnp.ones(3)
    with pytest.raises(TypeError, match=f"^wrong: {words}"):
        tx.update(g, tx.init(g))
