"""Transforms made of other transforms: `chain`, `lift`, and the base of the ready-made optimizers."""

import dataclasses
import reprlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import optax

from gdx.checks import check_chain_state
from gdx.fields import static
from gdx.leafwise import Leafwise, update_leaves
from gdx.transform import Transform


class Composed(Transform):
    """A transform that applies its `links` one after the other, as `optax.chain` does.

    A subclass gives its hyperparameters as fields and `links` as a property made of them. The state
    is the tuple of the links' states.

    >>> import gdx, jax.numpy as jnp
    >>> class heavy_adam(gdx.Composed):
    ...     learning_rate: gdx.Scalar = gdx.hyperparameter(minimum=0)
    ...     momentum: gdx.Scalar = gdx.hyperparameter(default=0.9, minimum=0, below=1)
    ...     @property
    ...     def links(self):
    ...         return gdx.adam(self.learning_rate), gdx.scale_by_momentum(self.momentum)
    >>> tx = heavy_adam(1e-3)
    >>> tx.replace(momentum=0.5), len(tx.init(jnp.ones(3)))
    (heavy_adam(learning_rate=0.001, momentum=0.5), 2)
    """

    @property
    def links(self) -> tuple[optax.GradientTransformation, ...]:
        """The transforms that this one applies, first to last."""
        raise NotImplementedError(f"{type(self).__name__} defines no links")

    def init(self, params: optax.Params) -> optax.OptState:
        return optax.chain(*self.links).init(params)

    def update(
        self, updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        check_chain_state(self, state, len(self.links))
        if not all(map(_is_leafwise, self.links)):
            return optax.chain(*self.links).update(updates, state, params, **extra_args)
        links, states = zip(*_flattened(self, state))
        updates, states = update_leaves(links, updates, states, params)
        return updates, _nested(self, iter(states))


def _is_leafwise(link: optax.GradientTransformation) -> bool:
    """Whether it is a plain leafwise link or composed of such, so that all can share one call."""
    if not isinstance(link, Transform) or link.has_schedule:
        return False
    if isinstance(link, Leafwise):
        return link.is_plain
    return type(link).update is Composed.update and all(map(_is_leafwise, cast(Composed, link).links))


def _flattened(tx: Composed, states: Any) -> Iterator[tuple[Leafwise, Any]]:
    """Each leafwise link with its state."""
    check_chain_state(tx, states, len(tx.links))
    for link, state in zip(tx.links, states):
        link = cast(Transform, link).at(None)
        if isinstance(link, Composed):
            yield from _flattened(link, state)
        else:
            yield cast(Leafwise, link), state


def _nested(tx: Composed, states: Iterator) -> tuple:
    """The states of its leafwise links, in the order of `_flattened`, in tuples as the links are composed."""
    return tuple(_nested(link, states) if isinstance(link, Composed) else next(states) for link in tx.links)


class Foreign(Transform):
    """A transform of optax or of the user's own, which is functions: compared by identity, without leaves."""

    transform: optax.GradientTransformation = static()

    def init(self, params: optax.Params) -> optax.OptState:
        return self.transform.init(params)

    def update(
        self, updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        return optax.with_extra_args_support(self.transform).update(updates, state, params, **extra_args)

    def __repr__(self) -> str:
        return f"<optax {self.transform.update.__qualname__.split('.')[0]}>"


def to_transform(label: str, value: Any) -> Transform:
    """Converts a field that is a transform, gdx's or optax's."""
    if not isinstance(value, optax.GradientTransformation):
        if hasattr(value, "gradient_transformation"):
            raise TypeError(f"{label} is a {type(value).__name__}, no transform; pass its .gradient_transformation()")
        raise TypeError(f"{label} is {reprlib.repr(value)}; expected a transform such as gdx.scale_by_adam()")
    return value if isinstance(value, Transform) else Foreign(value)


def _to_transforms(label: str, value: Any) -> tuple[Transform, ...]:
    if isinstance(value, optax.GradientTransformation) or not isinstance(value, tuple | list):
        raise TypeError(f"{label} is {reprlib.repr(value)}; expected a tuple of transforms, such as (gdx.sgd(0.1),)")
    return tuple(to_transform(f"{label}[{i}]", link) for i, link in enumerate(value))


def _to_function(label: str, value: Any) -> Callable[..., Any]:
    if not callable(value):
        raise TypeError(f"{label} is {reprlib.repr(value)}; expected a function of the transforms")
    return value


class chain(Composed):
    """Applies transforms one after the other: the updates of each are the gradients of the next.

    Like `optax.chain`, which it uses, but a value whose leaves are the hyperparameters of its links.
    optax's transforms can be links too.

    Args:
      *transforms: at least one transform, first to last.

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

    def __init__(self, *transforms: optax.GradientTransformation):
        object.__setattr__(self, "transforms", transforms)
        self.__post_init__()

    def validate(self) -> None:
        if not self.transforms:
            raise ValueError("chain: got no transforms; expected at least one, such as gdx.sgd(0.1)")

    @property
    def links(self) -> tuple[Transform, ...]:
        return self.transforms

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, self.transforms))})"


class lift(Transform):
    """Keeps transforms a value inside a wrapper that returns functions, such as `optax.MultiSteps`.

    The wrapper is called with the transforms whenever `init` or `update` is, so that their
    hyperparameters stay leaves of the whole.

    Args:
      transforms: a tuple of transforms.
      wrap: `wrap(*transforms)` returns an object with `init` and `update`. Lifts are equal when
        they hold the same function, so define it once rather than as a lambda on each call.

    Raises:
      TypeError: transforms is no tuple of transforms, or wrap no function.

    >>> import gdx, optax
    >>> def every_fourth(tx):
    ...     return optax.MultiSteps(tx, 4)
    >>> tx = gdx.lift((gdx.sgd(0.1),), every_fourth)
    >>> tx.replace(learning_rate=0.2)
    lift(transforms=(sgd(learning_rate=0.2),), wrap=<every_fourth>)
    """

    transforms: tuple[Transform, ...] = dataclasses.field(metadata={"convert": _to_transforms})
    wrap: Callable[..., Any] = static(convert=_to_function)

    def init(self, params: optax.Params) -> optax.OptState:
        return self.wrap(*self.transforms).init(params)

    def update(
        self, updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        wrapped = self.wrap(*self.transforms)
        if isinstance(wrapped, optax.GradientTransformation):
            wrapped = optax.with_extra_args_support(wrapped)
        return wrapped.update(updates, state, params, **extra_args)
