"""What `benchmarks.storage` trains: three small problems, and the formats whose training is compared."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pydoc_data.topics import topics
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdx
from gdx.demo import problems
from gdx.storage import Blocks, Dither, Format


@dataclasses.dataclass(frozen=True)
class NearestBfloat16(Format):
    """What gdx refuses for a second moment with b2 near 1."""

    keeps_positive: ClassVar[bool] = True

    def encode(self, x: jax.Array, dither: Dither) -> jax.Array:
        return x.astype(jnp.bfloat16)

    def decode(self, stored: jax.Array) -> jax.Array:
        return stored.astype(jnp.float32)


@dataclasses.dataclass(frozen=True, repr=False)
class Linear8(Blocks):
    """Equidistant codes, to nearest: small second moments become 0."""

    keeps_positive: ClassVar[bool] = True

    def codes(self, x: jax.Array, scales: jax.Array, bits: Any) -> jax.Array:
        return jnp.round(x * (127 / scales))

    def values(self, codes: jax.Array) -> jax.Array:
        return codes * jnp.float32(1 / 127)


class Problem(NamedTuple):
    """A network, its data and how long it is trained.

    Attributes:
      sizes: of its layers; inputs of class numbers are embedded first.
      train, test: inputs and labels.
      classes: how many different numbers the inputs are, and into how many each is embedded; None for real inputs.
      steps, rate: of the training.
      filters: of convolutions of 3 x 3 before the layers; the second one and later ones halve the image.
    """

    sizes: Sequence[int]
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    classes: tuple[int, int] | None
    steps: int
    rate: float
    filters: Sequence[int] = ()


@functools.cache
def digits() -> Problem:
    """The handwritten digits of scikit-learn."""
    problem = problems.digits()
    train, test = (tuple(map(np.asarray, data)) for data in (problem.train, problem.test))
    return Problem((64, 256, 256, 10), train, test, None, steps=1500, rate=1e-3)  # type: ignore[arg-type]


@functools.cache
def characters() -> Problem:
    """The next character after 16, in the help texts that come with Python."""
    text = "".join(topics[name] for name in sorted(topics))
    alphabet = sorted(set(text))
    numbers = np.array([alphabet.index(c) for c in text], np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(numbers, 17)
    inputs, labels = windows[:, :16], windows[:, 16]
    end = int(0.9 * len(inputs))
    test = np.random.default_rng(0).integers(end + 16, len(inputs), 8192)
    data = (inputs[:end], labels[:end]), (inputs[test], labels[test])
    return Problem((512, 256, 256, len(alphabet)), *data, (len(alphabet), 32), steps=3000, rate=2e-3)


@functools.cache
def convolution() -> Problem:
    """The digits once more, through convolutions: no format was chosen by what it does here."""
    return digits()._replace(sizes=(512, 64, 10), filters=(16, 32))


PROBLEMS: Mapping[str, Callable[[], Problem]] = {"digits": digits, "characters": characters, "convolution": convolution}
BATCH, EVALUATIONS = 128, 30
BFLOAT16: dict[str, Any] = {"mu_dtype": "bfloat16", "nu_dtype": gdx.storage.StochasticBfloat16()}
EIGHT_BIT: dict[str, Any] = {"mu_dtype": gdx.storage.SignedFourthRoot8(), "nu_dtype": gdx.storage.FourthRoot8()}
TURNED: dict[str, Any] = {name: dataclasses.replace(format, axis=-2) for name, format in EIGHT_BIT.items()}
FOUR_BIT: dict[str, Any] = {"mu_dtype": gdx.storage.SignedPowersOfTwo4(), "nu_dtype": gdx.storage.PowersOfTwo4()}
ROWS: dict[str, Any] = {name: dataclasses.replace(format, block=None) for name, format in EIGHT_BIT.items()}
COLUMNS: dict[str, Any] = {name: dataclasses.replace(format, axis=-2) for name, format in ROWS.items()}
BOTH: dict[str, Any] = {name: dataclasses.replace(format, axis=None) for name, format in ROWS.items()}
LINEAR: dict[str, Any] = {"mu_dtype": Linear8(), "nu_dtype": Linear8()}

AXES = {"-1": EIGHT_BIT, "-2": TURNED, "None": BOTH}

# settings of adamw, the link that rounds parameters, their dtype
FORMATS: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "float32": ({}, None, jnp.float32),
    # what the least change of a run does, for comparison
    "float32, eps = 1.1e-8": ({"eps": 1.1e-8}, None, jnp.float32),
    "bf16 state": (BFLOAT16, None, jnp.float32),
    "8-bit state": (EIGHT_BIT, None, jnp.float32),
    "8-bit state, rows and columns": (BOTH, None, jnp.float32),
    "4-bit state": (FOUR_BIT, None, jnp.float32),
    "bf16 parameters, stochastic": ({}, gdx.round_stochastically(), jnp.bfloat16),
    "bf16 parameters, corrected": ({}, gdx.round_with_correction(), jnp.bfloat16),
    "bf16 parameters, compensated": ({}, gdx.round_with_compensation(), jnp.bfloat16),
    "bf16 parameters, f32 master": ({}, gdx.round_with_master(), jnp.bfloat16),
    "8-bit state, bf16 stochastic": (EIGHT_BIT, gdx.round_stochastically(), jnp.bfloat16),
    "8-bit state, bf16 corrected": (EIGHT_BIT, gdx.round_with_correction(), jnp.bfloat16),
    "(refused) bf16 nu to nearest": ({"nu_dtype": NearestBfloat16()}, None, jnp.float32),
    "(refused) linear 8-bit state": (LINEAR, None, jnp.float32),
    "bf16 parameters to nearest": ({}, None, jnp.bfloat16),
}


def start(problem: Problem, key: jax.Array) -> dict[str, Any]:
    """Initial parameters."""
    layers = []
    for inputs, outputs in zip(problem.sizes, problem.sizes[1:]):
        key, draw = jax.random.split(key)
        layers.append({"w": jax.random.normal(draw, (inputs, outputs)) * np.sqrt(2 / inputs), "b": jnp.zeros(outputs)})
    embedding = jax.random.normal(key, problem.classes) if problem.classes else jnp.zeros(())
    filters = []
    for inputs, outputs in zip((1, *problem.filters), problem.filters):
        key, draw = jax.random.split(key)
        filters.append(jax.random.normal(draw, (3, 3, inputs, outputs)) * np.sqrt(2 / (9 * inputs)))
    return {"layers": layers, "embedding": embedding, **({"filters": filters} if filters else {})}


def convolved(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Images convolved with a kernel of 3 x 3, as a product of matrices: XLA's own takes several times as long here."""
    size = x.shape[1]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    parts = [x[:, i : i + size : stride, j : j + size : stride] for i in range(3) for j in range(3)]
    return jnp.concatenate(parts, axis=-1) @ kernel.reshape(-1, kernel.shape[-1])


def loss(params: Any, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats, computed in float32."""
    params = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    x = inputs if inputs.dtype == jnp.float32 else params["embedding"][inputs]
    for i, kernel in enumerate(params.get("filters", [])):
        x = jax.nn.relu(convolved(x.reshape(len(x), 8, 8, 1) if i == 0 else x, kernel, 1 + (i > 0)))
    x = x.reshape(len(inputs), -1)
    for i, layer in enumerate(params["layers"]):
        x = x @ layer["w"] + layer["b"]
        x = jax.nn.relu(x) if i + 1 < len(params["layers"]) else x
    return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()


def train(problem: Problem, tx: Any, dtype: Any, keep_gradients: int = 0) -> Callable[[int], Any]:
    """A compiled function from a seed to the validation losses, or to the first gradients."""
    inputs, labels = map(jnp.asarray, problem.train)
    held_out = tuple(map(jnp.asarray, problem.test))

    def step(carry: Any, key: jax.Array) -> Any:
        params, state = carry
        chosen = jax.random.randint(key, (BATCH,), 0, len(inputs))
        gradient = jax.grad(loss)(params, inputs[chosen], labels[chosen])
        updates, state = tx.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), gradient if keep_gradients else None

    def some_steps(carry: Any, keys: jax.Array) -> Any:
        carry, _ = jax.lax.scan(step, carry, keys)
        return carry, loss(carry[0], *held_out)

    def run(seed: jax.Array) -> Any:
        key, draw = jax.random.split(jax.random.key(seed))
        params = jax.tree.map(lambda p: p.astype(dtype), start(problem, draw))
        keys = jax.random.split(key, problem.steps)
        if keep_gradients:
            return params, jax.lax.scan(step, (params, tx.init(params)), keys[:keep_gradients])[1]
        return jax.lax.scan(some_steps, (params, tx.init(params)), keys.reshape(EVALUATIONS, -1))[1]

    return jax.jit(run)


BASES = "float32", "bf16 parameters, f32 master"


def compare(
    name: str, seeds: int, formats: Sequence[str]
) -> tuple[tuple[np.ndarray, dict[str, np.ndarray]], dict[str, list[Any]]]:
    """The steps and mean validation losses of each format; its last loss, and what it adds to both bases, with errors.

    The bases are trained too.
    """
    problem = PROBLEMS[name]()
    rate = optax.cosine_decay_schedule(problem.rate, problem.steps)
    losses = {}
    for label in dict.fromkeys((*BASES, *formats)):
        settings, rounding, dtype = FORMATS[label]
        tx: Any = gdx.adamw(rate, **settings)
        run = train(problem, tx if rounding is None else gdx.chain(tx, rounding), dtype)
        losses[label] = np.stack([np.asarray(run(seed)) for seed in range(seeds)])
    steps = problem.steps // EVALUATIONS * (1 + np.arange(EVALUATIONS))
    cells = {}
    for label, found in losses.items():
        added = [found[:, -1] - losses[base][:, -1] for base in BASES]
        with_error = [(x.mean(), x.std(ddof=1) / np.sqrt(seeds) if seeds > 1 else np.nan) for x in added]
        cells[label] = [found[:, -1].mean(), *with_error]
    return (steps, {label: found.mean(axis=0) for label, found in losses.items()}), cells


def eight_bit_errors(name: str, counts: Sequence[int]) -> Mapping[str, list[float]]:
    """For each of `AXES`: root mean square difference of 8-bit updates from float32 ones, over that of the latter.

    Args:
      name: of the problem whose gradients are taken.
      counts: the steps at which to look.
    """
    problem = PROBLEMS[name]()
    params, gradients = train(problem, gdx.adam(problem.rate), jnp.float32, keep_gradients=max(counts))(0)

    def updates(tx: gdx.Transform) -> Any:
        def step(state: Any, gradient: Any) -> Any:
            update, state = tx.update(gradient, state)
            return state, update["layers"][1]["w"]

        return np.asarray(jax.lax.scan(step, tx.init(params), gradients)[1])

    exact = updates(gdx.scale_by_adam())

    def errors(settings: dict[str, Any]) -> list[float]:
        off = updates(gdx.scale_by_adam(**settings)) - exact
        return [float(np.sqrt(np.mean(off[i - 1] ** 2) / np.mean(exact[i - 1] ** 2))) for i in counts]

    return {name: errors(settings) for name, settings in AXES.items()}


def rare_row_errors(spread: float, steps: int = 6000) -> Mapping[str, float]:
    """As `eight_bit_errors`, of the rows of an embedding that are hit once in 1,000 steps, beside frequent ones.

    Args:
      spread: of the logarithms of the columns' magnitudes.
      steps: how many; the second half is measured.
    """
    shape, rare = (256, 256), 64
    chance = jnp.where(jnp.arange(shape[0]) < rare, 1e-3, 0.3)[:, None]
    magnitudes = jnp.exp(spread * jax.random.normal(jax.random.key(0), shape[1:]))

    def run(tx: gdx.Transform) -> np.ndarray:
        exact = gdx.scale_by_adam()

        def step(carry: Any, t: jax.Array) -> Any:
            draw, hit = jax.random.split(jax.random.fold_in(jax.random.key(1), t))
            noise = magnitudes * jax.random.normal(draw, shape)
            gradient = jnp.where(jax.random.uniform(hit, (shape[0], 1)) < chance, noise, 0)
            (update, state), (right, kept) = tx.update(gradient, carry[0]), exact.update(gradient, carry[1])
            return (state, kept), jnp.stack([jnp.sum((update - right)[:rare] ** 2), jnp.sum(right[:rare] ** 2)])

        start = tx.init(jnp.zeros(shape)), exact.init(jnp.zeros(shape))
        return np.asarray(jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(steps))[1])())

    sums = {name: run(gdx.scale_by_adam(**settings))[steps // 2 :].sum(0) for name, settings in AXES.items()}
    return {name: float(np.sqrt(off / size)) for name, (off, size) in sums.items()}


def second_moment_after_shrinking(counts: Sequence[int]) -> dict[str, list[float]]:
    """The mean second moment in each format over the exact one, so many steps after gradients became smaller."""
    formats = {
        "bf16 stochastic": gdx.storage.StochasticBfloat16(),
        "8-bit fourth root": gdx.storage.FourthRoot8(),
        "4-bit powers of two": gdx.storage.PowersOfTwo4(),
        "(refused) bf16 to nearest": NearestBfloat16(),
        "(refused) 8-bit linear": Linear8(),
    }
    shape, before = (32, 256), 3000

    def run(tx: gdx.Transform) -> np.ndarray:
        def step(state: Any, t: jax.Array) -> Any:
            noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), t), shape)
            _, state = tx.update(noise * jnp.where(t < before, 1.0, 0.01), state)
            nu = state.nu.decode() if isinstance(state.nu, gdx.storage.Packed) else state.nu
            return state, nu.astype(jnp.float32).mean()

        steps = jnp.arange(before + max(counts))
        return np.asarray(jax.jit(lambda: jax.lax.scan(step, tx.init(jnp.zeros(shape)), steps)[1])())

    exact = run(gdx.scale_by_adam())
    found = {name: run(gdx.scale_by_adam(nu_dtype=format)) for name, format in formats.items()}
    at = before + np.array(counts) - 1
    return {name: list(nu[at] / exact[at]) for name, nu in found.items()}
