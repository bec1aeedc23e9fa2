"""Which dimension of a moment is split, and whose sharding it follows, from shapes alone; on which mesh it may be."""

import functools
import re

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import gdx

BLOCKS = {"block": 64, "minimum_size": 1}
EIGHT_BIT = {"mu_dtype": gdx.storage.SignedFourthRoot8(**BLOCKS), "nu_dtype": gdx.storage.FourthRoot8(**BLOCKS)}


@pytest.mark.parametrize(
    ("shape", "own", "expected"),
    [
        ((64, 512), P(), P("data")),
        ((3, 64, 512), P(), P(None, "data")),
        ((3, 64), P(), P(None, "data")),  # the last dimension, as no other will do
        ((64,), P(), P("data")),
        ((6, 7), P(), P()),
        ((), P(), P()),
        ((0, 64), P(), P(None, "data")),
        ((64, 512), P("data"), P("data")),  # split along the axis already
        ((64, 512), P(None, "model"), P("data", "model")),
        ((64, 512), P("model"), P("model", "data")),  # parts of 128 columns
        ((64, 256), P("model"), P(("model", "data"))),  # rather than narrow ones
        ((6, 256), P("model"), P("model", "data")),
        ((12, 7), P("model"), P("model")),
        ((64, 512), P(("model", "data")), P(("model", "data"))),
    ],
)
def test_the_dimension_that_is_split(shape, own, expected):
    mesh = AbstractMesh((4, 2), ("data", "model"))
    tx, p = gdx.scale_by_momentum(0.9), jax.ShapeDtypeStruct(shape, "float32")
    assert gdx.sharding.state_shardings(tx, p, mesh, specs=own).trace.spec == expected
    if shape:
        sharded = jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, own))
        assert gdx.sharding.state_shardings(tx, sharded, mesh).trace.spec == expected


@pytest.mark.parametrize("call", [gdx.sharding.state_shardings, gdx.describe])
@pytest.mark.parametrize(
    ("shape", "spec", "parts"),
    [
        ((6, 7), P("data"), "(4,)"),
        ((6, 7), P(("data", "model")), "(8,)"),
        ((64, 7), P("data", "model"), "(4, 2)"),
        ((64, 8), P("data", None, "model"), "(4, 1, 2)"),
        ((), P("data"), "(4,)"),
    ],
)
def test_a_spec_that_does_not_divide_its_parameter(call, shape, spec, parts):
    mesh = AbstractMesh((4, 2), ("data", "model"))
    even, bare = jax.ShapeDtypeStruct((8, 8), "float32"), jax.ShapeDtypeStruct(shape, "float32")
    cases = [(bare, {"even": P(), "w": spec})]
    if len(spec) <= len(shape):  # JAX makes no other array
        cases.append((jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, spec)), None))
    words = f"the parameter at ['w'] has the shape {shape}, which {spec} does not divide: into {parts} parts"
    for p, specs in cases:
        with pytest.raises(ValueError, match=re.escape(f"{call.__name__}: {words}")):
            call(gdx.adam(0.1), {"even": even, "w": p}, mesh, specs=specs)


def test_a_moment_follows_the_parameter_of_the_longest_path():
    """Not the other one of the same name and shape."""
    params = {"w": jax.ShapeDtypeStruct((64, 256), "float32")}
    specs = {"w": P("model"), "block": {"w": P(None, "model")}}
    mesh = AbstractMesh((4, 2), ("data", "model"))
    found = gdx.sharding.state_shardings(gdx.scale_by_momentum(0.9), {**params, "block": params}, mesh, specs=specs)
    assert found.trace["w"].spec == P(("model", "data"))
    assert found.trace["block"]["w"].spec == P("data", "model")


def test_an_axis_of_one_device_splits_nothing():
    """A parameter that only such an axis splits is split on its first dimension, as any."""
    tx, p = gdx.scale_by_momentum(0.9), jax.ShapeDtypeStruct((64, 512), "float32")
    found = gdx.sharding.state_shardings(tx, p, AbstractMesh((4, 1), ("data", "model")), specs=P("model"))
    assert found.trace.spec == P(("model", "data"))


@pytest.mark.parametrize(
    ("shape", "own", "codes", "scales"),
    [
        ((3, 512), P(), P(None, "data"), P(None, "data")),  # two blocks on each device
        ((3, 320), P(), P(), P()),  # 80 columns are no whole blocks
        ((3, 500), P(), P(), P()),
        ((4, 80), P(), P("data"), P("data")),
        ((4, 192), P(None, "model"), P("data", "model"), P("data")),  # the parameter's own split cuts a block
    ],
)
def test_codes_and_scales_agree(shape, own, codes, scales):
    mesh = AbstractMesh((4, 2), ("data", "model"))
    tx, p = gdx.adam(0.1, **EIGHT_BIT), jax.ShapeDtypeStruct(shape, "float32")
    found = gdx.sharding.state_shardings(tx, p, mesh, specs=own)[0]
    assert [(moment.codes.spec, moment.scales.spec) for moment in (found.mu, found.nu)] == [(codes, scales)] * 2


def test_rows_and_columns_follow_any_split():
    """Scales that a split cuts are on every device along it."""
    mesh = AbstractMesh((4, 2), ("data", "model"))
    tx = gdx.scale_by_adam(mu_dtype=gdx.storage.SignedFourthRoot8(block=None, axis=None))
    cases = {
        ((64, 256), P()): (P("data"), (P("data"), P())),
        ((64, 256), P(None, "model")): (P("data", "model"), (P("data"), P(None, "model"))),
        ((66, 256), P()): (P(None, "data"), (P(), P(None, "data"))),
        ((4096, 32), P()): (P("data"), P()),  # columns alone
    }
    for (shape, own), (codes, scales) in cases.items():
        p = jax.ShapeDtypeStruct(shape, "float32")
        found = gdx.sharding.state_shardings(tx, p, mesh, specs=own).mu
        assert found.codes.spec == codes
        assert jax.tree.map(lambda s: s.spec, found.scales) == scales


def mesh_of(devices, *kinds):
    return jax.sharding.Mesh(np.array(devices), ("data", "model")[: len(kinds)], axis_types=kinds)


def params_on(mesh):
    return jax.device_put({"w": np.ones((16, 64), "float32")}, NamedSharding(mesh, P()))


AUTOMATIC = mesh_of(jax.devices(), AxisType.Auto)
EXPLICIT = mesh_of(jax.devices(), AxisType.Explicit)
REVERSED = mesh_of(jax.devices()[::-1], AxisType.Auto)


@pytest.mark.parametrize("specs", [None, P()], ids=["no specs", "specs"])
@pytest.mark.parametrize(
    ("theirs", "mesh", "words"),
    [
        (REVERSED, AUTOMATIC, r"whose device number 0 is \S*[:_]0, not \S*[:_]7"),
        (EXPLICIT, AUTOMATIC, ""),
        (AUTOMATIC, EXPLICIT, ""),
    ],
    ids=["order", "explicit", "automatic"],
)
def test_parameters_on_a_mesh_that_looks_alike(theirs, mesh, words, specs):
    """Refused before anything is computed: arrays of both could never be used together."""
    params = params_on(theirs)
    tx = gdx.sharding.shard_state(gdx.adam(0.1), mesh, specs=specs)
    state = tx.init(params_on(mesh))
    both = re.escape(f"{theirs}, expected on {mesh}")
    words = rf"the parameter at \['w'\] is on {both}.*{words}.*jax\.device_put\(params"
    for call in (tx.init, functools.partial(tx.update, params, state)):
        with pytest.raises(ValueError, match=f"shard_state: {words}"):
            call(params)
    with pytest.raises(ValueError, match=f"state_shardings: {words}"):
        gdx.sharding.state_shardings(tx, params, mesh, specs=specs)
    if theirs is not REVERSED:  # which a tracer does not show
        with pytest.raises(ValueError, match=r"the parameter at \['w'\] is on .*expected on"):
            jax.jit(tx.init)(params)
    tx.init(jax.device_put(params, NamedSharding(mesh, P())))  # as the error says


@pytest.mark.parametrize("theirs", [REVERSED, mesh_of(jax.devices()[:4], AxisType.Auto), None])
@pytest.mark.parametrize("what", ["gradient", "state"])
def test_gradients_and_state_on_other_devices(what, theirs):
    params, tx = params_on(AUTOMATIC), gdx.sharding.shard_state(gdx.adam(0.1), AUTOMATIC)
    state = tx.init(params)
    elsewhere = jax.devices()[3] if theirs is None else NamedSharding(theirs, P())
    given = {"gradient": params, "state": state}
    given[what] = jax.device_put(given[what], elsewhere)
    path = {"gradient": r"\['w'\]", "state": r"\[0\]\.count"}[what]
    with pytest.raises(ValueError, match=rf"shard_state: the {what} at {path} is on .*, expected on .*jax\.device_put"):
        tx.update(given["gradient"], given["state"], params)
    # as the error says
    back = {"gradient": NamedSharding(AUTOMATIC, P()), "state": gdx.sharding.state_shardings(tx, params, AUTOMATIC)}
    given[what] = jax.device_put(given[what], back[what])
    tx.update(given["gradient"], given["state"], params)


def test_gradients_on_the_same_devices_may_be_on_a_mesh_with_other_axes():
    params, tx = params_on(AUTOMATIC), gdx.sharding.shard_state(gdx.adam(0.1), AUTOMATIC)
    other = mesh_of(np.reshape(jax.devices(), (4, 2)), AxisType.Auto, AxisType.Auto)
    gradients = jax.device_put(params, NamedSharding(other, P("model")))
    found, expected = (tx.update(g, tx.init(params), params)[0] for g in (gradients, params))
    np.testing.assert_array_equal(found["w"], expected["w"])


def test_the_axes_of_an_abstract_mesh_may_have_any_type():
    params, tx = params_on(EXPLICIT), gdx.adam(0.1)
    found = gdx.describe(tx, params, AbstractMesh((8,), ("data",)))
    assert found == gdx.describe(tx, params, EXPLICIT)


def test_inside_shard_map_over_another_axis():
    """There that axis is manual, and the parameters are still on the mesh."""
    mesh = mesh_of(np.reshape(jax.devices(), (4, 2)), AxisType.Auto, AxisType.Auto)
    tx, params = gdx.sharding.shard_state(gdx.momentum(0.1, 0.9), mesh), params_on(mesh)

    def updates(tx, params):
        return tx.update(params, tx.init(params), params)[0]

    part = functools.partial(updates, tx)
    part = jax.shard_map(part, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={"model"}, check_vma=False)
    np.testing.assert_array_equal(jax.jit(part)(params)["w"], updates(tx.tx, params)["w"])
