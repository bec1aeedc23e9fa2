"""A state taken from one format to another, and a training resumed from a file."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from gdx.storage import FourthRoot8, Packed, SignedFourthRoot8, StochasticBfloat16, convert
from tests.contract.table import assert_same_bits

EIGHT_BIT = {"mu_dtype": SignedFourthRoot8(), "nu_dtype": FourthRoot8()}
BFLOAT16 = {"mu_dtype": StochasticBfloat16(), "nu_dtype": StochasticBfloat16()}
PARAMS = {"w": jnp.linspace(-1, 1, 16 * 256).reshape(16, 256), "b": jnp.ones(3)}


def gradient(step):
    return jax.tree.map(lambda p: p + 0.1 * jnp.sin(jnp.linspace(0, 9, p.size) * (step + 1)).reshape(p.shape), PARAMS)


def some_steps(tx, params, state, steps):
    update = jax.jit(tx.update)
    for step in steps:
        updates, state = update(gradient(step), state, params)
        params = jax.tree.map(lambda p, u: (p.astype(jnp.float32) + u).astype(p.dtype), params, updates)
    return params, state


@pytest.mark.parametrize("formats", [EIGHT_BIT, BFLOAT16])
def test_there_and_back(formats):
    exact, small = gdx.adamw(0.01), gdx.adamw(0.01, **formats)
    _, state = some_steps(exact, PARAMS, exact.init(PARAMS), range(5))
    there = convert(state, small.init(PARAMS))
    assert jax.tree.structure(there) == jax.tree.structure(small.init(PARAMS))
    back = convert(there, exact.init(PARAMS))
    assert back[0].count == 5
    assert {x.dtype for x in jax.tree.leaves(back)} == {np.dtype("float32"), np.dtype("int32")}
    for name, error in (("mu", 1 / 31), ("nu", 0.2)):
        found, expected = np.asarray(getattr(back[0], name)["w"]), np.asarray(getattr(state[0], name)["w"])
        assert np.max(abs(found - expected)) <= error * np.max(abs(expected))
    some_steps(small, PARAMS, there, range(5, 7))
    assert_same_bits(convert(there, small.init(PARAMS)), there)


def test_counts_come_and_go():
    plain, random = gdx.sgd(0.1, 0.9), gdx.sgd(0.1, 0.9, accumulator_dtype=StochasticBfloat16())
    _, state = some_steps(random, PARAMS, random.init(PARAMS), range(3))
    moment = state[0].inner_state.trace["w"]
    there = convert(state, plain.init(PARAMS))
    assert_same_bits(there[0].trace["w"], moment.astype(jnp.float32))
    back = convert(there, random.init(PARAMS))
    assert back[0].count == 0
    assert_same_bits(back[0].inner_state.trace["w"], moment)
    assert_same_bits(convert(state, random.init(PARAMS)), state)
    scheduled = gdx.sgd(gdx.schedules.constant_schedule(0.1), 0.9)
    assert_same_bits(convert(there, scheduled.init(PARAMS)), (there[0], optax.ScaleByScheduleState(jnp.int32(0))))


def test_keys_of_other_links():
    noise = optax.add_noise(0.1, 0.5, jax.random.key(0))
    exact, small = (optax.chain(noise, gdx.adam(0.01, **formats)) for formats in ({}, EIGHT_BIT))
    there = convert(exact.init(PARAMS), small.init(PARAMS))
    assert there[0].rng_key == jax.random.key(0)
    assert isinstance(there[1][0].mu["w"], Packed)


def test_under_jit():
    exact, small = gdx.adam(0.01), gdx.adam(0.01, **EIGHT_BIT)
    state = exact.init(PARAMS)
    made = jax.jit(lambda state: convert(state, small.init(PARAMS)))(state)
    assert isinstance(made[0].mu["w"], Packed)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (gdx.sgd(0.1, momentum=0.9), r"has nothing at \[0\]\.trace"),
        (gdx.sgd(0.1), r"has also \[0\]\.mu"),
    ],
)
def test_states_that_differ_in_more(other, words):
    with pytest.raises(ValueError, match=f"convert: the state {words}.*same links, and the same parameters"):
        convert(gdx.adam(0.1).init(PARAMS), other.init(PARAMS))


@pytest.mark.parametrize("link", [gdx.round_with_compensation(), gdx.round_with_master()])
def test_a_correction_is_no_count(link):
    """Not that of a scalar either: what other links keep of it is not thrown away."""
    theta = jnp.ones((), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"convert: the state has nothing at \.correction"):
        convert(link.init(theta), gdx.round_with_correction().init(theta))
    with pytest.raises(ValueError, match="convert: the state has nothing at"):
        convert(gdx.round_with_correction().init(theta), link.init(theta))


def test_other_parameters():
    tx = gdx.adam(0.1)
    with pytest.raises(ValueError, match=r"has another shape at \[0\]\.mu\['b'\]"):
        convert(tx.init(PARAMS), tx.init({**PARAMS, "b": jnp.ones(4)}))


@pytest.mark.parametrize("formats", [EIGHT_BIT, BFLOAT16], ids=["8-bit", "bfloat16"])
@pytest.mark.parametrize(
    "rounding", [gdx.round_with_correction(3), gdx.round_with_compensation(), gdx.round_with_master()]
)
def test_resumes_bit_for_bit(tmp_path, formats, rounding):
    tx = gdx.chain(gdx.adamw(0.01, **formats), rounding)
    start = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    expected = some_steps(tx, start, tx.init(start), range(6))
    middle = some_steps(tx, start, tx.init(start), range(3))
    arrays = {str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(middle))}
    np.savez(tmp_path / "state.npz", **{i: x.view(np.uint8) if x.ndim else x for i, x in arrays.items()})
    with np.load(tmp_path / "state.npz") as file:
        target = (start, tx.init(start))
        leaves = [
            jnp.asarray(file[str(i)].view(x.dtype) if x.ndim else file[str(i)])
            for i, x in enumerate(jax.tree.leaves(target))
        ]
    restored = jax.tree.unflatten(jax.tree.structure(target), leaves)
    assert_same_bits(some_steps(tx, *restored, range(3, 6)), expected)


NUMBERS = [True, 3, 1.5, 1j, jax.random.key(0), jax.random.key(0, impl="rbg")]


@pytest.mark.parametrize("there", range(len(NUMBERS)))
@pytest.mark.parametrize("here", range(len(NUMBERS)))
def test_no_number_loses_its_kind(here, there):
    """A boolean in an integer, that in a real number and that in a complex one lose nothing; a key is nothing else."""
    state, like = ((optax.EmaState(jnp.int32(1), {"w": jnp.asarray(NUMBERS[i])}),) for i in (here, there))
    if here == there or here < there < 4:
        found = convert(state, like)[0].ema["w"]
        assert found.dtype == like[0].ema["w"].dtype and (found.item() if here < 4 else found) == NUMBERS[here]
        return
    with pytest.raises(TypeError, match=r"convert: the state is .* at \[0\]\.ema\['w'\], of which the one to go to, "):
        convert(state, like)


def test_a_complex_moment_is_not_packed():
    state, like = ({"w": x} for x in (jnp.ones((16, 256), complex), FourthRoot8().zeros(jnp.ones((16, 256)))))
    with pytest.raises(TypeError, match=r"the state is complex64 at \['w'\], of which the one to go to, float32"):
        convert(state, like)


@pytest.mark.parametrize("wrong", ["a", b"a", abs, np.array(["a"]), np.array([None])], ids=str)
def test_what_is_no_state(wrong):
    state = gdx.adam(0.1).init(PARAMS)
    for tree, place in ((wrong, "the root"), ((state[0]._replace(mu={"w": wrong}), state[1]), r"\[0\]\.mu\['w'\]")):
        with pytest.raises(TypeError, match=f"convert: state is .* at {place}; expected arrays"):
            convert(tree, state)
        with pytest.raises(TypeError, match=f"convert: like is .* at {place}; expected arrays"):
            convert(state, tree)
