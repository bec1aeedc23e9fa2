"""Checkpoints that come back bit for bit, on any mesh, or not at all."""

import builtins
import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from gdx.checkpoint import CheckpointError, Checkpoints
from gdx.checkpoint.describe import kind
from gdx.checkpoint.manifest import is_key
from gdx.compat import enable_x64
from gdx.extra import MissingExtra
from tests.contract.table import assert_same_bits

PARAMS = {"w": jnp.linspace(-1, 1, 64 * 256).reshape(64, 256), "b": jnp.ones(16)}


def on(mesh_shape: tuple[int, ...], tree, kind="Auto"):
    """The tree on a mesh of the first devices, split along its leading axis, scalars on all of them."""
    names = ("data", "model")[: len(mesh_shape)]
    mesh = jax.make_mesh(
        mesh_shape,
        names,
        axis_types=(jax.sharding.AxisType[kind],) * len(names),
        devices=jax.devices()[: int(np.prod(mesh_shape))],
    )
    return jax.tree.map(lambda x: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*names[: x.ndim]))), tree)


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@functools.cache
def advance(tx):
    def advance(params, state, step):
        gradients = jax.tree.map(lambda p: p + 0.1 * jnp.sin(p * step.astype(p.dtype)), params)
        with jax.numpy_dtype_promotion("standard"):  # for optax
            updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(advance, donate_argnums=(0, 1))


def some_steps(tx, params, state, steps):
    for step in steps:
        params, state = advance(tx)(params, state, jnp.int32(step))
    return params, state


def constant(step):
    return 0.01


def copied(tree):
    return jax.tree.map(jnp.copy, tree)


@pytest.mark.parametrize(
    "tx",
    [
        gdx.adamw(gdx.schedules.cosine_decay_schedule(0.1, decay_steps=9), mu_dtype="bfloat16"),
        gdx.adam(0.01, mu_dtype=gdx.storage.SignedFourthRoot8(), nu_dtype=gdx.storage.FourthRoot8()),
        gdx.chain(optax.clip_by_global_norm(1.0), gdx.sgd(0.1, 0.9), gdx.round_with_compensation()),
        optax.adamw(0.01),
    ],
    ids=kind,
)
@pytest.mark.parametrize("meshed", [False, True])
def test_training_goes_on_bit_for_bit(tx, meshed, checkpoints):
    params = on((8,), PARAMS) if meshed else copied(PARAMS)
    params, state = some_steps(tx, params, jax.jit(tx.init)(params), range(3))
    checkpoints.save(3, tx, params, state, extra={"seed": 1, "epochs": [0.5]})
    expected = some_steps(tx, params, state, range(3, 6))  # donates what is being written
    params = on((8,), PARAMS) if meshed else copied(PARAMS)
    step, params, state, extra = checkpoints.restore(tx, params, tx.init(params))
    assert (step, extra) == (3, {"seed": 1, "epochs": [0.5]})
    assert_same_bits(some_steps(tx, params, state, range(3, 6)), expected)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_from_mesh_to_mesh(kind, checkpoints):
    # over meshes of other shapes and sizes, and back
    tx = gdx.sgd(0.01, 0.9, accumulator_dtype=gdx.storage.SignedFourthRoot8(block=64))
    start = some_steps(tx, copied(PARAMS), tx.init(PARAMS), range(3))
    run = on((8,), start, kind)
    for step, shape in enumerate([(4,), (1,), (2, 4), (8,)]):
        checkpoints.save(step, tx, *run)
        targets = abstract(on(shape, start, kind))
        run = checkpoints.restore(tx, *targets)[1:3]
        assert_same_bits(run, start)
        assert [x.sharding for x in jax.tree.leaves(run)] == [x.sharding for x in jax.tree.leaves(targets)]


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_blocks_of_several_axes_go_from_mesh_to_mesh(kind, checkpoints):
    tx = gdx.adam(0.01, mu_dtype=gdx.storage.SignedFourthRoot8(), nu_dtype=gdx.storage.FourthRoot8())
    params = {"convolution": jnp.ones((64, 16, 3, 3)), "heads": jnp.ones((32, 8, 32)), "whole": jnp.ones((3, 3))}
    start = some_steps(tx, copied(params), tx.init(params), range(3))
    expected = some_steps(tx, *copied(start), range(3, 6))
    run = start
    for step, count in enumerate((4, 8, 1, 2)):
        mesh = jax.make_mesh(
            (count,), ("data",), axis_types=(jax.sharding.AxisType[kind],), devices=jax.devices()[:count]
        )
        checkpoints.save(step, tx, *run)
        whole = jax.tree.map(lambda p: jax.device_put(p, jax.NamedSharding(mesh, jax.P())), params)  # noqa: B023
        sharded = gdx.sharding.shard_state(tx, mesh)
        _, *run, _ = checkpoints.restore(sharded, whole, sharded.init(whole))
        codes = run[1][0].nu["heads"].codes
        assert codes.addressable_shards[0].data.size == codes.size // count
        assert_same_bits(tuple(run), start)
        found = some_steps(sharded, *copied(tuple(run)), range(3, 6))
        assert_same_bits(found, expected)


def test_what_was_not_bound_to_a_device_still_is_not(checkpoints):
    tx, params = gdx.adam(0.01), on((8,), PARAMS)
    state = tx.init(params)
    assert not state[0].count.committed
    checkpoints.save(1, tx, params, state)
    _, params, state, _ = checkpoints.restore(tx, abstract(params), state)
    some_steps(tx, params, state, [1])
    _, params, state, _ = checkpoints.restore(tx, on((2,), PARAMS), jax.eval_shape(tx.init, PARAMS))
    assert not any(x.committed for x in jax.tree.leaves(state))
    some_steps(tx, params, state, [1])


def test_arrays_of_every_kind(checkpoints):
    names = ["bool", "int4", "int8", "uint32", "float8_e4m3fn", "bfloat16", "float16", "complex64"]
    state = {
        "dtypes": [jnp.arange(6).astype(name) for name in names],
        "nothing": (jnp.zeros((0, 3)), np.zeros((2, 0), np.int64), optax.EmptyState(), None, {}),
        "host": (np.arange(5.0), np.float64(0.1), 3, 0.5, np.zeros((), np.complex128)),
        "odd": jnp.array([jnp.nan, -jnp.nan, jnp.inf, -0.0, 1e-45]),
        "keys": (jax.random.key(3), jax.random.split(jax.random.key(4, impl="rbg"), 3), jax.random.PRNGKey(5)),
    }
    tx = optax.identity()
    checkpoints.save(1, tx, {"deep": [{"/.[']": jnp.ones(2)}]}, state)
    _, params, restored, _ = checkpoints.restore(tx, {"deep": [{"/.[']": jnp.zeros(2)}]}, state)

    def data(tree):
        return jax.tree.map(lambda x: jax.random.key_data(x) if is_key(x) else x, tree)

    assert_same_bits(data(restored), data(state))
    assert [str(x.dtype) for x in restored["keys"]] == ["key<fry>", "key<rbg>", "uint32"]
    assert params["deep"][0]["/.[']"].tolist() == [1, 1]
    assert all(isinstance(x, np.ndarray) for x in restored["host"])


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_random_keys_onto_shapes(impl, checkpoints):
    tx = optax.add_noise(0.1, 0.5, key=jax.random.key(1, impl=impl))
    params = {"w": jnp.ones(16)}
    state = tx.init(params)
    checkpoints.save(1, tx, params, state)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    places = gdx.sharding.state_shardings(tx, params, mesh)
    shapes = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places)
    for target in (shapes, jax.eval_shape(lambda: state)):
        found = checkpoints.restore(tx, params, target).state
        assert found.rng_key.dtype == state.rng_key.dtype
        assert_same_bits(jax.random.key_data(found.rng_key), jax.random.key_data(state.rng_key))
    assert checkpoints.restore(tx, params, shapes).state.rng_key.sharding == places.rng_key


def test_nothing_at_all(checkpoints):
    checkpoints.save(1, optax.identity(), {}, optax.EmptyState())
    assert checkpoints.restore(optax.identity(), {}, optax.EmptyState())[:3] == (1, {}, optax.EmptyState())


def test_64_bits(checkpoints):
    with enable_x64(True):
        params = {"w": jnp.linspace(0, 1, 9), "n": jnp.array(1 + 1j)}
        tx = gdx.adam(0.1)
        checkpoints.save(1, tx, params, tx.init(params))
        assert_same_bits(checkpoints.restore(tx, params, tx.init(params)).params, params)
    with pytest.raises(CheckpointError, match=r"params/w is float32\[9\], saved float64\[9\]"):
        checkpoints.restore(tx, {"w": jnp.ones(9), "n": jnp.ones((), "complex64")}, tx.init(jnp.ones(9)))


def test_into_another_storage_format(checkpoints):
    exact, small = gdx.adamw(0.01), gdx.adamw(0.01, nu_dtype=gdx.storage.FourthRoot8())
    params, state = some_steps(exact, copied(PARAMS), exact.init(PARAMS), range(3))
    checkpoints.save(3, exact, params, state)
    with pytest.raises(CheckpointError) as error:
        checkpoints.restore(small, params, small.init(params))
    for said in (
        "nu_dtype is storage.FourthRoot8(), saved None",
        "Restore with the optimizer that saved it, adamw(learning_rate=0.01)",
        "gdx.storage.convert(state, tx.init(params))",
    ):
        assert said in str(error.value)
    with pytest.raises(CheckpointError, match="holds other arrays"):
        checkpoints.restore(small, params, small.init(params), allow=["nu_dtype"])
    _, params, restored, _ = checkpoints.restore(exact, params, exact.init(params))
    converted = gdx.storage.convert(restored, small.init(params))
    assert_same_bits(converted, gdx.storage.convert(state, small.init(params)))
    some_steps(small, params, converted, [3])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (gdx.adamw(0.02), "learning_rate is 0.02, saved 0.01"),
        (gdx.adamw(0.01, b2=0.9, eps=1e-6), "b2 is 0.9, saved 0.999; eps is 1e-06, saved 1e-08"),
        (gdx.adamw(constant), "learning_rate is <constant> with values .*, saved 0.01"),
        (gdx.adamw(0.01, nesterov=True), "nesterov is True, saved False"),
        (gdx.adam(0.01), "optimizer is adam, saved adamw; weight_decay is absent, saved 0.0001"),
        (gdx.sgd(0.01), "optimizer is sgd, saved adamw"),
        (gdx.adamw(0.01, mu_dtype="bfloat16"), "mu_dtype is 'bfloat16', saved None"),
        (optax.adamw(0.01), "optimizer is <optax chain>, saved adamw"),
    ],
    ids=["rate", "two", "schedule", "static", "adam", "sgd", "dtype", "optax"],
)
def test_another_optimizer_is_named_field_by_field(other, said, checkpoints):
    tx = gdx.adamw(0.01)
    checkpoints.save(1, tx, PARAMS, tx.init(PARAMS))
    with pytest.raises(CheckpointError, match=said):
        checkpoints.restore(other, PARAMS, other.init(PARAMS))


@pytest.mark.parametrize(
    "around",
    [
        lambda tx: optax.chain(optax.clip(1.0), tx),
        lambda tx: optax.MultiSteps(tx, 2),
        lambda tx: optax.masked(tx, {"w": True, "b": False}),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.partition({"a": tx, "b": optax.sgd(0.1)}, {"w": "a", "b": "b"}),
    ],
    ids=["chain", "MultiSteps", "masked", "apply_if_finite", "partition"],
)
def test_inside_a_wrapper_of_optax_too(around, checkpoints):
    tx, other = around(gdx.adamw(0.01)), around(gdx.adamw(0.02))
    state = tx.init(PARAMS)
    checkpoints.save(1, tx, PARAMS, state)
    with pytest.raises(CheckpointError, match=r"learning_rate is 0\.02, saved 0\.01\. .*allow=\['learning_rate'\]"):
        checkpoints.restore(other, PARAMS, state)
    checkpoints.restore(other, PARAMS, state, allow=["learning_rate"])
    checkpoints.restore(around(gdx.adamw(0.01)), PARAMS, state)


def test_fields_that_may_differ(checkpoints):
    tx, other = gdx.adamw(0.01), gdx.adamw(0.02, b1=0.8)
    checkpoints.save(1, tx, PARAMS, tx.init(PARAMS))
    with pytest.raises(CheckpointError, match=r"b1 is 0.8, saved 0.9. .* pass allow=\['learning_rate', 'b1'\]"):
        checkpoints.restore(other, PARAMS, other.init(PARAMS), allow=["learning_rate"])
    checkpoints.restore(other, PARAMS, other.init(PARAMS), allow=["learning_rate", "b1"])
    with pytest.raises(CheckpointError, match="no field 'b3' to allow; choose from optimizer, learning_rate"):
        checkpoints.restore(tx, PARAMS, tx.init(PARAMS), allow=["b3"])


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"w": jnp.ones((64, 256))}, r"it has also params/b, state/0/mu/b, state/0/nu/b"),
        (PARAMS | {"c": jnp.ones(3)}, r"it has nothing at params/c"),
        (PARAMS | {"b": jnp.ones(8)}, r"params/b is float32\[8\], saved float32\[16\]"),
        (PARAMS | {"b": jnp.ones(16, "bfloat16")}, r"params/b is bfloat16\[16\], saved float32\[16\]"),
    ],
)
def test_another_model_is_named_leaf_by_leaf(params, said, checkpoints):
    tx = gdx.adam(0.01)
    checkpoints.save(1, tx, PARAMS, tx.init(PARAMS))
    with pytest.raises(CheckpointError, match=said):
        checkpoints.restore(tx, params, tx.init(params))


def test_packed_moments_of_another_seed_or_block_are_named(checkpoints):
    formats = [gdx.storage.FourthRoot8(), gdx.storage.FourthRoot8(seed=1), gdx.storage.FourthRoot8(block=200)]
    first, second, third = (gdx.adam(0.01, nu_dtype=format) for format in formats)
    checkpoints.save(1, first, PARAMS, first.init(PARAMS))
    for other in (second, third):
        with pytest.raises(CheckpointError, match=r"nu_dtype is storage.FourthRoot8\((seed|block).*convert"):
            checkpoints.restore(other, PARAMS, other.init(PARAMS))


def test_the_newest_stay_and_no_step_comes_twice(checkpoints):
    tx = gdx.sgd(0.1)
    state = tx.init(PARAMS)
    assert checkpoints.steps == [] and not checkpoints.directory.exists()
    for step in (0, 5, 7):
        checkpoints.save(step, tx, jax.tree.map(lambda p: p * step, PARAMS), state)  # noqa: B023
    checkpoints.wait()
    assert checkpoints.steps == [5, 7]
    assert checkpoints.restore(tx, PARAMS, state, step=5).params["b"][0] == 5
    for step in (6, 7):
        with pytest.raises(CheckpointError, match=f"the step is {step}, but .* has a checkpoint of step 7"):
            checkpoints.save(step, tx, PARAMS, state)
    with pytest.raises(CheckpointError, match="no checkpoint of step 6; choose from 5, 7"):
        checkpoints.restore(tx, PARAMS, state, step=6)


def test_two_see_what_the_other_saved(tmp_path):
    tx = gdx.sgd(0.1)
    state = tx.init(PARAMS)
    with Checkpoints(tmp_path, keep=1) as writer, Checkpoints(tmp_path, keep=1) as reader:
        for step in (1, 2):  # the first is gone when the second is there
            writer.save(step, tx, PARAMS, state)
            writer.wait()
            assert reader.restore(tx, PARAMS, state).step == step
        with pytest.raises(CheckpointError, match=r"the step is 2, but .* has a checkpoint of step 2"):
            reader.save(2, tx, PARAMS, state)
        reader.save(3, tx, PARAMS, state)
        reader.wait()
        assert writer.steps == [3]


@pytest.mark.parametrize("extra", [jnp.ones(3), (1, 2), {1: 2}, [(1, 2)], object()])
def test_extra_is_json(extra, checkpoints):
    with pytest.raises(TypeError, match="as JSON has them"):
        checkpoints.save(1, gdx.sgd(0.1), PARAMS, (), extra=extra)
    assert checkpoints.steps == []


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), np.float64("nan"), 0.5])
def test_a_run_that_diverged_is_saved_too(loss, checkpoints):
    checkpoints.save(1, gdx.sgd(0.1), PARAMS, (), extra={"losses": [loss], "note": None})
    np.testing.assert_equal(checkpoints.restore(gdx.sgd(0.1), PARAMS, ()).extra, {"losses": [loss], "note": None})


class Hidden:
    """A key whose text says nothing."""

    def __init__(self, name, text="<key>"):
        self.name, self.text = name, text

    def __repr__(self):
        return self.text

    def __hash__(self):
        return hash(self.name)

    def __eq__(self, other):
        return self.name == other.name

    def __lt__(self, other):
        return self.name < other.name


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({Hidden("a"): jnp.ones(1), Hidden("b"): jnp.ones(2)}, r"two leaves are called params/<key>"),
        ({Hidden("a", "<key at 0x7f00>"): jnp.ones(1)}, r"a leaf is called params/<key at 0x7f00>"),
    ],
)
def test_leaves_that_could_not_be_told_apart_are_refused(params, said, checkpoints):
    for arguments in ((params, ()), (PARAMS, params)):
        with pytest.raises(ValueError, match=said.replace("params", "(params|state)") + ".*give the keys"):
            checkpoints.save(1, gdx.sgd(0.1), *arguments)
    assert checkpoints.steps == []


def test_addresses_are_no_folders(tmp_path, monkeypatch):
    for address in ("gs://bucket/run", "s3://bucket"):
        with pytest.raises(ValueError, match=rf"directory is '{address}'; expected a path of the file system"):
            Checkpoints(address)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Checkpoints("~/run").directory == tmp_path / "run"


def test_an_empty_folder_with_the_name_of_a_step(checkpoints):
    tx = gdx.sgd(0.1)
    (checkpoints.directory / "500").mkdir(parents=True)
    assert checkpoints.steps == []
    with pytest.raises(CheckpointError, match=r"save: .*500 is an empty folder .* remove it"):
        checkpoints.save(1, tx, PARAMS, ())
    (checkpoints.directory / "500").rmdir()
    checkpoints.save(1, tx, PARAMS, ())
    assert checkpoints.steps == [1]


def test_a_disk_that_is_full(checkpoints, monkeypatch):
    checkpoints.save(1, gdx.sgd(0.1), PARAMS, ())
    checkpoints.wait()

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    with pytest.raises(
        CheckpointError, match=r"save: .* could not be written; the ones before .*OSError: .*No space left"
    ):
        checkpoints.save(2, gdx.sgd(0.1), PARAMS, ())
    assert checkpoints.steps == [1]


def test_arrays_of_numpy_may_change_at_once(checkpoints):
    params = {"w": np.ones((1000, 1000), np.float32)}
    checkpoints.save(1, optax.identity(), params, ())
    params["w"][:] = 2
    assert checkpoints.restore(optax.identity(), params, ()).params["w"].max() == 1


def test_nothing_of_orbax_is_imported_before_it_is_used():
    code = "import sys, gdx; assert not {'orbax', 'tensorstore'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_missing_package_names_the_extra(monkeypatch, tmp_path):
    real = builtins.__import__

    def absent(name, *arguments):
        if name.split(".")[0] == "orbax":
            raise ModuleNotFoundError("No module named 'orbax'", name="orbax")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(MissingExtra, match=r"gdx-jax\[checkpoint\]"):
        Checkpoints(tmp_path)
