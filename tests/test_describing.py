"""Who is where, in which format and in how many bytes, against a state that was made and paths matched by hand."""

import math
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AbstractMesh

import gdx
from gdx.storage import FourthRoot8, SignedFourthRoot8
from tests.sharded import EIGHT_BIT as BLOCKS
from tests.sharded import make_mesh, make_params, on_device, put

EIGHT_BIT = {"mu_dtype": SignedFourthRoot8(), "nu_dtype": FourthRoot8()}
LAYER = {"kernel": jnp.ones((64, 128)), "bias": jnp.ones(128), "norm": jnp.ones(128)}
MODEL = {"embed": jnp.ones((9, 8)), "layers": [LAYER] * 3, "old": jnp.ones((5, 5)), "head": jnp.ones((8, 9))}
CHANGES = {
    "bias|norm": {"weight_decay": 0.0},
    "^embed": {"learning_rate": gdx.times(0.1)},
    "^old": None,
    "head": gdx.sgd(0.5, momentum=0.9),
}
GROUPS = gdx.groups(gdx.adamw(1e-3, weight_decay=0.1, **EIGHT_BIT), CHANGES)


@pytest.mark.parametrize(
    "tx",
    [
        GROUPS,
        gdx.chain(gdx.value(optax.clip)(1.0), GROUPS),
        optax.chain(optax.clip(1.0), GROUPS),
        gdx.value(optax.MultiSteps)(GROUPS, 2),
        gdx.sharding.shard_state(GROUPS, jax.make_mesh((1,), ("data",))),
    ],
    ids=["alone", "chain", "of optax", "wrapped", "sharded"],
)
def test_groups_are_found_wherever_they_are(tx):
    paths = {jax.tree_util.keystr(p, simple=True, separator="/"): x.size for p, x in jax.tree.leaves_with_path(MODEL)}
    expected = {name: {} for name in (*CHANGES, "all others")}
    for path, size in paths.items():
        expected[next((name for name in CHANGES if re.search(name, path)), "all others")][path] = size
    found = gdx.describe(tx, MODEL).groups
    assert {g.name: (*g.paths, g.parameters) for g in found} == {
        n: (*of, sum(of.values())) for n, of in expected.items()
    }
    decayed, embed, old, head, others = found
    assert decayed.hyperparams == {"weight_decay": 0} and embed.hyperparams == {"learning_rate": pytest.approx(1e-4)}
    assert (decayed.text, embed.text, old.text) == ("weight_decay=0", "learning_rate=0.0001", "frozen")
    assert head.text == "sgd: learning_rate=0.5, momentum=0.9"
    assert others.hyperparams == dict(gdx.adamw(1e-3, weight_decay=0.1).hyperparams)


WHOLE = gdx.chain(gdx.adamw(gdx.schedules.cosine_decay_schedule(0.1, 9)), gdx.round_with_compensation())


@pytest.mark.parametrize(
    ("tx", "dtype", "moments"),
    [
        (gdx.adamw(1e-3), "float32", {"mu", "nu"}),
        (GROUPS, "float32", {"mu", "nu", "trace"}),
        (gdx.skip_spikes(gdx.average_parameters(WHOLE)), "bfloat16", {"mu", "nu", "average", "compensation"}),
        (gdx.chain(gdx.sgd(0.1, 0.9), gdx.round_with_master()), "bfloat16", {"trace", "master"}),
        (gdx.value(optax.lion)(1e-4), "float32", {"mu"}),
        (optax.adamw(1e-3), "float32", {"mu", "nu"}),
    ],
)
def test_moments_are_as_large_as_those_of_a_state(tx, dtype, moments):
    params = jax.tree.map(lambda p: p.astype(dtype), MODEL)
    found, state = gdx.describe(tx, params), tx.init(params)
    held = [(name, x) for name in moments for _, x in optax.tree.get_all_with_path(state, name)]
    expected = dict.fromkeys(moments, 0)
    for name, tree in held:
        expected[name] += sum(x.nbytes for x in jax.tree.leaves(tree))
    sizes = dict.fromkeys(moments, 0)
    for moment in found.moments:
        if moment.name != "scalars":
            sizes[moment.name] += moment.nbytes
    assert sizes == expected
    total = sum(x.nbytes for x in jax.tree.leaves(state))
    assert found.nbytes == total == sum(moment.nbytes for moment in found.moments)
    count = sum(p.size for p in jax.tree.leaves(params))
    assert sum(moment.nbytes_per_parameter for moment in found.moments) == pytest.approx(total / count)
    lines = repr(found).splitlines()
    assert len(lines) <= 25 and max(map(len, lines)) <= 120
    assert all(f"  {name} " in repr(found) for name in moments)


def test_formats_are_told_apart():
    found = gdx.describe(GROUPS, MODEL).moments
    kernels, small = 3 * 64 * 128, 3 * 2 * 128 + 9 * 8
    per_moment = (("storage.SignedFourthRoot8()", kernels * (1 + 4 / 128)), ("float32", 4 * small))
    assert [(m.format, m.nbytes) for m in found if m.name == "mu"] == [*reversed(per_moment)]


class Layer(NamedTuple):
    weight: jax.Array
    mu: jax.Array


def test_moments_are_told_from_attributes_of_parameters():
    params = Layer(jnp.ones((2, 3)), jnp.ones(()))
    found = gdx.describe(gdx.adam(0.1), [params]).moments
    assert [(m.name, m.nbytes) for m in found] == [("mu", 28), ("nu", 28), ("scalars", 4)]


def test_of_optax_without_names_and_of_nothing():
    found = gdx.describe(optax.adamw(1e-3), jnp.ones(3)).groups
    assert found == (("all", "", {}, ("the root",), 3),)
    assert gdx.describe(gdx.sgd(0.1), {}).nbytes_per_parameter == 0


def test_schedules_are_shown_as_their_text():
    rate = gdx.schedules.linear_schedule(1.0, 0.0, 8)
    assert gdx.describe(gdx.sgd(rate), jnp.ones(3)).groups[0].hyperparams == {"learning_rate": rate}
    assert f"learning_rate={rate}" in repr(gdx.describe(gdx.sgd(rate), jnp.ones(3)))


def test_a_batch_is_refused():
    batch = gdx.grid(gdx.adamw, learning_rate=[0.1, 0.2])
    with pytest.raises(ValueError, match=r"describe: tx is a batch of 2 optimizers; expected .* gdx\.unstack\(tx\)"):
        gdx.describe(batch, MODEL)
    with pytest.raises(TypeError, match=r"describe: tx is 0\.1; expected a transform"):
        gdx.describe(0.1, MODEL)


def test_it_counts_what_devices_hold():
    mesh, tx = make_mesh(), gdx.adamw(1e-2, **BLOCKS)
    params = put(make_params(), mesh)
    state = gdx.sharding.shard_state(tx, mesh).init(params)
    found = gdx.describe(tx, params, mesh)
    assert found.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert found.nbytes_per_device == on_device(state)
    for name in ("mu", "nu"):
        there = sum(moment.nbytes_per_device for moment in found.moments if moment.name == name)
        assert there == on_device(optax.tree.get(state, name))
    whole = [leaf.nbytes for leaf in jax.tree.leaves(state) if leaf.sharding.is_fully_replicated]
    assert found.nbytes_replicated == sum(whole)
    assert [p.nbytes for p in found.replicated] == sorted(whole, reverse=True)
    reasons = {p.path: p.why for p in found.replicated}
    assert reasons["[0].count"] == "a scalar"
    assert reasons["[0].mu['odd']"] == "no dimension of (7,) divides into 8"
    assert f": {found.nbytes_per_device:,} on each device, {found.nbytes_replicated:,} of them not split" in repr(found)


def test_it_says_why_blocks_are_not_cut():
    tx, p = gdx.adam(0.1, **BLOCKS), jax.ShapeDtypeStruct((3, 320), "float32")
    found = gdx.describe(tx, p, AbstractMesh((4,), ("data",)))
    reasons = {place.path: place.why for place in found.replicated}
    assert reasons["[0].mu.codes"] == "no dimension of (3, 320) divides into 4 parts of whole blocks"


def test_it_stays_short():
    params = [jax.ShapeDtypeStruct((7,), "float32")] * 500
    shown = repr(gdx.describe(gdx.adam(0.1), params, AbstractMesh((8,), ("data",))))
    assert len(shown.splitlines()) <= 20 and shown.endswith("\n  and 995 smaller ones")
    assert "in 0, 1, 2 and 497 more" in shown


PARAMS = {"w": (512, 8, 64), "b": (512,), "v": (64, 64), "s": ()}
LABELS = {"w": "adam", "b": "sgd", "v": "sgd", "s": "adam"}
TX = gdx.adamw(1e-3, **EIGHT_BIT)
MOMENTUM = gdx.sgd(0.1, 0.9, accumulator_dtype=EIGHT_BIT["mu_dtype"])
FEW, ONE = (f"{count} numbers, fewer than minimum_size=4096" for count in (512, 1))
OF_ADAM = {f"mu['{k}']": why for k, why in (("b", FEW), ("s", ONE))} | {"nu['b']": FEW, "nu['s']": ONE}


@pytest.mark.parametrize("mesh", [None, AbstractMesh((8,), ("data",))], ids=["no mesh", "mesh"])
@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (TX, OF_ADAM),
        (gdx.adamw(optax.constant_schedule(0.1), **EIGHT_BIT), OF_ADAM),
        (optax.chain(optax.clip(1.0), TX, gdx.round_stochastically()), OF_ADAM),
        (gdx.value(optax.MultiSteps)(TX, every_k_schedule=2), OF_ADAM),
        (gdx.sharding.shard_state(TX, jax.make_mesh((1,), ("data",))), OF_ADAM),
        (optax.masked(TX, {name: name in "wv" for name in PARAMS}), {}),
        (gdx.chain(optax.masked(TX, {name: name != "b" for name in PARAMS})), {"mu['s']": ONE, "nu['s']": ONE}),
        (optax.partition({"adam": TX, "sgd": MOMENTUM}, LABELS), {"mu['s']": ONE, "nu['s']": ONE, "trace['b']": FEW}),
        (gdx.adamw(1e-3), {}),
        (
            gdx.adamw(1e-3, mu_dtype="bfloat16", nu_dtype=FourthRoot8()),
            {k: v for k, v in OF_ADAM.items() if k[0] == "n"},
        ),
        # the first of two moments of one name is held in another format
        (gdx.chain(gdx.scale_by_adam(nu_dtype=FourthRoot8(minimum_size=512)), TX), {"nu['s']": "1 numbers"} | OF_ADAM),
    ],
)
def test_it_says_what_stays_whole(tx, expected, mesh):
    params = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in PARAMS.items()}
    found = gdx.describe(tx, params, mesh)
    assert gdx.describe(tx, params, mesh) == found  # from nothing that was traced before
    whys = {place.path.rpartition(".")[2]: place.why_whole for place in found.whole}
    assert whys.keys() == expected.keys()
    assert all(whys[name].startswith(why) for name, why in expected.items())
    assert all(why in repr(found) for why in expected.values())
    count = sum(map(math.prod, PARAMS.values()))
    state = jax.eval_shape(tx.init, params)
    assert found.nbytes == sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    assert found.nbytes_per_parameter == found.nbytes / count
    if mesh is None:
        assert found.nbytes_per_device == found.nbytes
        assert f"state of {found.nbytes:,} bytes, {found.nbytes / count:.3f} per parameter\n" in repr(found)
