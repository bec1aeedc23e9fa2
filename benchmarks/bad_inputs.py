"""What happens to bad inputs: each is run with optax and with gdx, and what it does is found by looking.

Run `python -m benchmarks bad_inputs`. Every case makes a few steps on the loss |theta + 1|^2 / 2,
which good settings at least halve. A case ends as

- refused: it raised an error; *unclearly* if the message does not name what is wrong;
- NaN/inf, trains nothing, silently wrong: it ran, and the parameters show it or the case tells it;
- accepted: it ran, and did what was meant.
"""

import argparse
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gdx
from benchmarks.measure import table

STEPS, WIDTH = 20, 130
inject = optax.inject_hyperparams


class Trained(NamedTuple):
    """Parameters before and after training."""

    before: Any
    after: Any


class Case(NamedTuple):
    """A bad input.

    Attributes:
      name: the input.
      at_fault: what a clear error mentions, a pattern.
      run: gives the input to `optax` or `gdx`; a text that it returns is the outcome.
      harm: what is wrong if it runs without a sign; empty if that is what was meant.
    """

    name: str
    at_fault: str
    run: Callable[[Any], Trained | str]
    harm: str = ""


def start(dtype: Any = jnp.float32) -> dict[str, Any]:
    return {"w": jnp.array([1.0, 2.0, 3.0], dtype), "b": jnp.array(0.5, dtype)}


def gradients_at(params: Any) -> Any:
    """Gradients of the loss; a leaf that is not numeric is its own."""
    return jax.tree.map(lambda p: p + 1 if np.issubdtype(getattr(p, "dtype", str), np.number) else p, params)


def loss(params: Any) -> float:
    return sum(float(np.sum(abs(np.asarray(p, complex) + 1) ** 2)) for p in jax.tree.leaves(params))


def train(tx: Any, params: Any = None, alter: Any = None, state: Any = None, call: Any = None) -> Trained:
    """Trains with altered gradients, from a given state, or with update called in another way."""
    params = before = start() if params is None else params
    state = tx.init(params) if state is None else state
    for _ in range(STEPS):
        g = alter(gradients_at(params)) if alter else gradients_at(params)
        updates, state = call(tx, g, state, params) if call else tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return Trained(before, params)


def traced(make: Callable, *hyperparameters: float, params: Any = None) -> Trained:
    """Makes and trains an optimizer in one jitted program."""
    params = params or start()
    return Trained(params, jax.jit(lambda *h: train(make(*h), params).after)(*hyperparameters))


def signs(trained: Trained) -> str:
    """What can be seen from the parameters alone; empty if they are as they should be."""
    before, after = trained
    still = []
    for (path, old), new in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        name = jax.tree_util.keystr(path)
        if new.shape != old.shape:
            return f"silently wrong: the shape of {name} went from {old.shape} to {new.ndim} axes, {new.shape}"
        if new.dtype != old.dtype:
            return f"silently wrong: the dtype of {name} went from {old.dtype} to {new.dtype}"
        if not np.isfinite(np.asarray(new, complex)).all():
            return "NaN/inf"
        if np.array_equal(old, new):
            still.append(name)
    if still:
        return "trains nothing" if len(still) == len(before) else f"silently wrong: {still[0]} is never trained"
    if loss(after) > loss(before):
        return "silently wrong: the loss rises"
    return "silently wrong: the loss hardly falls" if loss(after) > loss(before) / 2 else ""


def outcome(case: Case, library: Any) -> str:
    """Runs a case and says how it ended."""
    try:
        result = case.run(library)
    except Exception as error:
        clear = re.search(case.at_fault, str(error))
        return f"refused{'' if clear else ' unclearly'}: {type(error).__name__}: {error}"
    unseen = f"silently wrong: {case.harm}" if case.harm else "accepted (harmless)"
    return result if isinstance(result, str) else signs(result) or unseen


def setting(optimizer: str, harm: str = "", name: str = "", **settings: Any) -> Case:
    """A bad setting, named first, beside good ones."""
    bad, value = next(iter(settings.items()))
    make = lambda lib: getattr(lib, optimizer)(**{"learning_rate": 0.1, **settings})  # noqa: E731
    return Case(name or f"{bad}={value!r}", bad, lambda lib: train(make(lib)), harm)


def gradient(name: str, alter: Callable, harm: str = "", at_fault: str = "w") -> Case:
    return Case(f"gradient {name}", rf"\b({at_fault})\b", lambda lib: train(lib.adam(0.1), alter=alter), harm)


def leaf(name: str, value: Any, derivative: Any = None, harm: str = "") -> Case:
    """A parameter that cannot be trained."""
    alter = lambda g: g if derivative is None else {**g, "x": derivative}  # noqa: E731
    return Case(f"parameter {name}", r"\['x'\]", lambda lib: train(lib.adam(0.1), {**start(), "x": value}, alter), harm)


def state(name: str, make: Callable, harm: str = "") -> Case:
    """A state for Adam that its init has not made."""
    return Case(f"state {name}", "state", lambda lib: train(lib.adam(0.1), state=make(lib)), harm)


def restored(name: str, change: Callable, harm: str = "") -> Case:
    """Adam's own state, but its first link's was changed on the way through a file."""
    own = lambda lib: lib.adam(0.1).init(start())  # noqa: E731
    return state(f"restored with {name}", lambda lib: (change(own(lib)[0]), *own(lib)[1:]), harm)


def called(arguments: str, at_fault: str, call: Callable, harm: str = "") -> Case:
    return Case(f"update({arguments})", at_fault, lambda lib: train(lib.adamw(0.1), call=call), harm)


def replaced(name: str, make: Callable) -> Case:
    """Only gdx replaces hyperparameters by name."""
    run = lambda lib: train(make().replace(**{name: 0.2})) if lib is gdx else "not offered"  # noqa: E731
    return Case(f"replace({name}=0.2)", name, run)


def in_scan(lib: Any) -> Trained:
    tx, params = lib.adam(0.1), start(jnp.bfloat16)

    def step(carry: Any, _: None) -> Any:
        params, state = carry
        updates, state = tx.update(jax.tree.map(lambda p: p.astype(jnp.float32) + 1, params), state, params)
        return (optax.apply_updates(params, updates), state), None

    return Trained(params, jax.lax.scan(step, (params, tx.init(params)), length=STEPS)[0][0])


ROUNDED = "the moment is rounded to integers"
CASES = (
    called("gradients, state", "params", lambda tx, g, s, p: tx.update(g, s)),
    called("state, gradients, params", "state|gradient", lambda tx, g, s, p: tx.update(s, g, p)),
    called("params, state, gradients", "param", lambda tx, g, s, p: tx.update(p, s, g), "descends on the wrong tree"),
    called("gradients, params, state", "state|param", lambda tx, g, s, p: tx.update(g, p, s)),
    called("gradients, None, params", "state", lambda tx, g, s, p: tx.update(g, None, p)),
    gradient("missing for a leaf", lambda g: {"w": g["w"]}, at_fault="b"),
    gradient("for an unknown leaf", lambda g: {**g, "c": g["b"]}, at_fault="c"),
    gradient("None for an array", lambda g: {**g, "b": None}, at_fault="b"),
    gradient("in a list for a dict", lambda g: list(g.values()), at_fault="list|0"),
    gradient("of shape (1,) for (3,)", lambda g: {**g, "w": g["w"][:1]}, "one number drives three"),
    gradient("of shape (1, 3) for (3,)", lambda g: {**g, "w": g["w"][None]}),
    gradient("complex for a real leaf", lambda g: {**g, "w": g["w"] + 2j}, "the imaginary part changes the step"),
    gradient("of NaN", lambda g: {**g, "w": g["w"] * np.nan}),
    gradient("of 1e20", lambda g: jax.tree.map(lambda x: x * 1e20, g)),
    leaf("of integers", jnp.arange(3), harm="steps are rounded to integers"),
    leaf("of integers, gradient float0", jnp.arange(3), np.zeros(3, jax.dtypes.float0)),
    leaf("of booleans", jnp.array([True, False]), harm="steps are rounded to True or False"),
    leaf("that is a string", "relu"),
    leaf("that is a PRNG key", jax.random.key(0), np.zeros((), jax.dtypes.float0)),
    state("of sgd with momentum", lambda lib: lib.sgd(0.1, 0.9).init(start())),
    state("of adamw", lambda lib: lib.adamw(0.1).init(start())),
    state("of other parameters", lambda lib: lib.adam(0.1).init({"w": jnp.ones(1), "b": jnp.ones(1)})),
    state("restored with a list for a tuple", lambda lib: list(lib.adam(0.1).init(start()))),
    restored("a dict for a NamedTuple", lambda s: s._asdict()),
    restored("a tuple for a NamedTuple", tuple),
    restored("count in float32", lambda s: s._replace(count=jnp.float32(0)), "stops counting at 2^24"),
    restored("count of shape (1,)", lambda s: s._replace(count=jnp.zeros(1, jnp.int32))),
    restored("count -1", lambda s: s._replace(count=jnp.int32(-1))),
    *(setting("sgd", learning_rate=rate) for rate in (-0.1, float("nan"), float("inf"), 1e39, None, "0.1", 0.1j)),
    setting("sgd", "taken for 1", learning_rate=True),
    setting("sgd", name="learning_rate of shape (3,)", learning_rate=np.full(3, 0.1)),
    setting("sgd", name="learning_rate=params, as in torch", learning_rate=start()),
    setting("sgd", name="schedule that returns shape (3,)", learning_rate=lambda step: jnp.full(3, 0.1)),
    setting("sgd", name="schedule that returns -0.1", learning_rate=lambda step: -0.1),
    setting("sgd", name="schedule that returns None", learning_rate=lambda step: None),
    Case("schedule that gets negative, traced", "rate", lambda lib: traced(lambda: lib.sgd(lambda t: 0.02 - t / 99))),
    Case("learning_rate=-0.1, traced", "rate", lambda lib: traced(lib.sgd, -0.1)),
    *(setting("sgd", momentum=momentum) for momentum in (1.0, 1.5, -0.1)),
    setting("sgd", "plain gradient descent", "nesterov=True without momentum", nesterov=True),
    setting("sgd", "taken for True", nesterov="no", momentum=0.9),
    setting("sgd", ROUNDED, accumulator_dtype="int8", momentum=0.9),
    setting("adam", b1=1),
    setting("adam", b2=1),
    setting("adam", "the newest square has a negative weight", b2=1.5),
    setting("adam", name="b2=1 - 1e-9, 1 in float32", b2=1 - 1e-9),
    setting("adam", name="b2=bfloat16(0.999), which is 1", b2=jnp.bfloat16(0.999)),
    setting("adam", "may divide by zero", eps=-1e-8),
    setting("adam", eps_root=-1.0),
    setting("adam", ROUNDED, mu_dtype="int8"),
    setting("adam", ROUNDED, name="mu_dtype=bool", mu_dtype=bool),
    setting("adam", mu_dtype="bfloat61"),
    setting("adam", name="unknown keyword beta1", beta1=0.9),
    setting("adamw", "pushes away from zero", weight_decay=-0.1),
    setting("adamw", weight_decay=None),
    setting("adamw", mask={"w": True}),
    setting("adamw", "taken for True", mask={"w": "yes", "b": False}),
    setting("adamw", mask={"w": 1, "b": 0}),
    Case("inject_hyperparams, bfloat16", "b2", lambda lib: train(inject(lib.adam)(0.1), start(jnp.bfloat16))),
    Case("the same, traced", "b1|b2", lambda lib: traced(inject(lib.adam), 0.1, params=start(jnp.bfloat16))),
    Case("float32 gradients for bfloat16 parameters, in scan", "gradient", in_scan),
    Case("chain()", "chain|transform", lambda lib: train(lib.chain())),
    Case("chain with a number", "chain|transform", lambda lib: train(lib.chain(lib.scale_by_adam(), -0.1))),
    Case("chain with scale_by_adam, not called", "chain|adam", lambda lib: train(lib.chain(lib.scale_by_adam))),
    replaced("lr", lambda: gdx.sgd(0.1)),
    replaced("learning_rate", lambda: gdx.chain(gdx.sgd(0.1), gdx.sgd(0.1))),
)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--each", action="store_true", help="what each of them does, too")
    each = parser.parse_args().each
    warnings.simplefilter("ignore")
    counts: dict[str, Counter[str]] = {"optax": Counter(), "gdx": Counter()}
    for case in CASES:
        for library in (optax, gdx):
            found = outcome(case, library)
            counts[library.__name__][found.partition(":")[0]] += 1
            if each or (library is gdx and not found.startswith("refused: ")):
                print(f"{case.name}: {library.__name__}  {textwrap.shorten(found, WIDTH, placeholder=' ...')}")
    kinds = sorted(set(counts["optax"]) | set(counts["gdx"]))
    print(f"\n{len(CASES)} bad inputs:\n")
    print(table(["", *counts], [[kind, *(counts[name][kind] for name in counts)] for kind in kinds]))
