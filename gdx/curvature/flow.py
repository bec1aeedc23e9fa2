"""Central flows: where gradient descent and RMSProp go on average while they oscillate at the edge of stability."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx.arguments import number, of_kind
from gdx.checks import check_state_like
from gdx.curvature.krylov import dot, from_vector, to_vector
from gdx.curvature.operators import Hessian, check_operator
from gdx.fields import is_concrete, to_integer, uncalled
from gdx.links.adam import adam
from gdx.links.descent import gradient_descent
from gdx.links.momentum import sgd
from gdx.mesh import on_any_mesh
from gdx.numerics import accurate
from gdx.storage.blocks import is_packed
from gdx.transform import Transform, value


class CentralFlow(NamedTuple):
    r"""The time-averaged path of an optimizer, as its central flow predicts it.

    Attributes:
      params: where it is after the last step.
      losses: of shape (steps,): the loss averaged over the oscillation, $L + \frac{1}{2} \langle H, \Sigma \rangle$,
        before each step, as `gdx.train` has it.
      center_losses: of shape (steps,): the loss at the center of the oscillation, $L(\theta(t))$.
      sharpness: of shape (steps, count): the largest eigenvalues there, in falling order; for RMSProp those of the
        preconditioned Hessian, $\eta P^{-1} H$. The edge of both is $2 / \eta$.
      variance: of shape (steps,): $\operatorname{tr} \Sigma$, the mean squared distance from the center.
    """

    params: Any
    losses: jax.Array
    center_losses: jax.Array
    sharpness: jax.Array
    variance: jax.Array


def central_flow(hessian: Hessian, tx: Transform, steps: int, *, state: Any = None, count: int = 4) -> CentralFlow:
    r"""The path of full-batch gradient descent or RMSProp, averaged over its oscillations at the edge of stability.

    Beyond the edge an optimizer is thrown from one wall of the valley to the other, which no gradient flow describes.
    Its average over time has a differential equation: with $\Sigma$ the covariance of the oscillation, and $P = I /
    \eta$ for gradient descent or $P = \mathrm{diag}(\sqrt{\nu + \bar\varepsilon} + \varepsilon) / \eta$ for RMSProp,

    $$ \dot\theta = -P^{-1} \left( \nabla L + \tfrac{1}{2} \nabla_\theta \langle \Sigma, H(\theta) \rangle \right),
       \qquad
       \dot\nu = \frac{1 - \beta}{\beta} \left( (\nabla L)^2 + 4 P^2 \, \mathrm{diag}\,\Sigma - \nu \right) $$

    where $\Sigma \succeq 0$ is what keeps $H \preceq 2 P$ and lives only where that is an equality: the solution of a
    semidefinite complementarity problem. Below the edge $\Sigma = 0$, and that is gradient flow.

    The flow is integrated in steps of the optimizer's own length. In each, the `count` largest eigenpairs are found by
    block Lanczos from the last ones; along these the flow is solved exactly, as an explicit step would itself oscillate
    there, and $\Sigma$ holds them below the edge at the step's end. (In the other directions a step is the optimizer's
    own.) One program for all steps and learning rates, compiled once for each loss and set of shapes.

    It predicts an average. Single steps scatter about it, bursts of tens of steps too: compare it with losses that are
    averaged over about 100. Where an oscillation has yet to grow from nothing, the measured sharpness first overshoots.

    Cost: a step takes 2 `count` products with the Hessian and `count` (`count` + 1) / 2 third derivatives, about 100
    gradients for 4 eigenpairs; memory for about `count`^2 + 3 `count` vectors like the parameters. It is for small
    networks whose loss is smooth (tanh rather than relu, whose corners have no third derivative). A loss that does not
    bend back beyond the edge, as a quadratic, has no average there: all is NaN, or means nothing.

    Args:
      hessian: the Hessian of the loss at the start; its batches together are the full batch.
      tx: the optimizer: `gdx.gradient_descent`, `gdx.sgd` without momentum, `gdx.value(optax.rmsprop)` without momentum
        and not centered, or `gdx.adam` with b1 = 0 (RMSProp with bias correction).
      steps: how many, at least 1.
      state: the optimizer's state at the start; None for a new one. The first steps of a new RMSProp without bias
        correction are long and no flow: better take some before.
      count: how many eigenpairs are followed, at least 1; no more than there are parameters are used. All that are at
        the edge have to be among them: where the last of `sharpness` comes close to it, follow more.

    Raises:
      TypeError: hessian is no `Hessian`, or of complex parameters; tx is another optimizer or has a schedule; the state
        is that of another one; steps or count is no integer; what the Hessian raises.
      ValueError: the learning rate is not positive, steps or count less than 1, or the state has other shapes.

    Source: Cohen et al., Understanding Optimization in Deep Learning with Central Flows (2025), sections 3 and 5.

    >>> import gdx, jax.numpy as jnp
    >>> valley = lambda p, batch: ((1 + p[1] ** 2) * p[0] ** 2 + (p[1] - 2) ** 2) / 2  # steeper along the way down
    >>> start, tx = jnp.array([0.1, 0.5]), gdx.gradient_descent(0.5)
    >>> flow = gdx.curvature.central_flow(gdx.curvature.Hessian(valley, start, jnp.zeros(1)), tx, 200, count=1)
    >>> round(flow.sharpness[-1, 0].item(), 2), round(flow.variance[-1].item(), 2)  # at 2 / 0.5 the walls hold it up
    (4.0, 0.15)
    >>> measured, predicted = gdx.train(valley, tx, start, jnp.zeros((200, 1))).losses[100:], flow.losses[100:]
    >>> bool(abs(measured.mean() / predicted.mean() - 1) < 0.01)
    True
    """
    name = "central_flow"
    of_kind(
        f"{name}: hessian", hessian, Hessian, "a gdx.curvature.Hessian(loss, params, batches), with third derivatives"
    )
    check_operator(name, hessian)
    if any(jnp.iscomplexobj(p) for p in jax.tree.leaves(hessian.params)):
        raise TypeError(
            f"{name}: there are complex parameters; expected real ones: take real and imaginary parts apart"
        )
    rule = _rule(tx)
    state = tx.init(hessian.params) if state is None else state
    check_state_like(tx, state, jax.eval_shape(tx.init, hessian.params))
    steps, count = to_integer(f"{name}: steps", steps, minimum=1), to_integer(f"{name}: count", count, minimum=1)
    jax.eval_shape(hessian, hessian.params)  # raises what it has to say
    is_moments = functools.partial(_has, "nu")
    (moments,) = [s for s in jax.tree.leaves(state, is_leaf=is_moments) if is_moments(s)] or [None]
    nu, made = (getattr(moments, field) if _has(field, moments) else None for field in ("nu", "count"))
    return _flow(hessian, (rule, nu, made), steps, count)


class _Rule(NamedTuple):
    """An optimizer as RMSProp: gradient descent is the one whose second moment is 1, and stays so."""

    learning_rate: Any
    decay: Any = 1.0
    inside: Any = 0.0
    outside: Any = 0.0


def _rule(tx: Any) -> _Rule:
    name, kind = "central_flow", type(tx)
    numbers = tx.hyperparams if isinstance(tx, Transform) else {}
    if any(callable(x) for x in numbers.values()):
        raise TypeError(f"{name}: tx is {tx!r}; replace its schedules by the numbers of one step: tx.replace(...)")
    rule = None
    if kind is gradient_descent or (kind is sgd and _is_nothing(tx.momentum)):
        rule = _Rule(tx.learning_rate)
    elif kind is adam and not tx.nesterov and _is_nothing(tx.b1):
        rule = _Rule(tx.learning_rate, tx.b2, tx.eps_root, tx.eps)
    elif kind is value(optax.rmsprop) and not tx.centered and _is_nothing(tx.momentum):
        rule = _Rule(tx.learning_rate, tx.decay, *((tx.eps, 0.0) if tx.eps_in_sqrt else (0.0, tx.eps)))
    if rule is None:
        raise TypeError(
            f"{name}: tx is {tx!r}; expected gradient descent or RMSProp without momentum, as values: "
            f"gdx.gradient_descent(0.1), gdx.value(optax.rmsprop)(1e-3) or gdx.adam(1e-3, b1=0.0){uncalled(tx)}"
        )
    number(f"{name}: tx.learning_rate", rule.learning_rate, "a positive number", above=0)
    return rule


def _is_nothing(momentum: Any) -> bool:
    return momentum is None or (is_concrete(momentum) and bool(momentum == 0))


def _has(field: str, state: Any) -> bool:
    return field in getattr(state, "_fields", ())


@functools.partial(jax.jit, static_argnums=(2, 3))
@on_any_mesh
def _flow(hessian: Hessian, optimizer: tuple, steps: int, count: int) -> CentralFlow:
    start = to_vector(hessian.params)
    count, dtype = min(count, len(start)), start.dtype
    rule, nu, made = optimizer
    rate, decay, inside, outside = (jnp.asarray(x, dtype) for x in rule)
    pairs = _Pairs(count, dtype)

    def loss(vector: jax.Array) -> jax.Array:
        params = hessian._as_given(from_vector(vector, hessian.params))
        losses = jax.lax.map(lambda batch: hessian._value(params, batch), hessian.batches)
        return jnp.mean(losses.astype(dtype))

    gradient = jax.grad(loss)

    def product(vector: jax.Array, scale: jax.Array) -> Callable[[jax.Array], jax.Array]:
        return lambda v: scale * jax.jvp(gradient, (vector,), (scale * v,))[1]

    def third(vector: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.jvp(lambda x: jax.jvp(gradient, (x,), (a,))[1], (vector,), (b,))[1]

    def averaged(step: Any) -> jax.Array:
        """The part of a new squared gradient in the corrected average that the step with this number, from 1, makes."""
        # -expm1(t log b): 1 - b^t without cancellation
        return (1 - decay) / (1.0 if made is None else -jnp.expm1(step.astype(dtype) * jnp.log(decay)))

    def metric(nu: jax.Array) -> tuple[jax.Array, jax.Array]:
        """P and its slope in the second moment."""
        root = jnp.sqrt(nu + inside)
        return (root + outside) / rate, jnp.where(root > 0, 0.5 / (root * rate), 0)

    def turn(carry: tuple, step: jax.Array) -> tuple[tuple, tuple]:
        vector, nu, guess = carry
        (value, g), (p, slope) = jax.value_and_grad(loss)(vector), metric(nu)
        scale = jax.lax.rsqrt(p)
        values, guess = _largest(product(vector, scale), guess)
        u = scale[None, :] * guess
        tensor = pairs.weights[:, None] * jax.vmap(functools.partial(third, vector))(u[pairs.i], u[pairs.j])
        squares = pairs.weights[:, None] * u[pairs.i] * u[pairs.j]
        part = averaged(step + 1)
        part = jnp.minimum(part / (1 - part), 1)  # of the next gradient, as its average is in use at once
        # along its eigenvectors a gradient decays while the flow follows it
        decays = jnp.where(values == 0, 1, -jnp.expm1(-values) / jnp.where(values == 0, 1, values))

        def moved(x: Any) -> jax.Array:
            """Where a gradient takes the parameters in one step, against its direction."""
            return x / p + dot(dot(u, x) * (decays - 1), u)

        # what is left to the edge after a step, without an oscillation, and what one adds to it
        left = pairs.of_diagonal(2 - values) + dot(tensor, moved(g)) + 2 * part * dot(squares, slope * (g * g - nu))
        gained = 0.5 * dot(tensor, jax.vmap(moved)(tensor).T)
        gained += 8 * part * dot(squares * (slope * p * p)[None, :], squares.T)
        x = pairs.complement(gained, left)
        sigma = dot(x, squares)
        found = value + 0.5 * dot(pairs.diagonal(x), values), value, values / rate, jnp.sum(sigma)
        vector = vector - moved(g + 0.5 * dot(x, tensor))
        return (vector, nu + part * (g * g + 4 * p * p * sigma - nu), guess), found

    begin = jnp.zeros((), jnp.int32) if made is None else jnp.asarray(made)
    if nu is None:
        nu = jnp.ones_like(start)
    else:
        nu = to_vector(jax.tree.map(lambda x: accurate(x.decode() if is_packed(x) else x), nu, is_leaf=is_packed))
        nu = nu.astype(dtype)
        if made is not None:  # the average is that of no gradients at first
            nu = jnp.where(begin > 0, nu * averaged(jnp.maximum(begin, 1)) / (1 - decay), 0)
        g = gradient(start)
        nu += averaged(begin + 1) * (g * g - nu)
    scale = jax.lax.rsqrt(metric(nu)[0])
    guess = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (len(start), count), dtype))[0].T
    guess, _ = jax.lax.scan(lambda guess, _: (_largest(product(start, scale), guess)[1], None), guess, None, 10)
    (vector, _, _), found = jax.lax.scan(turn, (start, nu, guess), begin + 1 + jnp.arange(steps, dtype=begin.dtype))
    return CentralFlow(hessian._as_given(from_vector(vector, hessian.params)), *found)


def _largest(product: Callable[[jax.Array], jax.Array], guess: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest eigenvalues, falling, and their vectors in rows: by Rayleigh-Ritz from two blocks of a Krylov space.

    A block finds an eigenvalue that there is several times, as there is at the edge.
    """
    count, size = guess.shape
    products = jax.vmap(product)
    if size <= 2 * count:
        basis = jnp.eye(size, dtype=guess.dtype)
        images = products(basis)
    else:
        first = products(guess)
        second = jnp.linalg.qr(jnp.concatenate([guess, first]).T)[0].T[count:]
        basis, images = jnp.concatenate([guess, second]), jnp.concatenate([first, products(second)])
    matrix = dot(basis, images.T)
    values, coefficients = jnp.linalg.eigh((matrix + matrix.T) / 2)
    return values[::-1][:count], dot(coefficients[:, ::-1][:, :count].T, basis)


class _Pairs:
    """Symmetric matrices of one size as vectors of their upper triangles, with the same inner product."""

    def __init__(self, size: int, dtype: np.dtype):
        self.size = size
        self.i, self.j = np.triu_indices(size)
        self.weights = np.where(self.i == self.j, 1, np.sqrt(2)).astype(dtype)

    def diagonal(self, x: jax.Array) -> jax.Array:
        return x[..., np.flatnonzero(self.i == self.j)]

    def of_diagonal(self, diagonal: jax.Array) -> jax.Array:
        return jnp.where(self.i == self.j, diagonal[self.i], 0)

    def to_semidefinite(self, x: jax.Array) -> jax.Array:
        """The nearest matrix without negative eigenvalues."""
        matrix = jnp.zeros((self.size, self.size), x.dtype).at[self.i, self.j].set(x / self.weights)
        values, vectors = jnp.linalg.eigh(matrix, UPLO="U", symmetrize_input=False)
        return dot(vectors * jnp.maximum(values, 0)[None, :], vectors.T)[self.i, self.j] * self.weights

    def complement(self, matrix: jax.Array, vector: jax.Array, turns: int = 60) -> jax.Array:
        """X, semidefinite, for which A X + b is so too, and orthogonal to it: the least 1/2 <X, A X> + <b, X>.

        Source: Boyd et al., Distributed Optimization and Statistical Learning via ADMM (2011), chapter 5.
        """
        most = jnp.zeros((self.size, self.size), vector.dtype).at[self.i, self.j].set(jnp.diagonal(matrix))
        each = jnp.max(jnp.maximum(most, most.T), axis=1)
        each = jnp.maximum(each, 1e-8 * jnp.max(each))
        each = jnp.where(each > 0, each, 1) ** -0.25  # these take the cone to itself, and no diagonal above 1
        units = each[self.i] * each[self.j]
        penalty = np.array(0.3, vector.dtype)
        matrix, vector = matrix * units[:, None] * units[None, :], vector * units
        inverse = jnp.linalg.inv(matrix + penalty * jnp.eye(len(vector), dtype=vector.dtype))

        def turn(_: Any, carry: tuple) -> tuple:
            x, dual = carry
            free = dot(inverse, penalty * (x - dual) - vector)
            x = self.to_semidefinite(free + dual)
            return x, dual + free - x

        zero = jnp.zeros_like(vector)
        return units * jax.lax.fori_loop(0, turns, turn, (zero, zero))[0]
