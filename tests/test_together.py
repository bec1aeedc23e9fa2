"""Groups, a schedule, a guard and an average around one optimizer, on small transformers in flax and in equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import gdx
from tests.contract.table import assert_same_bits

WIDTH, LENGTH, WORDS, STEPS, BAD = 16, 8, 16, 30, 11
BEFORE = np.tril(np.ones((LENGTH, LENGTH), bool))
RATE = gdx.schedules.warmup_cosine_decay_schedule(0.0, peak_value=0.1, warmup_steps=5, decay_steps=STEPS)
ADAMW = gdx.adamw(RATE, weight_decay=0.1)
BLOCKS = {"block": 8, "minimum_size": 1}
FEW_BITS = {"mu_dtype": gdx.storage.SignedFourthRoot8(**BLOCKS), "nu_dtype": gdx.storage.FourthRoot8(**BLOCKS)}
DECAY = 0.8


def around(tx):
    """An optimizer as large runs have it. The guard is outermost: a skipped step is not in the average either."""
    changes = {
        "embed": {"learning_rate": gdx.times(0.5)},
        "positions": None,
        "norm|bias": {"weight_decay": 0.0},
    }
    return gdx.skip_spikes(gdx.average_parameters(gdx.groups(tx, changes), DECAY))


class Flax(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(WORDS, WIDTH, rngs=rngs)
        self.positions = nnx.Param(jax.random.normal(rngs.params(), (LENGTH, WIDTH)))
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.last_norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, WORDS, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens) + self.positions[...]
        x = x + self.attention(self.norm(x), mask=BEFORE)
        return self.head(self.last_norm(x))


class Equinox(eqx.Module):
    embed: eqx.nn.Embedding
    positions: jax.Array
    norm: eqx.nn.LayerNorm
    attention: eqx.nn.MultiheadAttention
    last_norm: eqx.nn.LayerNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.embed = eqx.nn.Embedding(WORDS, WIDTH, key=keys[0])
        self.positions = jax.random.normal(keys[1], (LENGTH, WIDTH))
        self.norm = eqx.nn.LayerNorm(WIDTH)
        self.attention = eqx.nn.MultiheadAttention(2, WIDTH, use_output_bias=True, key=keys[2])
        self.last_norm = eqx.nn.LayerNorm(WIDTH)
        self.head = eqx.nn.Linear(WIDTH, WORDS, key=keys[3])

    def __call__(self, tokens):
        x = jax.vmap(self.embed)(tokens) + self.positions
        normed = jax.vmap(self.norm)(x)
        x = x + self.attention(normed, normed, normed, mask=jnp.asarray(BEFORE))
        return jax.vmap(lambda x: self.head(self.last_norm(x)))(x)


def in_flax():
    graph, params = nnx.split(Flax(nnx.Rngs(0)), nnx.Param)
    return params, lambda params, tokens: nnx.merge(graph, params)(tokens)


def in_equinox():
    params, static = eqx.partition(Equinox(jax.random.key(0)), eqx.is_inexact_array)
    return params, lambda params, tokens: jax.vmap(eqx.combine(params, static))(tokens)


def copying(logits):
    """A loss that is least where the token before is said, and NaN where a weight is; and batches, one of them bad."""

    def loss(params, batch):
        tokens, weights = batch
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # inside the libraries
            found = logits(params, tokens)[:, 1:]
        losses = optax.softmax_cross_entropy_with_integer_labels(found, tokens[:, :-1])
        return jnp.mean(losses * weights)

    tokens = jnp.asarray(np.random.default_rng(0).integers(WORDS, size=(STEPS + 1, 32, LENGTH)))
    weights = jnp.ones((STEPS + 1, 32, LENGTH - 1)).at[BAD, 3, 2].set(jnp.nan)
    return loss, (tokens, weights)


def walk(step, tx, params, state, *batches):
    """The parameters after each step, the last state and the losses."""
    points, losses = [], []
    for batch in zip(*batches):
        (params, state, _), (value, _) = step(tx, (params, state, (None, None)), (0, batch))
        points.append(params)
        losses.append(float(value))
    return points, state, losses


@pytest.mark.parametrize("make", [in_flax, in_equinox])
def test_a_transformer_is_trained(make, tmp_path):
    start, logits = make()
    loss, batches = copying(logits)
    step = jax.jit(lambda tx, *args: gdx.training.training_step(loss, tx)(*args))
    good = [np.delete(x, BAD, axis=0) for x in batches]
    tx, in_few_bits = around(ADAMW), around(ADAMW.replace(**FEW_BITS))
    for each in (in_few_bits, tx):
        points, state, losses = walk(step, each, start, each.init(start), *batches)
        assert np.mean(losses[-3:]) < 0.5 * np.log(WORDS) < np.mean(losses[:3])
        assert np.flatnonzero(~np.isfinite(losses)) == [BAD] and state.skipped == 1
        kept, expected, _ = walk(step, each, start, each.init(start), *good)
        assert_same_bits((points[-1], state._replace(skipped=expected.skipped)), (kept[-1], expected))

        average = gdx.read_average(state, points[-1])
        for found, *leaves in zip(*map(jax.tree.leaves, (average, *kept))):
            mean = np.average(np.stack(leaves).astype(float), axis=0, weights=DECAY ** np.arange(STEPS)[::-1])
            np.testing.assert_allclose(found, mean, rtol=1e-5, atol=1e-6)
        assert_same_bits((points[-1].positions, average.positions), (start.positions, start.positions))

    grid = gdx.grid(lambda peak_value: tx.replace(peak_value=peak_value), peak_value=[0.1, 1e-4, 0.01])
    swept = gdx.sweep(loss, grid, start, batches)
    np.testing.assert_allclose(swept.losses[0, :BAD], losses[:BAD], rtol=1e-3)
    assert swept.ranking(swept.losses[:, -1]) == [0, 2, 1]
    assert_same_bits(jax.tree.map(lambda x: x[0], swept.final.positions), start.positions)

    half, middle, _ = walk(step, tx, start, tx.init(start), *(x[:15] for x in batches))
    with gdx.checkpoint.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(15, tx, half[-1], middle)
        _, params, restored, _ = checkpoints.restore(tx, start, tx.init(start))
    resumed, end, _ = walk(step, tx, params, restored, *(x[15:] for x in batches))
    assert_same_bits((resumed[-1], end), (points[-1], state))
