r"""Transfer across width: what is tuned on a narrow model is right for a wide one (maximal update parametrisation).

With one learning rate for all parameters the best one falls as a model gets wider, and what is found on a small model
says little of a large one. It stays where it is once each parameter has its own multiple of it, and its own scale at
the start: such that every layer's output moves as far in a step at any width.

>>> import gdx, jax, jax.numpy as jnp
>>> like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
>>> layer = lambda width: {"kernel": like(width, width), "bias": like(width)}
>>> shapes = lambda width: {"embed": like(96, width), "layers": [layer(width)] * 2, "out": like(width, 96)}
>>> transfer = gdx.width.transfer(shapes(64), shapes(256))
>>> transfer
parameter        base   target   width of  rate of adam  of sgd  start
embed            96x64  96x256   input                1       4      1
layers/0/bias    64     256      input                1       4      1
layers/0/kernel  64x64  256x256  hidden            0.25       1    0.5
layers/1/bias    64     256      input                1       4      1
layers/1/kernel  64x64  256x256  hidden            0.25       1    0.5
out              64x96  256x96   output            0.25    0.25   0.25
>>> tx = transfer.optimizer(gdx.adamw(4e-3, weight_decay=0.1))  # numbers that are right at the base's width
>>> [f"{member.hyperparams['learning_rate']:.2g}" for member in tx.members]
['0.004', '0.001', '0.001', '0.004']
>>> tx.replace(learning_rate=1e-3).members[1].hyperparams["weight_decay"]  # as any optimizer of gdx's
0.4000000059604645

From a base to a target the fan-in of a parameter grows $m_\text{in}$ times (1 for biases and gains, which have none),
and its fan-out $m_\text{out}$ times. An entry of a gradient falls as $1 / m_\text{out}$, and the sum over the fan-in
asks for steps that fall as $1 / m_\text{in}$. From that follows all else:

| | input-like, bias, gain | hidden | output-like | rule |
|---|---|---|---|---|
| grows | fan-out | both | fan-in | |
| learning rate under Adam | 1 | $1 / m$ | $1 / m$ | $1 / m_\text{in}$ |
| learning rate under SGD | $m$ | 1 | $1 / m$ | $m_\text{out} / m_\text{in}$ |
| decay | | | | 1 / that of the learning rate |
| Adam's eps | $1 / m$ | $1 / m$ | 1 | $1 / m_\text{out}$ |
| standard deviation at the start | 1 | $1 / \sqrt m$ | $1 / m$ | |

All are relative to the base, at whose width nothing changes. It is the variant of table 3 of Tensor Programs V, which
leaves the model's function as it is; those of tables 8 and 9 multiply outputs instead. The decay is decoupled, and its
product with the learning rate is kept, which says how many steps the weights remember (Wang & Aitchison, 2024; Dey et
al., 2025).

What a model has to do itself: attention with scores of `q @ k / d` rather than `/ sqrt(d)` where the size d of a head
grows (`sqrt(d_base) / d`, to be the same at the base's width); no embedding that is the readout, too: what is tied has
two rules, and needs table 8's `logits * (base / width)`. Depth, the size of batches and the number of steps do not
transfer by this. `coordinate_check` shows whether a model has it right.

Sources: Yang et al., Tensor Programs V: Tuning Large Neural Networks via Zero-Shot Hyperparameter Transfer (2022),
tables 3, 8 and 9; Wang & Aitchison, How to set AdamW's weight decay as you scale model and dataset size (2024); Dey et
al., Don't be lazy: CompleteP enables compute-efficient deep transformers (2025).
"""

import math
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx.arguments import check_function, check_not_traced, of_kind
from gdx.checks import check_floating
from gdx.describing import table
from gdx.fields import refuse, to_integer, to_word
from gdx.grouping import groups, leaf_paths, times
from gdx.links.adam import scale_by_adam
from gdx.links.decay import add_decoupled_weight_decay
from gdx.links.descent import scale_by_learning_rate
from gdx.links.momentum import identity, scale_by_momentum
from gdx.links.rounding import round_stochastically, round_with_compensation, round_with_correction, round_with_master
from gdx.modules import is_equinox, is_nnx, take_apart
from gdx.numerics import accurate, compute_dtype
from gdx.training import Loss, train
from gdx.transform import Transform, all_within, to_transform
from gdx.trees import check_arrays
from gdx.values import names_of

__all__ = ["CoordinateCheck", "Transfer", "coordinate_check", "transfer"]


class Leaf(NamedTuple):
    """How a parameter grows from the base to the target; see `Transfer`."""

    path: str
    base: tuple[int, ...]
    target: tuple[int, ...]
    fan_in: float
    fan_out: float

    @property
    def kind(self) -> str:
        kinds = {(False, False): "none", (False, True): "input", (True, False): "output", (True, True): "hidden"}
        return kinds[self.fan_in != 1, self.fan_out != 1]

    @property
    def start(self) -> float:
        # a readout falls faster than a sum of random terms asks for, since it will be aligned with what it reads
        return {"hidden": self.fan_in**-0.5, "output": 1 / self.fan_in}.get(self.kind, 1.0)

    def changes(self, like: str) -> dict[str, float]:
        like = to_word("changes: like", like, "adam", "sgd")
        rate = (1 if like == "adam" else self.fan_out) / self.fan_in
        return {"learning_rate": rate, "weight_decay": 1 / rate, "eps": 1 / self.fan_out}


class Transfer(NamedTuple):
    """How each parameter grows from a base to a target, and what follows; prints as a table. See `transfer`.

    Attributes:
      leaves: one for each parameter: its `path`, its shapes in `base` and `target`, how many times its `fan_in` and
        `fan_out` grow, which of them does as its `kind` ("input", "hidden", "output", or "none" if neither), the
        multiple `start` of the base's standard deviation at the start, and `changes(like)`, those of
        hyperparameters by name for an optimizer like "adam" or "sgd".
    """

    leaves: tuple[Leaf, ...]

    def __repr__(self) -> str:
        rows = [
            (
                leaf.path,
                _shape(leaf.base),
                _shape(leaf.target),
                leaf.kind,
                *(f"{leaf.changes(like)['learning_rate']:.4g}" for like in ("adam", "sgd")),
                f"{leaf.start:.4g}",
            )
            for leaf in self.leaves
        ]
        header = ["parameter", "base", "target", "width of", "rate of adam", "of sgd", "start"]
        return "\n".join(line.removeprefix("  ") for line in table(header, "<<<<>>>", rows))

    def optimizer(self, tx: optax.GradientTransformation, like: str | None = None) -> groups:
        """The optimizer for the target, of one whose numbers are right for the base: a `gdx.groups` of it.

        Its hyperparameters are the base's: one learning rate, to be replaced, swept or scheduled; each group has a
        multiple of it, of the weight decay, and of `eps`. (Under adamw's `schedule_multiplier` the rate does not
        multiply the decay, which then stays as it is.) Norms that are clipped inside are those of a group: clip
        outside, `gdx.chain(clip, transfer.optimizer(tx))`. It goes by paths: parameters of another width it takes for
        the target's.

        Args:
          tx: the optimizer, gdx's or a `gdx.value` of any other, with a hyperparameter `learning_rate`.
          like: "adam" where the size of a step does not depend on that of the gradient, entry by entry (Adam, RMSProp,
            Lion); "sgd" where it is proportional to it. None for what is made of gdx's own links alone.

        Raises:
          TypeError: tx is no transform.
          ValueError: like is None and tx may be of either kind, or of neither, or like is another word; tx has no
            hyperparameter `learning_rate`, or several.

        >>> import gdx, jax.numpy as jnp
        >>> base, target = ({"w": jnp.ones((2, n)), "v": jnp.ones((n, 2))} for n in (4, 16))
        >>> tx = gdx.width.transfer(base, target).optimizer(gdx.sgd(0.1))
        >>> tx.patterns, tx.changes
        (('^v$', '^w$'), ({'learning_rate': times(factor=0.25)}, {'learning_rate': times(factor=4.0)}))
        """
        tx = to_transform("optimizer: tx", tx)
        if any(map(np.ndim, jax.tree.leaves(tx))):
            raise ValueError(
                f"optimizer: tx is a batch, {tx!r}; make the batch of what this returns, as in "
                f"gdx.grid(transfer.optimizer(gdx.adam(0.1)).replace, learning_rate=[0.01, 0.1])"
            )
        like = _kind_of(tx) if like is None else to_word("optimizer: like", like, "adam", "sgd")
        names = names_of(tx)
        if "learning_rate" not in names:
            several = [name for name in names if name.endswith(".learning_rate")]
            raise ValueError(
                f"optimizer: tx is {tx!r}, {'with ' + ', '.join(several) if several else 'without a learning_rate'}; "
                f"expected one learning rate, that of which each parameter gets a multiple"
            )
        there = {name for name in ("learning_rate", "weight_decay", "eps") if name in names}
        if "schedule_multiplier" in names and names["schedule_multiplier"].value is not None:
            there -= {"weight_decay"}
        members: dict[tuple[tuple[str, float], ...], list[str]] = {}
        for leaf in self.leaves:
            changes = {name: by for name, by in leaf.changes(like).items() if name in there and by != 1}
            members.setdefault(tuple(changes.items()), []).append(leaf.path)
        every = [leaf.path for leaf in self.leaves]
        return groups(
            tx, {_pattern(paths, every): {name: times(by) for name, by in key} for key, paths in members.items() if key}
        )

    def start(self, params: Any, base: Any) -> Any:
        r"""Fresh parameters of the target with the scales at the start that they need, from those of the base.

        Each that grows is multiplied by one number, such that the root of its mean square is that of the base's times
        1 (input-like, biases and gains), $1 / \sqrt{m_\text{in}}$ (hidden) or $1 / m_\text{in}$ (output-like). So it
        does not matter how an initialiser depends on the width: one of $1 / \sqrt{\text{fan-in}}$ is right but for
        the readout, a constant one for embeddings alone, and flax's for embeddings falls where it should not. What is
        all 0 stays so.

        Args:
          params: parameters or a module of the target, freshly initialised.
          base: the same of the base, by the same initialisers.

        Raises:
          ValueError: they have other paths or shapes than the trees that this was made of.

        >>> import gdx, jax, jax.numpy as jnp
        >>> base, wide = ({"out": jax.random.normal(jax.random.key(0), (n, 3)) / n**0.5} for n in (100, 400))
        >>> started = gdx.width.transfer(base, wide).start(wide, base)["out"]
        >>> rms = lambda x: jnp.sqrt(jnp.mean(x**2))
        >>> f"{rms(started) / rms(base['out']):.3f}"
        '0.250'
        """
        for name, given, shapes in (("params", params, 2), ("base", base, 1)):
            expected = {leaf.path: leaf[shapes] for leaf in self.leaves}
            _check_same(f"start: {name}", _shapes(f"start: {name}", given), expected)
        apart, rest, parts = take_apart("start: params", params)
        like = take_apart("start: base", base)[0]
        for name, tree in (("params", apart), ("base", like)):
            check_floating(f"start: in {name}, the parameter", tree)
            if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree)):
                raise TypeError(f"start: {name} has shapes alone; expected parameters, freshly initialised")
        found = jax.tree.leaves(like)
        leaves, structure = jax.tree.flatten(apart)
        scaled = [
            p if leaf.kind == "none" else _scaled(p, like, leaf.start)
            for p, like, leaf in zip(leaves, found, self.leaves)
        ]
        return parts.join(jax.tree.unflatten(structure, scaled), rest)


def _rms(x: Any) -> jax.Array:
    """The root of the mean square, in units of the largest, whose square is a number."""
    x = accurate(jnp.abs(x))
    unit = jnp.max(x)
    return unit * jnp.sqrt(jnp.mean(jnp.square(x / jnp.where(unit > 0, unit, 1))))


@jax.jit
def _scaled(p: Any, base: Any, start: Any) -> Any:
    size, wanted = (_rms(x).astype(compute_dtype(p)) for x in (p, base))
    factor = jnp.where(size > 0, start * wanted / jnp.where(size > 0, size, 1), 1)
    return p * factor.astype(jnp.finfo(p.dtype).dtype)


def transfer(base: Any, target: Any, inputs: Mapping[str, Any] | None = None) -> Transfer:
    """Which of a parameter's axes grow from a base to a target, and the multiples that follow.

    Both are the model, of two widths: make the narrow one, tune it, and make the wide one. Whether an axis belongs to
    the fan-in or the fan-out follows from this:

    - an array with a single axis, and whatever is called a bias, has no fan-in;
    - where two axes grow by one factor, the one is fan-in and the other fan-out (which is which does not matter);
    - in an equinox `Linear` the last axis is the fan-in, in its `Embedding` the first;
    - else, outside of equinox, the last axis is the fan-out (as in flax, of kernels, embeddings and convolutions), and
      of two axes the first is the fan-in.

    Where that says nothing, `inputs` has to.

    Args:
      base, target: trees of arrays or of `jax.ShapeDtypeStruct`s, as `jax.eval_shape` makes them, or modules of flax
        nnx or equinox, of which the parameters count.
      inputs: for patterns of paths, as in `gdx.groups`, which axes are fan-in: an integer, a tuple of them, or () for
        none. Of several patterns that match the first counts.

    Raises:
      TypeError: inputs is no dict of axes, or a leaf has no shape.
      ValueError: the trees have other paths, or an array other axes; nothing grows; it is not known which axes of an
        array are fan-in; a pattern matches no path, or is no regular expression; an axis is out of range.

    >>> import gdx, jax.numpy as jnp
    >>> torch_like = [{"read": jnp.ones((3, n))} for n in (4, 8)]  # (out, in)
    >>> gdx.width.transfer(*torch_like, inputs={"read": 1}).leaves[0].kind
    'output'
    """
    shapes, wide = (_shapes(f"transfer: {name}", tree) for name, tree in (("base", base), ("target", target)))
    _check_same("transfer: target", wide, shapes)
    given = _given(inputs, shapes)
    known = _of_equinox(base) if is_equinox(base) else None
    leaves = tuple(_leaf(path, shapes[path], wide[path], given.get(path), known) for path in shapes)
    if all(leaf.kind == "none" for leaf in leaves):
        raise ValueError("transfer: base and target have the same shapes; expected a model of two widths")
    return Transfer(leaves)


def _shapes(label: str, tree: Any) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by its path."""
    params = take_apart(label, tree)[0] if is_nnx(tree) else tree
    leaves = [*zip(leaf_paths(params), jax.tree.leaves(params))]
    if is_equinox(tree):  # shapes alone are no arrays to equinox
        leaves = [(path, x) for path, x in leaves if jnp.issubdtype(getattr(x, "dtype", bool), jnp.inexact)]
    for path, x in leaves:
        if not hasattr(x, "shape"):
            refuse(f"{label}: {path}", x, "an array, or a jax.ShapeDtypeStruct")
    return {path: tuple(x.shape) for path, x in leaves}


def _check_same(label: str, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises unless these have the same paths, and shapes of as many axes, or the same shapes."""
    is_target = label == "transfer: target"
    for path in [*(path for path in expected if path not in found), *(path for path in found if path not in expected)]:
        has, other = ("no", "there is one") if path in expected else ("a parameter", "there is none")
        raise ValueError(
            f"{label} has {has} {path}, but {other} in {'base' if is_target else 'what this was made of'}; expected "
            f"the same model{' of another width' if is_target else ''}"
        )
    for path, shape in found.items():
        if shape != expected[path] and (not is_target or len(shape) != len(expected[path])):
            wanted = f"{len(expected[path])} axes, as base has with {expected[path]}" if is_target else expected[path]
            raise ValueError(f"{label} has shape {shape} at {path}; expected {wanted}")


def _leaf(
    path: str,
    base: tuple[int, ...],
    target: tuple[int, ...],
    given: tuple[int, ...] | None,
    known: Mapping[str, int] | None,
) -> Leaf:
    growth = [Fraction(wide, narrow) if narrow and wide else Fraction(1) for narrow, wide in zip(base, target)]
    growing, rank = [axis for axis, by in enumerate(growth) if by != 1], len(base)
    if given is not None:
        inputs = given
    elif not growing or rank == 1 or re.search("bias", path.split("/")[-1]):
        inputs = ()
    elif len(growing) == 2 and growth[growing[0]] == growth[growing[1]]:
        inputs = (growing[0],)
    elif known is not None and rank == 2 and path in known:
        inputs = (known[path],)
    elif known is None and (rank == 2 or growing == [rank - 1]):
        inputs = tuple(range(rank - 1))
    else:
        raise ValueError(
            f"transfer: {path} grows from {base} to {target} along {'axis' if len(growing) == 1 else 'axes'} "
            f"{', '.join(map(str, growing))}, which may be fan-in or fan-out; say which axes are fan-in, as in "
            f"inputs={{{'^' + re.escape(path) + '$'!r}: {growing[0]}}}, or () for none"
        )
    fan_in, fan_out = (
        float(math.prod(by for axis, by in enumerate(growth) if (axis in inputs) == is_in)) for is_in in (True, False)
    )
    return Leaf(path, base, target, fan_in, fan_out)


def _of_equinox(model: Any) -> dict[str, int]:
    """Which axis is fan-in, of the weights that equinox itself has laid out."""
    nn, known = sys.modules["equinox"].nn, dict[str, int]()
    for kind, axis in ((nn.Linear, 1), (nn.Embedding, 0)):
        nodes = jax.tree_util.tree_leaves_with_path(model, is_leaf=lambda x: isinstance(x, kind))  # noqa: B023
        for path, node in nodes:
            if isinstance(node, kind):
                weight = (*path, jax.tree_util.GetAttrKey("weight"))
                known[jax.tree_util.keystr(weight, simple=True, separator="/")] = axis
    return known


def _given(inputs: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The axes that are said to be fan-in, by path."""
    found: dict[str, tuple[int, ...]] = {}
    expected = "a dict from patterns of paths to axes, such as {'readout': 1}"
    for pattern, axes in of_kind("transfer: inputs", {} if inputs is None else inputs, Mapping, expected).items():
        label = f"transfer: inputs at {pattern!r}"
        try:
            matching = [path for path in shapes if re.search(pattern, path)]
        except (re.error, TypeError) as error:
            raise ValueError(f"{label} is no regular expression ({error})") from error
        if not matching:
            raise ValueError(f"{label} matches no path; expected one that does: the paths are {', '.join(shapes)}")
        numbers = tuple(to_integer(label, axis) for axis in (axes if isinstance(axes, tuple | list) else (axes,)))
        for path in matching:
            rank = len(shapes[path])
            if not all(-rank <= axis < rank for axis in numbers):
                raise ValueError(f"{label} is {axes}; expected axes of {path}, which has shape {shapes[path]}")
            found.setdefault(path, tuple(axis % rank for axis in numbers))
    return found


_ROUNDING = round_stochastically, round_with_correction, round_with_compensation, round_with_master
_LINEAR: tuple[Any, ...] = (
    *(identity, scale_by_learning_rate, scale_by_momentum, add_decoupled_weight_decay),
    *_ROUNDING,  # they make the steps that they are given
)


def _kind_of(tx: Transform) -> str:
    """Whether a step is like Adam's or like SGD's, of what is made of gdx's links."""
    links = [link for link in all_within(tx) if len([*all_within(link)]) == 1]
    for link in links:
        if not isinstance(link, (scale_by_adam, *_LINEAR)):
            raise ValueError(
                f"optimizer: it is not known how large the steps of {link!r} are; say like='adam' if they do not "
                f"depend on the gradient's size, entry by entry, or like='sgd' if they are proportional to it. (Of "
                f"those that normalise whole matrices, such as muon and lamb, neither is true.)"
            )
    return "adam" if any(isinstance(link, scale_by_adam) for link in links) else "sgd"


def _pattern(paths: Iterable[str], every: Iterable[str]) -> str:
    """A regular expression of these paths and of no other ones, with any number for numbers where that is as good."""
    paths, found = [*paths], dict[str, None]()
    others = [path for path in every if path not in paths]
    for path in paths:
        exact = re.escape(path)
        general = re.sub(r"\d+", r"\\d+", exact)
        found[exact if any(re.fullmatch(general, other) for other in others) else general] = None
    return f"^{next(iter(found))}$" if len(found) == 1 else f"^({'|'.join(found)})$"


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"


class CoordinateCheck(NamedTuple):
    """How large activations are at several widths, and how far a few steps move them. See `coordinate_check`.

    Attributes:
      widths: of shape (widths,).
      sizes: by the name of the activations, of shape (widths, steps + 1): their mean absolute value at the start and
        after each step.
      changes: the same of what they differ from those at the start.
      losses: of shape (widths, steps + 1).
    """

    widths: np.ndarray
    sizes: dict[str, np.ndarray]
    changes: dict[str, np.ndarray]
    losses: np.ndarray

    @property
    def slopes(self) -> dict[str, np.ndarray]:
        """By name, of shape (steps + 1,): the power of the width that `changes` grow with; NaN at the start."""
        return {name: _slope(self.widths, found) for name, found in self.changes.items()}

    @property
    def size_slopes(self) -> dict[str, np.ndarray]:
        """The same of `sizes`."""
        return {name: _slope(self.widths, found) for name, found in self.sizes.items()}


def _slope(widths: np.ndarray, found: np.ndarray) -> np.ndarray:
    """The slopes of least squares in the logarithms."""
    x = np.log(widths) - np.log(widths).mean()
    with np.errstate(divide="ignore", invalid="ignore"):
        return x @ np.where(found > 0, np.log(found), np.nan) / (x @ x)


def coordinate_check(
    loss: Loss,
    setup: Callable[[int], tuple[optax.GradientTransformation, Any]],
    batch: Any,
    widths: Iterable[int],
    *,
    steps: int = 4,
) -> CoordinateCheck:
    """Trains a few steps on one batch at several widths, and measures how far activations move.

    Where learning rates transfer, every layer moves as far at any width: all `slopes` are near 0. One near 1/2 or 1
    says that the layer moves too far as the model gets wider, a negative one that it stands still. Of `size_slopes`
    those of a readout are near -1/2 at the start, where it is a sum of random terms that falls. Take widths that are
    far apart, and at least a few hundred numbers of each activation.

    Args:
      loss: a function of parameters and a batch that returns the loss and a dict of activations by name, as
        `gdx.train` takes it: what is to be looked at, such as the outputs of layers and the logits.
      setup: a function of the width that returns the optimizer and the parameters, or a module, to start from.
      batch: what the loss is given in each step.
      widths: at least two.
      steps: how many to take, at least 1.

    Raises:
      TypeError: loss or setup is no such function, or returns something else; batch is no arrays, widths no integers;
        it is called in a compiled function.
      ValueError: there are less than two widths, or fewer than one step; names differ from width to width.

    Source: Yang et al., Tensor Programs V (2022), appendix D.1.

    >>> import gdx, jax, jax.numpy as jnp
    >>> def params(width):
    ...     draws = jax.random.normal(jax.random.key(0), (2, 8, width))
    ...     return {"read": draws[0], "out": draws[1].T / width**0.5}
    >>> def loss(params, x):
    ...     hidden = x @ params["read"]
    ...     out = jnp.tanh(hidden) @ params["out"]
    ...     return jnp.mean((out - 1) ** 2), {"hidden": hidden, "out": out}
    >>> def transferred(width):
    ...     transfer = gdx.width.transfer(params(16), params(width))
    ...     return transfer.optimizer(gdx.adam(0.01)), transfer.start(params(width), params(16))
    >>> for setup in (transferred, lambda width: (gdx.adam(0.01), params(width))):
    ...     check = gdx.width.coordinate_check(loss, setup, jnp.eye(8), [64, 1024], steps=1)
    ...     print({name: f"{abs(slope[-1]):.0f}" for name, slope in check.slopes.items()})
    {'hidden': '0', 'out': '0'}
    {'hidden': '0', 'out': '1'}
    """
    check_function("coordinate_check: loss", loss, "the parameters", "a batch")
    check_function("coordinate_check: setup", setup, "a width")
    check_not_traced("coordinate_check", (batch, widths, steps))
    steps = to_integer("coordinate_check: steps", steps, minimum=1)
    if not isinstance(widths, Iterable):
        refuse("coordinate_check: widths", widths, "at least two widths, such as [64, 256, 1024]")
    tried = [to_integer(f"coordinate_check: widths[{i}]", width, minimum=1) for i, width in enumerate(widths)]
    if len({*tried}) < 2:
        raise ValueError(f"coordinate_check: widths is {tried}; expected at least two different ones")
    check_arrays("coordinate_check: batch", batch)
    if not jax.tree.leaves(batch):
        refuse("coordinate_check: batch", batch, "arrays, such as jnp.zeros(()) for a loss that looks at none")
    batches = jax.tree.map(lambda x: jnp.broadcast_to(x, (steps + 1, *jnp.shape(x))), batch)
    sizes, changes, losses = dict[str, list[Any]](), dict[str, list[Any]](), []
    for width in tried:
        made = setup(width)
        if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], optax.GradientTransformation):
            raise TypeError(
                f"coordinate_check: setup returned {reprlib.repr(made)}; expected an optimizer and parameters"
            )
        trained = train(loss, *made, batches)
        if not isinstance(trained.aux, Mapping) or not trained.aux:
            raise TypeError(
                f"coordinate_check: the loss returned {reprlib.repr(trained.aux)} beside the loss; expected a dict of "
                f"activations by name, as in `return loss, {{'hidden': hidden}}`"
            )
        for name, x in trained.aux.items():
            if not (hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.inexact) and x.size):
                got = f"{x.dtype}{list(x.shape[1:])}" if hasattr(x, "dtype") else reprlib.repr(x)
                raise TypeError(
                    f"coordinate_check: the loss returned {got} as {name!r}; expected one floating-point array that is "
                    f"not empty"
                )
        if sizes and {*trained.aux} != {*sizes}:
            raise ValueError(
                f"coordinate_check: the loss returned {', '.join(map(repr, trained.aux))} at width {width}, and "
                f"{', '.join(map(repr, sizes))} at width {tried[0]}; expected the same names at each"
            )
        check_not_traced("coordinate_check", trained.losses)
        losses.append(np.asarray(trained.losses))
        for name, x in trained.aux.items():
            found = np.asarray(accurate(x)).reshape(steps + 1, -1)
            for means, of in ((sizes, found), (changes, found - found[0])):
                means.setdefault(name, []).append(np.abs(of).mean(axis=1))
    found_sizes, found_changes = ({name: np.stack(x) for name, x in means.items()} for means in (sizes, changes))
    return CoordinateCheck(np.array(tried), found_sizes, found_changes, np.stack(losses))
