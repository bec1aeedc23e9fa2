"""8 bits in blocks: codes and scales, their errors, what is not finite, and where they live."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gdx
from gdx.storage import (
    Dither,
    FourthRoot8,
    Packed,
    PowersOfTwo4,
    SignedFourthRoot8,
    SignedPowersOfTwo4,
    StochasticBfloat16,
)
from tests.contract.table import assert_same_bits

SIGMAS = 5.4
FIRST = Dither(np.uint32(1), np.uint32(0))
MU, NU = SignedFourthRoot8(), FourthRoot8()
SMALL = {"block": 8, "minimum_size": 1}


@pytest.mark.parametrize(("format", "top"), [(SignedFourthRoot8(**SMALL), 127), (FourthRoot8(**SMALL), 255)])
def test_against_the_formula(format, top):
    x = np.random.default_rng(0).standard_normal((3, 40)).astype(np.float32) ** 3
    x = x if format.signed else abs(x)
    packed = format.encode(jnp.asarray(x), FIRST)
    scales = abs(x.astype(float)).reshape(3, 5, 8).max(-1)
    codes = top * (abs(x) / np.repeat(scales, 8, -1)) ** 0.25
    found = np.asarray(packed.codes, float)
    np.testing.assert_array_equal(packed.scales, scales.astype(np.float32))
    assert np.all((abs(found) >= np.floor(codes - 1e-4)) & (abs(found) <= np.ceil(codes + 1e-4)))
    assert np.all((np.sign(found) == np.sign(x)) | (found == 0))
    expected = np.sign(found) * (found / top) ** 4 * np.repeat(scales, 8, -1)
    np.testing.assert_allclose(packed.decode(), expected, rtol=1e-6)


@pytest.mark.parametrize("format", [MU, NU])
def test_unbiased_in_value(format):
    x = np.geomspace(1e-8, 1, 256).astype(np.float32)
    x = x * (-1) ** np.arange(256) if format.signed else x
    draws = 20_000
    one = lambda t: format.encode(jnp.asarray(x), Dither(t, jnp.uint32(0))).decode()  # noqa: E731
    found = np.asarray(jax.jit(jax.vmap(one))(jnp.arange(1, draws + 1, dtype=jnp.uint32)), np.float64)
    low, high = found.min(0), found.max(0)
    gap = high - low
    assert all(len(np.unique(column)) <= 2 for column in found.T)
    assert np.all((low - 1e-6 * abs(x) <= x) & (x <= high + 1e-6 * abs(x)))
    sigma = np.sqrt(np.maximum((x - low) * (high - x), 0) / draws)
    # the chance is a multiple of 2^-16, and the numbers are float32
    assert np.all(abs(found.mean(0) - x) <= SIGMAS * sigma + gap * 2.0**-16 + 1e-6 * abs(x))


@pytest.mark.parametrize("momentum", [0.9, 0.99])
def test_a_velocity_that_only_decays_vanishes(momentum):
    """Rounded to nearest it stands still, and the parameter of a gradient that has become zero drifts for ever."""
    steps = round(5 / (1 - momentum))
    x = jnp.full((64, 256), 0.01).at[:, 0].set(1)
    g = jnp.zeros_like(x).at[:, 0].set(1 - momentum)  # keeps the largest of each block where it is
    tx = gdx.scale_by_momentum(momentum, accumulator_dtype=MU)
    state = tx.init(x)._replace(inner_state=optax.TraceState(MU.encode(x, FIRST)))
    step = lambda state, _: (tx.update(g, state)[1], None)  # noqa: E731
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, None, steps))(state)
    found = np.asarray(state.inner_state.trace.decode(), np.float64)[:, 1:]
    assert abs(found.mean() - 0.01 * momentum**steps) <= SIGMAS * found.std() / np.sqrt(found.size)


def test_below_the_first_code_nothing_is_left_to_chance():
    """A first moment of a billionth would else be one code, now and then, and its step as long as a thousand."""
    for format, relative, code in ((MU, 3e-9, 0), (NU, 2e-10, 1)):
        x = jnp.full((16, 256), relative).at[:, 0].set(1)
        assert np.all(format.encode(x, FIRST).codes[:, 1:] == code)


def test_a_positive_second_moment_stays_positive():
    x = jnp.asarray(np.array([1.0, 1e-12, 1e-30, 0.0, 1e-37, 0.5, 0.0, 2e-20], np.float32))
    packed = FourthRoot8(**SMALL).encode(x, FIRST)
    np.testing.assert_array_equal(np.asarray(packed.codes) > 0, np.asarray(x) > 0)
    np.testing.assert_array_equal(np.asarray(packed.decode()) > 0, np.asarray(x) > 0)


@pytest.mark.parametrize("format", [SignedFourthRoot8(**SMALL), FourthRoot8(**SMALL)])
@pytest.mark.parametrize("scale", [1e-45, 1e-39, 2e-38, 1e-30, 1.0, 1e30, 3e38])
def test_any_magnitude(format, scale):
    x = np.array([1, 0.5, 0.25, 0.1, 0, 0.01, 1e-3, 1], np.float32) * np.float32(scale)
    found = np.asarray(format.encode(jnp.asarray(x), FIRST).decode())
    assert np.all(np.isfinite(found) | (x > 3.3e38))
    if scale > 1e-36:  # below, some of the numbers are subnormal, which count as 0
        np.testing.assert_allclose(found, x, rtol=0.2, atol=3e-3 * scale)
    if scale < 1e-38:
        np.testing.assert_array_equal(found, 0)


@pytest.mark.parametrize("format", [SignedFourthRoot8(**SMALL), FourthRoot8(**SMALL)])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_makes_its_block_nan(format, bad):
    x = np.ones(16, np.float32)
    x[3] = bad
    found = np.asarray(format.encode(jnp.asarray(x), FIRST).decode())
    assert np.all(np.isnan(found[:8]))
    assert np.all(found[8:] == 1)


def test_small_leaves_stay_float32():
    params = {
        "big": jnp.zeros((16, 256)),
        "few": jnp.zeros((15, 256)),
        "narrow": jnp.zeros((64, 255)),
        "s": jnp.ones(()),
    }
    state = gdx.scale_by_adam(mu_dtype=MU, nu_dtype=NU).init(params)
    for moment in (state.mu, state.nu):
        assert all(isinstance(moment[name], Packed) for name in ("big", "narrow"))
        assert all(moment[name].dtype == np.float32 for name in ("few", "s"))


def test_bytes_per_parameter():
    params = {"w": jnp.zeros((64, 1024)), "v": jnp.zeros(2**16)}
    sizes = {
        8.0: gdx.scale_by_adam(),
        4.0: gdx.scale_by_adam(mu_dtype="bfloat16", nu_dtype=StochasticBfloat16()),
        2.03125: gdx.scale_by_adam(mu_dtype=MU, nu_dtype=NU),
    }
    for expected, tx in sizes.items():
        state = tx.init(params)
        assert sum(x.nbytes for x in jax.tree.leaves((state.mu, state.nu))) == expected * 2 * 2**16


def test_a_node_of_two_arrays():
    packed = MU.encode(jnp.ones((16, 512)), FIRST)
    assert (packed.shape, packed.ndim, packed.size, packed.dtype) == ((16, 512), 2, 16 * 512, np.int8)
    assert packed.nbytes == 16 * 512 + 16 * 2 * 4
    assert repr(packed) == "Packed(codes=int8[16,512], scales=float32[16,2], format=storage.SignedFourthRoot8())"
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(packed)]
    assert paths == [".codes", ".scales"]
    assert_same_bits(jax.jit(lambda x: x)(packed), packed)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P("a"), P("a", "b"), P(None, "b"), P(None, ("a", "b"))])
def test_sharded_like_the_parameter_with_the_same_bits(spec, kind):
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(kind,) * 2)
    random = np.random.default_rng(0)
    params, g = (jnp.asarray(random.standard_normal((8, 1024)).astype(np.float32)) for _ in range(2))
    mu, nu = (SignedPowersOfTwo4(), PowersOfTwo4()) if spec == P(None, "b") else (MU, NU)
    tx = gdx.chain(
        gdx.sgd(1.0, 0.9, accumulator_dtype=mu), gdx.adamw(0.1, mu_dtype=mu, nu_dtype=nu), gdx.round_stochastically()
    )

    def run(params, g):
        params = params.astype(jnp.bfloat16)
        state = tx.init(params)
        update = jax.jit(tx.update)
        for _ in range(3):
            updates, state = update(g, state, params)
            params = (params.astype(jnp.float32) + updates).astype(jnp.bfloat16)
        return params, state

    sharding = NamedSharding(mesh, spec)
    found, state = run(jax.device_put(params, sharding), jax.device_put(g, sharding))
    assert_same_bits((found, state), run(params, g))
    fresh = tx.init(jax.device_put(params, sharding))[1][0].nu
    assert fresh.codes.sharding.is_equivalent_to(sharding, 2)
    # a device's part of a row along both axes is half of a block
    scales = NamedSharding(mesh, P() if spec == P(None, ("a", "b")) else spec)
    assert fresh.scales.sharding.is_equivalent_to(scales, 2)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    "tx", [gdx.adam(0.1, mu_dtype=MU, nu_dtype=NU), gdx.sgd(0.1, 0.9, accumulator_dtype=MU)], ids=["adam", "sgd"]
)
def test_inside_shard_map(tx, kind):
    """Each device trains its own part, also from a state that all had in common."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    parts = jnp.asarray(np.random.default_rng(0).standard_normal((4, 16, 256)).astype(np.float32))

    def train(state, p):
        step = lambda state, _: tx.update(p, state, p)[::-1]  # noqa: E731
        return jax.lax.scan(step, tx.update(p, state, p)[1], None, 2)[1]

    def own(p):
        return train(tx.init(p[0]), p[0])[None]

    def common(state, p):
        return train(state, p[0])[None]

    state = tx.init(parts[0])
    split = jax.device_put(parts, NamedSharding(mesh, P("data")))
    expected = jnp.stack([jax.jit(train)(state, p) for p in parts])
    found = jax.jit(jax.shard_map(own, mesh=mesh, in_specs=P("data"), out_specs=P("data")))(split)
    assert_same_bits(found, expected)
    state = jax.device_put(state, NamedSharding(mesh, P()))
    found = jax.jit(jax.shard_map(common, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")))(state, split)
    assert_same_bits(found, expected)


def test_a_gradient_that_is_still_to_be_summed_is_refused():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,))
    w = jax.device_put(jnp.ones((16, 256)), NamedSharding(mesh, P()))
    x = jax.device_put(jnp.ones((8, 16)), NamedSharding(mesh, P("data")))
    tx = gdx.sgd(0.1, 0.9, accumulator_dtype=MU)

    def step(w, state, x, summed):
        g = jnp.einsum("ni,nj->ij", x, 2 * (x @ w), out_sharding=P(unreduced={"data"}))
        return tx.update({"w": jax.sharding.reshard(g, P()) if summed else g}, state)[0]["w"]

    step = jax.jit(step, static_argnames="summed")
    words = r"gradient at \['w'\] is a sum that is still to be made.*'data'.*jax\.sharding\.reshard"
    with jax.set_mesh(mesh):
        with pytest.raises(ValueError, match=words):
            step(w, tx.init({"w": w}), x, False)
        np.testing.assert_allclose(step(w, tx.init({"w": w}), x, True), -0.1 * 2 * 16 * 8, rtol=1e-6)


def test_scales_that_do_not_divide_are_replicated_along_their_axis():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(AxisType.Auto,))
    like = jax.device_put(jnp.zeros((8, 512)), NamedSharding(mesh, P(None, "a")))
    scales = MU.zeros(like).scales
    assert scales.shape == (8, 2)
    assert scales.sharding.is_equivalent_to(NamedSharding(mesh, P()), 2)


def test_the_update_is_that_of_the_stored_moments():
    random = np.random.default_rng(0)
    g = jnp.asarray(random.standard_normal((16, 256)).astype(np.float32))
    tx = gdx.scale_by_adam(mu_dtype=MU, nu_dtype=NU)
    updates, state = jax.jit(tx.update)(g, tx.init(g))
    mu, nu = (np.asarray(moment.decode(), float) for moment in (state.mu, state.nu))
    expected = mu / (1 - np.float32(0.9)) / (np.sqrt(nu / (1 - np.float32(0.999))) + 1e-8)
    np.testing.assert_allclose(updates, expected, rtol=1e-5)


def test_a_state_in_another_format_is_refused():
    params = {"w": jnp.ones((16, 256))}
    exact, small = gdx.adam(0.1), gdx.adam(0.1, nu_dtype=NU)
    words = r"state\.nu at \['w'\] is float32\[16,256\], which is not how storage\.FourthRoot8\(\) holds it.*convert"
    with pytest.raises(TypeError, match=words):
        small.update(params, exact.init(params), params)
    with pytest.raises(TypeError, match=r"state\.nu at \['w'\] is Packed.*without a storage format"):
        exact.update(params, small.init(params), params)
    with pytest.raises(ValueError, match=r"state\.mu.*no gradient for"):
        small.update({}, small.init(params), {})


def test_blocks_along_another_axis():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 40, 5)).astype(np.float32))
    for format in (SignedFourthRoot8(**SMALL), FourthRoot8(**SMALL)):
        turned = dataclasses.replace(format, axis=-2)
        magnitudes = x if format.signed else abs(x)
        packed, straight = turned.encode(magnitudes, FIRST), format.encode(magnitudes.swapaxes(1, 2), FIRST)
        assert packed.scales.shape == (3, 5, 5)
        np.testing.assert_array_equal(packed.scales, straight.scales.swapaxes(1, 2))
        # a number is rounded by the bits of its place, which is another one here
        assert np.all(abs(packed.codes.astype(int) - straight.codes.swapaxes(1, 2).astype(int)) <= 1)
    assert not turned.fits((4096,))
    assert turned.fits((8, 512))
    assert not turned.fits((1, 4096))


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("shape", [(16, 16), (4, 24, 40)])
def test_a_step_in_blocks_has_the_bits_of_one_on_whole_leaves(axis, shape, monkeypatch):
    """Other devices than CPUs see a leaf as blocks, if they are whole and the link is elementwise."""
    kinds = (SignedPowersOfTwo4, PowersOfTwo4) if (axis, len(shape)) == (-2, 2) else (SignedFourthRoot8, FourthRoot8)
    mu, nu = (kind(**SMALL, axis=axis) for kind in kinds)
    g, p = (jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)) for seed in range(2))
    seen = []

    class watched(gdx.scale_by_adam):
        def direction(self, shared, g, p, mu, nu):
            seen.append(g.shape)
            return super().direction(shared, g, p, mu, nu)

    class by_rows(watched):
        elementwise = False

    def run(link):
        tx = gdx.chain(link(mu_dtype=mu, nu_dtype=nu), gdx.add_decoupled_weight_decay(0.1))
        state = tx.init(p)
        for _ in range(3):
            updates, state = jax.jit(tx.update)(g, state, p)
        return jax.tree.leaves((updates, state))

    on_cpu = run(watched)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, default, **platforms: default(*args))
    in_blocks = run(watched)
    assert {len(s) for s in seen} == {len(shape), len(shape) + 1}
    seen.clear()
    whole = run(by_rows)
    assert set(seen) == {shape}
    assert_same_bits(in_blocks, on_cpu)
    assert_same_bits(whole, on_cpu)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        *(({"block": block}, ValueError, f"block is {block}; (?=expected .* >= 8$)") for block in (-1, 0, 1, 3, 7)),
        ({"minimum_size": 1.5}, TypeError, "minimum_size is 1.5"),
        ({"axis": 0}, ValueError, "axis is 0"),
        ({"axis": 0.5}, TypeError, r"axis is 0\.5"),
        ({"axis": None}, ValueError, "axis is None with block=256; (?=expected block=None)"),
        ({"seed": True}, TypeError, "seed is True"),
    ],
)
def test_refused_settings(settings, error, words):
    with pytest.raises(error, match=f"SignedFourthRoot8: {words}.*expected"):
        SignedFourthRoot8(**settings)


def test_in_a_batch_of_optimizers():
    """Each lane of vmap, with its own state, has the bits of the optimizer alone."""
    g = jnp.asarray(np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32))

    def run(rate):
        tx = gdx.adam(rate, mu_dtype=MU, nu_dtype=NU)
        step = lambda carry, _: (tx.update(g, carry)[::-1][0], None)  # noqa: E731
        state, _ = jax.lax.scan(step, tx.init(g), None, 5)
        return tx.update(g, state)

    rates = jnp.array([0.1, 0.2])
    batch = jax.jit(jax.vmap(run))(rates)
    for lane in range(2):
        assert_same_bits(jax.tree.map(lambda x: x[lane], batch), jax.jit(run)(rates[lane]))  # noqa: B023


def test_training_lowers_the_loss_as_in_float32():
    target = jnp.asarray(np.random.default_rng(0).standard_normal((16, 256)).astype(np.float32))

    def final(tx):
        def step(carry, _):
            params, state = carry
            updates, state = tx.update(params - target, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = jnp.zeros_like(target)
        (params, _), _ = jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), None, 500))(params)
        return float(jnp.mean((params - target) ** 2))

    assert final(gdx.adam(0.02, mu_dtype=MU, nu_dtype=NU)) < 1.2 * final(gdx.adam(0.02)) + 1e-3


def test_a_new_state_is_as_free_as_its_parameters():
    formats = {"mu_dtype": SignedFourthRoot8(), "nu_dtype": FourthRoot8()}
    params = jnp.ones((64, 512))
    state = gdx.adam(0.1, **formats).init(params)
    assert not any(leaf.committed for leaf in jax.tree.leaves(state))
    there = jax.device_put(params, jax.devices()[1])
    assert all(leaf.committed for leaf in jax.tree.leaves(gdx.adam(0.1, **formats).init(there)) if leaf.ndim)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_takes_no_memory_for_wider_gradients(dtype):
    formats = {"mu_dtype": SignedFourthRoot8(), "nu_dtype": FourthRoot8()}
    tx = gdx.chain(gdx.adamw(1e-3, **formats), gdx.round_stochastically())
    params = jax.ShapeDtypeStruct((256, 512), jnp.dtype(dtype))

    def step(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        with jax.numpy_dtype_promotion("standard"):
            return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params), params)
    # the new codes and scales, where a copy of the gradient in float32 would be 4 bytes more for each parameter
    assert lowered.compile().memory_analysis().temp_size_in_bytes < 2.2 * 256 * 512


@pytest.mark.parametrize("formats", [{"nu_dtype": NU}, {"mu_dtype": MU}], ids=["second moment", "first moment"])
def test_of_five_million_numbers_none_has_another_code(formats):
    """On a mesh and in a loop over members blocks lie otherwise, where a compiler's functions may round otherwise."""
    tx, random = gdx.adam(1e-2, **formats), np.random.default_rng(0)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    sharded = gdx.sharding.shard_state(tx, mesh, specs=P("model"))
    place = lambda x: jax.device_put(x, NamedSharding(mesh, P("model")))  # noqa: E731
    alone, spread = jax.jit(tx.update), jax.jit(sharded.update)
    in_loop = jax.jit(lambda tx, g, state: jax.lax.map(lambda tx: tx.update(g, state), tx))
    params = jnp.zeros((64, 2048))
    state, there = tx.init(params), jax.tree.map(lambda x: x.sharding, sharded.init(place(params)))
    for i in range(40):
        g = random.standard_normal(params.shape, np.float32)
        found = spread(place(g), jax.device_put(jax.device_get(state), there))
        if i in (2, 3, 20, 24):
            in_turn = in_loop(gdx.stack([tx, tx]), g, state)
        expected = _, state = alone(g, state)
        assert_same_bits(found, expected)
        if i in (2, 3, 20, 24):
            assert_same_bits(jax.tree.map(lambda x: x[0], in_turn), expected)
