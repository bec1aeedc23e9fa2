"""Symmetric linear maps on the space of the parameters: a Hessian, a Gauss-Newton matrix, either one preconditioned.

An operator is a value, as an optimizer is: a pytree with the parameters and the data as its leaves and
the functions in its structure. So it can be made outside of `jax.jit` and passed in, and other
parameters or other data of the same shapes compile nothing.
"""

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdx.arguments import check_function, of_kind
from gdx.checks import check_floating, check_params
from gdx.compat import has_no_derivative
from gdx.fields import is_concrete
from gdx.grouping import leaf_paths
from gdx.mesh import on_any_mesh
from gdx.numerics import accurate
from gdx.storage.blocks import is_packed
from gdx.training import Loss
from gdx.transform import Transform
from gdx.trees import leading_axis, path_text

Outputs = Callable[[Any, Any], Any]
"""What a model makes of parameters and a batch of data: a function that returns an array, or a tree of them."""


class Operator:
    """Base class of a symmetric linear map on trees like its parameters.

    Write one as a dataclass that is a pytree, with `params` and `__call__`. Complex parameters count as
    pairs of real ones, with the inner product Re x^H y.

    Attributes:
      params: a tree of arrays like those that it maps.

    >>> import dataclasses, gdx, jax, jax.numpy as jnp
    >>> @jax.tree_util.register_dataclass
    ... @dataclasses.dataclass(frozen=True)
    ... class Shifted(gdx.curvature.Operator):
    ...     operator: gdx.curvature.Operator
    ...     shift: jax.Array
    ...     @property
    ...     def params(self):
    ...         return self.operator.params
    ...     def __call__(self, vector):
    ...         return jax.tree.map(lambda x, v: x + self.shift * v, self.operator(vector), vector)
    >>> bowl = gdx.curvature.Hessian(lambda theta, batch: jnp.sum(theta**2), jnp.ones(2), jnp.zeros(1))
    >>> gdx.curvature.trace(Shifted(bowl, jnp.float32(0.5)), jax.random.key(0)).value.item()
    5.0
    """

    params: Any

    def __call__(self, vector: Any) -> Any:
        """The product with a vector, a tree shaped like the parameters, in at least float32."""
        raise NotImplementedError(f"{type(self).__name__} defines no __call__")

    def losses(self) -> jax.Array:
        """The loss on each batch, where the operator is that of a loss: of shape (batches,), else (0,)."""
        return jnp.zeros(0)


class _Averaged(Operator):
    """The mean over mini-batches of a product that is made from one of them."""

    batches: Any

    def _value(self, params: Any, batch: Any) -> Any:
        raise NotImplementedError

    def _product(self, params: Any, vector: Any, batch: Any) -> Any:
        raise NotImplementedError

    def losses(self) -> jax.Array:
        return _losses(self, None)

    def __call__(self, vector: Any) -> Any:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            if field.metadata.get("static"):
                check_function(
                    f"{type(self).__name__}: {field.name}",
                    getattr(self, field.name),
                    "parameters or outputs",
                    "a batch",
                )
        check_params(self, self.params)
        check_vector(f"{type(self).__name__}:", self.params, vector)
        params = jax.tree.map(accurate, self.params)
        vector = jax.tree.map(lambda p, v: jnp.asarray(v).astype(p.dtype), params, vector)
        count = leading_axis(
            f"{type(self).__name__}: in batches,",
            self.batches,
            "batches",
            least=1,
            mend="; for a single batch, jax.tree.map(lambda x: x[None], batch)",
        )

        def add(total: Any, batch: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, self._product(params, vector, batch)), None

        try:
            total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), self.batches)
        except (TypeError, ValueError) as error:
            if not has_no_derivative(error):
                raise
            raise TypeError(
                f"{type(self).__name__}: the loss cannot be differentiated twice, forward through its gradient; define "
                f"custom derivatives with jax.custom_jvp, and loops with a fixed number of turns. JAX says: {error}"
            ) from error
        # the gradient of JAX in a complex parameter is the conjugate of the direction of steepest ascent
        return jax.tree.map(lambda x: x.conj() / np.array(count, x.dtype), total)

    def _as_given(self, params: Any) -> Any:
        """Accurate parameters, back in the dtypes that the loss was written for."""
        return jax.tree.map(lambda p, given: p.astype(jnp.result_type(given)), params, self.params)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Hessian(_Averaged):
    r"""The Hessian of a loss, as its product with a vector: exact, at the cost of a few gradients.

    $$ H v = \frac{1}{B} \sum_{b=1}^B
       \frac{\partial}{\partial \epsilon} \nabla L(\theta + \epsilon v; D_b) \Big|_{\epsilon=0} $$

    The data may be several mini-batches $D_b$, over which it is averaged one at a time: memory is needed for
    one of them. Where a loss has corners, as relu networks have, it is the Hessian of the smooth piece that
    JAX's derivative belongs to, and the corners count for nothing. In bfloat16 or float16 parameters,
    vectors and sums are float32, and the loss computes as it was written, which leaves two or
    three digits.

    Args:
      loss: the loss of parameters on one batch, a real scalar, differentiable twice.
      params: where it is taken: a tree of floating-point arrays.
      batches: a tree of arrays with a leading axis of batches; `jax.tree.map(lambda x: x[None], batch)` for one.

    Raises (when it is called):
      TypeError: the loss is not real, not an array, or cannot be differentiated twice; a parameter is no
        floating-point array.
      ValueError: the loss is not scalar; the vector is not shaped like the parameters; the leaves of batches do
        not have one leading axis in common.

    Source: Pearlmutter, Fast exact multiplication by the Hessian (1994).

    >>> import gdx, jax.numpy as jnp
    >>> bowl = lambda theta, batch: 0.5 * jnp.sum(batch * theta**2)
    >>> hessian = gdx.curvature.Hessian(bowl, jnp.ones(2), batches=jnp.array([[1.0, 9.0], [3.0, 11.0]]))
    >>> hessian(jnp.array([1.0, 1.0])).tolist()
    [2.0, 10.0]
    """

    loss: Loss = dataclasses.field(metadata={"static": True})
    params: Any
    batches: Any

    def _value(self, params: Any, batch: Any) -> jax.Array:
        return self.loss(params, batch)

    def _product(self, params: Any, vector: Any, batch: Any) -> Any:
        gradient = jax.grad(lambda p: _checked(self, self.loss(self._as_given(p), batch)))
        return jax.jvp(gradient, (params,), (vector,))[1]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GaussNewton(_Averaged):
    r"""The generalised Gauss-Newton matrix of a convex loss of a model's outputs, as its product with a vector.

    $$ G v = \frac{1}{B} \sum_{b=1}^B J_b^\top \, \nabla_z^2 \ell(z; D_b) \, J_b v,
       \qquad z = f(\theta; D_b), \quad J_b = \partial f / \partial \theta $$

    The Hessian without the curvature of the model itself: positive semidefinite for a convex $\ell$, and equal to
    the Fisher matrix for cross-entropy of softmax and for squared errors.

    Args:
      outputs: what the model makes of parameters and one batch: an array or a tree of arrays.
      loss: the loss of outputs on one batch, a real scalar, convex in the outputs.
      params, batches: as in `Hessian`.

    Raises (when it is called):
      TypeError, ValueError: as `Hessian`.

    Source: Schraudolph, Fast curvature matrix-vector products for second-order gradient descent (2002).

    >>> import gdx, jax.numpy as jnp
    >>> def error(z, batch):
    ...     return 0.5 * jnp.sum((z - batch) ** 2)
    >>> matrix = gdx.curvature.GaussNewton(lambda theta, batch: theta**2, error, jnp.array([3.0]), jnp.ones((1, 1)))
    >>> matrix(jnp.array([1.0])).tolist()  # (2 theta)^2; the Hessian has 6 theta^2 - 2 = 52
    [36.0]
    """

    outputs: Outputs = dataclasses.field(metadata={"static": True})
    loss: Callable[[Any, Any], jax.Array] = dataclasses.field(metadata={"static": True})
    params: Any
    batches: Any

    def _value(self, params: Any, batch: Any) -> jax.Array:
        return self.loss(self.outputs(params, batch), batch)

    def _product(self, params: Any, vector: Any, batch: Any) -> Any:
        z, forward = jax.linearize(lambda p: self.outputs(self._as_given(p), batch), params)
        gradient = jax.grad(lambda z: _checked(self, self.loss(z, batch)))
        (found,) = jax.linear_transpose(forward, params)(jax.jvp(gradient, (z,), (forward(vector),))[1])
        return found


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Preconditioned(Operator):
    r"""An operator between two diagonal scalings, $v \mapsto S A S v$: symmetric, as Lanczos needs.

    Args:
      operator: $A$.
      scale: the diagonal of $S$, a tree like the parameters. With $S = P^{-1/2}$ the eigenvalues are those of
        $P^{-1} A$, and the eigenvectors $P^{1/2}$ times those.

    >>> import gdx, jax.numpy as jnp
    >>> bowl = lambda theta, batch: 0.5 * jnp.sum(jnp.array([1.0, 9.0]) * theta**2)
    >>> hessian = gdx.curvature.Hessian(bowl, jnp.ones(2), batches=jnp.zeros(1))
    >>> gdx.curvature.Preconditioned(hessian, scale=jnp.array([1.0, 1 / 3]))(jnp.ones(2)).round(3).tolist()
    [1.0, 1.0]
    """

    operator: Operator
    scale: Any

    @property
    def params(self) -> Any:
        return self.operator.params

    def __call__(self, vector: Any) -> Any:
        check_operator("Preconditioned", self.operator)
        check_floating("Preconditioned: scale", self.scale)
        check_vector("Preconditioned:", self.params, self.scale, "scale")

        def scaled(tree: Any) -> Any:
            return jax.tree.map(lambda x, s: x * jnp.asarray(s, x.dtype), tree, self.scale)

        return scaled(self.operator(scaled(vector)))

    def losses(self) -> jax.Array:
        return self.operator.losses()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block(Operator):
    r"""The diagonal block of an operator that belongs to some of its parameters: the curvature of a layer.

    It maps vectors of these parameters alone, $v \mapsto E^\top A E v$ with $E$ that fills up with zeros, and costs
    what a product with the whole operator does. Its eigenvalues lie between those of the whole.

    Args:
      operator: $A$.
      pattern: a regular expression that is searched in the path of each leaf, as in `gdx.groups`.

    Attributes:
      params: of the leaves whose path has it, a dict from path to array.

    Raises (when it is called, or its params are read):
      ValueError: the pattern is no regular expression, or no path has it.
      TypeError: the pattern is no text.

    >>> import gdx, jax.numpy as jnp
    >>> loss = lambda p, batch: 0.5 * jnp.sum(p["a"] ** 2) + jnp.sum(p["a"]) * p["b"] + 4 * p["b"] ** 2
    >>> hessian = gdx.curvature.Hessian(loss, {"a": jnp.ones(2), "b": jnp.ones(())}, batches=jnp.zeros(1))
    >>> block = gdx.curvature.Block(hessian, "b")
    >>> block({"b": jnp.ones(())})["b"].item()
    8.0
    """

    operator: Operator
    pattern: str = dataclasses.field(metadata={"static": True})

    def _chosen(self, tree: Any) -> dict[str, Any]:
        of_kind("Block: pattern", self.pattern, str, "a regular expression, such as 'norm|bias'")
        found = dict(zip(leaf_paths(self.operator.params), jax.tree.leaves(tree)))
        try:
            chosen = {path: x for path, x in found.items() if re.search(self.pattern, path)}
        except re.error as error:
            raise ValueError(f"Block: the pattern {self.pattern!r} is no regular expression ({error})") from error
        if not chosen:
            listed = ", ".join([*[*found][:20], "..."] if len(found) > 20 else found)
            raise ValueError(
                f"Block: the pattern {self.pattern!r} matches no path; expected one that does. The paths are {listed}"
            )
        return chosen

    @property
    def params(self) -> Any:
        check_operator("Block", self.operator)
        return self._chosen(self.operator.params)

    def __call__(self, vector: Any) -> Any:
        check_vector("Block:", self.params, vector)
        leaves, structure = jax.tree.flatten(self.operator.params)
        whole = [
            vector[path] if path in vector else jnp.zeros_like(accurate(x))
            for path, x in zip(leaf_paths(self.operator.params), leaves)
        ]
        return self._chosen(self.operator(jax.tree.unflatten(structure, whole)))

    def losses(self) -> jax.Array:
        return self.operator.losses()


def adam_preconditioned(operator: Operator, tx: Transform, state: Any) -> Preconditioned:
    r"""A Hessian as Adam's steps see it: $P_t^{-1/2} H P_t^{-1/2}$, with

    $$ P_t = (1 - \beta_1^t) \left( \sqrt{\nu_t / (1 - \beta_2^t) + \bar\varepsilon} + \varepsilon \right) $$

    Adam is gradient descent with averaged gradients, preconditioned by $P_t$; its largest eigenvalue, the
    preconditioned sharpness, is what `stability_edge` limits, by $38 / \eta$ for $\beta_1 = 0.9$. Decoupled weight
    decay is no part of it.

    Args:
      operator: `Hessian` or `GaussNewton`.
      tx: the optimizer, `gdx.adam`, `gdx.adamw`, or a chain with one `gdx.scale_by_adam`.
      state: its state after at least one step; optax's own Adam has the same.

    Raises:
      TypeError: tx has not one Adam's hyperparameters, or the state not one Adam's state.
      ValueError: the state has taken no step; $P_t$ is 0 (where $\nu_t$ is, without `eps` and `eps_root`) or NaN.

    Source: Cohen et al., Adaptive Gradient Methods at the Edge of Stability (2022), section 2.

    >>> import gdx, jax, jax.numpy as jnp
    >>> bowl = lambda theta, batch: 0.5 * jnp.sum(batch * theta**2)
    >>> theta, batches, tx = jnp.array([1.0, 5.0]), jnp.array([[1.0, 9.0]]), gdx.adam(0.1, b1=0.0)
    >>> hessian = gdx.curvature.Hessian(bowl, theta, batches)
    >>> _, state = tx.update(jax.grad(bowl)(theta, batches[0]), tx.init(theta))
    >>> matrix = gdx.curvature.adam_preconditioned(hessian, tx, state)
    >>> [round(x, 3) for x in matrix(jnp.ones(2)).tolist()]  # curvature over the gradient's size: 1 / 1 and 9 / 45
    [1.0, 0.2]
    """
    check_operator("adam_preconditioned", operator)
    numbers = tx.hyperparams if isinstance(tx, Transform) else {}
    if not {"b1", "b2", "eps", "eps_root"} <= set(numbers):
        raise TypeError(
            f"adam_preconditioned: tx is {tx!r}; expected an optimizer with the hyperparameters of one Adam, such as "
            f"gdx.adam(1e-3)"
        )
    found = [s for s in jax.tree.leaves(state, is_leaf=_is_adam) if _is_adam(s)]
    if len(found) != 1:
        raise TypeError(
            f"adam_preconditioned: the state has {len(found)} parts with a count and a second moment (nu); expected "
            f"one: pass the state that the update of this optimizer returned"
        )
    (adam,) = found
    if is_concrete(adam.count) and int(adam.count) < 1:
        raise ValueError("adam_preconditioned: the state has taken no step, so that it has no scale; update it first")
    count = jnp.asarray(adam.count).astype(float)
    b1, b2, eps, eps_root = (
        jnp.asarray(numbers[name](count - 1) if callable(numbers[name]) else numbers[name], float)
        for name in ("b1", "b2", "eps", "eps_root")
    )

    def scale(nu: Any) -> jax.Array:
        nu = accurate(nu.decode() if is_packed(nu) else nu).real
        # -expm1(t log b): 1 - b^t without cancellation
        c1, c2 = (-jnp.expm1(count * jnp.log(b)).astype(nu.dtype) for b in (b1, b2))
        root = jnp.sqrt(nu / c2 + eps_root.astype(nu.dtype))
        return jax.lax.rsqrt(c1 * (root + eps.astype(nu.dtype)))

    scales = jax.tree.map(scale, adam.nu, is_leaf=is_packed)
    for path, s in jax.tree_util.tree_leaves_with_path(scales):
        if is_concrete(s) and not bool(jnp.all(jnp.isfinite(s))):
            raise ValueError(
                f"adam_preconditioned: the second moment (nu) at {path_text(path)} is NaN, or 0 while eps and eps_root "
                f"are 0, so that Adam's step divides by 0; expected finite gradients and eps > 0: tx.replace(eps=1e-8)"
            )
    return Preconditioned(operator, scales)


def _is_adam(state: Any) -> bool:
    return {"count", "nu"} <= set(getattr(state, "_fields", ()))


def check_operator(label: str, operator: Any) -> None:
    """Raises unless it is an operator whose parameters are floating-point arrays."""
    of_kind(f"{label}: operator", operator, Operator, "one such as gdx.curvature.Hessian(loss, params, batches)")
    check_params(operator, operator.params)


def check_vector(label: str, params: Any, vector: Any, what: str = "vector") -> None:
    """Raises unless a vector has the structure and shapes of the parameters, and is real where they are."""
    given: Any = jax.tree.structure(vector)
    expected = jax.tree.structure(params)
    if given != expected:
        raise ValueError(
            f"{label} the {what}'s tree is {given}, that of the parameters {expected}; "
            f"pass a {what} with the tree of the parameters"
        )
    for (path, p), v in zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(vector)):
        if np.shape(v) != np.shape(p) or (jnp.iscomplexobj(v) and not jnp.iscomplexobj(p)):
            raise ValueError(
                f"{label} the {what} at {path_text(path)} is {jnp.result_type(v)}{list(np.shape(v))}, the parameter "
                f"there {jnp.result_type(p)}{list(np.shape(p))}; expected that shape, and real where the parameter is"
            )


@functools.partial(jax.jit, static_argnums=1)
@on_any_mesh
def _losses(operator: _Averaged, _: None) -> jax.Array:
    return jax.lax.map(lambda batch: operator._value(operator.params, batch), operator.batches)


def _checked(operator: Operator, value: Any) -> jax.Array:
    """The loss's value, once it is a real scalar."""
    name = type(operator).__name__
    if not isinstance(value, jax.Array):
        raise TypeError(f"{name}: the loss returns a {type(value).__name__}; expected a scalar array alone")
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name}: the loss returns {value.dtype}; expected a real floating-point number")
    if value.shape != ():
        raise ValueError(f"{name}: the loss has shape {value.shape}; expected a scalar, such as the mean of it")
    return value
