"""A transform is a value: text, comparison, hash, pickle, copy, replace, hyperparams, pytree."""

import copy
import dataclasses
import math
import pickle

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from gdx import *  # noqa: F403  (what repr evaluates in)
from gdx.compat import enable_x64


class scale_by_sign(gdx.Transform):
    """The example of the module docstring, with a nested transform and a static field besides."""

    strength: gdx.Scalar = gdx.hyperparameter(default=1.0)
    inner: gdx.Transform = gdx.scale_by_learning_rate(0.5)
    name: str = gdx.static(default="sign")

    def init_tree(self, params):
        return self.inner.init(params)

    def update_tree(self, updates, state, params=None, **extra_args):
        signs = jax.tree.map(lambda g: self.strength.astype(g.dtype) * jnp.sign(g), updates)
        return self.inner.update(signs, state, params)


NESTED = gdx.chain(
    gdx.scale_by_adam(b1=0.8),
    gdx.chain(gdx.scale_by_adam(), gdx.scale_by_adam(b2=0.9)),
    gdx.add_decoupled_weight_decay(0.1, mask={"w": True, "b": [False, True]}),
    gdx.sgd(0.1, momentum=0.5, accumulator_dtype=jnp.bfloat16),
)


def test_text_is_the_call():
    assert repr(gdx.adamw(1e-3)) == "adamw(learning_rate=0.001)"
    assert repr(gdx.sgd(1, momentum=np.float32(0.5))) == "sgd(learning_rate=1.0, momentum=0.5)"
    assert repr(gdx.adam(0.1, mu_dtype=jnp.bfloat16)) == "adam(learning_rate=0.1, mu_dtype='bfloat16')"
    assert repr(gdx.sgd(optax.constant_schedule(0.1))) == "sgd(learning_rate=<constant_schedule.lambda>)"
    assert repr(jax.vmap(gdx.sgd)(jnp.ones(3))) == "sgd(learning_rate=<float32[3]>)"
    assert repr(gdx.chain(optax.clip(1.0), gdx.sgd(0.1))) == "chain(<optax clip>, sgd(learning_rate=0.1))"
    assert eval(repr(NESTED)) == NESTED


def test_equal_values_are_equal_and_hash_alike():
    assert gdx.adam(0.5) == gdx.adam(jnp.float32(0.5)) == gdx.adam(np.float16(0.5))
    assert hash(gdx.adam(0.5)) == hash(gdx.adam(jnp.float32(0.5))) == hash(gdx.adam(np.float16(0.5)))
    assert not gdx.adam(0.5) != gdx.adam(0.5)  # noqa: SIM202  (tuple has its own !=)
    different = [
        gdx.adam(0.5),
        gdx.adam(0.25),
        gdx.adam(0.5, nesterov=True),
        gdx.adam(0.5, mu_dtype="bfloat16"),
        gdx.adamw(0.5),
        gdx.sgd(0.5),
        gdx.sgd(0.5, momentum=0.0),
        gdx.sgd(lambda count: 0.5),
        gdx.adamw(0.5, mask={"w": True}),
        gdx.adamw(0.5, mask={"w": False}),
        gdx.chain(gdx.adam(0.5)),
        jax.vmap(gdx.adam)(jnp.array([0.5])),
    ]
    assert len(set(different)) == len(different)
    assert all((a == b) == (a is b) for a in different for b in different)
    assert gdx.adam(0.5) != (None, None)
    assert gdx.adam(0.5) != "adam"


def test_comparing_tracers_does_not_crash():
    @jax.jit
    def compare(tx):
        assert tx == tx
        assert tx != tx.replace(learning_rate=0.5)
        return tx.learning_rate

    compare(gdx.sgd(0.1))


def test_what_tuple_would_do_is_refused():
    tx = gdx.sgd(0.1)
    for operation in (lambda: tx < tx, lambda: tx + tx, lambda: tx * 2, lambda: 2 * tx, lambda: None in tx):
        with pytest.raises(TypeError):
            operation()
    assert isinstance(tx._replace(init=lambda params: ()), optax.GradientTransformationExtraArgs)


def test_unpacks_as_the_pair():
    init, update = gdx.sgd(0.5)
    updates, _ = update(jnp.ones(2), init(jnp.ones(2)))
    np.testing.assert_array_equal(updates, -0.5)
    assert isinstance(gdx.sgd(0.5), optax.GradientTransformationExtraArgs)
    assert len(gdx.sgd(0.5)) == 2
    assert gdx.sgd(0.5)[0](jnp.ones(2)) == init(jnp.ones(2))


@pytest.mark.parametrize("tx", [gdx.adamw(1e-3), NESTED, gdx.sgd(optax.constant_schedule, momentum=0.9)])
def test_copies_are_equal(tx):
    assert pickle.loads(pickle.dumps(tx)) == tx
    assert copy.copy(tx) == tx
    assert copy.deepcopy(tx) == tx
    assert jax.tree.map(lambda x: x, tx) == tx


def test_fields_cannot_be_set():
    tx = gdx.sgd(0.1)
    with pytest.raises(AttributeError, match="learning_rate"):
        tx.learning_rate = 0.2
    with pytest.raises(TypeError):
        tx.hyperparams["learning_rate"] = 0.2


def test_names_are_the_shortest_that_tell_apart():
    assert dict(gdx.adam(0.1).hyperparams) == {
        "learning_rate": 0.1,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "eps_root": 0.0,
    }
    assert "momentum" not in gdx.sgd(0.1).hyperparams
    assert [name for name in NESTED.hyperparams if "b1" in name] == [
        "scale_by_adam.b1",
        "scale_by_adam[0].b1",
        "scale_by_adam[1].b1",
    ]
    assert NESTED.hyperparams["momentum"] == 0.5
    assert NESTED.hyperparams["weight_decay"] == 0.1
    assert dict(scale_by_sign().hyperparams) == {"strength": 1.0, "learning_rate": 0.5}


def test_replace_reaches_any_field():
    assert gdx.adam(0.1).replace(learning_rate=0.2, nesterov=True) == gdx.adam(0.2, nesterov=True)
    assert NESTED.replace(momentum=None, accumulator_dtype=None).hyperparams.get("momentum") is None
    changed = NESTED.replace(**{"scale_by_adam[1].b1": 0.7})
    assert changed.hyperparams["scale_by_adam[1].b1"] == 0.7
    assert changed.replace(**{"scale_by_adam[1].b1": 0.9}) == NESTED
    assert scale_by_sign().replace(learning_rate=0.1).inner == gdx.scale_by_learning_rate(0.1)


def test_replace_refuses_names_and_values():
    with pytest.raises(
        ValueError, match=r"chain\.replace: 'b1' is ambiguous; choose from scale_by_adam\.b1, scale_by_adam\[0\]"
    ):
        NESTED.replace(b1=0.5)
    with pytest.raises(
        ValueError, match=r"sgd\.replace: 'speed' is unknown; choose from learning_rate, momentum, nesterov"
    ):
        gdx.sgd(0.1).replace(speed=0.5)
    with pytest.raises(ValueError, match=r"sgd: momentum is 1\.0; expected a finite number in \[0, 1\)"):
        NESTED.replace(momentum=1.0)
    tx, changes = gdx.groups(gdx.sgd(0.1), {"a": {"momentum": 0.9}}), {"a": {"momentum": 0.9}}
    for whole in ("changes", "settings"):
        with pytest.raises(
            ValueError, match=rf"groups\.replace: '{whole}' cannot be replaced as a whole; choose from le"
        ):
            tx.replace(**{whole: {"a": None}})
    assert gdx.chain(tx).replace(tx=gdx.sgd(0.2)) == gdx.chain(gdx.groups(gdx.sgd(0.2), changes))
    for wrong in (gdx.sgd, 0.3):
        with pytest.raises(TypeError, match=r"groups: tx is .*; expected a transform"):
            tx.replace(tx=wrong)


def test_what_makes_a_transform_in_the_place_of_one_is_to_be_called():
    mesh, p = jax.make_mesh((1,), ("data",)), jnp.ones(2)
    places = [
        gdx.chain,
        gdx.watch,
        gdx.skip_spikes,
        gdx.average_parameters,
        lambda tx: gdx.groups(tx, {"a": None}),
        lambda tx: gdx.groups(gdx.sgd(0.1), {"a": tx}),
        lambda tx: gdx.sharding.shard_state(tx, mesh),
        lambda tx: gdx.describe(tx, p),
        lambda tx: gdx.hyperparams_in_use(tx, ()),
        lambda tx: gdx.stack([tx]),
        lambda tx: gdx.value(optax.MultiSteps)(tx, 2),
        lambda tx: gdx.value(optax.masked)(tx, True),
        lambda tx: gdx.value(optax.partition)({"a": tx}, {"a": "a"}),
    ]
    for make in (gdx.sgd, optax.adamw, gdx.value(optax.lion)):
        for place in places:
            with pytest.raises(TypeError, match=rf"; call it, as in {make.__name__}\("):
                place(make)

    # where a function is asked for, one that makes transforms is one
    def made(make: type[gdx.Transform], rate: float):
        return make(rate)

    for takes in (made, lambda make, rate: make(rate)):
        assert gdx.value(takes)(gdx.sgd, 0.1).init(p) == gdx.sgd(0.1).init(p)


def test_leaves_are_the_hyperparameters_with_keys():
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(gdx.adamw(0.1))]
    assert paths == [".learning_rate", ".b1", ".b2", ".eps", ".eps_root", ".weight_decay"]
    assert jax.tree_util.keystr(jax.tree_util.tree_leaves_with_path(NESTED)[-1][0]) == ".transforms[3].momentum"
    assert jax.tree.leaves(gdx.sgd(optax.constant_schedule(0.1))) == []
    partial = jax.tree_util.Partial(lambda rate, count: rate, 0.5)
    assert jax.tree.leaves(gdx.sgd(partial)) == [0.5]


def test_a_transformation_may_put_anything_in_the_leaves():
    axes = jax.tree.map(lambda _: 0, gdx.sgd(0.1))
    rates = jax.vmap(gdx.sgd)(jnp.arange(3.0))
    updates = jax.vmap(lambda tx: tx.update(jnp.ones(()), tx.init(jnp.ones(())))[0], in_axes=(axes,))(rates)
    np.testing.assert_array_equal(updates, [0, -1, -2])
    structs = jax.eval_shape(lambda tx: tx, gdx.sgd(0.1))
    assert structs.learning_rate == jax.ShapeDtypeStruct((), np.float32)


def test_building_an_optimizer_makes_no_array():
    assert all(type(leaf) is np.float64 for leaf in jax.tree.leaves(gdx.adamw(1, b1=np.float32(0.5))))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int32"])
def test_arrays_are_held_as_their_numbers_and_tracers_in_the_default_dtype(dtype):
    assert type(gdx.sgd(jnp.ones((), dtype)).learning_rate) is np.float64

    def traced(number):
        rate = gdx.sgd(number).learning_rate
        assert not rate.weak_type
        return rate

    assert jax.eval_shape(traced, jnp.ones((), dtype)).dtype == np.float32
    assert jax.eval_shape(traced, 1.0).dtype == np.float32
    with enable_x64(True):
        assert jax.eval_shape(traced, jnp.ones((), dtype)).dtype == np.float64


def test_float64_mode_keeps_float64_hyperparameters():
    with enable_x64(True):
        updates, _ = gdx.sgd(0.1).update(jnp.ones(()), (optax.EmptyState(), optax.EmptyState()))
        assert float(updates) == -0.1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: gdx.adam(1.0, b2=1 - 1e-8),
            r"adam: b2, in a step of float32, is 0\.99999999 \(1\.0 in float32\)",
        ),
        (
            lambda: gdx.sgd(1e39),
            r"sgd: learning_rate, in a step of float32, is 1e\+39 \(inf in float32\)",
        ),
    ],
)
def test_numbers_of_float64_that_float32_does_not_have(make, words):
    """They are right for parameters in float64, and refused where a step is computed in float32."""
    with enable_x64(True):
        tx, wide = make(), jnp.ones(2)
        assert np.isfinite(tx.update(wide, tx.init(wide))[0]).all()
        narrow = wide.astype("float32")
        with pytest.raises(ValueError, match=words):
            tx.update(narrow, tx.init(narrow))


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda u, s: u, r"a dict with keys \['a', 'b'\]; expected a pair, the updates and the new state"),
        (lambda u, s: None, r"a NoneType; expected a pair"),
        (lambda u, s: (u, s, u), r"a tuple of 3: .*; expected a pair"),
        (lambda u, s: (jax.tree.map(jnp.sum, u), s), r"updates, of the shape \(\) at \['a'\]; expected one for each"),
        (lambda u, s: ({"a": u["a"]}, s), r"updates as PyTreeDef\(\{'a': \*\}\); expected one for each gradient"),
        (lambda u, s: ({**u, "b": "no"}, s), r"updates, of the shape None at \['b'\]"),
    ],
)
def test_what_update_tree_returns_is_checked(step, words):
    class wrong(gdx.Transform):
        def init_tree(self, params):
            return optax.EmptyState()

        def update_tree(self, updates, state, params=None, **extra_args):
            return step(updates, state)

    g = {"a": jnp.ones(3), "b": jnp.ones(2)}
    with pytest.raises(TypeError, match=f"^wrong: update_tree returned {words}"):
        wrong().update(g, wrong().init(g))


@pytest.mark.parametrize("make", [gdx.adam, gdx.value(optax.lion), scale_by_sign])
def test_is_found_again_in_another_mode(make):
    with enable_x64(True):
        inside = {make(0.1)}
        assert make(0.1) in inside
    assert make(0.1) in inside
    outside = {make(0.1)}
    with enable_x64(True):
        assert make(0.1) in outside


@pytest.mark.parametrize("tx", [gdx.adamw(1e-3), gdx.sgd(0.1, 0.9), gdx.adam(1e-3, mu_dtype="bfloat16")], ids=repr)
@pytest.mark.parametrize("dtype", ["float64", "complex128"])
def test_arrays_of_numpy_in_double_precision_are_taken(tx, dtype):
    """As jax.numpy takes them, without a warning for each operation."""
    x = {"w": np.ones(3, dtype), "s": np.ones((), dtype)[()]}
    updates, _ = tx.update(x, tx.init(x), x)
    like = jax.tree.map(jnp.asarray, x)
    expected, _ = tx.update(like, tx.init(like), like)
    assert jax.tree.map(jnp.array_equal, updates, expected) == {"w": True, "s": True}
    assert updates["w"].dtype == jnp.asarray(x["w"]).dtype


def test_an_outside_class_gets_every_view():
    tx = scale_by_sign(2.0)
    assert eval(repr(tx), {"scale_by_sign": scale_by_sign}) == tx
    updates, _ = jax.jit(lambda tx, g: tx.update(g, tx.init(g)))(tx, jnp.array([-3.0, 5.0]))
    np.testing.assert_array_equal(updates, [1.0, -1.0])
    scheduled = scale_by_sign(lambda count: 1 / (1 + count))
    state = scheduled.init(jnp.ones(1))
    for expected in (-0.5, -0.25):
        updates, state = scheduled.update(jnp.ones(1), state)
        assert updates == expected
    assert isinstance(state, gdx.CountedState)
    assert state.count == 2


def test_a_batch_outside_vmap_is_refused():
    batch = jax.vmap(gdx.sgd)(jnp.ones(3))
    with pytest.raises(ValueError, match=r"sgd: learning_rate has shape \(3,\): this is a batch of optimizers"):
        batch.init(jnp.ones(2))


def test_a_round_trip_through_jit_changes_nothing_to_be_seen():
    for tx in (gdx.adamw(1e-3, b1=0.1), NESTED, gdx.sgd(gdx.schedules.linear_schedule(0.1, 0.0, 7))):
        back = jax.jit(lambda tx: tx)(tx)
        assert back == tx and hash(back) == hash(tx) and repr(back) == repr(tx)
        assert jax.device_put(tx) == tx
    assert repr(gdx.sgd(1 / 3)) == "sgd(learning_rate=0.33333334)"


def test_text_in_formats():
    tx = gdx.sgd(0.1)
    assert f"{tx:>25}" == "   sgd(learning_rate=0.1)"
    assert "%s" % tx == "{}".format(tx) == str(tx) == "sgd(learning_rate=0.1)"  # noqa: UP031, UP032


@pytest.mark.parametrize("name", ["count", "index"])
def test_methods_of_tuple_are_no_fields(name):
    with pytest.raises(AttributeError, match=rf"sgd has no field '{name}'"):
        getattr(gdx.sgd(0.1), name)

    class counting(gdx.Transform):
        count: gdx.Scalar = gdx.hyperparameter(default=1.0)

    assert counting(2.0).count == 2.0


def test_structures_are_compared_with_their_types():
    """numpy says that its dtype of doubles equals None."""
    kinds = [gdx.adam(0.1), gdx.adam(0.1, mu_dtype="float64"), gdx.adam(0.1, mu_dtype="float32")]
    assert len({*kinds}) == 3 and kinds[0] != kinds[1]
    compiled = jax.jit(lambda tx: tx)
    for tx in kinds:
        compiled(tx)
    assert compiled._cache_size() == 3
    assert gdx.adam(0.1, mu_dtype=jnp.bfloat16) == gdx.adam(0.1, mu_dtype="bfloat16")
    assert repr(kinds[1]) == "adam(learning_rate=0.1, mu_dtype='float64')"


def test_an_empty_mask_stays_a_field():
    link = gdx.add_decoupled_weight_decay(0.1, mask=())
    assert link.mask == () and jax.tree.leaves(link) == [0.1] and list(link.hyperparams) == ["weight_decay"]


class Switches(eqx.Module):
    """A module that can be called, and is a tree of booleans where it is a mask."""

    w: bool
    b: bool

    def __call__(self, x):
        return x


def test_a_module_given_as_a_mask_is_a_tree():
    params = Switches(jnp.ones(2), jnp.ones(2))
    tx = gdx.adamw(1.0, weight_decay=0.5, mask=Switches(True, False))
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert updates.w.tolist() == [-0.5, -0.5] and updates.b.tolist() == [0, 0]
    whole = gdx.adamw(1.0, weight_decay=0.5, mask=lambda params: Switches(False, True))
    assert whole.update(zeros, whole.init(params), params)[0].b.tolist() == [-0.5, -0.5]


@pytest.mark.parametrize("names", [("init",), ("update",), ("init", "update")])
def test_the_door_cannot_be_overridden(names):
    body = {name: lambda self, *args: None for name in names}
    with pytest.raises(TypeError, match=rf"mine: {' and '.join(names)} check .* give init_tree.* and update_tree"):
        type("mine", (gdx.Transform,), body)


def test_what_a_leafwise_link_would_never_call_is_refused():
    with pytest.raises(TypeError, match=r"mine: update_tree are not called .* step\(self, shared, g, p"):
        type("mine", (gdx.Leafwise,), {"update_tree": lambda self, *args: None})


def test_dataclasses_replace_works():
    assert dataclasses.replace(gdx.adam(0.1), b1=0.5) == gdx.adam(0.1, b1=0.5)


def test_hyperparameters_in_use():
    rate = gdx.schedules.linear_schedule(1.0, 0.0, transition_steps=4)
    inner = gdx.adamw(rate, weight_decay=lambda count: 0.1 * (1.0 + count))
    for tx in (inner, gdx.chain(optax.clip(1.0), gdx.chain(inner)), gdx.value(optax.MultiSteps)(inner, 1)):
        params = {"w": jnp.ones(3)}
        state = tx.init(params)
        with jax.numpy_dtype_promotion("standard"):
            for _ in range(2):
                _, state = tx.update(params, state, params)
        found = jax.jit(gdx.hyperparams_in_use)(tx, state)
        assert found["learning_rate"] == 0.5 and found["end_value"] == 0 and found["b1"] == np.float32(0.9)
        np.testing.assert_allclose(found["weight_decay"], 0.3, rtol=1e-6)
    lion = gdx.value(optax.lion)(rate)
    state = lion.init(params)
    _, state = lion.update(params, state, params)
    assert gdx.hyperparams_in_use(lion, state)["learning_rate"] == 0.75
    with pytest.raises(TypeError, match=r"expected a transform of gdx's.*gdx\.value"):
        gdx.hyperparams_in_use(optax.sgd(0.1), optax.sgd(0.1).init(params))


def after(tx, steps):
    """The state after so many steps."""
    params = {"w": jnp.ones(3)}
    state = tx.init(params)
    for _ in range(steps):
        _, state = tx.update(params, state, params)
    return state


LINE = gdx.schedules.linear_schedule(1.0, 0.0, transition_steps=8)
JOINED = gdx.schedules.join_schedules([gdx.schedules.constant_schedule(1.0), LINE], [2])


@gdx.schedule
def halved(rate):
    return lambda count: rate(count) / 2


@pytest.mark.parametrize(
    ("tx", "expected"),
    [
        (gdx.sgd(JOINED), {"learning_rate": 0.875, "boundaries.0": 2, "transition_steps": 8}),
        (gdx.value(optax.sgd)(JOINED), {"learning_rate": 0.875, "init_value": 1}),
        (gdx.chain(gdx.adamw(0.1, weight_decay=halved(LINE))), {"weight_decay": 0.3125, "learning_rate": 0.1}),
        # its count is called step_count, and starts from 1
        (gdx.value(optax.contrib.schedule_free)(optax.sgd(0.1), learning_rate=LINE), {"learning_rate": 0.5}),
        (
            gdx.value(optax.contrib.schedule_free)(gdx.sgd(LINE), learning_rate=halved(LINE)),
            {"base_optimizer.learning_rate": 0.625, "learning_rate": 0.25},
        ),
    ],
)
def test_schedules_in_schedules_in_use(tx, expected):
    found = gdx.hyperparams_in_use(tx, after(tx, 3))
    assert {name: pytest.approx(float(found[name])) for name in expected} == expected
    inner = [name for name in found if name.rpartition(".")[2] in ("rate", "linear_schedule", "constant_schedule")]
    assert not inner  # what is in use is the outer one's value


def test_one_schedule_at_several_counts_in_use():
    """By where it is, not by which it is."""
    every = gdx.value(optax.MultiSteps)(gdx.sgd(LINE), every_k_schedule=3)
    parts = gdx.value(optax.partition)({"x": every, "y": gdx.adam(LINE)}, {"w": "x", "b": "y"})
    params = {"w": jnp.ones(2), "b": jnp.ones(3)}
    state = parts.init(params)
    for _ in range(4):
        _, state = parts.update(params, state, params)
    found = jax.jit(gdx.hyperparams_in_use)(parts, state)
    assert (found["opt.learning_rate"], found["y.learning_rate"]) == (0.875, 0.5)
    tx = gdx.chain(gdx.value(optax.MultiSteps)(gdx.sgd(LINE), every_k_schedule=3), gdx.scale_by_learning_rate(LINE))
    found = gdx.hyperparams_in_use(tx, after(tx, 4))
    assert (found["opt.learning_rate"], found["scale_by_learning_rate.learning_rate"]) == (0.875, 0.5)


@pytest.mark.parametrize("tx", [gdx.adamw(LINE), gdx.sgd(LINE), gdx.chain(optax.clip(1.0), gdx.momentum(LINE))])
@pytest.mark.parametrize("state", [None, (), (optax.EmptyState(),), {}])
def test_hyperparameters_at_another_state_are_refused(tx, state):
    with pytest.raises((TypeError, ValueError), match=r"the state (is .*expected|has no count)"):
        gdx.hyperparams_in_use(tx, state)


@pytest.mark.parametrize(
    "make", [lambda tx: gdx.value(optax.lookahead)(tx, 2, 0.5), lambda tx: gdx.chain(tx, optax.lookahead(tx, 2, 0.5))]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_pair_of_parameters_that_lookahead_keeps(make, dtype):
    p = {"w": jnp.arange(1.0, 4.0).astype(dtype)}

    def run(tx):
        params = optax.LookaheadParams.init_synced(p)
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(params.fast, state, params)
            params = optax.apply_updates(params, updates)
        return params

    with jax.numpy_dtype_promotion("standard"):
        ours, theirs = run(make(gdx.sgd(0.1))), run(make(optax.sgd(0.1)))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs)):
        assert x.dtype == y.dtype == dtype
        np.testing.assert_allclose(*(np.asarray(z, "float32") for z in (x, y)), rtol=0 if dtype == "float32" else 0.02)
    with pytest.raises(ValueError, match=r"the gradients' tree differs from that of params: no gradient for \['w'\]"):
        make(gdx.sgd(0.1)).update({}, (), optax.LookaheadParams.init_synced(p))


@pytest.mark.parametrize("make", [optax.adam, optax.lion, optax.rmsprop, optax.adafactor, optax.adabelief])
@pytest.mark.parametrize("state", [None, (), {}, optax.EmptyState(), (optax.EmptyState(),) * 7])
def test_the_state_of_another_transform_is_refused_by_optaxs(make, state):
    params = {"w": jnp.ones(3)}
    for tx in (gdx.value(make)(0.1), gdx.chain(make(0.1))):
        with pytest.raises(TypeError, match=r"the state is .*expected a tuple of .*init\(params\) as the target"):
            tx.update(params, state, params)


def test_what_decides_on_a_number_while_it_steps_says_so():
    params = {"w": jnp.ones(3)}
    tx = gdx.value(optax.scale_by_sm3)()
    tx.update(params, tx.init(params), params)
    with pytest.raises(TypeError, match=r"scale_by_sm3: it needs the value of a number that is traced.*close over"):
        jax.jit(lambda tx: tx.update(params, tx.init(params), params))(tx)


def test_tiny_numbers_under_x64():
    with pytest.raises(ValueError, match=r"eps is 1e-50 \(0\.0 in float32\)"):
        gdx.adam(0.1, eps=1e-50)
    with enable_x64(True):
        assert gdx.adam(0.1, eps=1e-50).hyperparams["eps"] == 1e-50


def test_without_jit_under_debug_nans():
    params = {"w": jnp.linspace(-1, 1, 4)}
    tx = gdx.chain(gdx.adamw(gdx.schedules.cosine_decay_schedule(0.1, 4)), gdx.sgd(0.1, 0.9))
    with jax.disable_jit(True), jax.debug_nans(True):
        updates, _ = tx.update(params, tx.init(params), params)
    assert np.all(np.isfinite(updates["w"]))


def test_a_function_that_decides_on_a_gradient_is_told_what_to_do():
    @gdx.value
    def mine():
        return optax.GradientTransformation(lambda p: (), lambda u, s, p=None: (u if u[0] > 0 else -u, s))

    with pytest.raises(TypeError, match=r"^mine: it needs the value .* of a gradient, .*decide with jnp\.where \("):
        jax.jit(lambda g: mine().update(g, ())[0])(jnp.ones(2))


def test_a_copy_holds_the_same_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = gdx.sharding.shard_state(gdx.adam(0.1), mesh)
    assert copy.deepcopy(tx) == tx


@pytest.mark.parametrize("format", ["bfloat16", gdx.storage.StochasticBfloat16()], ids=str)
def test_few_bits_stay_so_inside_a_wrapper_of_optax(format):
    """What it holds is as it is, where parameters are wide."""
    tx, params = gdx.value(optax.MultiSteps)(gdx.sgd(0.1, 0.9, accumulator_dtype=format), 2), {"w": jnp.ones(3)}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params)
    np.testing.assert_allclose(updates["w"], -0.1, rtol=1e-6)
    assert optax.tree.get(state, "trace")["w"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ["replace", "hyperparams", "at", "formats", "rounds", "has_schedule"])
def test_a_field_that_hides_what_values_have_is_refused(name):
    with pytest.raises(TypeError, match=rf"^mine: '{name}' is a name that values have for something else"):
        type("mine", (gdx.Leafwise,), {"__annotations__": {name: gdx.Scalar}, name: gdx.hyperparameter(default=0.5)})


@pytest.mark.parametrize("rate", [lambda count: 0.1 if count < 3 else 0.01, lambda count: 0.1 * math.exp(-count)])
def test_a_schedule_that_decides_in_python_is_named(rate):
    tx = gdx.chain(gdx.sgd(rate))
    with pytest.raises(TypeError, match=r"scale_by_learning_rate: learning_rate, <.*lambda>, needs .*jnp\.where"):
        jax.jit(tx.update)(jnp.ones(3), tx.init(jnp.ones(3)))
