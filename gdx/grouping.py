r"""Groups of parameters by path: one optimizer, and for each group what is different there.

>>> import gdx, jax, jax.numpy as jnp
>>> params = {"embed": jnp.ones((9, 4)), "layer": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}, "old": jnp.ones(3)}
>>> tx = gdx.groups(
...     gdx.adamw(1e-3, weight_decay=0.1),
...     {
...         r"bias|norm": dict(weight_decay=0.0),  # a number of its own
...         r"^embed": dict(learning_rate=gdx.times(0.1)),  # a multiple: one learning rate stays one
...         r"^old": None,  # frozen: no state, no update
...     },
... )
>>> state = tx.init(params)
>>> updates, state = tx.update(params, state, params)
>>> jax.tree.map(lambda u: float(f"{u.ravel()[0]:.4g}"), updates)
{'embed': -0.00011, 'layer': {'bias': -0.001, 'kernel': -0.0011}, 'old': 0.0}
>>> dict(tx.hyperparams)["learning_rate"], dict(tx.hyperparams)["^embed.learning_rate.factor"]
(0.001, 0.1)
>>> tx.replace(**{"learning_rate": 1e-4, "bias|norm.weight_decay": 0.01}).hyperparams["bias|norm.weight_decay"]
0.01

A path is spelled by what leads to the leaf, keys, attributes and indices, with slashes between them: `layer/kernel` in
a dict or a flax nnx model, `layers/0/weight` in an equinox module, `the root` of an array alone. A pattern is a regular
expression that is searched (`re.search`) in it; the first that matches counts.

Each group is an optimizer of its leaves alone, in the tree that it is from, in which all other leaves are `None`: so
state is as large as without groups (frozen leaves less), and a norm that is clipped inside a group is the group's. For
that of all parameters clip outside: `gdx.chain(clip, gdx.groups(...))`. An average goes around the groups, too. Groups
may hold groups: their patterns are then searched among the group's own leaves. Where patterns take all parameters, what
only the optimizer of all others has acts on nothing; `gdx.describe` shows it. `nnx.Optimizer` takes groups from flax
0.12 on; before, split the model and write the step.
"""

import functools
import re
import reprlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx.checks import check_chain_state, held_together
from gdx.fields import Scalar, hyperparameter, is_number, static, text, to_number, uncalled
from gdx.numerics import by_itself
from gdx.schedules import schedule
from gdx.transform import Foreign, Transform, to_transform, value
from gdx.trees import is_box
from gdx.values import Named, Value, names_of

__all__ = ["groups", "times"]


_freeze = value(optax.set_to_zero)


class times(Value):
    """A multiple of what the optimizer has elsewhere, constant or scheduled: `gdx.times(0.1)`. See `gdx.groups`.

    Args:
      factor: at least 0; a schedule too.

    >>> import gdx
    >>> tx = gdx.groups(gdx.sgd(0.5), {"head": dict(learning_rate=gdx.times(0.1))})
    >>> tx.members[0]
    sgd(learning_rate=0.05)
    """

    factor: Scalar = hyperparameter(minimum=0)


@schedule
def product(first: Scalar, second: Scalar) -> Any:
    """The product of two numbers, of which one is a schedule, at a step count."""

    def at(count: Any) -> Any:
        return by_itself(_at(first, count) * _at(second, count))

    return at


def _at(value: Any, count: Any) -> Any:
    return jnp.asarray(value(count) if callable(value) else value, jnp.result_type(float))


def _multiplied(value: Any, factor: Any) -> Any:
    if callable(value) or callable(factor):
        return product(value, factor)
    # rounded as in a compiled program, to which both may be arguments
    pair = [x.astype(jnp.result_type(float)) for x in (value, factor)]
    return by_itself(pair[0] * pair[1])


class groups(Transform):
    r"""One optimizer for all parameters, with changes for those whose path matches a pattern.

    The state is a tuple: that of each group, in the order of the patterns, and last that of all other parameters.

    Args:
      tx: the optimizer, gdx's or a `gdx.value` of any other.
      changes: for each pattern, a regular expression, what is different where the path has it: a dict of
        hyperparameters by name, as `tx.replace` takes them, each with its new value (a number or a schedule) or
        `gdx.times(factor)` of what tx has; another transform; or None, which freezes. Of several patterns that match
        the first counts.
      **others: nothing; the error says what to do instead.

    Raises:
      TypeError: a change is none of these; tx is no transform, or one without hyperparameters where they are changed.
      ValueError: there are no changes; a pattern is no regular expression; a name is unknown, or a value out of range;
        in `init` and `update`: a pattern matches no path, or only such as earlier ones have taken.

    >>> import gdx, jax.numpy as jnp
    >>> tx = gdx.groups(gdx.sgd(0.5), {"b": dict(learning_rate=1.0), "c": None})
    >>> tx
    groups(sgd(learning_rate=0.5), {'b': {'learning_rate': 1.0}, 'c': None})
    >>> params = {"a": jnp.ones(()), "b": jnp.ones(()), "c": jnp.ones(())}
    >>> updates, state = tx.update(params, tx.init(params), params)
    >>> [float(u) for u in updates.values()]
    [-0.5, -1.0, 0.0]
    """

    tx: Transform
    patterns: tuple[str, ...] = static()
    changes: Any
    settings: tuple[Mapping[str, Any], ...] = static()

    def __init__(self, tx: optax.GradientTransformation, changes: Mapping[str, Any], **others: Any):
        if others:
            raise TypeError(
                f"groups: got {', '.join(others)} by keyword; expected the optimizer and a dict, as in groups(tx, "
                f"{{'norm|bias': dict(weight_decay=0.0)}}). To change a number, tx.replace(learning_rate=0.1)"
            )
        base = to_transform("groups: tx", tx)
        if not isinstance(changes, Mapping):
            raise TypeError(
                f"groups: changes is {reprlib.repr(changes)}; expected a dict from patterns of paths to what is "
                f"different there, such as {{'norm|bias': dict(weight_decay=0.0)}}"
            )
        if not changes:
            raise ValueError("groups: there are no changes; expected at least one, or the optimizer alone")
        numbers, settings = zip(*(_parts(base, pattern, change) for pattern, change in changes.items()))
        given = {"tx": base, "patterns": tuple(changes), "changes": numbers, "settings": settings}
        for name, held in given.items():
            object.__setattr__(self, name, held)
        self.__post_init__()

    def _convert(self, name: str, value: Any, source: str = "") -> tuple[Any, bool]:
        if name == "tx":
            value = to_transform("groups: tx", value)
        elif name == "patterns":
            value = tuple(map(_to_pattern, value)) if isinstance(value, tuple | list) else (_to_pattern(value),)
        elif name == "changes":  # what is no number is for the transform to refuse
            convert = lambda x: to_number(x) if is_number(x) else x  # noqa: E731
            value = jax.tree.map(convert, value, is_leaf=lambda x: isinstance(x, Value))
        return value, name in ("tx", "changes")

    def validate(self) -> None:
        if len(self.patterns) != len(self.changes):
            raise ValueError(f"groups: patterns is {self.patterns}; expected {len(self.changes)}, one for each change")
        _ = self.members

    @property
    def members(self) -> tuple[Transform, ...]:
        """The transform of each group, and last that of all other parameters."""
        fields: dict[str, Any] = vars(self)  # type: ignore[assignment]
        if "_members" in fields:
            return fields["_members"]
        members = (*map(self._member, range(len(self.patterns))), self.tx)
        if all(isinstance(x, np.generic) for x in jax.tree.leaves(self)):
            fields["_members"] = members
        return members

    def _member(self, i: int) -> Transform:
        change, settings, names = self.changes[i], dict(self.settings[i]), names_of(self.tx)
        if not isinstance(change, dict):
            return _freeze() if change is None else change
        for name, new in change.items():
            if isinstance(new, times) and name in names:
                of = names[name].value
                if names[name].is_static or of is None:
                    raise ValueError(f"groups: the change at {self.patterns[i]!r}: {name} is {text(of)}; give a number")
                new = _multiplied(of, new.factor)
            settings[name] = new
        try:
            return self.tx.replace(**settings)
        except (TypeError, ValueError) as error:
            raise type(error)(f"groups: the change at {self.patterns[i]!r}: {error}") from error

    def __repr__(self) -> str:
        changes = {
            pattern: {**change, **settings} if isinstance(change, dict) else change
            for pattern, change, settings in zip(self.patterns, self.changes, self.settings)
        }
        return f"groups({self.tx!r}, {text(changes)})"

    @property
    def rounds(self) -> bool:
        return any(tx.rounds for tx in self.members)

    def _init(self, params: optax.Params) -> optax.OptState:
        parts = self.split(params)[1]
        # a group may be of small leaves alone: what is said of formats that hold nothing is said of all together
        with held_together(self, params):
            return tuple(tx._init(part) for tx, part in zip(self.members, parts))

    def _update(self, updates: Any, state: Any, params: Any, extra_args: dict[str, Any]) -> tuple[Any, Any]:
        check_chain_state(self, state, len(self.members))
        assigned, gradients = self.split(updates)
        parts = [None] * len(gradients) if params is None else self.split(params)[1]
        new, states = list[Iterator[Any]](), list[Any]()
        for tx, g, s, p in zip(self.members, gradients, state, parts):
            u, s = tx._update(g, s, p, extra_args)
            new.append(iter(jax.tree.leaves(u)))
            states.append(s)
        leaves = [next(new[group]) for group in assigned]
        return jax.tree.unflatten(jax.tree.structure(updates), leaves), tuple(states)

    def split(self, tree: Any) -> tuple[tuple[int, ...], list[Any]]:
        """Which group each leaf is in, and the tree of each group, None where it has no leaf."""
        leaves, structure = jax.tree.flatten(tree)
        assigned = assigned_to(self.patterns, structure)
        return assigned, [
            jax.tree.unflatten(structure, [leaf if group == i else None for leaf, group in zip(leaves, assigned)])
            for i in range(len(self.members))
        ]

    def _counts(self, state: Any) -> Iterator[tuple[Any, Any]]:
        check_chain_state(self, state, len(self.members))
        names = names_of(self.tx)
        for i, (tx, inner) in enumerate(zip(self.members, state)):
            change = self.changes[i] if i < len(self.patterns) else {}
            own = change if isinstance(change, dict) else {}
            at = {names[name].path: name for name in own}
            for path, count in tx._counts(inner):
                if isinstance(change, Transform):
                    yield ("changes", i, *path), count
                elif path not in at:
                    yield ("tx", *path), count
                else:
                    yield ("changes", i, at[path]), count
                    if isinstance(own[at[path]], times):  # a schedule multiplied is one, whatever it is of
                        yield ("changes", i, at[path], "factor"), count

    def _walk(self, containers: bool = False) -> Iterator[Named]:
        names = names_of(self.tx)
        for each in self.tx._walk(containers):
            yield each.within(("tx",))
        if containers:
            yield Named(("tx",), ("tx",), False, self.tx)
        yield Named(("patterns",), ("patterns",), True, self.patterns)
        for i, (pattern, change, settings) in enumerate(zip(self.patterns, self.changes, self.settings)):
            for name, held in settings.items():
                yield Named((f"{pattern}.{name}",), ("settings", i, name), True, held)
            if isinstance(change, Transform):
                for name, each in names_of(change).items():
                    yield each.within(("changes", i))._replace(labels=(f"{pattern}.{name}",))
            for name, held in change.items() if isinstance(change, dict) else ():
                if containers or not isinstance(held, times):
                    yield Named((f"{pattern}.{name}",), ("changes", i, name), False, held)
                for inner, each in names_of(held).items() if isinstance(held, Value) else ():
                    there = each.within(("changes", i, name))._replace(labels=(f"{pattern}.{name}.{inner}",))
                    is_factor = isinstance(held, times) and inner == "factor" and name in names
                    yield there._replace(multiplies=("tx", *names[name].path)) if is_factor else there


def _to_pattern(value: Any) -> str:
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise (ValueError if isinstance(value, str) else TypeError)(
            f"groups: the pattern {value!r} is no regular expression ({error}); expected one such as 'norm|bias'"
        ) from error
    return value


def _parts(tx: Transform, pattern: Any, change: Any) -> tuple[Any, dict[str, Any]]:
    """What is changed in a group: a dict of numbers, a transform or None; and what is no number."""
    label = f"groups: the change at {pattern!r}"
    if change is None or isinstance(change, optax.GradientTransformation):
        return change if change is None else to_transform(label, change), {}
    if not isinstance(change, Mapping):
        raise TypeError(
            f"{label} is {reprlib.repr(change)}; expected a dict of hyperparameters, a transform, or None to freeze"
            f"{uncalled(change)}"
        )
    if not change:
        raise ValueError(f"{label} is empty; expected at least one hyperparameter, or None to freeze")
    if isinstance(tx, Foreign):
        raise TypeError(
            f"{label} is {reprlib.repr(change)}, but tx is a transform of optax's, which cannot be changed; make a "
            f"value of it, as in gdx.value(optax.lion)(1e-4)"
        )
    names = names_of(tx)
    fixed = {
        name: new
        for name, new in change.items()
        if name in names and names[name].is_static and not isinstance(new, times)
    }
    return {name: new for name, new in change.items() if name not in fixed}, fixed


@functools.lru_cache(maxsize=256)
def assigned_to(patterns: tuple[str, ...], structure: Any) -> tuple[int, ...]:
    """The group of each leaf."""
    indices = jax.tree.unflatten(structure, range(structure.num_leaves))
    found = [*leaf_paths(indices)]
    matching = [[i for i, pattern in enumerate(patterns) if re.search(pattern, path)] for path in found]
    assigned = tuple(of[0] if of else len(patterns) for of in matching)
    for i, pattern in enumerate(patterns):
        if found and i not in assigned:
            hiding = {patterns[of[0]]: path for of, path in zip(matching, found) if i in of}
            what = (
                "matches " + ", ".join(f"{path!r}, which {first!r} has taken" for first, path in hiding.items())
                if hiding
                else "matches no path"
            )
            listed = ", ".join([*found[:20], "..."] if len(found) > 20 else found)
            raise ValueError(
                f"groups: the pattern {pattern!r} {what}; expected one that matches a path which no earlier one does. "
                f"The paths are {listed}"
            )
    return assigned


def leaf_paths(tree: Any) -> Iterator[str]:
    """Where each leaf of a tree is, as patterns are searched in it."""
    # flax's box of an array is no part of the model: "value" would match every path of it
    for path, box in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_box):
        for inside, _ in jax.tree_util.tree_leaves_with_path(box):
            yield jax.tree_util.keystr((*path, *inside[1:]), simple=True, separator="/") or "the root"
