"""Transforms that treat every leaf by itself: the formula for one leaf here, the trees there."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType

from gdx.checks import check_complex, check_formats, check_like, check_state
from gdx.numerics import compute_dtype
from gdx.storage.blocks import Blocks, InBlocks, Packed, is_packed, reassembled
from gdx.storage.dither import Dither
from gdx.storage.formats import Format, is_encoded, with_slope_of
from gdx.transform import CountedState, Transform
from gdx.trees import varying_alike


class Rounding(NamedTuple):
    """What a link that rounds parameters is given beside the leaf: the parameter's own dtype, and random bits."""

    dtype: np.dtype
    dither: Dither | None


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
      elementwise: whether `accumulate` and `direction` take each number by itself, so that they may be given
        the leaf in another shape: moments in blocks of 8 bits then cost less.
      rounds: whether this is a link that rounds parameters: `step` then takes `rounding` as a keyword,
        and its update stays in the dtype it was computed in.

    Sign descent on a velocity:

    >>> import gdx, jax.numpy as jnp, optax
    >>> class scale_by_sign(gdx.Leafwise):
    ...     State = optax.TraceState
    ...     momentum: gdx.Scalar = gdx.hyperparameter(default=0.9, minimum=0, below=1)
    ...     def start(self, p):
    ...         return (jnp.zeros_like(p),)
    ...     def step(self, shared, g, p, trace):
    ...         trace = self.momentum * trace + g
    ...         return jnp.sign(trace), trace
    >>> tx = scale_by_sign(0.5)
    >>> updates, state = tx.update(jnp.array([3.0, -0.5]), tx.init(jnp.zeros(2)))
    >>> updates.tolist(), state.trace.tolist()
    ([1.0, -1.0], [3.0, -0.5])
    """

    def __init_subclass__(cls) -> None:
        ignored = {"init_tree", "update_tree"} & set(vars(cls))
        if ignored:
            raise TypeError(
                f"{cls.__name__}: {' and '.join(sorted(ignored))} are not called where leaves are treated one by one; "
                f"give start(self, p) and step(self, shared, g, p, *moments), or derive from gdx.Transform"
            )
        super().__init_subclass__()

    State: ClassVar[Any] = optax.EmptyState
    elementwise: ClassVar[bool] = False
    rounds: ClassVar[bool] = False

    @property
    def formats(self) -> tuple[Any, ...]:
        """The dtype or storage format of each moment; () if all are held as `start` made them."""
        return ()

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
        moments = self.accumulate(*args)
        return self.direction(*args[:3], *moments), *moments

    def accumulate(self, *args: Any) -> tuple[jax.Array, ...]:
        """`accumulate(shared, g, p, *moments)`: the new moments, from what `step` is given."""
        raise NotImplementedError(f"{type(self).__name__} defines neither step nor accumulate")

    def direction(self, *args: Any) -> jax.Array:
        """`direction(shared, g, p, *moments)`: the update, from the new moments."""
        raise NotImplementedError(f"{type(self).__name__} defines neither step nor direction")

    def acts_on(self, params: optax.Params | None) -> Any:
        """True, or a tree like the parameters that is True where this transform acts; other leaves pass unchanged."""
        return True

    # The state: moments, and the step count if it is needed.

    Counted: ClassVar[Any] = optax.ScaleByScheduleState

    @property
    def counts(self) -> bool:
        """Whether the state has the step count beside `State`: for a schedule, or to round moments at random."""
        is_random = any(getattr(format, "stochastic", False) for format in self.formats)
        return "count" not in self.State._fields and (is_random or self.has_schedule)

    def _packed(self, count: Any, moments: dict[str, Any]) -> Any:
        """The state of a count and moments by name."""
        if not self.counts:
            return self.State(**moments) if count is None else self.State(count=count, **moments)
        return CountedState(count, self.State(**moments)) if moments else self.Counted(count)

    def _unpacked(self, state: Any) -> tuple[Any, Any]:
        """Count and moments of a state."""
        if not self.counts:
            check_state(self, state, self.State)
            return (state.count if "count" in self.State._fields else None), state
        kind = CountedState if _moments_of(self) else self.Counted
        check_state(self, state, kind)
        if kind is CountedState:
            check_state(self, state.inner_state, self.State)
        return state.count, state.inner_state if kind is CountedState else state

    def _init(self, params: optax.Params) -> Any:
        leaves, structure = jax.tree.flatten(params)
        if leaves:
            self.acts_on(params)
        names = _moments_of(self)
        count = jnp.zeros([], jnp.int32) if self.counts or "count" in self.State._fields else None
        at = self.at(count)
        moments = (jax.tree.unflatten(structure, m) for m in _columns(map(at.start, leaves), len(names)))
        return self._packed(count, dict(zip(names, moments)))

    def _update(self, updates: Any, state: Any, params: Any, extra_args: dict[str, Any]) -> tuple[Any, Any]:
        updates, (state,) = update_leaves((self,), (state,), updates, params)
        return updates, state

    def _counts(self, state: Any) -> Iterator[tuple[Any, Any]]:
        count, _ = self._unpacked(state)
        for _, value in self._hyperparameters():
            if callable(value):
                yield value, count


def update_leaves(
    links: tuple[Leafwise, ...], states: tuple, updates: optax.Updates, params: optax.Params | None
) -> tuple[optax.Updates, tuple]:
    """Applies leafwise links one after the other, in one call per leaf."""
    gradients, structure = jax.tree.flatten(updates)
    size = len(gradients)
    acting, counts, moments, at = [], [], [], []
    for link, state in zip(links, states):
        count, kept = link._unpacked(state)
        at.append(link.at(count))
        names = _moments_of(link)
        trees = {name: reassembled(getattr(kept, name), f) for name, f in zip(names, _formats_of(link))}
        for name, moment in trees.items():
            check_like(link, updates, f"state.{name}", moment)
        columns = [leaves_like(structure, moment) for moment in trees.values()]
        check_complex(link, updates, columns)
        check_formats(link, updates, list(trees), columns)
        mask = link.acts_on(params) if gradients else True
        acting.append([mask] * size if isinstance(mask, bool) else jax.tree.leaves(mask))
        counts.append(None if count is None else optax.safe_increment(count))
        moments.append(_columns(columns, size))
    draws = any(link.rounds or any(isinstance(f, Format) for f in link.formats) for link in links)

    @functools.cache
    def scalars(dtypes: tuple[np.dtype, ...]) -> tuple[Callable, list[jax.Array]]:
        """The step of one leaf, and what it is given besides the leaf."""
        real = tuple(jnp.finfo(dtype).dtype for dtype in dtypes)
        numbers, structure = jax.tree.flatten((*_scalars(tuple(at), counts, dtypes=real), counts if draws else None))
        return _stepper(structure), numbers

    def step(index: int, acts: tuple[bool, ...], g: Any, p: Any, moments: tuple) -> tuple:
        jitted, numbers = scalars(_dtypes(g, p, moments))
        return jitted(acts, numbers, g, p, moments, np.uint32(index) if draws else None)

    parameters = [None] * size if params is None else jax.tree.leaves(params)
    stepped = list(map(step, range(size), zip(*acting), gradients, parameters, zip(*moments)))

    new_updates, new_moments = _columns(stepped, 2)
    new_states = []
    for link, count, rows in zip(links, counts, _columns(new_moments, len(links))):
        names = _moments_of(link)
        trees = {name: jax.tree.unflatten(structure, m) for name, m in zip(names, _columns(rows, len(names)))}
        new_states.append(link._packed(count, trees))
    return jax.tree.unflatten(structure, new_updates), tuple(new_states)


def _dtypes(g: Any, p: Any, moments: tuple) -> tuple[np.dtype, ...]:
    """In which each link computes: of what comes into it, whichever links share the call."""
    dtypes, dtype = [], compute_dtype(g)
    for kept in moments:
        dtype = compute_dtype(*jax.tree.leaves((p, kept)), np.zeros((), dtype))
        dtypes.append(dtype)
    return tuple(dtypes)


@functools.partial(jax.jit, static_argnames="dtypes")
def _scalars(links: tuple[Leafwise, ...], counts: list, *, dtypes: tuple[np.dtype, ...]) -> tuple:
    """Links with their hyperparameters in the dtypes they compute in, and what their leaves share."""
    cast = [jax.tree.map(lambda x: x.astype(d), pair) for *pair, d in zip(links, counts, dtypes)]  # noqa: B023
    return [link for link, _ in cast], [link.shared(count) for link, count in cast]


@functools.lru_cache(maxsize=256)
def _stepper(structure: Any) -> Callable:
    """The jitted step of one leaf through links of this structure: each shape and dtype is traced once."""

    def step(acting: tuple, numbers: list, g: Any, p: Any, moments: tuple, index: Any) -> tuple:
        links, shared, counts = jax.tree.unflatten(structure, numbers)
        dtypes = _dtypes(g, p, moments)
        formats = [list(map(_format_of, _formats_of(link), kept)) for link, kept in zip(links, moments)]
        u, new_moments = g, []
        for i, (link, common, acts, kept, few) in enumerate(zip(links, shared, acting, moments, formats)):
            if acts:
                dither = None if counts is None or counts[i] is None else Dither(counts[i].astype(jnp.uint32), index)
                u, *kept = _step_in_blocks(link, common, u, p, kept, few, dtypes[i], dither)
            new_moments.append(tuple(kept))
        return u, tuple(new_moments)

    @functools.partial(jax.jit, static_argnums=0)
    def placed(acting: tuple, numbers: list, g: Any, p: Any, moments: tuple, index: Any) -> tuple:
        one_step = functools.partial(step, acting)
        if any(map(is_packed, jax.tree.leaves(moments, is_leaf=is_packed))):
            g, p, moments = varying_alike((g, p, moments))
            shardings = jax.tree.map(lambda x: jax.typeof(x).sharding, (g, moments))
            if AxisType.Explicit in shardings[0].mesh.axis_types:
                # blocks may end inside the part of a device, which types cannot say
                one_step = jax.sharding.auto_axes(one_step, out_sharding=shardings)
        return one_step(numbers, g, p, moments, index)

    return placed


def _formats_of(link: Leafwise) -> tuple[Any, ...]:
    """The dtype or storage format of each moment, None where it is held as `start` made it."""
    return link.formats or (None,) * len(_moments_of(link))


def _format_of(format: Any, moment: Any) -> Format | None:
    """The storage format in which a moment is held; None for an array of its own dtype."""
    return format if is_encoded(format, moment) else None


def _step_in_blocks(
    link: Leafwise, shared: Any, g: Any, p: Any, moments: Sequence, formats: list, dtype: np.dtype, dither: Any
) -> Iterable[Any]:
    """The step of one link, during which all arrays are seen as blocks, if there are whole ones and it allows that."""
    layouts = {f.layout(g.shape) for f in formats if isinstance(f, Blocks)}
    layout = layouts.pop() if len(layouts) == 1 and link.elementwise else None
    if layout is None or layout.missing:
        return _step_one(link, shared, g, p, moments, formats, dtype, dither)
    in_blocks = [InBlocks(f, layout.axis) if isinstance(f, Blocks) else f for f in formats]

    def whole() -> list[Any]:
        return list(_step_one(link, shared, g, p, moments, formats, dtype, dither))

    def blocks() -> list[Any]:
        # or the compiler goes back to the whole array, and writes out each scale once for each number
        split_g, split_p, split_moments = jax.lax.optimization_barrier(_each(layout.split, (g, p, moments)))
        stepped = _step_one(link, shared, split_g, split_p, split_moments, in_blocks, dtype, dither)
        return _each(layout.join, list(stepped))

    return jax.lax.platform_dependent(cpu=whole, default=blocks)  # on CPUs it takes twice as long in blocks


def _each(function: Callable[[Any], Any], tree: Any) -> Any:
    """The function of each array or packed array of a tree."""
    return jax.tree.map(function, tree, is_leaf=is_packed)


def _step_one(
    link: Leafwise,
    shared: Any,
    g: Any,
    p: Any,
    moments: Sequence,
    formats: Sequence[Format | None],
    dtype: np.dtype,
    dither: Any,
) -> Iterable[Any]:
    def cast(x: Any) -> Any:
        return None if x is None else x.astype(dtype if jnp.iscomplexobj(x) else jnp.finfo(dtype).dtype)

    def decode(stored: Sequence) -> list[Any]:
        return [cast(x if format is None else format.decode(x)) for format, x in zip(formats, stored)]

    def encode(new: Sequence) -> list[Any]:
        return [
            x.astype(old.dtype) if format is None else format.encode(x, dither and dither._replace(field=field))
            for field, (x, old, format) in enumerate(zip(new, moments, formats, strict=True))
        ]

    # only a real hyperparameter and a complex leaf of its precision are left to promote
    with jax.numpy_dtype_promotion("standard"):
        is_few = [format is not None or x.dtype.itemsize < 4 for format, x in zip(formats, moments)]
        if type(link).step is Leafwise.step and any(is_few):

            def accumulate() -> tuple[jax.Array, ...]:
                return link.accumulate(shared, cast(g), cast(p), *decode(moments))

            stored = _once(lambda: encode(accumulate()), list(moments), dither)
            u = link.direction(shared, cast(g), cast(p), *map(with_slope_of, accumulate(), decode(stored)))
        else:
            rounding = {"rounding": Rounding(p.dtype, dither)} if link.rounds else {}
            u, *new = link.step(shared, cast(g), cast(p), *decode(moments), **rounding)
            stored = encode(new)
            if link.rounds and stored:
                # else what rounding keeps is worked out after the parameters have been overwritten, from a copy
                u, *stored = _once(lambda: [u, *stored], [], dither)
    return [u, *stored]


def _once(renew: Callable[[], list[Any]], old: list[Any], dither: Dither | None) -> list[Any]:
    """`renew()`, on CPUs worked out once: XLA would do it again there, for each element that reads the result."""

    def fenced() -> list[Any]:
        packed = [moment for moment in old if isinstance(moment, Packed)]
        if not packed:
            return jax.lax.optimization_barrier(renew())
        # around block scales it ignores the barrier, at 6 times the time; a condition, always true, it heeds
        if dither is None:
            true = jax.lax.bitcast_convert_type(packed[0].scales[(0,) * packed[0].ndim], jnp.int32) != -1
        else:  # every device has the count, but only one of a mesh that scale
            true = dither.step != np.uint32(0xFFFFFFFF)
        return jax.lax.cond(true, renew, lambda: old)

    return jax.lax.platform_dependent(cpu=fenced, default=renew)


def moment_like(p: jax.Array, dtype: Any = None, *, real: bool = False) -> Any:
    """Zeros shaped and sharded like a parameter.

    Args:
      p: the parameter.
      dtype: the moment's dtype or storage format; None for the parameter's dtype, but at least
        float32. Where a complex parameter needs a complex moment, the complex dtype of that
        precision; a format then holds none.
      real: whether the moment is real also where the parameter is complex.
    """
    if isinstance(dtype, Format):
        moment = moment_like(p, real=real)
        return dtype.zeros(moment) if jnp.isrealobj(moment) and dtype.fits(moment.shape) else moment
    if dtype is None:
        dtype = jnp.finfo(compute_dtype(p)).dtype
    if jnp.iscomplexobj(p) and not real:
        dtype = np.promote_types(dtype, np.complex64)
    return jnp.zeros_like(p, dtype=dtype)


def leaves_like(structure: Any, moment: Any) -> list[Any]:
    """The leaves of a tree of moments, of which one in a storage format may be a node of its own."""
    return structure.flatten_up_to(moment)


def _moments_of(link: Leafwise) -> list[str]:
    return [name for name in link.State._fields if name != "count"]


def _columns(rows: Iterable[Iterable], width: int) -> list[tuple]:
    """Rows turned into `width` columns, also where there are no rows."""
    return list(zip(*rows, strict=True)) or [()] * width
