"""The loss around parameters, where it is known: quadratics, and networks that compute the same at another scale."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gdx import landscape
from gdx.compat import enable_x64
from tests.contract.table import tree

PARAMS = tree()


def bowl(params):
    return jnp.sum(params["w"] ** 2) + 3 * jnp.sum(params["b"] ** 2) + params["s"] * params["b"][0]


def metrics(params):
    return {"loss": bowl(params), "bias": params["b"]}


def test_a_line_is_the_function_at_each_point():
    start, end, positions = tree(0), tree(1), np.linspace(-0.5, 1.5, 7)
    found = landscape.line(bowl, start, end, positions, chunk_size=3)
    points = [jax.tree.map(lambda a, b: (1 - t) * a + t * b, start, end) for t in positions.tolist()]  # noqa: B023
    np.testing.assert_allclose(found, [bowl(point) for point in points], rtol=1e-5)
    np.testing.assert_allclose(landscape.line(bowl, start, end, [0.0]), [bowl(start)], rtol=0)


@pytest.mark.parametrize("chunk_size", [1, 4, 100, None])
def test_a_plane_has_rows_of_y_and_columns_of_x(chunk_size):
    directions = tree(1), tree(2)
    x, y = np.array([-1.0, 0.0, 0.5, 2.0]), np.array([0.0, 1.0, 3.0])
    found = landscape.plane(metrics, PARAMS, directions, x, y, chunk_size=chunk_size)
    assert found["loss"].shape == (3, 4) and found["bias"].shape == (3, 4, 7)
    for row, b in enumerate(y.tolist()):
        for column, a in enumerate(x.tolist()):
            point = jax.tree.map(lambda p, d, e: p + a * d + b * e, PARAMS, *directions)  # noqa: B023
            np.testing.assert_allclose(found["loss"][row, column], bowl(point), rtol=1e-5)
            np.testing.assert_allclose(found["bias"][row, column], point["b"], rtol=1e-5)


def test_one_compile_for_all_points_and_parameters():
    traces = []

    def counted(params):
        traces.append(1)
        return bowl(params)

    for seed in range(3):
        landscape.line(counted, tree(seed), tree(seed + 1), np.linspace(0, seed, 8))
    assert len(traces) <= 2  # lax.map itself may trace the function for the chunks and the rest
    once = len(traces)
    landscape.line(counted, tree(5), tree(6), np.linspace(-1, 1, 8))
    assert len(traces) == once


def test_memory_is_bounded_by_the_chunk():
    """A thousand points of a million numbers: the program's own buffers hold a few copies of the parameters."""
    params = jax.ShapeDtypeStruct((1_000_000,), np.float32)
    points = jax.ShapeDtypeStruct((1000, 1), np.float32)

    def size(chunk):
        lowered = landscape._measured.lower(lambda p: jnp.sum(jnp.sin(p)), chunk, params, (params,), points)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    assert size(2) < 5 * 4e6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_dtypes_keep_theirs(dtype):
    with enable_x64(dtype == "float64"):
        seen = []

        def measure(params):
            seen.append({leaf.dtype.name for leaf in jax.tree.leaves(params)})
            return params["w"][0, 0]

        start, end = tree(0, dtype), tree(1, dtype)
        middle = landscape.line(measure, start, end, [0.5])[0]
        landscape.plane(measure, start, (start, end), [0.5], [0.5])
        assert seen == [{dtype}] * len(seen)
        exact = (np.asarray(start["w"], float) + np.asarray(end["w"], float))[0, 0] / 2
        np.testing.assert_allclose(np.asarray(middle, float), exact, rtol=float(jnp.finfo(dtype).eps))


def network(params, inputs):
    return jax.nn.relu(inputs @ params["in"]) @ params["out"]


def test_filters_are_as_long_as_the_parameters():
    params = {"conv": jnp.asarray(np.random.default_rng(0).standard_normal((3, 3, 2, 5)), jnp.float32), **PARAMS}
    params["conv"] = params["conv"].at[..., 1].set(0)
    d = landscape.filter_normalised_direction(jax.random.key(0), params)
    lengths = np.linalg.norm(np.asarray(d["conv"]).reshape(-1, 5), axis=0)
    np.testing.assert_allclose(lengths, np.linalg.norm(np.asarray(params["conv"]).reshape(-1, 5), axis=0), rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(d["w"], axis=0), np.linalg.norm(params["w"], axis=0), rtol=1e-5)
    assert lengths[1] == 0 and not np.any(d["b"]) and not np.any(d["s"])
    other = landscape.filter_normalised_direction(jax.random.key(1), params)
    assert not np.allclose(d["w"], other["w"])


def test_filter_normalised_slices_do_not_see_the_scale_of_layers():
    """Doubling one layer and halving the next changes no output, and no such slice; a plain direction's it does."""
    random = np.random.default_rng(0)
    params = {"in": jnp.asarray(random.standard_normal((4, 6)), jnp.float32)}
    params["out"] = jnp.asarray(random.standard_normal((6, 2)), jnp.float32)
    scaled = {"in": params["in"] * 8, "out": params["out"] / 8}
    inputs = jnp.asarray(random.standard_normal((20, 4)), jnp.float32)
    targets = network(params, inputs)

    def loss(params):
        return jnp.mean((network(params, inputs) - targets) ** 2)

    def rises(direction):
        return [
            landscape.random_rise(loss, p, jax.random.key(0), 0.3, direction=direction).mean for p in (params, scaled)
        ]

    one, other = rises(landscape.filter_normalised_direction)
    np.testing.assert_allclose(one, other, rtol=1e-4)
    one, other = rises(landscape.normal_direction)
    assert other > 3 * one


@pytest.mark.parametrize("slope", [0.0, 100.0])
def test_random_sharpness_is_half_the_trace(slope):
    """At any point of a quadratic: the mirrored pairs take out the slope, and with it its variance."""
    curvature = jnp.asarray(np.geomspace(0.1, 10, 50), jnp.float32)

    def quadratic(theta):
        return 0.5 * jnp.sum(curvature * theta**2) + slope * jnp.sum(theta)

    found = landscape.random_rise(
        quadratic, jnp.zeros(50), jax.random.key(1), 0.1, direction=landscape.normal_direction, samples=400
    )
    expected = 0.5 * 0.01 * np.sum(curvature)
    # the variance of half a weighted sum of squares of normal numbers
    exact_error = np.sqrt(np.sum(np.asarray(curvature) ** 2) / 2) * 0.01 / np.sqrt(400)
    assert abs(found.mean - expected) < 5 * exact_error
    assert 0.7 * exact_error < found.error < 1.3 * exact_error


def test_random_sharpness_under_vmap_and_jit():
    stacked = jax.tree.map(lambda a, b: jnp.stack([a, b]), tree(0), tree(1))
    sharpness = lambda p: landscape.random_rise(bowl, p, jax.random.key(0), 0.1, samples=5, chunk_size=2)  # noqa: E731
    found = jax.jit(jax.vmap(sharpness))(stacked)
    np.testing.assert_allclose(found.mean, [sharpness(tree(0)).mean, sharpness(tree(1)).mean], rtol=1e-3)


def test_normal_directions_are_standard_normal():
    d = landscape.normal_direction(jax.random.key(0), {"a": jnp.zeros((100, 100), "bfloat16"), "b": jnp.zeros(10_000)})
    assert {leaf.dtype.name for leaf in jax.tree.leaves(d)} == {"float32"}
    values = np.stack([np.ravel(leaf) for leaf in jax.tree.leaves(d)])
    assert np.all(abs(values.mean(axis=1)) < 0.05) and np.all(abs(values.std(axis=1) - 1) < 0.05)
    assert abs(np.mean(values[0] * values[1])) < 0.05


KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: landscape.line(bowl, PARAMS, {"w": PARAMS["w"]}, [0.0]),
            r"line: start and end differ at \['b'\], \['s'\]; expected trees of one structure",
        ),
        (
            lambda: landscape.line(bowl, PARAMS, {**PARAMS, "b": jnp.zeros(1)}, [0.0]),
            r"line: start at \['b'\] has shape \(7,\), end \(1,\); expected trees of the same shapes",
        ),
        (lambda: landscape.line(bowl, [PARAMS], (PARAMS,), [0.0]), r"start and end differ in their containers"),
        (lambda: landscape.line(bowl, PARAMS, PARAMS, 0.5), r"line: positions has shape \(\); expected \(points,\)"),
        (lambda: landscape.line(bowl, PARAMS, PARAMS, []), r"line: positions has shape \(0,\); expected \(points,\)"),
        (
            lambda: landscape.line(bowl, PARAMS, PARAMS, [0.0], chunk_size=0),
            r"line: chunk_size is 0; expected an integer >= 1",
        ),
        (
            lambda: landscape.plane(bowl, PARAMS, (PARAMS, PARAMS["w"]), [0.0], [0.0]),
            r"plane: origin and direction 1 differ at",
        ),
        (
            lambda: landscape.plane(bowl, PARAMS, (PARAMS, PARAMS), [0.0], [[0.0]]),
            r"plane: y has shape \(1, 1\); expected \(points,\)",
        ),
        (
            lambda: landscape.random_rise(bowl, PARAMS, KEY, 0.0),
            r"random_rise: radius is 0\.0; expected more",
        ),
        (
            lambda: landscape.random_rise(bowl, PARAMS, KEY, float("nan")),
            r"random_rise: radius is nan; expected more",
        ),
        (
            lambda: landscape.random_rise(bowl, PARAMS, KEY, 0.1, samples=1),
            r"random_rise: samples is 1; expected an integer >= 2",
        ),
        (
            lambda: landscape.random_rise(bowl, PARAMS, KEY, 0.1, chunk_size=-1),
            r"random_rise: chunk_size is -1; expected an integer >= 1",
        ),
    ],
)
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=f"landscape.*{words}"):
        call()
