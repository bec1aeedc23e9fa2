"""Which dimension of a moment is split, and whose sharding it follows: from shapes alone."""

import re

import jax
import pytest
from jax.sharding import AbstractMesh, NamedSharding
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


@pytest.mark.parametrize("call", [gdx.sharding.state_shardings, gdx.sharding.report])
@pytest.mark.parametrize("given", ["own", "specs"])
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
def test_a_spec_that_does_not_divide_its_parameter(call, given, shape, spec, parts):
    if given == "own" and len(spec) > len(shape):
        pytest.skip("JAX makes no such array")
    mesh = AbstractMesh((4, 2), ("data", "model"))
    sharding = NamedSharding(mesh, spec) if given == "own" else None
    params = {
        "even": jax.ShapeDtypeStruct((8, 8), "float32"),
        "w": jax.ShapeDtypeStruct(shape, "float32", sharding=sharding),
    }
    specs = None if given == "own" else {"even": P(), "w": spec}
    words = f"the parameter at ['w'] has the shape {shape}, which {spec} does not divide: into {parts} parts"
    words = f"{call.__name__}: {words}"
    with pytest.raises(ValueError, match=re.escape(words)):
        call(gdx.adam(0.1), params, mesh, specs=specs)


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
