"""Transforms that treat every leaf by itself: the formula for one leaf here, the trees there."""

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx.checks import (
    check_held,
    check_own_formats,
    check_returned,
    check_starts,
    check_state,
    checked_moments,
    no_values,
    require_params,
)
from gdx.numerics import by_itself
from gdx.storage.formats import Format
from gdx.storage.stepping import stepped
from gdx.transform import CountedState, Transform, as_array
from gdx.trees import paths


class Leafwise(Transform):
    """A transform that treats every leaf by itself: a subclass gives its formula, and `start` if it keeps moments.

    The formula is `step`, or `accumulate` and `direction`, of which `step` is then made: so that the
    direction is that of the moments as they are stored, where `formats` keep them in few bits.

    A step is computed in the dtype of the gradient, parameter and moments together, but at least
    float32, and its hyperparameters come in that dtype too (the real one for complex leaves). The
    update is returned in the gradient's dtype and each moment in its own: no dtype changes from
    one step to the next.

    Attributes:
      State: the state's NamedTuple. A field `count` is the number of updates so far; every other
        field is one moment, a tree shaped like the parameters.
      Counted: the state's NamedTuple where there are no moments, but a schedule to count for: with `count` alone.
      elementwise: whether `accumulate` and `direction` take each number by itself, so that they may be given
        the leaf in another shape: moments in blocks then cost less.
      mask: on which leaves it acts, as a tree of booleans or a function of the parameters; None for all. Where there is
        a mask, `update` needs the parameters, and the state is in an `optax.MaskedState`; there are moments for all
        leaves, and those of the others stay as they start (optax's `masked` has none for these).
      rounds: whether this is a link that rounds parameters: `step` then takes `dither` as a keyword, a
        `gdx.storage.Dither` if the state has a count, and its update stays in the dtype it was computed in.

    Sign descent on a velocity, in any storage format, with the same bits in every program:

    >>> import gdx, jax.numpy as jnp, optax
    >>> class scale_by_sign(gdx.Leafwise):
    ...     State = optax.TraceState
    ...     elementwise = True
    ...     momentum: gdx.Scalar = gdx.hyperparameter(default=0.9, minimum=0, below=1)
    ...     dtype: object = gdx.static(default=None, convert=gdx.storage.to_storage)
    ...     @property
    ...     def formats(self):
    ...         return (self.dtype,)
    ...     def start(self, p):
    ...         return (gdx.storage.moment_like(p, self.dtype),)
    ...     def accumulate(self, shared, g, p, trace):
    ...         return (gdx.alike(self.momentum * trace) + gdx.uncontracted(g),)
    ...     def direction(self, shared, g, p, trace):
    ...         return jnp.sign(trace)
    >>> tx = scale_by_sign(0.5, "bfloat16")
    >>> updates, state = tx.update(jnp.array([3.0, -0.5]), tx.init(jnp.zeros(2)))
    >>> updates.tolist(), state.trace
    ([1.0, -1.0], Array([3, -0.5], dtype=bfloat16))
    """

    def __init_subclass__(cls) -> None:
        ignored = {"init_tree", "update_tree"} & set(vars(cls))
        if ignored:
            raise TypeError(
                f"{cls.__name__}: {' and '.join(sorted(ignored))} are not called where leaves are treated one by one; "
                f"give start(self, p) and step(self, shared, g, p, *moments), or derive from gdx.Transform"
            )
        if not hasattr(cls.State, "_fields"):
            raise TypeError(
                f"{cls.__name__}: State is {cls.State!r}; expected a NamedTuple, with a field for each moment"
            )
        cls._moments = [name for name in cls.State._fields if name != "count"]
        super().__init_subclass__()

    State: ClassVar[Any] = optax.EmptyState
    Counted: ClassVar[Any] = optax.ScaleByScheduleState
    elementwise: ClassVar[bool] = False
    rounds: ClassVar[bool] = False
    mask = cast(Any, None)  # an annotation would make it a field
    _moments: ClassVar[list[str]] = []

    @property
    def formats(self) -> tuple[Any, ...]:
        """The dtype or storage format of each moment; () if all are held as `start` made them."""
        return ()

    def start(self, p: jax.Array) -> tuple[Any, ...]:
        """The moments of one parameter before the first step, in the order of the state's fields."""
        return ()

    def shared(self, count: jax.Array) -> Any:
        """Scalars that the steps of all leaves need, computed once.

        Args:
          count: 1 in the first step; None if the state has no count.
        """
        return ()

    def step(self, shared: Any, g: jax.Array, p: jax.Array, *moments: Any, **dither: Any) -> tuple[jax.Array, ...]:
        """One leaf's update, followed by its new moments.

        Args:
          shared: what the method of that name returned.
          g: the gradient.
          p: the parameter; None if update was called without parameters, which `acts_on` may refuse.
          *moments: in the order of the state's fields.
          **dither: random bits, where the link `rounds`.
        """
        new = self.accumulate(shared, g, p, *moments)
        check_returned(self, "accumulate", new, moments, "the new moments")
        return self.direction(shared, g, p, *new), *new

    def accumulate(self, shared: Any, g: jax.Array, p: jax.Array, *moments: Any) -> tuple[jax.Array, ...]:
        """The new moments, from what `step` is given."""
        raise NotImplementedError(f"{type(self).__name__} defines neither step nor accumulate")

    def direction(self, shared: Any, g: jax.Array, p: jax.Array, *moments: Any) -> jax.Array:
        """The update, from the new moments."""
        raise NotImplementedError(f"{type(self).__name__} defines neither step nor direction")

    def lasting(self, shared: Any) -> tuple[Any, ...]:
        r"""How many steps what is added to each moment lasts in `direction`, in sum of its weights: $1 / (1 - \beta)$.

        None for a moment in which the direction is not linear; () if none `compensates`, see `gdx.storage.Format`.
        """
        return ()

    @property
    def in_two_parts(self) -> bool:
        """Whether its step is `accumulate` and `direction`."""
        return type(self).step is Leafwise.step

    def acts_on(self, params: optax.Params | None) -> Any:
        """True, or a tree like the parameters that is True where this transform acts; other leaves pass unchanged."""
        if self.mask is None:
            return True
        require_params(self, params)
        with no_values(
            f"{type(self).__name__}: the mask needs values of the parameters, which are traced; let it decide by "
            f"paths, shapes and dtypes"
        ):
            mask = self.mask(params) if _is_function(self.mask) else self.mask
        for path, leaf in zip(paths(mask), jax.tree.leaves(mask)):
            if not isinstance(leaf, bool | np.bool_):
                raise TypeError(f"{type(self).__name__}: the mask at {path} is {leaf!r}, expected True (acts) or False")
        try:
            return jax.tree.broadcast(jax.tree.map(bool, mask), params)
        except ValueError as error:
            same = " (in other containers)" if [*paths(mask)] == [*paths(params)] else ""
            raise ValueError(
                f"{type(self).__name__}: the mask has leaves at {_listed(mask)}, the parameters at "
                f"{_listed(params)}{same}; expected one boolean for each parameter or for a whole subtree, or a "
                f"function of the parameters"
            ) from error

    # The state: moments, and the step count if it is needed.

    @functools.cached_property
    def counts(self) -> bool:
        """Whether the state has the step count beside `State`: for a schedule, or to round moments at random."""
        is_random = any(getattr(format, "stochastic", False) for format in self.formats)
        return "count" not in self.State._fields and (is_random or self.has_schedule)

    @functools.cached_property
    def draws(self) -> bool:
        """Whether its step may need random bits."""
        return self.rounds or any(isinstance(format, Format) for format in self.formats)

    def _packed(self, count: Any, structure: Any, rows: Iterable[Iterable]) -> Any:
        """The state of a count and of each leaf's moments."""
        columns = _columns(rows, len(self._moments))
        moments = {name: jax.tree.unflatten(structure, column) for name, column in zip(self._moments, columns)}
        if not self.counts:
            state = self.State(**moments) if count is None else self.State(count=count, **moments)
        else:
            state = CountedState(count, self.State(**moments)) if moments else self.Counted(count)
        return state if self.mask is None else optax.MaskedState(state)

    def _unpacked(self, state: Any) -> tuple[Any, Any]:
        """Count and moments of a state."""
        if self.mask is not None:
            check_state(self, state, optax.MaskedState)
            state = state.inner_state
        kind, count = self.State, None
        if self.counts and self._moments:
            check_state(self, state, CountedState)
            count, state = state
        elif self.counts:
            kind = self.Counted
        check_state(self, state, kind)
        return (state.count if "count" in kind._fields else count), state

    def _init(self, params: optax.Params) -> Any:
        check_own_formats(self, self._moments)
        leaves, structure = jax.tree.flatten(params)
        if leaves:
            self.acts_on(params)
        count = jnp.zeros([], jnp.int32) if self.counts or "count" in self.State._fields else None
        with no_values(f"{type(self).__name__}: start {_NEEDS_A_VALUE}"):
            rows = list(map(self.at(count).start, leaves))
        for p, row in zip(leaves, rows):
            like = [p] * len(self._moments)
            check_returned(self, "start", row, like, f"the moments of State, {self.State.__name__}")
        check_starts(self, self._moments, rows)
        if self.draws:
            check_held(self, params, self._moments, rows)
        return self._packed(count, structure, rows)

    def _update(self, updates: Any, state: Any, params: Any, extra_args: dict[str, Any]) -> tuple[Any, Any]:
        updates, (state,) = update_leaves((self,), (state,), updates, params)
        return updates, state

    def _counts(self, state: Any) -> Iterator[tuple[Any, Any]]:
        count, _ = self._unpacked(state)
        for name, value in self._hyperparameters():
            if callable(value):
                yield (name,), count


def update_leaves(
    links: tuple[Leafwise, ...], states: tuple[Any, ...], updates: optax.Updates, params: optax.Params | None
) -> tuple[optax.Updates, tuple[Any, ...]]:
    """Applies leafwise links one after the other, in one call per leaf."""
    gradients, structure = jax.tree.flatten(updates)
    size = len(gradients)
    at, counts, moments, acting = [], [], [], []
    for link, state in zip(links, states):
        count, kept = link._unpacked(state)
        at.append(link.at(count))
        trees = {name: getattr(kept, name) for name in link._moments}
        columns = checked_moments(link, updates, trees) if trees else []
        mask = link.acts_on(params) if gradients else True
        acting.append([mask] * size if isinstance(mask, bool) else jax.tree.leaves(mask))
        counts.append(None if count is None else optax.safe_increment(count))
        moments.append(_columns(columns, size))
    draws = any(link.draws for link in links)
    parameters = [None] * size if params is None else list(map(as_array, jax.tree.leaves(params)))
    # in the whole tree, of which this may be a group's part with None elsewhere: no two leaves round alike
    places = enumerate(jax.tree.leaves(updates, is_leaf=lambda x: x is None)) if draws else ()
    indices: list[Any] = [np.uint32(i) for i, x in places if x is not None] or [None] * size
    steppers, rows = dict[Any, Any](), []
    for acts, g, p, kept, index in zip(zip(*acting), gradients, parameters, zip(*moments), indices):
        dtypes = _dtypes(g.dtype, None if p is None else p.dtype, tuple([tuple([x.dtype for x in m]) for m in kept]))
        if dtypes not in steppers:
            for link, dtype in zip(at, dtypes):
                link.check_narrow(dtype)
            scalars = _scalars(tuple(at), counts, dtypes=dtypes)
            numbers, of_numbers = jax.tree.flatten((*scalars, counts if draws else [None] * len(links)))
            steppers[dtypes] = functools.partial(_stepper(of_numbers, dtypes), numbers)
        rows.append(steppers[dtypes](acts, g, p, kept, index))
    new_updates, *new_moments = _columns(rows, 1 + len(links))
    new_states = [link._packed(count, structure, kept) for link, count, kept in zip(links, counts, new_moments)]
    return jax.tree.unflatten(structure, new_updates), tuple(new_states)


@functools.cache
def _dtypes(g: Any, p: Any, moments: tuple[tuple[Any, ...], ...]) -> tuple[np.dtype, ...]:
    """In which each link computes: of what comes into it, given by its dtypes, whichever links share the call."""
    dtypes = [np.promote_types(np.float32, g)]
    for kept in moments:
        dtypes.append(functools.reduce(np.promote_types, kept if p is None else (p, *kept), dtypes[-1]))
    return tuple(dtypes[1:])


_NEEDS_A_VALUE = (
    "needs the value of a number or array, which is traced; decide with jnp.where or jax.lax.cond, or by a static field"
)


@functools.partial(jax.jit, static_argnames="dtypes")
def _scalars(links: tuple[Leafwise, ...], counts: list[Any], *, dtypes: tuple[np.dtype, ...]) -> tuple[list, list]:
    """Links with their hyperparameters in the dtypes they compute in, and what their leaves share."""
    cast, shared = list[Leafwise](), []
    for link, count, dtype in zip(links, counts, dtypes):
        leaves, structure = jax.tree.flatten((link, count))
        link, count = jax.tree.unflatten(structure, [x.astype(jnp.finfo(dtype).dtype) for x in leaves])
        cast.append(link)
        with no_values(f"{type(link).__name__}: shared {_NEEDS_A_VALUE}"):
            shared.append(link.shared(count))
    return cast, shared


@functools.lru_cache(maxsize=256)
def _stepper(structure: Any, dtypes: tuple[np.dtype, ...]) -> Callable[..., tuple[Any, ...]]:
    """The jitted step of one leaf through links of this structure: each shape and dtype is traced once."""

    def step(numbers: list, acting: tuple[bool, ...], g: Any, p: Any, moments: tuple, index: Any) -> tuple[Any, ...]:
        u, new = g, list[tuple[Any, ...]]()
        links = zip(*jax.tree.unflatten(structure, numbers), acting, moments, dtypes)
        for link, shared, count, acts, kept, dtype in links:
            if acts:
                # where no moment stands between them, the compiler makes one factor of two numbers that are constants
                u = by_itself(u) if new and not any(new) else u
                with no_values(f"{type(link).__name__}: its step {_NEEDS_A_VALUE}"):
                    u, *kept = stepped(link, shared, u, p, kept, dtype, count, index)
            new.append(tuple(kept))
        return u, *new

    return jax.jit(step, static_argnums=1)


def _columns(rows: Iterable[Iterable], width: int) -> list[tuple]:
    """Rows turned into `width` columns, also where there are no rows."""
    return list(zip(*rows, strict=True)) or [()] * width


def _is_function(mask: Any) -> bool:
    """Whether a mask is a function of the parameters: a module that can be called may be a tree of booleans."""
    leaves = jax.tree.leaves(mask)
    return bool(leaves) and all(map(callable, leaves))


def _listed(tree: Any) -> str:
    listed = list(paths(tree))
    return ", ".join([*listed[:5], "..."] if len(listed) > 5 else listed) or "no path"
