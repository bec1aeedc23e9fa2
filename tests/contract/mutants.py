"""Shows that the tests can fail: applies wrong variants one at a time and reports which test catches each.

Run by hand, about half an hour: `python -m tests.contract.mutants [--only WORDS]`. The working tree is
not touched: each variant is made in a copy.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = [
    "tests/test_optimizers.py",
    "tests/contract",
    "tests/test_transform.py",
    "tests/test_leafwise.py",
    "tests/storage",
    "tests/test_integration.py",
    "tests/test_sharding.py",
]  # after the file's own, and those of its folder
ADAM, MOMENTUM, DECAY = "links/adam.py", "links/momentum.py", "links/decay.py"
ROUNDING, BLOCKS, FORMATS = "links/rounding.py", "storage/blocks.py", "storage/formats.py"

# what is wrong, the file, the right text, the wrong text
# fmt: off
MUTANTS = [
    ("epsilon inside the root", ADAM, "self.eps_root) + shared.eps)", "self.eps_root + shared.eps))"),
    ("eps_root ignored", ADAM, "_sqrt(alike(nu * shared.from_nu) + self.eps_root)", "_sqrt(nu * shared.from_nu)"),
    ("first moment not corrected", ADAM, "mu_hat = mu * shared.from_mu", "mu_hat = mu"),
    ("second moment not corrected", ADAM, "_sqrt(alike(nu * shared.from_nu)", "_sqrt(nu"),
    ("correction by b1 for both", ADAM, "from_g, 1 / _correction(self.b2, count)", "from_g, 1 / _correction(self.b1, count)"),
    ("correction with cancellation", ADAM, "-jnp.expm1(t * jnp.log1p(b - 1 + 0 * t))", "1 - b**t"),
    ("correction of a constant", ADAM, "b - 1 + 0 * t", "b - 1"),
    ("division by a scalar", ADAM, "mu * shared.from_mu", "mu / (1 / shared.from_mu)"),
    ("moment weights swapped", ADAM, "alike(self.b1 * mu) + uncontracted(shared.w1 * g)", "alike(shared.w1 * mu) + uncontracted(self.b1 * g)"),
    ("second moment of g, not of its square", ADAM, "uncontracted(shared.w2 * _square(g))", "uncontracted(shared.w2 * abs(g))"),
    ("nesterov adam ignored", ADAM, "if self.nesterov:", "if False:"),
    ("nesterov adam corrected one step late", ADAM, "_correction(self.b1, count + 1)", "_correction(self.b1, count)"),
    ("first moment contracted freely", ADAM, "uncontracted(shared.w1 * g)", "shared.w1 * g"),
    ("nesterov adam contracted freely", ADAM, "uncontracted(g * shared.from_g)", "g * shared.from_g"),
    ("zero over zero", ADAM, "jnp.maximum(self.eps, jnp.finfo(self.eps.dtype).tiny)", "self.eps"),
    ("slope of the root at zero", ADAM, "jnp.where(positive, 0.5 / _sqrt(jnp.where(positive, x, 1)), 0)", "0.5 / _sqrt(x)"),
    ("slope of the correction", ADAM, "-t * b ** (t - 1)", "-t * b**t"),
    ("complex second moment", ADAM, "moment_like(p, self.nu_dtype, real=True)", "moment_like(p, self.nu_dtype)"),
    ("momentum with factor 1 - mu", MOMENTUM, "alike(self.momentum * trace) + uncontracted(g)", "alike(self.momentum * trace) + (1 - self.momentum) * g"),
    ("nesterov ignored", MOMENTUM, "if self.nesterov else trace", "if False else trace"),
    ("nesterov with the old velocity", MOMENTUM, "return uncontracted(g) + alike(self.momentum * trace) if", "return uncontracted(g) + alike(self.momentum * (trace - g)) if"),
    ("velocity contracted freely", MOMENTUM, "alike(self.momentum * trace) + uncontracted(g)", "self.momentum * trace + g"),
    ("decay with the wrong sign", DECAY, "g + alike(self.weight_decay * p)", "g - alike(self.weight_decay * p)"),
    ("mask ignored", DECAY, "if self.mask is None:", "if True:"),
    ("mask inverted", DECAY, "return jax.tree.broadcast(mask, params)", "return jax.tree.map(lambda m: not m, jax.tree.broadcast(mask, params))"),
    ("ascent", "links/learning_rate.py", "-self.learning_rate if self.flip_sign", "self.learning_rate if self.flip_sign"),
    ("decay not scaled by the rate", "optimizers.py", "return direction, decay, scale_by_learning_rate(self.learning_rate)", "return direction, scale_by_learning_rate(self.learning_rate), decay"),
    ("L2 instead of decoupled", "optimizers.py", "return direction, decay, scale", "return decay, direction, scale"),
    ("L2 instead of Loshchilov & Hutter's decay", "optimizers.py", "return direction, base_rate, decay, scale", "return decay, direction, base_rate, scale"),
    ("rate outside the velocity", "optimizers.py", "return scale_by_learning_rate(self.learning_rate), velocity", "return velocity, scale_by_learning_rate(self.learning_rate)"),
    ("overflow unseen", "numerics.py", "jnp.where(product < jnp.inf, product", "jnp.where(product <= jnp.inf, product"),
    ("count off by one", "leafwise.py", "optax.safe_increment(state.count) if", "state.count if"),
    ("count wraps", "leafwise.py", "optax.safe_increment(state.count) if", "state.count + 1 if"),
    ("state in the computed dtype", "leafwise.py", "x.astype(old.dtype) if format is None", "x if format is None"),
    ("update in the computed dtype", "leafwise.py", "u if is_rounded else u.astype(g.dtype)", "u"),
    ("computed in the leaf's dtype", "numerics.py", "for x in arrays), np.dtype(np.float32))", "for x in arrays), np.dtype(jnp.result_type(arrays[0])))"),
    ("moments in the parameter's dtype", "leafwise.py", "dtype = jnp.finfo(compute_dtype(p)).dtype", "dtype = jnp.finfo(jnp.result_type(p)).dtype"),
    ("tree not compared", "checks.py", "if structure != jax.tree.structure(tree):", "if False:"),
    ("shapes not compared", "checks.py", "if np.shape(leaf) != np.shape(other):", "if False:"),
    ("state not checked", "checks.py", "if not isinstance(state, kind):", "if False:"),
    ("schedule one step ahead", "transform.py", "update(self.at(state.count), updates", "update(self.at(state.count + 1), updates"),
    ("schedule not counted", "transform.py", "ScheduledState(optax.safe_increment(state.count),", "ScheduledState(state.count,"),
    ("weak-typed hyperparameters", "fields.py", "else np.float64(value)", "else float(value)"),
    ("hyperparameters kept in float32", "fields.py", "else np.float64(value)", "else np.float32(value)"),
    ("array dtypes kept", "fields.py", "return value.astype(jnp.result_type(float)) if isinstance(value, jax.Array)", "return value if isinstance(value, jax.Array)"),
    ("rounding to one allowed", "fields.py", "and minimum <= rounded < below and", "and"),
    ("compensation ignored", ROUNDING, "s = g + compensation", "s = g"),
    ("compensation with the wrong sign", ROUNDING, "return moved, s - moved", "return moved, moved - s"),
    ("master rounded", ROUNDING, "return _to_bfloat16(master) - p, master", "return _to_bfloat16(master) - p, _to_bfloat16(master)"),
    ("rounding by a pair of conversions", ROUNDING, "return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)", "return x"),
    ("parameters and moments share random bits", ROUNDING, "_replace(field=2)", "_replace(field=0)"),
    ("rounding always down", FORMATS, "(raw + bits) &", "raw &"),
    ("NaN rounded", FORMATS, "jnp.where(jnp.isnan(x), x, rounded)", "rounded"),
    ("both moments share random bits", "storage/dither.py", "return hashed >> 16 if self.field % 2 else", "return"),
    ("leaves share random bits", "storage/dither.py", "for number in (self.leaf, self.step):", "for number in (self.step,):"),
    ("steps share random bits", "storage/dither.py", "for number in (self.leaf, self.step):", "for number in (self.leaf,):"),
    ("seeds and leaves added", "storage/dither.py", "key = lowbias32(jnp.uint32((seed + 0x9E3779B9 * (self.field // 2)) % 2**32))", "key = jnp.uint32((seed + 0x9E3779B9 * (self.field // 2)) % 2**32)"),
    ("codes rounded evenly between themselves", BLOCKS, "chance = (root - square) * (root + square)", "chance = (jnp.sqrt(root) - below) * (next_square - square) * (next_square + square)"),
    ("a second moment of 0", BLOCKS, "(x > 0).astype(jnp.float32) if self.keeps_positive else 0, codes", "0, codes"),
    ("chance below the first code", BLOCKS, "below < 1, (x > 0)", "below < 0, (x > 0)"),
    ("a first moment rounded to nearest", BLOCKS, "jnp.where(uniform * gap < chance", "jnp.where((0.5 if self.signed else uniform) * gap < chance"),
    ("decoded products contracted", BLOCKS, "return jnp.minimum(product, jnp.finfo(jnp.float32).max)", "return product"),
    ("moments of nnx not reassembled", BLOCKS, "isinstance(x, Mapping) and set(x)", "False and set(x)"),
    ("explicit types within a block", "leafwise.py", "if AxisType.Explicit in shardings[0].mesh.axis_types:", "if False:"),
    ("types that differ in shard_map", "trees.py", "if missing else x", "if False else x"),
    ("sums still to be made", "checks.py", "if is_packed(leaf) else ()", "if False else ()"),
    ("infinite scales", BLOCKS, "jnp.where(scales < jnp.inf, scales, jnp.nan)", "scales"),
    ("small leaves in 8 bits", BLOCKS, "np.prod(shape, dtype=object) >= self.minimum_size", "True"),
    ("the update reads what was not rounded", "leafwise.py", "*map(with_slope_of, accumulate(), decode(stored))", "*accumulate()"),
    ("formats not compared", "checks.py", "if is_packed(leaf) if expected is None else _kinds(leaf) != expected:", "if False:"),
    ("nearest second moment allowed", ADAM, "nearest = isinstance(tx.nu_dtype, np.dtype) and tx.nu_dtype.itemsize < 4", "nearest = False"),
    ("static fields not compared", "transform.py", "value if isinstance(value, _PLAIN) else Static(value)", "None"),
    ("numbers of a schedule folded", "schedules.py", "return chosen + 0 * count.astype(dtype)", "return jnp.asarray(chosen)"),
    ("conditions of a schedule inverted", "schedules.py", "condition if choice else ~condition", "~condition if choice else condition"),
    ("one way of a schedule", "schedules.py", "untried += way.others()", "pass"),
    ("numbers of a schedule unnamed", "transform.py", "for name in value.named:", "for name in ():"),
    ("another order of the grid", "population.py", "itertools.product(*axes.values())", "itertools.product(*list(axes.values())[::-1])"),
    ("programs not compared", "population.py", "if structure != jax.tree.structure(members[0]):", "if False:"),
    ("labels of one member", "population.py", "column[i] for name", "column[0] for name"),
    ("chunks in another order", "training.py", "filled.reshape(size, chunks).T", "filled.reshape(chunks, size)"),
    ("chunks filled from the front", "training.py", "np.minimum(places, members - 1)", "places[::-1] % members"),
    ("steps after the last segment left out", "training.py", "x[whole:], batches", "x[steps:], batches"),
    ("nothing rematerialised", "training.py", "    @jax.checkpoint\n", ""),
    ("state of before forgotten", "training.py", "tx.init(start) if state is None else state", "tx.init(start)"),
    ("divergence of the end unseen", "training.py", "jax.tree.leaves((self.losses, self.final))", "jax.tree.leaves(self.losses)"),
    ("batches of one order", "noise/batches.py", "jax.random.split(key, number))", "jnp.stack([key] * number))"),
    ("padding counted", "noise/batches.py", "(jnp.arange(steps * batch_size) < size)", "(jnp.arange(steps * batch_size) >= 0)"),
    ("variance as with replacement", "noise/estimates.py", "(total - size) / larger(total - 1, 1)", "1.0"),
    ("noise of the large batch", "noise/estimates.py", "excess * b * ratio", "excess * b"),
    ("one gradient too many", "noise/estimates.py", "scatter * (size / (number - 1))", "scatter * (size / number)"),
    ("noise not averaged from the first step", "noise/measuring.py", "(1 - self.decay) / -jnp.expm1(n * jnp.log1p(self.decay - 1))", "(1 - self.decay) * n**0"),
    ("filling counts like examples", "noise/measuring.py", "if not isinstance(part, Batches):", "if True:"),
    ("best rate by the largest alone", "curvature/rates.py", "rate, contraction = 2 / (bounded + high)", "rate, contraction = 2 / high"),
    ("edge of momentum of gradient descent", "curvature/rates.py", "edge = 2 * (1 + mu) / rate", "edge = 2 / rate"),
    ("Hessian of one batch", "curvature/operators.py", "jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), self.batches)", "add(jax.tree.map(jnp.zeros_like, params), jax.tree.map(lambda x: x[0], self.batches))"),
    ("squares of eigenvalues", "curvature/krylov.py", "unit = near(image)", "unit = jnp.ones((), image.dtype)"),
    ("an exhausted span counted", "curvature/krylov.py", "goes_on = coupling > 10 * jnp.finfo(start.dtype).eps * size_of_all", "goes_on = coupling > -1"),
    ("split inside a block", "placement.py", "part % units.get(dimension, 1) == 0", "True"),
    ("updates left split", "sharding.py", "return constrain(updates, plan.params), constrain(state, plan.state)", "return constrain(updates, plan.moments), constrain(state, plan.state)"),
    ("places not in the checksum", "checkpoint/checksums.py", "lowbias32(places(word.shape, lowbias32(jnp.uint32(0x9E3779B9 + salt))))", "lowbias32(jnp.full(word.shape, salt, jnp.uint32))"),
    ("fields not compared on restore", "checkpoint/manifest.py", "if name not in allow and fields.get(name) != here.get(name)", "if False"),
    ("edge one rate too far", "training.py", "rates[best + fails[0] - 1] * rates[best + fails[0]]", "rates[best + fails[0]] * rates[best + fails[0]]"),
]
# fmt: on


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="run the variants whose description contains this, or of this file")
    words = parser.parse_args().only
    chosen = [mutant for mutant in MUTANTS if words in mutant[0] or words == mutant[1]]
    survivors = 0
    for what, file, right, wrong in chosen:
        caught_by = run(file, right, wrong)
        survivors += caught_by is None
        print(f"{what:45} {caught_by or 'SURVIVES'}", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} caught")
    return survivors


def run(file: str, right: str, wrong: str) -> str | None:
    """The first test that fails with the wrong text in place of the right one."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in ("gdx", "tests"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "demo"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        source = copy / "gdx" / file
        text = source.read_text()
        if right not in text:
            raise SystemExit(f"{file} has no {right!r}; bring the list of variants up to date")
        source.write_text(text.replace(right, wrong, 1))
        own = Path("tests", file).with_name(f"test_{source.stem}.py")
        near = [path for path in (own, own.parent) if (copy / path).exists() and path != Path("tests")]
        tests = [*map(str, near), *TESTS, "--ignore=tests/contract/test_mutants.py"]
        outcome = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--tb=no", "-q", *tests],
            cwd=copy,
            env={**os.environ, "PYTHONPATH": str(copy)},
            capture_output=True,
            text=True,
        )
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", outcome.stdout, re.MULTILINE)
    return found.group(1) if found else None


if __name__ == "__main__":
    sys.exit(main())
