"""Averages of the parameters: against NumPy in double precision, in few bits, on meshes, and against theory."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gdx
from gdx.averages import AverageState
from gdx.checkpoint import Checkpoints
from gdx.compat import enable_x64
from gdx.storage import SignedFourthRoot8, StochasticBfloat16
from gdx.trees import unboxed
from tests.contract.table import assert_same_bits, one_step, scan
from tests.sharded import both_kinds, make_mesh, put


def oracle(points, decay, start=0, every=1):
    """The average of the points by its definition: the sum of each with its weight, over the sum of the weights.

    A point's weight is what the exponential average gives it, 1 - decay, times all decays that came after it.
    """
    points = np.asarray(points, np.float64)
    chosen = np.arange(start, len(points), every)
    if not len(chosen):
        return points[-1]
    if decay is None:
        return points[chosen].mean(axis=0)
    decays = np.array([np.float32(decay(t) if callable(decay) else decay) for t in chosen], np.float64)
    after = np.append(np.cumprod(decays[::-1])[::-1][1:], 1.0)
    weights = (1 - decays) * after
    return np.tensordot(weights, points[chosen], 1) / weights.sum()


def walk(tx, params, gradients):
    """The parameters and the average after each step."""

    def step(carry, g):
        carry = one_step(tx, *carry, g)
        return carry, (carry[0], gdx.read_average(carry[1], carry[0]))

    return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), gradients)[1])()


def make_gradients(steps, shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((steps, *shape)).astype("float32"))


def warm_up(count):
    return jnp.minimum(0.99, (1.0 + count) / (10.0 + count))


@pytest.mark.parametrize("decay", [None, 0.0, 0.5, 0.999, warm_up], ids=lambda x: getattr(x, "__name__", str(x)))
@pytest.mark.parametrize(("start", "every"), [(0, 1), (0, 4), (50, 1), (7, 3), (1000, 1)])
def test_is_the_weighted_mean_of_what_the_parameters_were(decay, start, every):
    tx = gdx.average_parameters(gdx.sgd(0.05), decay, start=start, every=every)
    points, averages = walk(tx, jnp.linspace(-3.0, 3.0, 8), make_gradients(200, (8,)))
    for n in (1, 2, 3, 8, 51, 52, 60, 199, 200):
        expected = oracle(points[:n], decay, start, every)
        np.testing.assert_allclose(averages[n - 1], expected, rtol=5e-7, atol=2e-7, err_msg=f"{n}")
        if n <= start + 1:
            assert_same_bits(averages[n - 1], points[n - 1])


@pytest.mark.parametrize(("decay", "error"), [(None, 1e-7), (0.999, 2**-25 / 1e-3), (0.9999, 2**-25 / 1e-4)])
def test_stays_exact_over_a_million_steps(decay, error):
    """Where a step would move the mean of all by less than half a unit in its last place for most of the way."""
    steps = 10**6
    tx = gdx.average_parameters(gdx.sgd(1.0), decay)
    # up by 0.05 half way, with noise: 1 + 0.05 [t > steps / 2]
    random = np.random.default_rng(0)
    points = (1 + 0.05 * (np.arange(steps) >= steps // 2) + 1e-3 * random.standard_normal(steps)).astype("float32")

    def step(state, point):  # the parameters given, whatever the optimizer would do
        return tx.update(jnp.zeros(()), state, point)[1], None

    start = tx.init(jnp.zeros(()))
    state, _ = jax.jit(lambda points: jax.lax.scan(step, start, points))(jnp.append(jnp.zeros(1), points[:-1]))
    expected = points.astype(float).mean() if decay is None else exponential(points, np.float32(decay))
    assert abs(float(gdx.read_average(state, jnp.asarray(points[-1]))) - expected) < error


def exponential(points, decay):
    weights = np.exp(np.log(float(decay)) * np.arange(len(points))[::-1])
    return np.sum(weights * points) / np.sum(weights)


@pytest.mark.parametrize("dtype", [StochasticBfloat16(), SignedFourthRoot8(block=8, minimum_size=1)], ids=str)
@pytest.mark.parametrize("decay", [None, 0.999])
def test_few_bits_have_the_error_of_one_rounding_and_do_not_drift(dtype, decay):
    """Over 10,000 steps, with every single move far below half a unit in the last place."""
    tx, steps, shape = gdx.average_parameters(gdx.sgd(1e-3), decay, dtype=dtype), 10_000, (64, 8)
    # from 1.5 down to 0.5 and up again by 0.25
    falls = np.where(np.arange(steps) < 8_000, 0.125, -0.125)[:, None, None]
    g = falls + np.random.default_rng(0).standard_normal((steps, *shape))
    tx_exact = gdx.average_parameters(gdx.sgd(1e-3), decay)
    g = jnp.asarray(g.astype("float32"))
    params = jnp.full(shape, 1.5)
    points, averages = walk(tx, params, g)
    _, exact = walk(tx_exact, params, g)
    errors = np.asarray(averages, float) - np.asarray(exact, float)
    for n in (1_000, 5_000, 10_000):
        size, largest = np.sqrt(np.mean(errors[n - 1] ** 2)), np.max(np.abs(exact[n - 1]))
        unit = 2.0**-7 if isinstance(dtype, StochasticBfloat16) else 4 / 127 * largest
        apart = np.max(np.mean(np.abs(points[:n] - exact[:n]), axis=(1, 2)))
        assert size < np.sqrt(unit * max(apart, unit) / 2)
        assert abs(np.mean(errors[n - 1])) < 5 * size / np.sqrt(errors[0].size)


OPTIMIZERS = {
    "gdx": gdx.adamw(1e-2),
    "optax": optax.adamw(1e-2, weight_decay=0.1),
    "of bfloat16": gdx.chain(gdx.adamw(1e-2), gdx.round_stochastically()),
    "scheduled": gdx.sgd(gdx.schedules.linear_schedule(0.1, 0.0, 50), 0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"every": 3, "start": 2}, {"dtype": StochasticBfloat16()}], ids=str)
def test_the_bits_of_the_updates_are_those_of_the_optimizer(name, options):
    tx = OPTIMIZERS[name]
    # what is optax's computes in bfloat16 when it is alone
    params = {"w": jnp.linspace(-1, 1, 33), "b": jnp.ones((), "float32" if name == "optax" else "bfloat16")}
    gradients = jax.tree.map(lambda p: make_gradients(50, p.shape).astype(p.dtype), params)

    def updates_of(tx):
        def step(carry, g):
            updates, state = optax.with_extra_args_support(tx).update(g, carry[1], carry[0])
            with jax.numpy_dtype_promotion("standard"):
                return (optax.apply_updates(carry[0], updates), state), updates

        return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), gradients))()

    with jax.numpy_dtype_promotion("standard"):
        (end, state), updates = updates_of(tx)
    (averaged_end, averaged_state), averaged = updates_of(gdx.average_parameters(tx, **options))
    assert_same_bits((averaged_end, averaged_state.inner_state, averaged), (end, state, updates))


@pytest.mark.parametrize("decay", [None, 0.9, 0.998])
@pytest.mark.parametrize("options", [{}, {"every": 2}, {"dtype": StochasticBfloat16()}], ids=str)
def test_the_bits_of_the_average_are_the_same_in_every_program(decay, options):
    tx = gdx.average_parameters(gdx.sgd(0.1), decay, **options)
    params, gradients = jnp.linspace(-1.0, 1.0, 33), make_gradients(100, (33,))

    def state_of(tx, params, gradients):
        return jax.lax.scan(lambda c, g: (one_step(tx, *c, g), None), (params, tx.init(params)), gradients)[0][1]

    by_argument = jax.jit(state_of)(tx, params, gradients)
    assert_same_bits(jax.jit(lambda p, g: state_of(tx, p, g))(params, gradients), by_argument)
    if decay is not None:
        batch = gdx.stack([tx, tx.replace(decay=0.5), tx.replace(decay=0.25)])
        found = jax.jit(jax.vmap(state_of, (0, None, None)))(batch, params, gradients)
        assert_same_bits(jax.tree.map(lambda x: x[0], found), by_argument)
        constant = tx.replace(decay=lambda count: decay)
        assert_same_bits(jax.jit(lambda p, g: state_of(constant, p, g))(params, gradients).inner_state, by_argument)


def test_is_of_what_parameters_become_whatever_moves_them():
    """Rounded by a link, clipped by the user, scaled by a wrapper: the average is of what update is given."""
    tx = optax.chain(
        gdx.average_parameters(gdx.chain(gdx.sgd(0.1), gdx.round_with_compensation()), None), optax.scale(0.5)
    )
    params, points = jnp.linspace(-1, 1, 9).astype("bfloat16"), []
    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for g in make_gradients(20, (9,)):
            updates, state = tx.update(g, state, params)
            params = jnp.maximum(optax.apply_updates(params, updates), 0)
            points.append(np.asarray(params, float))
        average = gdx.read_average(state, params)
    assert average.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(average, float), np.mean(points, axis=0), rtol=2**-8)


# Where the state is found.


def nested(tx):
    return {
        "alone": tx,
        "chain": gdx.chain(optax.clip(1e3), tx),
        "optax.chain": optax.chain(optax.clip(1e3), optax.chain(tx, optax.identity())),
        "in optax.MultiSteps": gdx.value(optax.MultiSteps)(tx, 1),
        "inject_hyperparams": optax.inject_hyperparams(lambda rate: gdx.chain(tx, gdx.value(optax.scale)(rate)))(1.0),
        "another wrapper": optax.apply_if_finite(tx, 3),
    }


@pytest.mark.parametrize("name", nested(optax.identity()))
def test_is_found_however_deep(name):
    tx = gdx.average_parameters(gdx.sgd(0.1), 0.9)
    params, gradients = {"w": jnp.ones(3), "none": None}, {"w": make_gradients(20, (3,)), "none": None}
    points, averages = walk(nested(tx)[name], params, gradients)
    np.testing.assert_allclose(averages["w"][-1], oracle(points["w"], 0.9), rtol=1e-6)
    assert averages["none"] is None


@pytest.mark.parametrize("place", ["inside", "outside", "in a group"])
def test_masked_and_frozen_leaves(place):
    params = {"w": jnp.ones(3), "frozen": {"a": jnp.full(2, 7.0)}}
    labels = {"w": True, "frozen": {"a": False}}
    tx = {
        "inside": gdx.average_parameters(optax.masked(gdx.sgd(0.1), labels), None),
        "outside": optax.masked(gdx.average_parameters(gdx.sgd(0.1), None), labels),
        "in a group": gdx.groups(gdx.sgd(0.1), {"^w": gdx.average_parameters(gdx.sgd(0.1), None)}),
    }[place]
    tx = optax.chain(tx, optax.masked(optax.set_to_zero(), jax.tree.map(lambda x: not x, labels)))
    gradients = jax.tree.map(lambda p: make_gradients(20, p.shape), params)
    points, averages = walk(tx, params, gradients)
    np.testing.assert_allclose(averages["w"][-1], oracle(points["w"], None), rtol=1e-6)
    assert_same_bits(jax.tree.map(lambda x: x[-1], averages["frozen"]), params["frozen"])


def test_boxes_of_flax():
    model, points = nnx.Linear(2, 2, use_bias=False, rngs=nnx.Rngs(0)), []
    tx = gdx.watch(gdx.average_parameters(gdx.gradient_descent(0.5), None), 1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for _ in range(2):
        optimizer.update(model, jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param)))
        points.append(np.array(model.kernel[...]))
    params = nnx.state(model, nnx.Param)
    for like in (params, unboxed(params)):
        average = gdx.read_average(optimizer.opt_state, like)
        assert jax.tree.structure(average) == jax.tree.structure(like)
        np.testing.assert_allclose(*jax.tree.leaves(average), np.mean(points, axis=0), rtol=1e-6)
    watched = gdx.read_watch(optimizer.opt_state)
    assert isinstance(watched.step, jax.Array) and (watched.step, watched.gradient_norm) == (1, 2)


def test_complex_parameters():
    tx = gdx.average_parameters(gdx.sgd(0.1), 0.9)
    params = jnp.array([1 + 2j, 3 - 1j], jnp.complex64)
    gradients = jax.lax.complex(make_gradients(20, (2,)), make_gradients(20, (2,), 1))
    points, averages = walk(tx, params, gradients)
    assert averages.dtype == jnp.complex64
    for part in (np.real, np.imag):
        np.testing.assert_allclose(part(averages[-1]), oracle(part(points), 0.9), rtol=1e-6)


def test_double_precision():
    with enable_x64(True):
        tx = gdx.average_parameters(gdx.sgd(0.1), None)
        points, averages = walk(tx, jnp.ones(3, float), jnp.asarray(np.random.default_rng(0).standard_normal((50, 3))))
        assert averages.dtype == np.float64
        np.testing.assert_allclose(averages[-1], np.mean(points, axis=0), rtol=1e-15)


def test_a_batch_of_decays_in_train_and_sweep():
    def loss(theta, noise):
        return jnp.sum(0.5 * theta**2 + noise * theta)

    def make(decay):
        return gdx.average_parameters(gdx.sgd(0.1), decay, dtype=SignedFourthRoot8(block=8, minimum_size=1))

    grid, noise, start = gdx.grid(make, decay=[0.5, 0.9, 0.99]), make_gradients(50, (4, 4)), jnp.ones((4, 4))
    swept = gdx.sweep(loss, grid, start, noise)
    assert [label["decay"] for label in swept.labels] == [0.5, 0.9, 0.99]
    trained = jax.vmap(lambda tx: gdx.train(loss, tx, start, noise))(grid)
    assert_same_bits(trained.params, swept.final)
    averages = gdx.read_average(trained.state, trained.params)
    for i, tx in enumerate(gdx.unstack(grid)):
        alone = gdx.train(loss, tx, start, noise)
        np.testing.assert_allclose(averages[i], gdx.read_average(alone.state, alone.params), rtol=1e-6)


def test_is_a_value_with_the_numbers_of_both():
    schedule = gdx.schedules.linear_schedule(0.0, 0.5, 10)
    tx = gdx.average_parameters(gdx.sgd(gdx.schedules.linear_schedule(1.0, 0.0, 4)), schedule)
    assert tx.replace(tx=gdx.sgd(0.1), decay=0.9) == gdx.average_parameters(gdx.sgd(0.1), 0.9)
    assert (
        repr(gdx.average_parameters(gdx.sgd(0.1), None)) == "average_parameters(tx=sgd(learning_rate=0.1), decay=None)"
    )
    state = tx.init(jnp.ones(2))
    _, state = tx.update(jnp.ones(2), state, jnp.ones(2))
    used = gdx.hyperparams_in_use(tx, state)
    assert {"learning_rate": 0.75, "decay": 0.05}.items() <= {k: round(float(v), 6) for k, v in used.items()}.items()


# Machines.


@both_kinds
@pytest.mark.parametrize("dtype", [None, SignedFourthRoot8(block=64, minimum_size=1)], ids=str)
@pytest.mark.parametrize("every", [1, 2])
def test_split_over_a_mesh(kind, dtype, every, tmp_path):
    shapes = {"w": (16, 64), "odd": (7,)}
    params = {name: make_gradients(1, shape)[0] for name, shape in shapes.items()}
    tx = gdx.average_parameters(gdx.adamw(1e-2), 0.9, every=every, dtype=dtype)
    mesh = make_mesh(8, kind)
    sharded = gdx.sharding.shard_state(tx, mesh)

    def run(tx, params, gradients):
        state = tx.init(params)
        for g in gradients:
            params, state = jax.jit(one_step, static_argnums=())(tx, params, state, g)
        return params, state

    gradients = [{name: make_gradients(1, shape, i)[0] for name, shape in shapes.items()} for i in range(5)]
    on_mesh = put(params, mesh)
    end, state = run(sharded, on_mesh, [put(g, mesh) for g in gradients])
    expected_end, expected = run(tx, params, gradients)
    held = jax.tree.leaves(state.mean.average["w"])[0]
    assert held.sharding.shard_shape((16, 64)) == (2, 64)
    average = gdx.read_average(state, end)
    assert_same_bits(
        jax.device_get((end, average)), jax.device_get((expected_end, gdx.read_average(expected, expected_end)))
    )
    assert average["w"].sharding.is_equivalent_to(end["w"].sharding, 2)
    compiled = jax.jit(gdx.read_average)(state, end)
    assert_same_bits(jax.device_get(compiled), jax.device_get(average))

    # saved from eight devices, restored onto one
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, sharded, end, state)
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(tx, expected_end, expected)
    assert_same_bits(jax.device_get(restored.state), jax.device_get(expected))


# What is refused.


def test_errors():
    params = {"w": jnp.ones(3)}
    tx = gdx.average_parameters(gdx.sgd(0.1), 0.9)
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"average_parameters: update needs the parameters; call update\(gradients"):
        tx.update(params, state)
    with pytest.raises(TypeError, match=r"average_parameters: tx is 0\.999; expected a transform"):
        gdx.average_parameters(0.999)
    with pytest.raises(
        TypeError, match=r"average_parameters: the state is .* expected AverageState\(total, rest, weight, "
    ):
        tx.update(params, gdx.sgd(0.1).init(params), params)
    with pytest.raises(ValueError, match=r"read_average: the state has no average; expected"):
        gdx.read_average(gdx.adamw(0.1).init(params), params)
    for several in (gdx.chain(tx, tx), gdx.average_parameters(tx, None)):
        with pytest.raises(ValueError, match=r"read_average: the state has 2 averages; expected that of one"):
            gdx.read_average(several.init(params), params)
    for other in ({"w": jnp.ones(2)}, {"v": jnp.ones(3)}, jnp.ones(3)):
        with pytest.raises(ValueError, match=r"read_average: params has leaves at .*, unlike the average"):
            gdx.read_average(state, other)
    for dtype in ("complex64", "int32", bool, "float16", "float8_e5m2", "f3"):
        with pytest.raises(
            (TypeError, ValueError), match=r"dtype is .*; expected .*StochasticBfloat16\(\), a dtype of 32"
        ):
            gdx.average_parameters(gdx.sgd(0.1), dtype=dtype)
    assert isinstance(state, AverageState)


# Theory.


def test_the_mean_has_the_least_error_that_there_is():
    """Polyak & Juditsky 1992, theorem 1: n E|mean|^2 -> tr(H^-1 S H^-1), for any rate; not so the last parameters."""
    random = np.random.default_rng(0)
    q, _ = np.linalg.qr(random.standard_normal((4, 4)))
    hessian = q @ np.diag([0.3, 0.7, 1.0, 2.0]) @ q.T
    root = random.standard_normal((4, 4)) / 2  # of the covariance of the gradients
    inverse = np.linalg.inv(hessian)
    limit = np.trace(inverse @ root @ root.T @ inverse)
    h, r = (jnp.asarray(x.astype("float32")) for x in (hessian, root))

    def loss(theta, key):
        noise = r @ jax.random.normal(key, (4,))
        return 0.5 * theta @ h @ theta + noise @ theta

    def errors(tx, steps, key):
        params, state, *_ = gdx.train(loss, tx, jnp.zeros(4), jax.random.split(key, steps))
        return jnp.sum(gdx.read_average(state, params) ** 2), jnp.sum(params**2)

    keys, last = jax.random.split(jax.random.key(0), 2000), {}
    for rate in (0.1, 0.4):
        tx = gdx.average_parameters(gdx.sgd(rate), None, start=200)
        for n in (500, 2000):
            mean, end = map(np.asarray, jax.jit(jax.vmap(lambda key: errors(tx, 200 + n, key)))(keys))  # noqa: B023
            # exactly, for a start at random from where the walk settles; the correction falls as 1 / n
            expected = exact_error(hessian, root @ root.T, rate, n)
            sampling = np.std(mean) / np.sqrt(len(keys))
            assert abs(np.mean(mean) - expected) < 4 * sampling
            assert abs(expected * n / limit - 1) < 60 / (rate * n)
            last[rate] = np.mean(end)
            assert np.mean(mean) < 0.2 * np.mean(end)
    assert last[0.4] > 3 * last[0.1]


def exact_error(hessian, noise, rate, n):
    """The mean square of the mean of n points of x' = (1 - rate H) x + rate xi, in its stationary state."""
    step = np.eye(len(hessian)) - rate * hessian
    size = len(hessian)
    covariance = np.linalg.solve(np.eye(size**2) - np.kron(step, step), rate**2 * noise.ravel()).reshape(size, size)
    total, power = n * np.trace(covariance), np.eye(size)
    for lag in range(1, n):
        power = step @ power
        total += 2 * (n - lag) * np.trace(power @ covariance)
    return total / n**2


def test_scan_is_used_as_the_tables():
    """The contract's own walk gives the same parameters with and without the average."""
    tx, params, g = gdx.adamw(1e-2), jnp.ones(5), make_gradients(30, (5,))
    assert_same_bits(jax.jit(scan)(gdx.average_parameters(tx), params, g), jax.jit(scan)(tx, params, g))
