"""Transforms that treat every leaf by itself: the formula for one leaf here, the trees there."""

import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx.checks import check_complex, check_like, check_state
from gdx.transform import Transform


class Leafwise(Transform):
    """A transform that treats every leaf by itself: a subclass gives `step`, and `start` if it keeps moments.

    A step is computed in the dtype of the gradient, parameter and moments together, but at least
    float32, and its hyperparameters come in that dtype too (the real one for complex leaves). The
    update is returned in the gradient's dtype and each moment in its own: no dtype changes from
    one step to the next.

    Attributes:
      State: the state's NamedTuple. A field `count` is the number of updates so far; every other
        field is one moment, a tree shaped like the parameters.
    """

    State: ClassVar[Any] = optax.EmptyState

    def start(self, p: jax.Array) -> tuple[jax.Array, ...]:
        """The moments of one parameter before the first step, in the order of the state's fields."""
        return ()

    def shared(self, count: Any) -> Any:
        """Scalars that the steps of all leaves need, computed once.

        Args:
          count: 1 in the first step; None if the state has no count.
        """
        return ()

    def step(self, *args: Any, **kwargs: Any) -> tuple[jax.Array, ...]:
        """`step(shared, g, p, *moments)`: one leaf's update, followed by its new moments.

        Args:
          shared: what the method of that name returned.
          g: the gradient.
          p: the parameter; None if update was called without parameters.
          *moments: in the order of the state's fields.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no step")

    def acts_on(self, params: optax.Params | None) -> Any:
        """True, or a tree like the parameters that is True where this transform acts; other leaves pass unchanged."""
        return True

    @property
    def is_plain(self) -> bool:
        """Whether its update is `step` on every leaf and nothing else, so that links of a chain can share a call."""
        return type(self).update is Leafwise.update

    def init(self, params: optax.Params) -> Any:
        leaves, structure = jax.tree.flatten(params)
        if leaves:
            self.acts_on(params)
        names = _moments_of(self)
        moments = (jax.tree.unflatten(structure, m) for m in _columns(map(self.start, leaves), len(names)))
        count = {"count": jnp.zeros([], jnp.int32)} if "count" in self.State._fields else {}
        return self.State(**count, **dict(zip(names, moments)))

    def update(
        self, updates: optax.Updates, state: Any, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        updates, (state,) = update_leaves((self,), updates, (state,), params)
        return updates, state


def update_leaves(
    links: tuple[Leafwise, ...], updates: optax.Updates, states: tuple, params: optax.Params | None
) -> tuple[optax.Updates, tuple]:
    """Applies leafwise links one after the other, in one call per leaf."""
    gradients, structure = jax.tree.flatten(updates)
    size = len(gradients)
    acting, counts, moments = [], [], []
    for link, state in zip(links, states):
        check_state(link, state, link.State)
        trees = {name: getattr(state, name) for name in _moments_of(link)}
        for name, moment in trees.items():
            check_like(link, updates, f"state.{name}", moment)
        check_complex(link, updates, list(trees.values()))
        mask = link.acts_on(params) if gradients else True
        acting.append([mask] * size if isinstance(mask, bool) else jax.tree.leaves(mask))
        counts.append(optax.safe_increment(state.count) if "count" in link.State._fields else None)
        moments.append(_columns(map(jax.tree.leaves, trees.values()), size))

    @functools.cache
    def scalars(dtype: np.dtype) -> tuple[Callable, list[jax.Array]]:
        """The step of one leaf, and what it is given besides the leaf."""
        numbers, structure = jax.tree.flatten(_scalars(links, counts, dtype=dtype))
        return _stepper(structure), numbers

    def step(acts: tuple[bool, ...], g: Any, p: Any, moments: tuple) -> tuple:
        dtype = compute_dtype(*jax.tree.leaves((g, p, moments)))
        jitted, numbers = scalars(jnp.finfo(dtype).dtype)
        return jitted(acts, numbers, g, p, moments)

    parameters = [None] * size if params is None else jax.tree.leaves(params)
    stepped = list(map(step, zip(*acting), gradients, parameters, zip(*moments)))

    new_updates, new_moments = _columns(stepped, 2)
    new_states = []
    for link, count, rows in zip(links, counts, _columns(new_moments, len(links))):
        names = _moments_of(link)
        fields = {name: jax.tree.unflatten(structure, m) for name, m in zip(names, _columns(rows, len(names)))}
        new_states.append(link.State(**fields) if count is None else link.State(count=count, **fields))
    return jax.tree.unflatten(structure, new_updates), tuple(new_states)


@functools.partial(jax.jit, static_argnames="dtype")
def _scalars(links: tuple[Leafwise, ...], counts: list, *, dtype: np.dtype) -> tuple:
    """Links with their hyperparameters in one dtype, and what their leaves share."""
    links, counts = jax.tree.map(lambda x: x.astype(dtype), (links, counts))
    return links, tuple(link.shared(count) for link, count in zip(links, counts))


@functools.lru_cache(maxsize=256)
def _stepper(structure: Any) -> Callable:
    """The jitted step of one leaf through links of this structure: each shape and dtype is traced once."""

    @functools.partial(jax.jit, static_argnums=0)
    def step(acting: tuple, numbers: list, g: Any, p: Any, moments: tuple) -> tuple:
        links, shared = jax.tree.unflatten(structure, numbers)
        dtype = compute_dtype(*jax.tree.leaves((g, p, moments)))
        new_moments = []
        for link, common, acts, kept in zip(links, shared, acting, moments):
            if acts:
                g, *kept = _step_one(link, common, g, p, kept, dtype)
            new_moments.append(tuple(kept))
        return g, tuple(new_moments)

    return step


def _step_one(link: Leafwise, shared: Any, g: Any, p: Any, moments: Iterable, dtype: np.dtype) -> Iterable[jax.Array]:
    def cast(x: Any) -> Any:
        return None if x is None else x.astype(dtype if jnp.iscomplexobj(x) else jnp.finfo(dtype).dtype)

    # only a real hyperparameter and a complex leaf of its precision are left to promote
    with jax.numpy_dtype_promotion("standard"):
        stepped = link.step(shared, *map(cast, (g, p, *moments)))
    return [new.astype(old.dtype) for new, old in zip(stepped, (g, *moments), strict=True)]


def uncontracted(product: jax.Array) -> jax.Array:
    """A product that is rounded by itself, never as part of a fused multiply-add.

    In a sum of two products a compiler may fuse either, and chooses by the program around them:
    with this around one of them, a step has the same bits in every program. A product that
    overflows to infinity becomes NaN, to be seen.
    """
    # barriers and reduce_precision are removed before the compiler fuses
    return jnp.where(product < jnp.inf, product, jnp.nan) if jnp.isrealobj(product) else product


def compute_dtype(*arrays: Any) -> np.dtype:
    """The dtype to compute a leaf's step in: that of the arrays together, but at least float32."""
    return functools.reduce(np.promote_types, (jnp.result_type(x) for x in arrays), np.dtype(np.float32))


def moment_like(p: jax.Array, dtype: Any = None, *, real: bool = False) -> jax.Array:
    """Zeros shaped and sharded like a parameter.

    Args:
      p: the parameter.
      dtype: the moment's dtype; None for the parameter's, but at least float32. Where a complex
        parameter needs a complex moment, the complex dtype of that precision.
      real: whether the moment is real also where the parameter is complex.
    """
    if dtype is None:
        dtype = jnp.finfo(compute_dtype(p)).dtype
    if jnp.iscomplexobj(p) and not real:
        dtype = np.promote_types(dtype, np.complex64)
    return jnp.zeros_like(p, dtype=dtype)


def _moments_of(link: Leafwise) -> list[str]:
    return [name for name in link.State._fields if name != "count"]


def _columns(rows: Iterable[Iterable], width: int) -> list[tuple]:
    """Rows turned into `width` columns, also where there are no rows."""
    return list(zip(*rows, strict=True)) or [()] * width
