"""Slopes through moments in few bits: right, or refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from gdx.storage import FourthRoot8, PowersOfTwo4, SignedFourthRoot8, SignedPowersOfTwo4, Simulated

CURVATURES = np.linspace(0.1, 2.0, 8 * 64, dtype=np.float32).reshape(8, 64)
SIGNED, POSITIVE = SignedFourthRoot8(block=64, minimum_size=1), FourthRoot8(block=64, minimum_size=1)

FOUR = SignedPowersOfTwo4(block=64, minimum_size=1), PowersOfTwo4(block=64, minimum_size=1)


def adamw(learning_rate, b1=0.9, b2=0.99, of=lambda format: format):
    return gdx.adamw(learning_rate, b1, b2, weight_decay=0.1, mu_dtype=of(SIGNED), nu_dtype=of(POSITIVE))


def momentum(learning_rate, momentum=0.9, of=lambda format: format):
    return gdx.momentum(learning_rate, momentum, of(SIGNED))


def final(tx, gradient=lambda p: CURVATURES * p, steps=5, unroll=False):
    """The mean parameter after some steps."""
    params = jnp.ones(CURVATURES.shape)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(gradient(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = params, tx.init(params)
    if unroll:
        for _ in range(steps):
            carry, _ = step(carry, None)
    else:
        carry, _ = jax.lax.scan(step, carry, None, length=steps)
    return jnp.mean(carry[0])


def forward(function):
    return lambda x: jax.jvp(function, (x,), (1.0,))[1]


REFUSED = {
    "rate": lambda x: final(momentum(0.1 * x)),
    "momentum": lambda x: final(momentum(0.1, 0.9 * x)),
    "b1": lambda x: final(adamw(0.1, b1=0.9 * x)),
    "b2": lambda x: final(adamw(0.1, b2=0.9 * x), steps=2, unroll=True),
    "start": lambda x: final(adamw(0.1), lambda p: x * CURVATURES * p),
}
WAYS = {
    "grad": jax.grad,
    "forward": forward,
    "jit": lambda f: jax.jit(jax.grad(f)),
    "vmap": lambda f: lambda x: jax.vmap(forward(f))(x * jnp.ones(2)),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(f)),
}


@pytest.mark.parametrize(
    ("name", "way"), [*((name, "grad") for name in REFUSED), *(("rate", way) for way in list(WAYS)[1:])]
)
def test_what_the_codes_have_lost_is_refused(name, way):
    with pytest.raises(TypeError, match=r"FourthRoot8\(block=64.*a slope was asked for.*take storage\.Simulated"):
        WAYS[way](REFUSED[name])(1.0)


def test_of_a_decoded_state_too():
    state = lambda x: gdx.scale_by_momentum(0.9, accumulator_dtype=SIGNED).update(  # noqa: E731
        x * CURVATURES, gdx.scale_by_momentum(0.9, accumulator_dtype=SIGNED).init(jnp.ones(CURVATURES.shape))
    )[1]
    with pytest.raises(TypeError, match=r"take storage\.Simulated"):
        jax.grad(lambda x: state(x).inner_state.trace.decode().sum())(1.0)


@pytest.mark.parametrize("way", ["grad", "forward"])
def test_what_needs_no_slope_of_earlier_moments_is_right(way):
    """The rate outside of the velocity, for gradients that are given: the sum of the velocities."""
    run = lambda x, dtype: final(gdx.sgd(0.1 * x, 0.9, accumulator_dtype=dtype), lambda p: jnp.asarray(CURVATURES))  # noqa: E731
    exact = -0.1 * sum(sum(0.9**k for k in range(t + 1)) for t in range(5)) * CURVATURES.mean()
    assert WAYS[way](functools.partial(run, dtype=SIGNED))(1.0) == pytest.approx(exact, rel=2e-3)


def test_of_one_step_are_those_of_exact_moments():
    def slopes(of):
        before, params = adamw(0.1, of=of), jnp.ones(CURVATURES.shape)
        _, state = before.update(CURVATURES, before.init(params), params)
        update = lambda x: adamw(0.1, 0.9 * x[0], 0.99 * x[1], of).update(x[2] * CURVATURES**2, state, params)[0]  # noqa: E731
        return jax.grad(lambda x: jnp.mean(update(x)))(jnp.ones(3))

    np.testing.assert_allclose(slopes(lambda format: format), slopes(lambda format: None), rtol=2e-2)


def test_on_a_mesh():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    g, tx = jax.device_put(CURVATURES, split), momentum(0.1)
    state = tx.init(g)
    one = jax.jit(jax.grad(lambda x: jnp.sum(tx.update(x * g, state)[0])))(1.0)
    assert one == pytest.approx(-0.1 * CURVATURES.sum(), rel=1e-3)


def in_four_bits(learning_rate, of):
    return gdx.adam(learning_rate, mu_dtype=of(FOUR[0]), nu_dtype=of(FOUR[1]))


@pytest.mark.parametrize("make", [momentum, adamw, in_four_bits])
def test_simulated_makes_the_same_steps(make):
    for few, simulated in zip(*(leaves_of_a_run(make(0.1, of=of)) for of in (lambda f: f, Simulated))):
        np.testing.assert_array_equal(few, simulated)


def leaves_of_a_run(tx):
    """Parameters and moments."""
    params = jnp.ones(CURVATURES.shape)
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(CURVATURES * params, state, params)
        params = optax.apply_updates(params, updates)
    is_packed = lambda x: isinstance(x, gdx.storage.Packed)  # noqa: E731
    return [params, *(x.decode() if is_packed(x) else x for x in jax.tree.leaves(state, is_leaf=is_packed))]


def test_slopes_of_simulated_are_those_of_exact_moments_on_average():
    """Over seeds; with a slope of the stored numbers missing, a tenth of it would be left."""
    seeds = [gdx.storage.SignedFourthRoot8(block=64, minimum_size=1, seed=seed) for seed in range(3)]
    slopes = lambda of: jax.grad(lambda x: final(gdx.momentum(0.1 * x[0], 0.9 * x[1], of)))(jnp.ones(2))  # noqa: E731
    few = np.mean([slopes(Simulated(format)) for format in seeds], axis=0)
    np.testing.assert_allclose(few, slopes(None), rtol=2e-2)


def test_beside_blocks_what_is_simulated_is_as_alone(monkeypatch):
    """On accelerators too, where steps are made in blocks."""
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default, **platforms: default(*args))
    formats = SIGNED, FourthRoot8(block=32, minimum_size=1)
    both, mixed = (gdx.adam(0.1, mu_dtype=of(formats[0]), nu_dtype=formats[1]) for of in (lambda f: f, Simulated))
    for a, b in zip(leaves_of_a_run(both), leaves_of_a_run(mixed)):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("format", [POSITIVE, FOUR[1]], ids=repr)
def test_the_slope_of_b2_is_none_in_the_first_step(format):
    """Where it cancels in the corrected second moment, however roughly that is held."""
    run = lambda b2: final(gdx.adam(0.1, b2=b2, nu_dtype=Simulated(format)), steps=1, unroll=True)  # noqa: E731
    assert jax.grad(run)(0.99) == pytest.approx(0, abs=1e-5)


def test_simulated_is_as_its_format():
    for format in (SIGNED, POSITIVE, PowersOfTwo4(block=None), gdx.storage.StochasticBfloat16()):
        simulated = Simulated(format)
        assert [simulated.signed, simulated.keeps_positive] == [format.signed, format.keeps_positive]
        assert all(simulated.fits(shape) == format.fits(shape) for shape in [(3,), (8, 64), (64, 256)])
    with pytest.raises(ValueError, match="rounds small second moments to 0"):
        gdx.adam(0.1, nu_dtype=Simulated(SIGNED))
    with pytest.raises(TypeError, match="Simulated: format is 'bfloat16'; expected a format"):
        Simulated("bfloat16")
