"""Training in one program: the same steps as one by one, populations, the range test and hypergradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gdx
from gdx.compat import enable_x64
from gdx.surroundings import Surroundings
from gdx.training import TREE
from tests.contract.table import assert_same_bits

random = np.random.default_rng(0)
INPUTS = jnp.asarray(random.standard_normal((64, 5)).astype(np.float32))
TARGETS = jnp.sin(INPUTS[:, :1])
START = {"a": jnp.asarray(random.standard_normal((5, 8)).astype(np.float32)) / 2, "b": jnp.zeros((8, 1))}
EXAMPLES = jnp.asarray(random.integers(0, 64, (23, 16)))


def loss(params, examples):
    predictions = jnp.tanh(INPUTS[examples].astype(params["a"].dtype) @ params["a"]) @ params["b"]
    return jnp.mean((predictions - TARGETS[examples].astype(params["a"].dtype)) ** 2)


def final_loss(params):
    return {"loss": loss(params, jnp.arange(64))}


def one_by_one(tx):
    params, state, losses = START, tx.init(START), []

    @jax.jit
    def step(tx, params, state, examples):
        value, gradients = jax.value_and_grad(loss)(params, examples)
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, value

    for examples in EXAMPLES:
        params, state, value = step(tx, params, state, examples)
        losses.append(value)
    return params, state, jnp.stack(losses)


def bowl(params, batch):
    return 2 * jnp.sum(params**2)  # its curvature is 4


@pytest.mark.parametrize("remat", [False, 4])
def test_takes_the_steps_of_a_loop(remat):
    tx = gdx.adamw(0.01)
    found = jax.jit(lambda tx: gdx.train(loss, tx, START, EXAMPLES, remat=remat))(tx)
    for a, b in zip(jax.tree.leaves(tuple(found)), jax.tree.leaves(one_by_one(tx))):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)


def test_goes_on_from_a_state():
    tx = gdx.adamw(0.01)
    train = jax.jit(lambda tx, params, examples, state: gdx.train(loss, tx, params, examples, state=state))
    whole = train(tx, START, EXAMPLES, tx.init(START))
    first = train(tx, START, EXAMPLES[:10], tx.init(START))
    second = train(tx, first.params, EXAMPLES[10:], first.state)
    assert_same_bits((second.params, second.state), (whole.params, whole.state))
    assert_same_bits(jnp.concatenate([first.losses, second.losses]), whole.losses)


def test_takes_optax_and_python_floats():
    found = gdx.train(lambda p, batch: (p["x"] - batch) ** 2, optax.sgd(0.1), {"x": 1.0}, jnp.zeros(3))
    np.testing.assert_allclose(found.params["x"], 0.8**3, rtol=1e-6)
    np.testing.assert_allclose(found.losses, [1, 0.8**2, 0.8**4], rtol=1e-6)


@pytest.mark.parametrize(
    "tx", [optax.polyak_sgd(), optax.chain(optax.adam(0.1), optax.contrib.reduce_on_plateau()), optax.lbfgs()]
)
def test_gives_optax_what_some_of_its_optimizers_ask_for(tx):
    with jax.numpy_dtype_promotion("standard"):
        found = gdx.train(lambda p, batch: jnp.sum((p - batch) ** 2), tx, jnp.ones(3), jnp.zeros(20))
    assert found.losses[-1] < 0.2 * found.losses[0]


def test_remat_without_jit():
    with jax.disable_jit():
        found = gdx.train(bowl, gdx.sgd(0.1), jnp.ones(2), jnp.zeros(9), remat=3)
    np.testing.assert_allclose(found.params, 0.6**9 * np.ones(2), rtol=1e-6)


def hyperparameters_and_slopes(tx, remat):
    leaves, structure = jax.tree.flatten(tx)
    start = jax.tree.map(lambda p: p.astype(float), START)

    def after(leaves):
        trained = gdx.train(loss, jax.tree.unflatten(structure, list(leaves)), start, EXAMPLES, remat=remat)
        return loss(trained.params, jnp.arange(64))

    return jnp.asarray(leaves), jax.jit(after), jax.jit(jax.grad(after))


OPTIMIZERS = [
    gdx.chain(gdx.add_decoupled_weight_decay(0.01), gdx.sgd(0.05, 0.8, nesterov=True)),
    gdx.adamw(
        gdx.schedules.warmup_cosine_decay_schedule(
            0.01, peak_value=0.1, warmup_steps=5.3, decay_steps=19.7, end_value=0.02
        ),
        b1=0.8,
        weight_decay=0.1,
        eps=1e-3,
        eps_root=1e-4,
    ),
]


@pytest.mark.parametrize("tx", OPTIMIZERS, ids=["sgd", "adamw"])
@pytest.mark.parametrize("remat", [False, 4])
def test_slopes_in_every_hyperparameter_match_finite_differences(tx, remat):
    with enable_x64(True):
        values, after, slopes = hyperparameters_and_slopes(tx, remat)
        found = slopes(values)
        for i, value in enumerate(values):
            step = 1e-5 * value
            a, b, c, d = (after(values.at[i].add(k * step)) for k in (1, -1, 2, -2))
            np.testing.assert_allclose(found[i], (8 * (a - b) - (c - d)) / (12 * step), rtol=1e-6, atol=1e-9)


def test_rematerialisation_keeps_memory_for_thirty_steps():
    def temporary(steps, remat):
        def after(tx, examples):
            return loss(gdx.train(loss, tx, START, examples, remat=remat).params, jnp.arange(64))

        traced = jax.jit(jax.grad(after)).lower(gdx.adam(0.1), jax.ShapeDtypeStruct((steps, 16), jnp.int32))
        return traced.compile().memory_analysis().temp_size_in_bytes

    assert temporary(10_000, True) < 0.01 * temporary(1000, False)
    assert temporary(10_000, True) < 1.5 * temporary(64, True)


GRID = gdx.grid(gdx.adamw, learning_rate=np.geomspace(1e-3, 1e-1, 4), weight_decay=[0.0, 0.1])


@pytest.mark.parametrize("chunk_size", [None, 1, 3, 8, 100])
def test_a_sweep_trains_each_member(chunk_size):
    found = gdx.sweep(loss, GRID, START, EXAMPLES, chunk_size=chunk_size)
    assert found.losses.shape == (8, len(EXAMPLES)) and found.final["a"].shape == (8, 5, 8)
    for i, member in enumerate(gdx.unstack(GRID)):
        params, _, losses = one_by_one(member)
        np.testing.assert_allclose(found.losses[i], losses, rtol=1e-3, atol=1e-6)
        np.testing.assert_allclose(found.final["a"][i], params["a"], rtol=1e-3, atol=1e-4)
    assert found.labels == gdx.labels(GRID) and not np.any(found.diverged)


def test_another_grid_compiles_nothing(monkeypatch):
    from gdx import stages

    gdx.sweep(loss, GRID, START, EXAMPLES, evaluate=final_loss)
    size = stages.in_one._cache_size()
    gdx.sweep(loss, jax.tree.map(lambda h: h / 2, GRID), START, EXAMPLES, evaluate=final_loss)
    assert stages.in_one._cache_size() == size


def test_chunks_bound_the_memory():
    from gdx import stages

    def temporary(size):
        batch = gdx.grid(gdx.adamw, learning_rate=np.geomspace(1e-3, 1e-1, 256))
        wide = {"a": jnp.zeros((5, 512)), "b": jnp.zeros((512, 1))}
        around, steps = Surroundings(loss, final_loss), len(EXAMPLES)
        plan = stages.Plan("sweep", loss, final_loss, 0, None, (), around, TREE, size, 0, steps)
        arrays = {"params": (wide, None), "model_state": None, "batches": EXAMPLES}
        compiled = stages.in_one.lower(plan, batch, None, arrays).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(16) < temporary(256) / 10


def test_members_that_diverge_touch_no_other():
    rates = [1e-2, 1e30, 2e-2, 1e-1]
    found = gdx.sweep(loss, gdx.grid(gdx.sgd, learning_rate=rates), START, EXAMPLES, evaluate=final_loss)
    assert found.diverged.tolist() == [False, True, False, False]
    calm = gdx.sweep(
        loss, gdx.grid(gdx.sgd, learning_rate=[1e-2, 1e-3, 2e-2, 1e-1]), START, EXAMPLES, evaluate=final_loss
    )
    assert_same_bits(found.losses[::2], calm.losses[::2])
    assert found.ranking(found.final["loss"]) == [3, 2, 0]
    assert found.ranking(-found.losses[:, 0]) == [0, 2, 3]


def test_a_member_whose_last_step_diverges_is_marked():
    found = gdx.sweep(loss, gdx.grid(gdx.sgd, learning_rate=[0.1, 3e38]), START, EXAMPLES[:1], evaluate=final_loss)
    assert np.all(np.isfinite(found.losses)) and found.diverged.tolist() == [False, True]


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
@pytest.mark.parametrize("chunk_size", [None, 8])
def test_a_sharded_population_is_trained_in_place(kind, chunk_size):
    mesh = jax.make_mesh((8,), ("members",), axis_types=(kind,))
    batch = gdx.grid(gdx.adamw, learning_rate=np.geomspace(1e-3, 1e-1, 16))
    spread = jax.device_put(batch, jax.NamedSharding(mesh, jax.P("members")))
    found = gdx.sweep(loss, spread, START, EXAMPLES, chunk_size=chunk_size)
    assert found.losses.sharding.spec[0] == "members"
    assert {shard.data.shape for shard in found.final["a"].addressable_shards} == {(2, 5, 8)}
    expected = gdx.sweep(loss, batch, START, EXAMPLES, chunk_size=chunk_size)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=1e-4)
    assert not np.any(found.diverged)
    if chunk_size is None:
        halved = gdx.sweep(loss, spread, START, EXAMPLES, halve=1)
        assert {x.sharding.spec[0] for x in jax.tree.leaves((halved.losses, halved.final))} == {"members"}


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_progress_comes_from_inside(chunk_size, jitted):
    calls = []

    def progress(done, least, diverged):
        calls.append((done, least, diverged))

    batches = jnp.tile(EXAMPLES, (10, 1))
    run = functools.partial(gdx.sweep, loss, GRID, START, chunk_size=chunk_size, progress=progress)
    found = jax.jit(lambda x: run(x)[1:])(batches) if jitted else run(batches)[1:]
    assert_same_bits(found, run(batches, progress=False)[1:])
    jax.effects_barrier()
    fractions = [done for done, *_ in calls]
    assert fractions == sorted(fractions) and fractions[-1] == 1 and 67 <= len(calls) <= 150
    assert calls[-1][1] < calls[0][1] and all(diverged == 0 for *_, diverged in calls)


def test_progress_ends_with_the_last_step_and_leaves_out_copies():
    calls = []
    batch = gdx.grid(gdx.sgd, learning_rate=[1e-2, 1e-3, 1e-4, 1e30])  # the last chunk has two copies of the last
    steps = jnp.tile(EXAMPLES, (9, 1))[:175]  # 350 in two chunks, which is no multiple of what lies between reports
    run = functools.partial(gdx.sweep, loss, batch, START, chunk_size=3, progress=lambda *call: calls.append(call))
    for way in (run, jax.jit(lambda steps: run(steps).losses)):
        way(steps)
        jax.effects_barrier()
        assert calls[-1][0] == 1 and max(diverged for *_, diverged in calls) == 1
        calls.clear()


def test_progress_of_few_steps():
    calls = []
    batch = gdx.grid(gdx.sgd, learning_rate=[1e-2, 1e30])
    result = gdx.sweep(loss, batch, START, EXAMPLES[:2], progress=lambda *call: calls.append(call))
    jax.effects_barrier()
    assert [(done, diverged) for done, _, diverged in calls] == [(0.5, 0), (1.0, 1)]
    assert calls[1][1] == result.losses[0, 1]


@pytest.mark.parametrize(
    ("tx", "edge"),
    [(gdx.gradient_descent(0.1), 0.5), (gdx.momentum(0.1, 0.5), 0.75), (gdx.sgd(0.1, momentum=0.5), 0.75)],
)
def test_the_range_test_finds_the_edge_of_a_bowl(tx, edge):
    """2 / lambda, and 2 (1 + momentum) / lambda for the heavy ball."""
    found = gdx.range_test(bowl, tx, jnp.ones(3), jnp.zeros((200, 1)), low=1e-2, high=10, points=200)
    rates = found.learning_rates
    np.testing.assert_allclose(found.edge, np.sqrt(rates[rates < edge][-1] * rates[rates > edge][0]))
    assert found.learning_rates[0] == 0.01 and found.losses.shape == (200,) and found.start == 6
    assert found.suggested < found.edge


def test_the_range_test_suggests_the_best_rate():
    found = gdx.range_test(
        bowl, gdx.gradient_descent(0.1), jnp.ones(3), jnp.zeros((3, 1)), low=1e-2, high=10, points=99
    )
    assert abs(found.suggested / 0.25 - 1) < 0.05
    assert np.all(found.losses[found.learning_rates > 1] > found.start)


def test_the_range_test_without_an_edge():
    found = gdx.range_test(
        bowl, gdx.gradient_descent(0.1), jnp.ones(3), jnp.zeros((9, 1)), low=1e-3, high=0.1, points=5
    )
    assert found.edge == np.inf and found.suggested == 0.1


REFUSED = {
    "no batches": (
        lambda: gdx.train(loss, gdx.sgd(0.1), START, ()),
        r"there are no arrays; expected arrays with a leading",
    ),
    "uneven batches": (
        lambda: gdx.train(loss, gdx.sgd(0.1), START, (jnp.ones(3), {"y": jnp.ones(4)})),
        r"\[0\] has shape \(3,\), \[1\]\['y'\] has shape \(4,\); expected arrays with a leading axis of steps",
    ),
    "a scalar": (lambda: gdx.train(loss, gdx.sgd(0.1), START, jnp.ones(())), r"the root has shape \(\)"),
    "no steps": (lambda: gdx.sweep(loss, GRID, START, EXAMPLES[:0]), r"the root has shape \(0, 16\)"),
    "a single optimizer": (lambda: gdx.sweep(loss, gdx.sgd(0.1), START, EXAMPLES), r"expected a batch"),
    "no chunk": (
        lambda: gdx.sweep(loss, GRID, START, EXAMPLES, chunk_size=0),
        r"chunk_size is 0; expected an integer >= 1",
    ),
    "a range upside down": (
        lambda: gdx.range_test(bowl, gdx.sgd(0.1), START, EXAMPLES, low=1, high=0.1),
        r"low is 1 and high is 0\.1; expected numbers, 0 < low < high",
    ),
    "one point": (
        lambda: gdx.range_test(bowl, gdx.sgd(0.1), START, EXAMPLES, points=1),
        r"points is 1; expected an integer >= 2",
    ),
    "no rate to replace": (
        lambda: gdx.range_test(bowl, gdx.scale_by_adam(), jnp.ones(2), EXAMPLES),
        r"range_test: scale_by_adam\(\) has no learning_rate to try; give it one, as in gdx\.chain\(",
    ),
    "only rates of 0": (
        lambda: gdx.range_test(bowl, gdx.chain(gdx.sgd(0.0), gdx.sgd(0.0)), jnp.ones(2), EXAMPLES),
        r"tx has sgd\[0\]\.learning_rate=0\.0, sgd\[1\]\.learning_rate=0\.0; expected numbers, not all 0",
    ),
    "a schedule among rates": (
        lambda: gdx.range_test(bowl, gdx.chain(gdx.sgd(0.1), gdx.sgd(lambda count: 0.1)), jnp.ones(2), EXAMPLES),
        r"tx has sgd\[0\]\.learning_rate=0\.1, sgd\[1\]\.learning_rate=<.*>; expected numbers",
    ),
    "a batch of rates": (
        lambda: gdx.range_test(loss, GRID, START, EXAMPLES),
        r"tx is a batch, of learning_rate=<float64\[8\]>; expected one optimizer, as in gdx\.unstack",
    ),
    **{
        f"{value} at the start": (
            lambda value=value: gdx.range_test(
                lambda theta, batch: bowl(theta, batch) + value, gdx.sgd(0.1), jnp.ones(2), EXAMPLES
            ),
            rf"range_test: the loss is {value} at the start, before any step; expected params and batches where",
        )
        for value in (np.nan, np.inf, -np.inf)
    },
    "nothing trains": (
        lambda: gdx.range_test(bowl, gdx.sgd(0.1), jnp.ones(2), EXAMPLES, low=1, high=10),
        r"no learning rate from 1 to 10 ends below the loss of the start, 4; try others",
    ),
}


class Unhashable(list):
    def __call__(self, params, batch):
        return loss(params, batch)


READS = {  # what looks at the losses that it has made
    "range_test": lambda start: gdx.range_test(bowl, gdx.sgd(0.1), start, jnp.zeros((4, 1)), points=2),
    "coordinate_check": lambda start: gdx.width.coordinate_check(
        lambda p, _: (jnp.sum(p**2), {"p": p}), lambda width: (gdx.sgd(0.1), start), jnp.zeros(1), [1, 2]
    ),
    "noise.critical_batch_size": lambda start: gdx.noise.critical_batch_size(
        bowl, gdx.sgd(0.1), start, 16, (1, 2), examples=8, keys=jax.random.split(jax.random.key(0)), tolerance=1.0
    ),
}


@pytest.mark.parametrize("around", [jax.jit, jax.vmap, jax.grad], ids=lambda around: around.__name__)
@pytest.mark.parametrize("name", READS)
def test_what_reads_losses_is_not_to_be_traced(name, around):
    with pytest.raises(TypeError, match=rf"^{name}: .* is traced, .*; call {name} outside of jax\.jit"):
        around(READS[name])(jnp.ones(3))


KEYS = jax.random.split(jax.random.key(0))
# each argument that may hold an array, and what a loss closes over
TRACED = {
    "range_test": (
        lambda tx, x: gdx.range_test(bowl, tx, START, jnp.zeros((4, 1))),
        lambda tx, x: gdx.range_test(bowl, gdx.sgd(0.1), START, jnp.zeros((4, 1)), low=x),
        lambda tx, x: gdx.range_test(bowl, gdx.chain(gdx.sgd(x), gdx.sgd(0.1)), START, jnp.zeros((4, 1))),
        lambda tx, x: gdx.range_test(lambda p, b: x * bowl(p, b), gdx.sgd(0.1), START, jnp.zeros((4, 1)), points=2),
    ),
    "coordinate_check": (
        lambda tx, x: gdx.width.coordinate_check(lambda p, _: (p, {"p": p}), lambda n: (tx, x), x, [1, 2]),
        lambda tx, x: gdx.width.coordinate_check(
            lambda p, _: (p, {"p": p}), lambda n: (tx, jnp.ones(())), jnp.zeros(1), [1, 2]
        ),
    ),
    "noise.critical_batch_size": tuple(
        lambda tx, x, key=key, value=value: gdx.noise.critical_batch_size(
            *(bowl, tx if key == "tx" else gdx.sgd(0.1), START, 16),
            **{"batch_sizes": (1, 2), "examples": 8, "keys": KEYS} | ({} if key == "tx" else {key: value(x)}),
        )
        for key, value in {"tx": None, "factors": lambda x: (0.5, x), "exponent": lambda x: x}.items()
    ),
}


@pytest.mark.parametrize("name", TRACED)
def test_nothing_that_it_reads_is_to_be_traced(name):
    for call in TRACED[name]:
        with pytest.raises(TypeError, match=rf"^{name}: .* is traced, .*; call {name} outside of jax\.jit"):
            jax.jit(lambda tx, x: (call(tx, x), x)[1])(gdx.sgd(0.1), 0.1)  # noqa: B023


def test_refuses_what_is_no_optimizer_of_gdx_or_has_no_hash():
    with pytest.raises(TypeError, match=r"range_test: tx is .*; expected one of gdx's optimizers"):
        gdx.range_test(bowl, optax.sgd(0.1), jnp.ones(2), EXAMPLES)
    with pytest.raises(TypeError, match=r"sweep: loss is \[\], which has no hash.*lambda \*arguments: loss"):
        gdx.sweep(Unhashable(), GRID, START, EXAMPLES)


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case):
    run, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        run()


@pytest.mark.parametrize(
    ("returned", "kinds"),
    [
        (lambda x: (x, 1.0, 2.0), r"\('float32\[\]', 'float32\[\]', 'float32\[\]'\)"),
        (lambda x: x[None], r"float32\[1\]"),
        (lambda x: {"loss": x}, r"\{'loss': 'float32\[\]'\}"),
        (lambda x: 1, r"int32\[\]"),
        (lambda x: jax.lax.complex(x, x), r"complex64\[\]"),
        (lambda x: None, "None"),
    ],
)
@pytest.mark.parametrize("way", ["train", "sweep", "range_test"])
def test_a_loss_that_is_no_scalar_is_refused(way, returned, kinds):
    with pytest.raises(TypeError, match=rf"the loss returned {kinds}; expected a real scalar"):
        WAYS[way](lambda params, batch: returned(loss(params, batch)), GRID if way == "sweep" else gdx.sgd(0.1))


WAYS = {
    way: lambda loss, tx, batches=EXAMPLES, way=way: getattr(gdx, way)(loss, tx, START, batches)
    for way in ("train", "sweep", "range_test")
}


@pytest.mark.parametrize("way", WAYS)
def test_refuses_arguments_in_each_others_places(way):
    tx = GRID if way == "sweep" else gdx.sgd(0.1)
    run = WAYS[way]
    for wrong in (gdx.sgd(0.1), gdx.sgd, 1.0, None):
        with pytest.raises(
            TypeError, match=rf"{way}: loss is .*; expected a function .*, as in {way}\(loss, .*batches"
        ):
            run(wrong, tx)
    for wrong, words in ((gdx.sgd, r"call it, as in sgd\("), (optax.adam, "as in"), (loss, "as in"), (None, "as in")):
        with pytest.raises(TypeError, match=rf"{way}: .* is no optimizer; expected one such as gdx\.sgd.*{words}"):
            run(loss, wrong)
    with pytest.raises(TypeError, match=rf"{way}: batches is a list of 23; .*jax\.tree\.map.*jnp\.stack"):
        run(loss, tx, list(EXAMPLES))
    for several in ([gdx.sgd(0.1), gdx.sgd(0.2)], (optax.sgd(0.1),)):
        with pytest.raises(TypeError, match=rf"{way}: .* is no optimizer; .* as in gdx\.sweep\(loss, gdx\.stack\("):
            run(loss, several)
    if way != "train":
        with pytest.raises(TypeError, match=rf"{way}: .*; expected .* of gdx's"):
            run(loss, optax.sgd(0.1))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"low": "x"}, ValueError, r"low is 'x' and high is 10\.0; expected numbers, 0 < low < high"),
        ({"high": None}, ValueError, r"high is None; expected numbers"),
        ({"points": "x"}, TypeError, r"points is 'x'; expected an integer"),
        ({"points": 2.5}, TypeError, r"points is 2\.5; expected an integer"),
        ({"chunk_size": "x"}, TypeError, r"chunk_size is 'x'; expected an integer"),
    ],
)
def test_a_range_that_is_none(settings, error, words):
    with pytest.raises(error, match=words):
        gdx.range_test(loss, gdx.sgd(0.1), START, EXAMPLES, **settings)


def test_a_score_of_another_shape():
    found = gdx.sweep(loss, GRID, START, EXAMPLES)
    for score in (found.losses, found.losses[:-1, 0], 1.0):
        with pytest.raises(
            ValueError, match=r"ranking: score has shape .*; expected \(\d+,\), one number for each member"
        ):
            found.ranking(score)


WRONG_SCORES = {
    "complex": np.ones(8) * 1j,
    "text": list("abcdefgh"),
    "digits": list("12345678"),
    "booleans": [True] * 8,
    "nothing": [None] * 8,
    "none at all": None,
    "a dictionary": {"loss": np.ones(8)},
    "keys": jax.random.split(jax.random.key(0), 8),
    "ragged": [[1.0], *[1.0] * 7],
}


@pytest.mark.parametrize("score", WRONG_SCORES.values(), ids=WRONG_SCORES)
def test_a_score_that_is_no_number(score):
    found = gdx.sweep(loss, GRID, START, EXAMPLES)
    with pytest.raises(TypeError, match=r"ranking: score is .*; expected real numbers, one for each member, as in"):
        found.ranking(score)


def test_a_score_of_few_bits():
    found = gdx.sweep(loss, GRID, START, EXAMPLES)
    half = found.losses[:, -1].astype(jnp.bfloat16)
    assert found.ranking(half) == found.ranking([float(x) for x in half])


@pytest.mark.parametrize(
    ("wrong", "shown"),
    [
        (lambda params: loss(params, EXAMPLES[0]), r"<lambda>\(params\)"),
        (lambda params, batch, key: loss(params, batch), r"<lambda>\(params, batch, key\)"),
        (functools.partial(loss, START), r".*\(examples\)"),
        (functools.partial(loss, examples=EXAMPLES[0]), r".*examples=.*"),
    ],
    ids=["one", "three", "partial", "by name"],
)
@pytest.mark.parametrize("way", WAYS)
def test_a_loss_takes_parameters_and_a_batch(way, wrong, shown):
    tx = GRID if way == "sweep" else gdx.sgd(0.1)
    words = rf"{way}: loss is {shown}; expected a function of the parameters and a batch, as in {way}\(loss, "
    with pytest.raises(TypeError, match=words):
        WAYS[way](wrong, tx)


def test_functions_that_take_what_they_are_given():
    """Also through decorators that give them more, and with arguments that they leave to their defaults."""

    def keyed(function):
        return functools.wraps(function)(lambda *arguments: function(*arguments, jax.random.key(0)))

    for right in (
        keyed(lambda params, batch, key: loss(params, batch)),
        jax.jit(loss),
        lambda *arguments: loss(*arguments),
        lambda params, batch, scale=1.0, *, add=0.0: scale * loss(params, batch) + add,
        functools.partial(lambda scale, params, batch: scale * loss(params, batch), 1.0),
    ):
        np.testing.assert_allclose(
            gdx.train(right, gdx.sgd(0.1), START, EXAMPLES).losses,
            gdx.train(loss, gdx.sgd(0.1), START, EXAMPLES).losses,
            rtol=1e-5,
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"progress": 1}, "progress is 1; expected a function of the fraction that is done and the least loss"),
        ({"progress": lambda done: None}, r"progress is <lambda>\(done\); expected a function of the fraction"),
        ({"evaluate": 3}, "evaluate is 3; expected a function of the parameters"),
        ({"evaluate": 0}, "evaluate is 0; expected a function of the parameters"),
        ({"evaluate": loss}, r"evaluate is loss\(params, examples\); expected a function of the parameters"),
        ({"evaluate": lambda params: "low"}, "evaluate returned 'low'; expected an array or number, or a tree of such"),
        (
            {"evaluate": lambda params: {"loss": abs}},
            r"evaluate returned \{'loss': <.*abs>\} at \['loss'\]; expected",
        ),
        ({"evaluate": lambda params: None}, "evaluate returned None; expected an array"),
    ],
    ids=lambda x: str(next(iter(x))) if isinstance(x, dict) else "",
)
def test_what_a_sweep_cannot_call_or_keep(settings, words):
    with pytest.raises(TypeError, match=f"sweep: {words}"):
        gdx.sweep(loss, GRID, START, EXAMPLES, **settings)


@pytest.mark.parametrize(
    ("remat", "error", "expected"),
    [
        ("yes", TypeError, "True, False or an integer >= 1"),
        (None, TypeError, "True, False or an integer >= 1"),
        (2.0, TypeError, "True, False or an integer >= 1"),
        (0, ValueError, "an integer >= 1"),
    ],
)
def test_remat_is_a_switch_or_a_number(remat, error, expected):
    with pytest.raises(error, match=f"train: remat is {remat!r}; expected {expected}"):
        gdx.train(loss, gdx.sgd(0.1), START, EXAMPLES, remat=remat)


def test_the_range_of_several_learning_rates():
    """The largest takes each rate, the others keep their ratio to it."""
    masked = gdx.value(optax.masked)

    def rates(a, b):
        return gdx.chain(masked(gdx.sgd(a), {"a": True, "b": False}), masked(gdx.sgd(b), {"a": False, "b": True}))

    bowls = lambda p, batch: jnp.sum(p["a"] ** 2) + jnp.sum(p["b"] ** 2)  # noqa: E731
    start = {"a": jnp.ones(3), "b": jnp.ones(2)}
    found = gdx.range_test(bowls, rates(0.1, 0.025), start, jnp.zeros((20, 1)), low=0.1, high=1.0, points=4)
    for rate, last in zip(found.learning_rates, found.losses):
        losses = gdx.train(bowls, rates(rate, rate / 4), start, jnp.zeros((20, 1))).losses
        np.testing.assert_allclose(np.mean(losses[-2:]), last, rtol=1e-4)


@pytest.mark.parametrize(
    "rounds", [gdx.round_with_correction(0), gdx.round_with_compensation(), gdx.round_with_master()], ids=repr
)
def test_links_that_round_train_under_strict_promotion(rounds):
    tx, start, batches = gdx.chain(gdx.sgd(0.1), rounds), jnp.ones(4, "bfloat16"), jnp.zeros((5, 4), "bfloat16")
    with jax.numpy_dtype_promotion("strict"):
        found = gdx.train(lambda p, b: jnp.sum((p - b) ** 2), tx, start, batches)
    assert found.params.dtype == jnp.bfloat16 and bool(jnp.all(abs(found.params - jnp.bfloat16(0.33)) < 0.01))


@pytest.mark.parametrize("wrong", ["a", b"a", abs, np.array(["a", "b"])], ids=str)
@pytest.mark.parametrize("way", [gdx.train, gdx.sweep, gdx.range_test])
def test_what_is_no_array(way, wrong):
    tx = GRID if way is gdx.sweep else gdx.sgd(0.1)
    for tree, place in ((wrong, "the root"), ({**START, "b": wrong}, r"\['b'\]")):
        with pytest.raises(TypeError, match=f"{way.__name__}: params is .* at {place}; expected arrays"):
            way(loss, tx, tree, EXAMPLES)
        with pytest.raises(TypeError, match=f"{way.__name__}: batches is .* at {place}; expected arrays"):
            way(loss, tx, START, tree)
        if way is gdx.train:
            for optimizer in (tx, optax.sgd(0.1)):
                with pytest.raises(TypeError, match=f"train: state is .* at {place}; expected arrays"):
                    gdx.train(loss, optimizer, START, EXAMPLES, state=tree)


def test_batches_may_be_keys_and_numbers_of_few_bits():
    keys = {"key": jax.random.split(jax.random.key(0), 3), "x": jnp.ones(3, "bfloat16"), "flag": jnp.ones(3, bool)}

    def noisy(params, batch):
        return jnp.sum((params - jax.random.normal(batch["key"])) ** 2)

    assert gdx.train(noisy, gdx.sgd(0.1), jnp.ones(2), keys).losses.shape == (3,)


MAKERS = (gdx.sgd, gdx.momentum, gdx.adam, gdx.adamw, optax.sgd, optax.adam, optax.lion, gdx.value(optax.sgd))


def goes_on(tx, state, **settings):
    with jax.numpy_dtype_promotion("standard"):  # optax's need it
        return gdx.train(loss, tx, START, EXAMPLES, state=state, **settings).state


@pytest.mark.parametrize("make", MAKERS)
def test_the_state_of_another_optimizer_is_refused(make):
    tx = make(0.1)
    own = tx.init(START)
    for state in (other(0.1).init(START) for other in MAKERS):
        if jax.tree.structure(state) == jax.tree.structure(own):
            goes_on(tx, state)
        else:
            with pytest.raises(TypeError, match=r"^\w+: the state is .*, expected .*init\(params\) as the target"):
                goes_on(tx, state)
    if jax.tree.leaves(own):
        with pytest.raises(ValueError, match=r"^\w+: the state is float32\[9,1\] at .*, expected the shape \(8, 1\)"):
            goes_on(tx, tx.init({**START, "b": jnp.zeros((9, 1))}))


@pytest.mark.parametrize("remat", [False, True])
@pytest.mark.parametrize("make", [gdx.momentum, gdx.adam, optax.adam, optax.adamw, optax.rmsprop])
def test_a_state_of_few_bits_is_refused(make, remat):
    """Where the step would make it wider; what of optax's is a value keeps it as it is."""
    few = jax.tree.map(lambda x: x.astype("bfloat16") if x.ndim else x, make(0.1).init(START))
    said = r"^\w+: .*state.* is bfloat16\[5,8\](.*expected the dtype float32|, which is not how)"
    with pytest.raises(TypeError, match=said):
        goes_on(make(0.1), few, remat=remat)
    if make is optax.adam:
        assert goes_on(gdx.value(make)(0.1), few, remat=remat)[0].mu["a"].dtype == "bfloat16"


def another_start():
    return jnp.full(2, 3.0)


class Model:
    scale = 1.0

    def __init__(self):
        self.target = jnp.zeros(2)

    def loss(self, theta, batch):
        return jnp.sum((theta - self.target) ** 2) + 0 * jnp.sum(batch)


TARGET = jnp.zeros(2)


def around_it(theta, batch):
    return jnp.sum((theta - TARGET) ** 2) + 0 * jnp.sum(batch)


def through_another(theta, batch):
    return around_it(theta, batch)


def in_a_function_of_its_own(theta, batch):
    return jax.tree.map(lambda x: around_it(x, batch), theta)


@pytest.mark.parametrize("kind", ["global", "helper", "inner", "cell", "method", "partial", "default", "container"])
def test_a_sweep_sees_what_has_changed_around_its_functions(kind, monkeypatch):
    target, held, model = jnp.zeros(2), [jnp.zeros(2)], Model()

    def in_a_cell(theta, batch):
        return jnp.sum((theta - target) ** 2) + 0 * jnp.sum(batch)

    def by_default(theta, batch, target=target):
        return jnp.sum((theta - target) ** 2) + 0 * jnp.sum(batch)

    def in_a_list(theta, batch):
        return jnp.sum((theta - held[0]) ** 2) + 0 * jnp.sum(batch)

    losses = {
        "global": around_it,
        "helper": through_another,
        "inner": in_a_function_of_its_own,
        "cell": in_a_cell,
        "method": model.loss,
        "partial": functools.partial(by_default, target=target),
        "default": by_default,
        "container": in_a_list,
    }
    loss, grid = losses[kind], gdx.grid(gdx.sgd, learning_rate=[0.01, 0.1])

    def compare():
        swept = gdx.sweep(loss, grid, jnp.ones(2), jnp.zeros((5, 2)))
        alone = [gdx.train(loss, tx, jnp.ones(2), jnp.zeros((5, 2))).losses for tx in gdx.unstack(grid)]
        np.testing.assert_allclose(swept.losses, jnp.stack(alone), rtol=1e-6)
        return float(swept.losses[0, 0])

    before = compare()
    monkeypatch.setitem(globals(), "TARGET", another_start())
    target = held[0] = model.target = another_start()
    by_default.__defaults__ = (target,)
    if kind == "partial":
        loss = functools.partial(by_default, target=target)
    assert compare() != before


def test_a_sweep_of_the_same_functions_is_found_again():
    traced = []

    def loss(theta, batch):
        traced.append(theta)
        return jnp.sum((theta - TARGET) ** 2) + 0 * jnp.sum(batch)

    for rates in ([0.01, 0.1], [0.2, 0.3]):
        gdx.sweep(loss, gdx.grid(gdx.sgd, learning_rate=rates), jnp.ones(2), jnp.zeros((5, 2)))
        count = len(traced)
        traced.clear()
    assert count == 0


@pytest.mark.parametrize("way", ["train", "sweep", "range_test"])
def test_a_complex_parameter_descends(way):
    def loss(theta, batch):
        return jnp.sum(jnp.abs(theta) ** 2) + 0 * jnp.sum(batch)

    start, batches = jnp.array([1 + 1j, -2j]), jnp.zeros((40, 2))
    if way == "range_test":
        assert 0.05 < gdx.range_test(loss, gdx.sgd(0.1), start, batches).suggested < 1
    elif way == "sweep":
        losses = gdx.sweep(loss, gdx.grid(gdx.adam, learning_rate=[0.05, 0.1]), start, batches).losses
        assert float(losses[:, -1].max()) < 0.2 * float(losses[0, 0])
    else:
        # by hand, the two parts as real numbers
        losses, z = [], np.array([[1.0, 1.0], [0.0, -2.0]])
        for _ in range(40):
            losses.append((z**2).sum())
            z -= 0.1 * 2 * z
        np.testing.assert_allclose(gdx.train(loss, gdx.sgd(0.1), start, batches).losses, losses, rtol=1e-4)
