"""Checkpoints in part: the parameters alone, some of them, and what Orbax alone reads and writes."""

import functools
import re
import shutil

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import gdx
from gdx.checkpoint import CheckpointError, Checkpoints
from gdx.compat import enable_x64
from tests.checkpoint.test_checkpoints import copied, on, some_steps
from tests.contract.table import assert_same_bits

# keys as of torch, haiku and nobody
MODEL = {
    "layers": [{"w": jnp.full((8, 2), float(i)), "b": jnp.full(2, i + 0.5)} for i in range(3)],
    "norm.scale": jnp.full(2, 7.0),
    "mlp/~/linear": {"w": jnp.full((8, 2), 8.0)},
    "head[1]": {"w": jnp.full((8, 2), 9.0), "b": jnp.full(2, 9.5)},
}
PATHS = [
    *("head[1]/b", "head[1]/w", "layers/0/b", "layers/0/w", "layers/1/b", "layers/1/w", "layers/2/b", "layers/2/w"),
    *("mlp/~/linear/w", "norm.scale"),
]


@pytest.fixture
def saved(checkpoints):
    tx = gdx.adam(0.1)
    checkpoints.save(1, tx, MODEL, tx.init(MODEL), extra={"epoch": 4})
    checkpoints.wait()
    return checkpoints


def zeros(tree):
    return jax.tree.map(jnp.zeros_like, tree)


def test_parameters_alone_on_any_mesh(saved):
    targets = [zeros(MODEL), on((2,), zeros(MODEL)), jax.eval_shape(lambda: MODEL)]
    saved.save(2, optax.identity(), zeros(MODEL), ())
    for target in targets:
        found = saved.restore_params(target, step=1)
        assert (found.step, found.extra, found.skipped, found.unread) == (1, {"epoch": 4}, (), ())
        assert_same_bits(found.params, MODEL)
        if isinstance(jax.tree.leaves(target)[0], jax.Array):
            assert jax.tree.map(lambda x: x.sharding, found.params) == jax.tree.map(lambda x: x.sharding, target)
    assert_same_bits(saved.restore_params(zeros(MODEL)).params, zeros(MODEL))


@pytest.mark.parametrize(
    ("skip", "at"),
    [
        (["^head"], {0, 1}),
        (["b$"], {0, 2, 4, 6}),
        ([r"layers/[12]/", "norm"], {4, 5, 6, 7, 9}),
        (["w", r"^head\[1\]/b$"], {0, 1, 3, 5, 7, 8}),
    ],
    ids=str,
)
def test_what_a_pattern_matches_stays(skip, at, saved):
    target = jax.tree.map(lambda x: -x - 1, MODEL)
    # of another shape and dtype, and in a tree of other containers
    target["head[1]"] = {"w": jnp.ones((8, 5), "bfloat16"), "b": jnp.ones(5)} if at >= {0, 1} else target["head[1]"]
    found = saved.restore_params(target, skip=iter(skip))
    assert jax.tree.structure(found.params) == jax.tree.structure(target)
    assert found.skipped == found.unread == tuple(PATHS[i] for i in sorted(at))
    for i, (got, kept, old) in enumerate(zip(*map(jax.tree.leaves, (found.params, target, MODEL)))):
        assert (got is kept) if i in at else bool(jnp.all(got == old) and got.dtype == old.dtype)


def test_fewer_layers_are_not_read_and_this_is_said(saved):
    found = saved.restore_params({"layers": zeros(MODEL["layers"][:2])})
    assert found.skipped == ()
    assert found.unread == ("head[1]/b", "head[1]/w", "layers/2/b", "layers/2/w", "mlp/~/linear/w", "norm.scale")
    assert_same_bits(found.params, {"layers": MODEL["layers"][:2]})


def changed(change):
    model = zeros(MODEL)
    change(model)
    return model


OTHER_MODELS = {
    "head": (lambda m: m.update({"head[1]": {"w": jnp.ones((8, 5)), "b": jnp.ones(5)}}), {"^head\\[1\\]/"}),
    "head's bias": (lambda m: m["head[1]"].update(b=jnp.ones(3)), {"^head\\[1\\]/b$"}),
    "more layers": (lambda m: m["layers"].extend(zeros(MODEL["layers"])), {f"^layers/{i}/" for i in (3, 4, 5)}),
    "a new scale": (lambda m: m.update({"norm.scale2": jnp.ones(2)}), {"^norm\\.scale2$"}),
    "dtype": (lambda m: m.update({"norm.scale": jnp.ones(2, "bfloat16")}), {"^norm\\.scale$"}),
    "several": (
        lambda m: m.update({"mlp/~/linear": {"w": jnp.ones((8, 3)), "b": jnp.ones(3)}, "x": {"y": jnp.ones(1)}}),
        {"^mlp/", "^x/"},
    ),
}


@pytest.mark.parametrize("which", OTHER_MODELS)
def test_another_model_is_taken_as_its_error_says(which, saved):
    change, patterns = OTHER_MODELS[which]
    model, tx = changed(change), gdx.adam(0.1)
    advised = []
    for restore in (functools.partial(saved.restore, tx, state=tx.init(model)), saved.restore_params):
        with pytest.raises(CheckpointError) as error:
            restore(params=model)
        advised.append(eval(re.search(r"restore_params\(params, skip=(\[.*?'\])\)", str(error.value))[1]))
        assert ("Nothing is cast" in str(error.value)) == (which == "dtype")
    assert advised[0] == advised[1] and set(advised[0]) == patterns
    found = saved.restore_params(model, skip=advised[0])
    theirs, ours = (dict(zip_paths(tree)) for tree in (MODEL, model))
    unlike = [path for path, x in ours.items() if path not in theirs or not is_like(x, theirs[path])]
    assert found.skipped == tuple(unlike)
    for path, x in zip_paths(found.params):
        assert_same_bits(x, ours[path] if path in unlike else theirs[path])
    # half of the advice leaves the other half, and what was said before stays said
    with pytest.raises(CheckpointError, match=re.escape(f"skip={['^layers/0/', *advised[0]]}")):
        saved.restore_params(model, skip=["^layers/0/"])
    with pytest.raises(CheckpointError, match="with arrays, not shapes, where that matches"):
        saved.restore_params(jax.eval_shape(lambda: model))


def zip_paths(tree):
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        yield "/".join(str(getattr(key, "key", getattr(key, "idx", None))) for key in path), x


def is_like(x, y):
    return (x.shape, x.dtype) == (y.shape, y.dtype)


def test_a_model_of_which_nothing_fits(saved):
    for model in ({"a": jnp.ones(3)}, jnp.ones(3), {"w": jnp.ones((8, 2)), "b": jnp.ones(3)}):
        with pytest.raises(CheckpointError, match=r"it has nothing at .*\. None of the parameters fits$"):
            saved.restore_params(model)
    cast = jax.tree.map(lambda x: x.astype("bfloat16"), MODEL)
    with pytest.raises(CheckpointError, match=r"ask for the saved dtype .*, and cast what comes back$"):
        saved.restore_params(cast)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"skip": "^head"}, TypeError, r"skip is '\^head'; expected a sequence of patterns, such as \['\^head'\]"),
        ({"skip": None}, TypeError, "skip is None; expected a sequence of patterns"),
        ({"skip": [3]}, TypeError, "the pattern 3 is no regular expression"),
        ({"skip": ["(b"]}, ValueError, r"the pattern '\(b' is no regular expression \(.*\); expected one such as"),
        (
            {"skip": ["b", "tail"]},
            ValueError,
            r"the pattern 'tail' matches no path of params; .*The paths are head.1./b",
        ),
        ({"skip": [""]}, ValueError, "nothing is left to be read"),
        *(
            ({"params": x}, TypeError, r"params is .* at the root; expected a tree of arrays or jax\.ShapeDtypeStructs")
            for x in (None, {}, 1, "run", gdx.adam(0.1), abs)
        ),
        ({"params": optax.adam(0.1)}, TypeError, r"params is <function .* at \.init; expected a tree of arrays"),
        ({"params": {"a": {"b": 1.0}, "a/b": 2.0}}, ValueError, "two leaves are called params/a/b"),
        ({"step": 7}, CheckpointError, r".* has no checkpoint of step 7; choose from 1$"),
        ({"step": 1.0}, TypeError, r"step is 1\.0; expected an integer"),
    ],
)
def test_what_restore_params_refuses(arguments, error, said, saved):
    with pytest.raises(error, match=f"restore_params: {said}"):
        saved.restore_params(**{"params": MODEL} | arguments)


def test_a_part_of_the_saved_parameters_is_found(saved):
    for part, at in (
        (MODEL["layers"][1], r"head\[1\], layers/0, layers/1 and others"),
        (MODEL["layers"], "layers"),
        (jnp.ones(()), None),
    ):
        said = f"They are like what it has at {at}: ask for it there, as in" if at else "None of the parameters fits$"
        with pytest.raises(CheckpointError, match=rf"^restore_params: .*\. {said}") as error:
            saved.restore_params(zeros(part))
        if at:
            found = eval(str(error.value).rpartition("restore_params")[2], {"params": part})
            found = jax.tree.leaves(saved.restore_params(found).params)
            assert_same_bits(found, jax.tree.leaves(MODEL["head[1]"] if "head" in at else part))


def test_what_stays_has_a_value(saved):
    gone = jnp.ones(2)
    gone.delete()
    for x in (jax.ShapeDtypeStruct((2,), "float32"), gone):
        with pytest.raises(ValueError, match=r"restore_params: norm.scale has no value that could stay; expected an"):
            saved.restore_params({**zeros(MODEL), "norm.scale": x}, skip=["norm"])


def test_other_arrays_than_those_saved_are_noticed_where_they_are_read(tmp_path):
    tx, params = gdx.sgd(0.1), {"a": jnp.ones(3), "b": jnp.ones(3)}
    for name, factor in (("first", 1.0), ("second", 2.0)):
        with Checkpoints(tmp_path / name) as checkpoints:
            checkpoints.save(1, tx, {**params, "b": params["b"] * factor}, ())
    shutil.rmtree(tmp_path / "first" / "1" / "arrays")
    shutil.copytree(tmp_path / "second" / "1" / "arrays", tmp_path / "first" / "1" / "arrays")
    with Checkpoints(tmp_path / "first") as checkpoints:
        with pytest.raises(CheckpointError, match="params/b is not what was saved"):
            checkpoints.restore_params(params)
        assert checkpoints.restore_params(params, skip=["b"]).skipped == ("b",)


def test_64_bits_are_not_cast_silently(checkpoints):
    with enable_x64(True):
        params = {"w": jnp.ones(3) / 3}
        checkpoints.save(1, optax.identity(), params, ())
        checkpoints.wait()
    for target in (jax.ShapeDtypeStruct((3,), np.float64), jnp.ones(3)):
        for restore in (checkpoints.restore_params, lambda params: checkpoints.restore(optax.identity(), params, ())):
            with pytest.raises(
                CheckpointError, match=r"w is float32\[3\], saved float64\[3\]\. .* by arrays of numpy\)"
            ):
                restore({"w": target})
    assert_same_bits(checkpoints.restore_params({"w": np.zeros(3)}).params, params)


@pytest.mark.parametrize("kind", ["links", "format", "nothing"])
def test_what_is_advised_for_another_state_works(kind, checkpoints):
    tx, params = gdx.adam(0.1), {"w": jnp.ones((8, 2))}
    state = tx.init(params)
    checkpoints.save(1, tx, params, state)
    other = {"links": gdx.sgd(0.1), "format": gdx.adam(0.1, mu_dtype="bfloat16"), "nothing": tx}[kind]
    for target in [None, (), {}] if kind == "nothing" else [other.init(params)]:
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(other, params, target)
        for said in (
            f"Restore with the optimizer that saved it, {tx!r}, onto what is like the saved state, such as",
            "where storage formats are all that differs, gdx.storage.convert(state, tx.init(params))",
            "Or go on with the parameters alone: restore_params(params)",
        ):
            assert said in str(error.value)
    assert_same_bits(checkpoints.restore_params(params).params, params)
    found = checkpoints.restore(tx, params, state).state
    if kind == "format":
        gdx.storage.convert(found, other.init(params))


def by_orbax(checkpoints):
    return ocp.PyTreeCheckpointer().restore(checkpoints.directory / str(checkpoints.steps[-1]) / "arrays")


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_orbax_alone_reads_by_the_names_of_the_tree(saved):
    found = by_orbax(saved)
    assert_same_bits(found["params"]["layers"]["2"]["w"], MODEL["layers"][2]["w"])
    assert_same_bits(found["params"]["norm.scale"], MODEL["norm.scale"])
    assert_same_bits(found["params"]["mlp"]["~"]["linear"]["w"], MODEL["mlp/~/linear"]["w"])
    assert found["state"]["0"]["nu"]["head[1]"]["w"].shape == (8, 2) and found["state"]["0"]["count"] == 0
    model = nnx.Linear(8, 2, rngs=nnx.Rngs(0))
    tx = gdx.adam(0.1, mu_dtype=gdx.storage.SignedFourthRoot8(block=8, minimum_size=1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    saved.save(2, tx, nnx.state(model), nnx.state(optimizer))
    saved.wait()
    found = by_orbax(saved)
    assert_same_bits(found["params"], nnx.to_pure_dict(nnx.state(model)))
    assert found["state"]["opt_state"]["0"]["mu"]["kernel"].keys() == {"codes", "scales"}
    # the names are the model's, with or without flax's boxes
    assert_same_bits(saved.restore_params(nnx.to_pure_dict(nnx.state(model))).params, found["params"])


@pytest.mark.parametrize(
    "params", [{"a": {"b": 1.0}, "a/b": 2.0}, {"a": {"b": 1.0}, "a.b": 2.0}, {"a": 1.0, "a/b": 2.0}], ids=str
)
def test_names_that_are_one_in_the_files_are_refused(params, checkpoints):
    with pytest.raises(ValueError, match=r"two leaves are called params/a.*; give the keys in its path texts that"):
        checkpoints.save(1, optax.identity(), params, ())
    assert checkpoints.steps == []


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_a_run_of_optax_is_taken_over_and_given_back(checkpoints, tmp_path):
    """From files that Orbax alone wrote, and to it again."""
    theirs, ours, params = optax.adamw(0.1), gdx.adamw(0.1), {"w": jnp.linspace(-1, 1, 16).reshape(8, 2)}
    at_three = some_steps(theirs, copied(params), theirs.init(params), range(3))
    ocp.PyTreeCheckpointer().save(tmp_path / "theirs", {"params": at_three[0], "opt_state": at_three[1]})
    found = ocp.PyTreeCheckpointer().restore(
        tmp_path / "theirs", item={"params": params, "opt_state": ours.init(params)}
    )
    checkpoints.save(3, ours, found["params"], found["opt_state"])
    _, params, state, _ = checkpoints.restore(ours, params, ours.init(params))
    assert_same_bits((params, state), at_three)
    taken_over, optax_alone = (some_steps(tx, *copied(at_three), range(3, 6)) for tx in (ours, theirs))
    assert_same_bits(some_steps(ours, params, state, range(3, 6)), taken_over)
    # optax rounds its corrections
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-6), taken_over, optax_alone)
    found = by_orbax(checkpoints)
    given_back = optax.ScaleByAdamState(**found["state"]["0"]), *theirs.init(params)[1:]
    assert_same_bits(some_steps(theirs, found["params"], given_back, range(3, 6)), optax_alone)
