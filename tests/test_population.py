"""Batches of optimizers: made, labelled, taken apart, and used wherever a pytree with a leading axis is."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from tests.contract.table import assert_same_bits, every_row, gradients, scan, tree

STEPS = 3


@every_row
def test_lanes_have_the_bits_of_single_optimizers(row):
    single = row.tx
    members = [single, jax.tree.map(lambda h: h / 2, single)]
    found = jax.jit(jax.vmap(scan, (0, None, None)))(gdx.stack(members), tree(), gradients(STEPS))
    for i, member in enumerate(members):
        expected = jax.jit(scan)(member, tree(), gradients(STEPS))
        assert_same_bits(jax.tree.map(lambda x: x[i], found), expected)  # noqa: B023


@every_row
def test_unstack_undoes_stack(row):
    members = [row.make(**settings) for settings in row.settings[:1]] + [jax.tree.map(lambda h: h / 2, row.tx)]
    assert gdx.unstack(gdx.stack(members)) == members


def test_a_grid_is_every_combination_in_order():
    batch = gdx.grid(
        gdx.adamw, learning_rate=[1e-3, 1e-2], weight_decay=np.array([0.0, 0.1, 0.2]), b1=0.8, nesterov=True
    )
    members = gdx.unstack(batch)
    assert members[1] == gdx.adamw(1e-3, b1=0.8, weight_decay=0.1, nesterov=True)
    assert [tuple(label.values()) for label in gdx.labels(batch)] == [
        (rate, decay) for rate in (1e-3, 1e-2) for decay in (0.0, 0.1, 0.2)
    ]
    assert gdx.labels(batch)[0] == {"learning_rate": 1e-3, "weight_decay": 0.0}
    assert batch.b1.shape == (6,) and len(members) == 6


@pytest.mark.parametrize(
    "values", [(0.1, 0.2), [0.1, 0.2], np.array([0.1, 0.2]), jnp.array([0.1, 0.2]), [np.float32(0.1), jnp.float32(0.2)]]
)
def test_an_axis_may_be_any_sequence_of_numbers(values):
    batch = gdx.grid(gdx.sgd, learning_rate=values)
    np.testing.assert_allclose(batch.learning_rate, [0.1, 0.2], rtol=1e-6)


def test_schedules_are_points_too():
    rates = [gdx.schedules.cosine_decay_schedule(v, decay_steps=10) for v in (0.1, 0.2)]
    batch = gdx.grid(gdx.sgd, learning_rate=rates)
    assert gdx.labels(batch) == [{"init_value": 0.1}, {"init_value": 0.2}]
    updates = jax.vmap(lambda tx: tx.update(jnp.ones(()), tx.init(jnp.ones(())))[0])(batch)
    np.testing.assert_allclose(updates, [-0.1, -0.2], rtol=1e-6)


def pair(make, **settings):
    return gdx.stack([make(**settings), make(**settings)])


BATCHES = {
    "an optimizer": lambda: pair(gdx.adamw, learning_rate=0.1),
    "a link": lambda: pair(gdx.scale_by_adam),
    "one of optax's": lambda: pair(gdx.value(optax.lamb), learning_rate=0.1),
    "a chain": lambda: pair(lambda: gdx.chain(gdx.value(optax.clip)(1.0), gdx.adam(0.1))),
    "in a wrapper": lambda: pair(gdx.value(optax.MultiSteps), opt=gdx.adam(0.1), every_k_schedule=2),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_what_is_replaced_in_a_batch_is_checked_in_each_member(kind):
    batch = BATCHES[kind]()
    for values in ([0.5, 0.25], (0.5, 0.25), np.array([0.5, 0.25]), jnp.array([0.5, 0.25])):
        assert [tx.hyperparams["b1"] for tx in gdx.unstack(batch.replace(b1=values))] == [0.5, 0.25]
    assert [tx.hyperparams["b1"] for tx in gdx.unstack(batch.replace(b1=0.5))] == [0.5, 0.5]
    assert batch.replace(b1=0.5) == batch.replace(b1=[0.5, 0.5])
    out_of_range = [2.0] if kind != "one of optax's" else []
    for wrong in [np.nan, np.inf, "a", True, *out_of_range]:
        with pytest.raises((TypeError, ValueError), match=r"b1 is "):
            batch.replace(b1=wrong)
        with pytest.raises((TypeError, ValueError), match=r"b1 is "):
            batch.replace(b1=[0.5, wrong])
    for wrong in (np.ones(3) / 2, [0.5], jnp.ones((3, 2)) / 2):
        with pytest.raises(
            ValueError, match=r"replace: .*b1 has shape .*; expected a number, or an array of 2, with one"
        ):
            batch.replace(b1=wrong)
    single = gdx.unstack(batch)[0]
    traced = jax.jit(lambda tx, b1: tx.replace(b1=b1))
    assert gdx.unstack(traced(batch, jnp.array([0.5, 0.25]))) == [single.replace(b1=0.5), single.replace(b1=0.25)]
    assert gdx.unstack(traced(batch, 0.5)) == [single.replace(b1=0.5)] * 2


def test_a_schedule_is_put_into_a_batch():
    rate = gdx.schedules.linear_schedule(0.1, 0.0, 10)
    batch = gdx.grid(gdx.sgd, learning_rate=[0.1, 0.2]).replace(learning_rate=rate)
    assert gdx.unstack(batch) == [gdx.sgd(rate)] * 2
    each = jax.tree.map(lambda x: np.stack([x, 2 * x]), rate)
    assert gdx.unstack(batch.replace(learning_rate=each))[1] == gdx.sgd(jax.tree.map(lambda x: 2 * x, rate))


def test_arrays_that_are_no_batch_are_replaced_as_a_whole():
    @gdx.value
    def weighted(weights: jax.Array, rate: float = 0.1):
        return optax.chain(optax.stateless(lambda u, _: jax.tree.map(lambda x: x * weights, u)), optax.sgd(rate))

    tx = weighted(jnp.ones(3)).replace(weights=jnp.ones(4), rate=0.2)
    assert tx.weights.shape == (4,) and tx.rate == 0.2
    with pytest.raises(ValueError, match="rate is nan"):
        tx.replace(rate=np.nan)


def test_is_a_value_that_one_program_takes():
    batch = gdx.grid(gdx.sgd, learning_rate=[0.1, 0.2])
    assert batch == gdx.grid(gdx.sgd, learning_rate=[0.1, 0.2]) and hash(batch) is not None
    assert repr(batch) == "sgd(learning_rate=<float64[2]>)"
    step = jax.jit(jax.vmap(lambda tx: tx.update(jnp.ones(2), tx.init(jnp.ones(2)))[0]))
    for rates in ([0.1, 0.2], [0.3, 0.4], np.float32([0.5, 0.6])):
        step(gdx.grid(gdx.sgd, learning_rate=rates))
    assert step._cache_size() == 1


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_single_optimizers_of_a_batch_on_a_mesh(kind):
    mesh = jax.make_mesh((8,), ("members",), axis_types=(kind,))
    batch = gdx.grid(gdx.adamw, learning_rate=np.geomspace(1e-4, 1, 16))
    spread = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("members")))
    np.testing.assert_allclose(gdx.unstack(spread)[3].learning_rate, gdx.unstack(batch)[3].learning_rate, rtol=1e-6)


def test_spread_over_a_mesh():
    mesh = jax.make_mesh((8,), ("members",), axis_types=(jax.sharding.AxisType.Auto,))
    batch = gdx.grid(gdx.adamw, learning_rate=np.geomspace(1e-4, 1, 16))
    spread = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("members")))
    run = jax.jit(jax.vmap(scan, (0, None, None)))
    found = run(spread, tree(), gradients(STEPS))
    assert {leaf.sharding.spec for leaf in jax.tree.leaves(found)} == {jax.P("members")}
    assert_same_bits(found, run(batch, tree(), gradients(STEPS)))


def test_lax_map():
    batch = gdx.grid(gdx.sgd, learning_rate=[0.1, 0.2])
    found = jax.lax.map(lambda tx: tx.update(jnp.ones(()), tx.init(jnp.ones(())))[0], batch)
    np.testing.assert_allclose(found, [-0.1, -0.2], rtol=1e-6)


REFUSED = {
    "nothing": (lambda: gdx.stack([]), ValueError, r"stack: got no optimizers; expected at least one"),
    "optax's": (lambda: gdx.stack([optax.sgd(0.1)]), TypeError, r"optimizer 0 is .*; expected one of gdx's"),
    "another kind": (
        lambda: gdx.stack([gdx.sgd(0.1), gdx.adam(0.1)]),
        ValueError,
        r"optimizer 1 is adam\(learning_rate=0\.1\), another program than optimizer 0, sgd\(learning_rate=0\.1\)",
    ),
    "another static field": (
        lambda: gdx.stack([gdx.adam(0.1), gdx.adam(0.1, nesterov=True)]),
        ValueError,
        r"optimizer 1 is adam\(learning_rate=0\.1, nesterov=True\), another program",
    ),
    "other closures": (
        lambda: gdx.stack([gdx.sgd(lambda count: 0.1), gdx.sgd(lambda count: 0.2)]),
        ValueError,
        r"take those of gdx\.schedules where schedules differ in numbers",
    ),
    "a batch among them": (
        lambda: gdx.stack([gdx.sgd(0.1), gdx.grid(gdx.sgd, learning_rate=[0.1, 0.2])]),
        ValueError,
        r"optimizer 1, sgd\(learning_rate=<float64\[2\]>\), is a batch of 2; expected single optimizers",
    ),
    "batches": (
        lambda: gdx.stack([gdx.grid(gdx.sgd, learning_rate=[0.1, 0.2])] * 3),
        ValueError,
        r"optimizer 0, sgd\(learning_rate=<float64\[2\]>\), is a batch of 2.*gdx\.unstack",
    ),
    "an empty axis": (
        lambda: gdx.grid(gdx.sgd, learning_rate=[]),
        ValueError,
        r"grid: learning_rate is empty; expected at least one value",
    ),
    "an empty array": (lambda: gdx.grid(gdx.sgd, learning_rate=np.ones(0)), ValueError, r"learning_rate is empty"),
    **{
        f"{name} in the place of what makes one": (
            lambda made=made: gdx.grid(made, b1=[0.8, 0.9]),
            TypeError,
            rf"grid: make is {shown}.*; expected what makes an optimizer, .* as in gdx\.grid\(",
        )
        for name, made, shown in (
            ("an optimizer", gdx.adam(1e-3), "adam"),
            ("one of optax", optax.adam(1e-3), "Gradient"),
            ("a schedule", gdx.schedules.constant_schedule(0.1), "constant_schedule"),
            ("text", "adam", "'adam'"),
            ("nothing", None, "None"),
        )
    },
    "what makes optax's": (
        lambda: gdx.grid(optax.sgd, learning_rate=[0.1, 0.2]),
        TypeError,
        r"expected one of gdx's, such as .* gdx\.value\(optax\.lion\)",
    ),
    **{
        f"{name} alone": (
            lambda one=one: gdx.stack(one),
            TypeError,
            r"stack: optimizers is .*sgd.*; expected a list, such as \[gdx",
        )
        for name, one in (("one", gdx.sgd(0.1)), ("a class", gdx.sgd))
    },
    "a bad point": (
        lambda: gdx.grid(gdx.sgd, learning_rate=[0.1, -1.0]),
        ValueError,
        r"sgd: learning_rate is -1\.0; expected a finite number >= 0",
    ),
    "an axis of a switch": (
        lambda: gdx.grid(gdx.adam, learning_rate=[0.1], nesterov=[True, False]),
        TypeError,
        r"nesterov is \[True, False\]; expected True or False",
    ),
    "a table": (
        lambda: gdx.grid(gdx.sgd, learning_rate=np.ones((2, 2))),
        ValueError,
        r"learning_rate has shape \(2, 2\); .*gdx\.stack or gdx\.grid",
    ),
    "an unknown name": (
        lambda: gdx.grid(gdx.sgd, rate=[0.1]),
        TypeError,
        r"sgd: there is no argument 'rate'; expected learning_rate",
    ),
    "a single one": (
        lambda: gdx.unstack(gdx.sgd(0.1)),
        ValueError,
        r"sgd\.learning_rate has shape \(\); expected a batch, in which every hyperparameter has shape \(members,\)",
    ),
    "uneven": (
        lambda: gdx.labels(jax.tree.map(lambda h: np.ones(2) if h == 0.1 else np.ones(3), gdx.sgd(0.1, 0.5))),
        ValueError,
        r"has shape \([23],\); expected a batch",
    ),
    "its own update": (
        lambda: gdx.grid(gdx.sgd, learning_rate=[0.1, 0.2]).init(jnp.ones(2)),
        ValueError,
        r"learning_rate has shape \(2,\): this is a batch of optimizers; .*jax\.vmap, or train it with gdx\.sweep",
    ),
    "nothing to vary": (
        lambda: gdx.unstack(gdx.chain(optax.identity())),
        ValueError,
        r"has no hyperparameters to tell members apart",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    make, error, words = REFUSED[case]
    with pytest.raises(error, match=words):
        make()


@pytest.mark.parametrize("what", [gdx.labels, gdx.unstack])
@pytest.mark.parametrize(
    "wrong", ["a", 3, None, object(), {"a": 1}, np.ones(2), optax.sgd(0.1), [gdx.sgd(0.1)], gdx.sgd]
)
def test_what_is_no_optimizer_is_no_batch(what, wrong):
    said = rf"(?s)^{what.__name__}: batch is .*; expected a batch of gdx's optimizers, as gdx\.stack or gdx\.grid"
    with pytest.raises(TypeError, match=said):
        what(wrong)


@pytest.mark.parametrize(
    "make",
    [
        set,
        frozenset,
        iter,
        lambda rates: (rate for rate in rates),
        lambda rates: map(float, rates),
        collections.deque,
        lambda rates: dict.fromkeys(rates).keys(),
        lambda rates: dict(enumerate(rates)).values(),
    ],
    ids=["set", "frozenset", "iterator", "generator", "map", "deque", "keys", "values"],
)
def test_an_axis_is_a_list_or_an_array(make):
    for settings in ({"learning_rate": make([0.1, 0.2])}, {"learning_rate": [0.1], "b1": make([0.1, 0.2])}):
        name = [*settings][-1]
        said = rf"^grid: {name} is .*; expected its values in a list or an array, as in {name}=\[0\.1"
        with pytest.raises(TypeError, match=said):
            gdx.grid(gdx.adam, **settings)


def test_a_container_of_something_else_is_the_same_in_every_member():
    taken = []

    def make(learning_rate, names):
        taken.append(names)
        return gdx.sgd(learning_rate)

    for names in ({"a", "b"}, {"a": 0.1}, "ab", frozenset(), ["a", "b"], {0.1: 0.2}):
        assert len(gdx.labels(gdx.grid(make, learning_rate=[0.1, 0.2], names=names))) == 2
        assert taken[-2:] == [names] * 2
