"""Modules of flax nnx and of equinox, taken apart into what is trained and what is not, and put together again."""

import reprlib
import sys
from dataclasses import dataclass
from typing import Any

import jax

from gdx.trees import path_text


@dataclass(frozen=True)
class Parts:
    """How a model is made of its parameters and the rest of its arrays; what is in it besides is compared.

    Attributes:
      kind: "nnx" or "equinox", or "tree" where all of it is parameters.
      fixed: what is no array: nnx's graph, or the structure and the leaves of an equinox module.
    """

    kind: str
    fixed: Any = None

    def join(self, params: Any, rest: Any) -> Any:
        """The model."""
        if self.kind == "nnx":
            # variables made anew, which may be written in this trace
            params, rest = jax.tree.map(lambda x: x, (params, rest))
            return sys.modules["flax"].nnx.merge(self.fixed, params, rest)
        if self.kind == "equinox":
            structure, leaves = self.fixed
            return sys.modules["equinox"].combine(params, rest, jax.tree.unflatten(structure, leaves))
        return params

    def rest_of(self, model: Any, rest: Any) -> Any:
        """The rest of its arrays after a model was used: nnx writes batch statistics and the like into it."""
        return _split_nnx(model)[2] if self.kind == "nnx" else rest


def take_apart(label: str, model: Any) -> tuple[Any, Any, Parts]:
    """The parameters of a model, the rest of its arrays, and how both make it again.

    Of nnx's modules the parameters are what is an `nnx.Param`; of equinox's the floating-point arrays.

    Raises:
      TypeError: beside modules of nnx there is something else, which would not be trained.
    """
    if is_nnx(model):
        kind = sys.modules["flax.nnx"].Module
        for path, x in jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda x: isinstance(x, kind)):
            if not isinstance(x, kind):
                raise TypeError(
                    f"{label} is {reprlib.repr(x)} at {path_text(path)}, beside modules of flax nnx, of which each "
                    f"nnx.Param is trained; expected modules alone: make it an nnx.Param in one of them"
                )
        graph, params, rest = _split_nnx(model)
        return params, rest, Parts("nnx", graph)
    if is_equinox(model):
        equinox = sys.modules["equinox"]
        arrays, fixed = equinox.partition(model, equinox.is_array)
        params, rest = equinox.partition(arrays, equinox.is_inexact_array)
        leaves, structure = jax.tree.flatten(fixed, is_leaf=lambda x: x is None)
        return params, rest, Parts("equinox", (structure, tuple(leaves)))
    return model, None, Parts("tree")


def _split_nnx(model: Any) -> Any:
    nnx = sys.modules["flax"].nnx
    return nnx.split(model, nnx.Param, ...)


def is_nnx(model: Any) -> bool:
    """Whether there is a module of flax nnx in a tree; nobody has one who has not imported it."""
    return _has(model, "flax.nnx")


def is_equinox(model: Any) -> bool:
    """Whether there is a module of equinox in a tree."""
    return _has(model, "equinox")


def _has(model: Any, library: str) -> bool:
    kind = getattr(sys.modules.get(library), "Module", ())
    return any(isinstance(x, kind) for x in jax.tree.leaves(model, is_leaf=lambda x: isinstance(x, kind)))
