"""Transfer across width: the multiples by hand, that they make equal steps in NumPy, and what is refused."""

import itertools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gdx
from gdx.compat import enable_x64
from gdx.width import CoordinateCheck, coordinate_check, transfer


def shapes(**leaves):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in leaves.items()}


def transformer(width, heads, head):
    """An embedding, attention as flax lays it out, a network with a wider middle, and a readout."""
    return shapes(
        embedding=(96, width),
        positions=(16, width),
        gain=(width,),
        query=(width, heads, head),
        query_bias=(heads, head),
        attended=(heads, head, width),
        up=(width, 4 * width),
        up_bias=(4 * width,),
        down=(4 * width, width),
        convolution=(3, 3, width, width),
        stacked=(6, width, width),
        readout=(width, 96),
        readout_bias=(96,),
    )


INPUT, HIDDEN, OUTPUT = (1, 4), (4, 4), (4, 1)


@pytest.mark.parametrize(("heads", "head"), [(16, 8), (4, 32)])
def test_which_width_each_parameter_of_a_transformer_has(heads, head):
    found = transfer(transformer(32, 4, 8), transformer(128, heads, head))
    fans = {leaf.path: (leaf.fan_in, leaf.fan_out) for leaf in found.leaves}
    inputs = dict.fromkeys(["embedding", "positions", "gain", "query_bias", "up_bias"], INPUT)
    hidden = dict.fromkeys(["query", "attended", "up", "down", "convolution", "stacked"], HIDDEN)
    assert fans == {**inputs, **hidden, "readout": OUTPUT, "readout_bias": (1, 1)}
    # Tensor Programs V, table 3, relative to the base: Adam's rate, SGD's rate, and the start
    table = {"input": (1, 4, 1), "hidden": (1 / 4, 1, 1 / 2), "output": (1 / 4, 1 / 4, 1 / 4), "none": (1, 1, 1)}
    for leaf in found.leaves:
        adam, sgd = leaf.changes("adam"), leaf.changes("sgd")
        assert (adam["learning_rate"], sgd["learning_rate"], leaf.start) == table[leaf.kind]
        assert adam["weight_decay"] * adam["learning_rate"] == sgd["weight_decay"] * sgd["learning_rate"] == 1


def test_what_is_narrower_is_the_inverse():
    wide, narrow = transformer(128, 16, 8), transformer(32, 4, 8)
    for there, back in zip(transfer(narrow, wide).leaves, transfer(wide, narrow).leaves):
        assert there.fan_in * back.fan_in == there.fan_out * back.fan_out == there.start * back.start == 1


def test_the_optimizer_is_groups_with_the_base_s_numbers():
    found = transfer(transformer(32, 4, 8), wide := transformer(128, 16, 8))
    tx = found.optimizer(gdx.adamw(0.5, weight_decay=0.25, eps=1e-8))
    assert tx.hyperparams["learning_rate"] == 0.5
    used = [[tx.hyperparams[name] for name in ("learning_rate", "weight_decay", "eps")] for tx in tx.members]
    by_group = dict(zip(tx.patterns, used))
    np.testing.assert_allclose(by_group["^readout$"], [0.125, 1.0, 1e-8])
    np.testing.assert_allclose(next(v for k, v in by_group.items() if "query|" in k), [0.125, 1.0, 0.25e-8])
    np.testing.assert_allclose(next(v for k, v in by_group.items() if "embedding" in k), [0.5, 0.25, 0.25e-8])
    np.testing.assert_allclose(used[-1], [0.5, 0.25, 1e-8])
    # of decay alone, as strong in each step for all
    ones, zeros = ({name: np.full(x.shape, i, np.float32) for name, x in wide.items()} for i in (1, 0))
    updates, _ = jax.jit(lambda tx: tx.update(zeros, tx.init(ones), ones))(tx.replace(learning_rate=1.0))
    assert {float(u.ravel()[0]) for u in jax.tree.leaves(updates)} == {-0.25}
    # the base rate does not multiply this decay
    own = gdx.adamw(0.5, weight_decay=0.25, schedule_multiplier=1.0)
    assert {member.hyperparams["weight_decay"] for member in found.optimizer(own).members} == {0.25}


def network(widths, random):
    """Layers with deviations of 1 / sqrt(fan-in)."""
    return [random.standard_normal((n, m)) / np.sqrt(n) for n, m in itertools.pairwise(widths)]


def outputs(weights, x):
    hidden = [x]
    for w in weights[:-1]:
        hidden.append(np.tanh(hidden[-1] @ w))
    return hidden, hidden[-1] @ weights[-1]


def gradients(weights, x):
    """Of half the mean square of (output - 1)."""
    hidden, out = outputs(weights, x)
    back, found = (out - 1) / out.size, list[np.ndarray]()
    for w, h in zip(weights[::-1], hidden[::-1]):
        found.insert(0, h.T @ back)
        back = (back @ w.T) * (1 - h**2)
    return found


@pytest.mark.parametrize("like", ["adam", "sgd"])
def test_a_step_moves_outputs_as_far_at_any_width(like):
    """In NumPy, in float64: a first step of Adam without eps is the sign of the gradient."""
    base, wide, random = 64, 1024, np.random.default_rng(0)
    x, rate = random.standard_normal((8, 16)), {"adam": 1e-4, "sgd": 1e-2}[like]
    shapes = {n: [(16, n), (n, n), (n, n), (n, 4)] for n in (base, wide)}
    found = transfer(*([jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes[n]] for n in (base, wide)))

    def moved(width, rates, starts, seed):
        weights = network([16, width, width, width, 4], np.random.default_rng(seed))
        weights = [w * by for w, by in zip(weights, starts)]
        steps = [np.sign(g) if like == "adam" else g for g in gradients(weights, x)]
        after = [w - rate * by * step for w, by, step in zip(weights, rates, steps)]
        hidden, new = outputs(weights, x), outputs(after, x)
        return [np.abs(b - a).mean() for a, b in zip([*hidden[0][1:], hidden[1]], [*new[0][1:], new[1]])]

    ones = np.ones(4)
    # the base's readout starts as its width asks for; these starts are relative to 1 / sqrt(fan-in)
    starts = [leaf.start * np.sqrt(leaf.fan_in) for leaf in found.leaves]
    rates = [leaf.changes(like)["learning_rate"] for leaf in found.leaves]
    narrow = np.mean([moved(base, ones, ones, seed) for seed in range(8)], axis=0)
    plain, right = (np.array(moved(wide, *by, 0)) / narrow for by in ((ones, ones), (rates, starts)))
    assert np.all(np.abs(np.log(right)) < np.log(1.6)), right
    assert np.abs(np.log(plain)).max() > np.log(4), plain


class Readable(eqx.Module):
    embedding: eqx.nn.Embedding
    layers: list
    readout: eqx.nn.Linear
    scale: jax.Array
    depth: int

    def __init__(self, width):
        key = jax.random.key(0)
        self.embedding = eqx.nn.Embedding(7, width, key=key)
        self.layers = [eqx.nn.Linear(width, width, key=key)]
        self.readout = eqx.nn.Linear(width, 7, key=key)
        self.scale, self.depth = jnp.ones(width), 1


class Model(nnx.Module):
    def __init__(self, width, rngs):
        self.embedding = nnx.Embed(7, width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(width // 4, width, width, decode=False, rngs=rngs)
        self.readout = nnx.Linear(width, 7, rngs=rngs)


def kinds(found):
    return {leaf.path: leaf.kind for leaf in found.leaves}


def test_modules_of_equinox_whose_weights_are_the_other_way_round():
    base, wide = Readable(8), Readable(32)
    found = transfer(eqx.filter_eval_shape(Readable, 8), wide)
    assert found == transfer(base, wide)
    expected = {"embedding/weight": "input", "layers/0/weight": "hidden", "layers/0/bias": "input"}
    expected |= {"readout/weight": "output", "readout/bias": "none", "scale": "input"}
    assert kinds(found) == expected
    started = found.start(wide, base)
    assert isinstance(started, Readable) and started.depth == 1
    assert jnp.std(started.readout.weight) < 0.7 * jnp.std(wide.readout.weight)
    tx = found.optimizer(gdx.sgd(1.0))
    params = eqx.filter(wide, eqx.is_inexact_array)
    updates, _ = jax.jit(lambda p: tx.update(jax.tree.map(jnp.ones_like, p), tx.init(p), p))(params)
    assert [float(-u.weight[0, 0]) for u in (updates.embedding, updates.readout)] == [4.0, 0.25]


def test_modules_of_flax_whose_embeddings_start_smaller_where_they_are_wide():
    base, wide = Model(8, nnx.Rngs(0)), Model(32, nnx.Rngs(0))
    found = transfer(base, nnx.eval_shape(lambda: Model(32, nnx.Rngs(0))))
    assert found == transfer(base, wide) == transfer(nnx.state(base, nnx.Param), nnx.state(wide, nnx.Param))
    expected = {f"attention/{x}/{y}": z for x in ("key", "query", "value") for y, z in KERNEL_AND_BIAS.items()}
    expected |= {f"attention/out/{x}": y for x, y in KERNEL_AND_BIAS.items()}
    expected |= {"embedding/embedding": "input", "readout/kernel": "output", "readout/bias": "none"}
    assert kinds(found) == expected
    started = found.start(wide, base)
    for name, by in (("embedding.embedding", 1), ("attention.query.kernel", 1 / 2), ("readout.kernel", 1 / 4)):
        start, was, before = (np.asarray(attribute(model, name)) for model in (started, base, wide))
        np.testing.assert_allclose(np.sqrt(np.mean(start**2)), by * np.sqrt(np.mean(was**2)), rtol=1e-6)
        np.testing.assert_allclose(start / start.max(), before / before.max(), rtol=1e-6)
    assert not np.any(started.attention.query.bias[...])


KERNEL_AND_BIAS = {"kernel": "hidden", "bias": "input"}


def attribute(model, name):
    for part in name.split("."):
        model = getattr(model, part)
    return model[...]


def test_patterns_match_what_they_are_of_alone():
    narrow = shapes(fc1=(3, 4), fc2=(4, 4), fc3=(4, 4), fc4=(4, 3))
    wide = shapes(fc1=(3, 8), fc2=(8, 8), fc3=(8, 8), fc4=(8, 3))
    assert transfer(narrow, wide).optimizer(gdx.sgd(1.0)).patterns == ("^fc1$", "^fc4$")
    assert transfer(narrow, wide).optimizer(gdx.adam(1.0)).patterns == ("^fc1$", "^(fc2|fc3)$", "^fc4$")
    tx = transfer(*({"a.b": [tree["fc2"]] * 12, "c": tree["fc4"]} for tree in (narrow, wide))).optimizer(gdx.adam(1.0))
    assert tx.patterns == (r"^a\.b/\d+$", "^c$")


def test_which_optimizers_are_like_which():
    found = transfer(shapes(w=(3, 4)), shapes(w=(3, 8)))
    rates = {
        1.0: [
            *(gdx.adam(1.0), gdx.skip_spikes(gdx.adamw(1.0)), (gdx.value(optax.lion)(1.0), "adam")),
            gdx.chain(gdx.adamw(1.0), gdx.round_with_correction()),
        ],
        2.0: [gdx.gradient_descent(1.0), gdx.nesterov(1.0), (gdx.value(optax.sgd)(1.0), "sgd")],
    }
    for rate, optimizers in rates.items():
        for tx in optimizers:
            tx, *like = tx if type(tx) is tuple else (tx,)
            made = found.optimizer(tx, *like) if rate > 1 else None
            assert made is None or made.members[0].hyperparams["learning_rate"] == rate
    for tx in (gdx.value(optax.lion)(1.0), gdx.chain(gdx.value(optax.clip)(1.0), gdx.adam(1.0)), optax.adam(1.0)):
        with pytest.raises(ValueError, match=r"^optimizer: it is not known how large the steps of .*like='adam'"):
            found.optimizer(tx)
    with pytest.raises(ValueError, match="optimizer: like is 'muon'; expected 'adam' or 'sgd'"):
        found.optimizer(gdx.sgd(1.0), "muon")
    with pytest.raises(ValueError, match="changes: like is 'muon'; expected 'adam' or 'sgd'"):
        found.leaves[0].changes("muon")
    with pytest.raises(ValueError, match=r"tx is a batch, .*; make the batch of what this returns, as in gdx\.grid"):
        found.optimizer(gdx.grid(gdx.adam, learning_rate=[0.1, 0.2]))
    with pytest.raises(ValueError, match="without a learning_rate; expected one learning rate"):
        found.optimizer(gdx.scale_by_adam())


TWO = [{"a": jnp.ones((3, 4)), "b": jnp.ones(4)}, {"a": jnp.ones((3, 8)), "b": jnp.ones(8)}]
ASKED = "which may be fan-in or fan-out; say which axes are fan-in, as in inputs=.*, or \\(\\) for none"


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((TWO[0], TWO[0]), ValueError, "base and target have the same shapes; expected a model of two widths"),
        ((TWO[0], {"a": TWO[1]["a"]}), ValueError, "target has no b, but there is one in base; expected the same"),
        (({"a": TWO[0]["a"]}, TWO[1]), ValueError, "target has a parameter b, but there is none in base; expected"),
        ((shapes(a=(3, 4)), shapes(a=(3, 2, 4))), ValueError, r"shape \(3, 2, 4\) at a; expected 2 axes, as base has"),
        (({"a": 3}, {"a": 4}), TypeError, "base: a is 3; expected an array, or a jax.ShapeDtypeStruct"),
        ((shapes(a=(5, 4, 3)), shapes(a=(5, 8, 3))), ValueError, rf"a grows from .* along axis 1, {ASKED}"),
        ((shapes(a=(5, 4, 3)), shapes(a=(5, 8, 9))), ValueError, rf"a grows from .* along axes 1, 2, {ASKED}"),
        (
            [eqx.nn.Conv1d(3, n, 5, key=jax.random.key(0)) for n in (4, 8)],
            ValueError,
            f"weight grows .* axis 0, {ASKED}",
        ),
        ((*TWO, {"c": 0}), ValueError, "inputs at 'c' matches no path; expected one that does: the paths are a, b"),
        ((*TWO, {"(": 0}), ValueError, r"inputs at '\(' is no regular expression"),
        ((*TWO, {"a": 2}), ValueError, r"inputs at 'a' is 2; expected axes of a, which has shape \(3, 4\)"),
        ((*TWO, {"a": 0.5}), TypeError, "inputs at 'a' is 0.5; expected an integer"),
        ((*TWO, [0]), TypeError, r"inputs is \[0\]; expected a dict from patterns of paths to axes"),
    ],
)
def test_refuses(arguments, error, words):
    with pytest.raises(error, match=f"^transfer: (.*){words}"):
        transfer(*arguments)


def test_inputs_say_what_shapes_do_not():
    base, wide = (shapes(a=(5, n, 3), read=(n,), torch=(3, n), both=(n, 2 * n - 4)) for n in (4, 8))
    found = transfer(base, wide, {"^a": 1, "read": 0, "torch": -1, "both|^a": (1,)})
    assert [(leaf.fan_in, leaf.fan_out) for leaf in found.leaves] == [(2, 1), (3, 2), (2, 1), (2, 1)]
    assert kinds(transfer(base, wide, {"a": ()}))["a"] == "input"


def test_a_start_is_of_the_same_model():
    found = transfer(*TWO)
    with pytest.raises(ValueError, match=r"start: params has shape \(3, 4\) at a; expected \(3, 8\)"):
        found.start(TWO[0], TWO[1])
    with pytest.raises(ValueError, match="start: base has no b, but there is one in what this was made of"):
        found.start(TWO[1], {"a": TWO[0]["a"]})
    with pytest.raises(TypeError, match="start: base has shapes alone; expected parameters"):
        found.start(TWO[1], jax.eval_shape(lambda: TWO[0]))
    with pytest.raises(
        TypeError, match=r"start: in params, the parameter at .*b.* is .*int32.*, expected a floating-point"
    ):
        found.start(TWO[1] | {"b": jnp.ones(8, int)}, TWO[0])
    tiny = [jax.tree.map(lambda x: 1e-25 * x, tree) for tree in TWO]
    np.testing.assert_allclose(found.start(TWO[1], tiny[0])["b"], tiny[1]["b"], rtol=1e-5)
    with enable_x64(True):
        halves = jax.tree.map(lambda x: x.astype("float16"), TWO[1])
        doubles = jax.tree.map(lambda x: x.astype("float64"), TWO[0])
        assert found.start(halves, doubles)["b"].dtype == np.float16
    zeros = jax.tree.map(jnp.zeros_like, TWO[1])
    assert not any(map(jnp.any, jax.tree.leaves(found.start(zeros, TWO[0]))))


def line(params, batch):
    return jnp.sum(params["w"]) * batch, {"wide": params["w"] * params["by"], "flat": params["w"][:2]}


def along(width, by=1.0):
    frozen = gdx.groups(gdx.sgd(0.5), {"by": None})
    return frozen, {"w": jnp.zeros(width), "by": jnp.float32(by * width)}


def test_a_coordinate_check_measures_sizes_changes_and_slopes():
    check = coordinate_check(line, along, jnp.ones(()), [2, 8, 32], steps=2)
    assert isinstance(check, CoordinateCheck) and check.widths.tolist() == [2, 8, 32]
    moved = 0.5 * np.arange(3)  # all of w, in each step
    np.testing.assert_allclose(check.changes["flat"], np.tile(moved, (3, 1)))
    np.testing.assert_allclose(check.sizes["wide"], np.outer([2, 8, 32], moved))
    np.testing.assert_allclose(check.losses, -np.outer([2, 8, 32], moved))
    np.testing.assert_allclose(check.slopes["wide"], [np.nan, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(check.size_slopes["flat"], [np.nan, 0, 0], atol=1e-6)


def found_as(activations):
    """A loss with these activations, or with one that is called like the width."""
    return lambda p, batch: (jnp.sum(p["w"]) * batch, activations or {str(len(p["w"])): p["w"]})


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((3, along, 1.0, [2, 4]), TypeError, "loss is 3; expected a function of the parameters and a batch"),
        ((line, 3, 1.0, [2, 4]), TypeError, "setup is 3; expected a function of a width"),
        ((line, along, 1.0, [2, 2]), ValueError, r"widths is \[2, 2\]; expected at least two different"),
        ((line, along, 1.0, [2, 4.0]), TypeError, r"widths\[1\] is 4.0; expected an integer"),
        ((line, lambda width: along(width)[1], 1.0, [2, 4]), TypeError, "setup returned .*; expected an optimizer and"),
        ((lambda *x: line(*x)[0], along, 1.0, [2, 4]), TypeError, "returned None beside the loss; expected a dict of"),
        ((line, along, 1.0, 8), TypeError, r"widths is 8; expected at least two widths, such as \[64, 256, 1024\]"),
        ((line, along, "abc", [2, 4]), TypeError, "batch is 'abc' at the root; expected arrays"),
        ((line, along, None, [2, 4]), TypeError, r"batch is None; expected arrays, such as jnp\.zeros"),
        (
            (found_as({"a": {"b": 1.0}}), along, 1.0, [2, 4]),
            TypeError,
            "returned .* as 'a'; expected one floating-point",
        ),
        (
            (found_as({"a": 1}), along, 1.0, [2, 4]),
            TypeError,
            r"returned int32\[\] as 'a'; expected one floating-point",
        ),
        ((found_as(None), along, 1.0, [2, 4]), ValueError, "returned '4' at width 4, and '2' at width 2; expected the"),
    ],
)
def test_a_coordinate_check_refuses(arguments, error, words):
    with pytest.raises(error, match=f"^coordinate_check: .*{words}"):
        coordinate_check(*arguments)
