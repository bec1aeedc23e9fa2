"""Transforms one after the other."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import optax

from gdx.checks import check_chain_state
from gdx.leafwise import Leafwise, update_leaves
from gdx.numerics import alike, by_itself
from gdx.transform import Call, Transform, to_transform


def _to_transforms(label: str, value: Any) -> tuple[Transform, ...]:
    if not value:
        raise ValueError("chain: got no transforms; expected at least one, such as gdx.sgd(0.1)")
    return tuple(to_transform(f"{label}[{i}]", link) for i, link in enumerate(value))


class chain(Transform):
    """Applies transforms one after the other: the updates of each are the gradients of the next.

    Like `optax.chain`, but a value whose leaves are the hyperparameters of its links. optax's transforms can be links
    too; `gdx.value` makes values of them. The state is the tuple of the links' states. Between links updates are at
    least float32, so that the result does not depend on how a chain is put together.

    Args:
      *transforms: at least one transform, first to last.
      **others: nothing; the error says what to do instead.

    Raises:
      TypeError: a link is not a transform.
      ValueError: there is no link.

    >>> import gdx
    >>> tx = gdx.chain(gdx.scale_by_adam(b1=0.8), gdx.scale_by_learning_rate(0.1))
    >>> tx
    chain(scale_by_adam(b1=0.8), scale_by_learning_rate(learning_rate=0.1))
    >>> tx.replace(b1=0.9).hyperparams["b1"]
    0.9
    """

    transforms: tuple[Transform, ...] = dataclasses.field(metadata={"convert": _to_transforms})

    def __init__(self, *transforms: optax.GradientTransformation, **others: Any):
        if others:
            raise TypeError(
                f"chain: got {', '.join(others)} by keyword; expected transforms, as in chain(clip, gdx.sgd(0.1)). "
                f"To change a number of one, tx.replace(learning_rate=0.1)"
            )
        object.__setattr__(self, "transforms", transforms)
        self.__post_init__()

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.transforms))})"

    def _init(self, params: optax.Params) -> optax.OptState:
        return tuple(link._init(params) for link in self.transforms)

    def _update(self, updates: Any, state: Any, params: Any, extra_args: dict[str, Any]) -> tuple[Any, Any]:
        structure: Any  # its type knows no methods
        links, structure = jax.tree.flatten(_links(self, state), is_leaf=lambda x: isinstance(x, Transform))
        pairs, states = list(zip(links, structure.flatten_up_to(state))), list[Any]()
        # neighbouring leafwise links share one compiled call for each leaf
        for is_leafwise, group in itertools.groupby(pairs, lambda pair: isinstance(pair[0], Leafwise)):
            if is_leafwise:
                neighbours, old_states = zip(*group)
                updates, new = update_leaves(neighbours, old_states, updates, params)
                states += new
            else:
                for link, old in group:
                    updates, new_state = link._update(updates, old, params, extra_args)
                    states.append(new_state)
                    # what ends the chain is added to parameters, as an update of gdx's own is
                    updates = jax.tree.map(alike if len(states) == len(pairs) else by_itself, updates)
        return updates, jax.tree.unflatten(structure, states)

    def _counts(self, state: Any) -> Iterator[tuple[Any, Any]]:
        check_chain_state(self, state, len(self.transforms))
        for index, (link, link_state) in enumerate(zip(self.transforms, state)):
            for path, count in link._counts(link_state):
                yield ("transforms", index, *path), count


def _links(tx: chain, states: Any) -> tuple[Any, ...]:
    """The links, each as what does the work, with those of a chain inside it as a tuple, as their states are."""
    check_chain_state(tx, states, len(tx.transforms))
    links = list[Any]()
    for link, state in zip(tx.transforms, states):
        while isinstance(link, Call) and isinstance(made := link.made, Transform):
            link = made
        links.append(_links(link, state) if isinstance(link, chain) else link)
    return tuple(links)
