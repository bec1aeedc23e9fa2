"""Links that end a chain, so that adding its update to bfloat16 parameters rounds them well."""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gdx.checks import require_params
from gdx.fields import static, to_integer
from gdx.leafwise import Leafwise
from gdx.storage.dither import Dither
from gdx.storage.formats import rounded_at_random, with_slope_of


class CompensationState(NamedTuple):
    """What rounding has kept back.

    Attributes:
      compensation: for each parameter, in bfloat16, what is still to be added to it.
    """

    compensation: Any


class CorrectionState(NamedTuple):
    """What bfloat16 parameters lack.

    Attributes:
      count: the number of updates so far.
      correction: for each parameter, in int8, how many 256ths of a unit in its last place its magnitude lacks.
    """

    count: jax.Array  # type: ignore[assignment]
    correction: Any


class MasterState(NamedTuple):
    """The parameters before rounding.

    Attributes:
      master: the parameters in at least float32.
    """

    master: Any


class _Rounding(Leafwise):
    """Base of the links that round: they act on bfloat16 parameters."""

    rounds: ClassVar[bool] = True

    def acts_on(self, params: optax.Params | None) -> Any:
        require_params(self, params)
        return jax.tree.map(lambda p: jnp.result_type(p) == jnp.bfloat16, params)


class round_stochastically(_Rounding):
    r"""Rounds the new parameters to bfloat16 at random, so that on average they are the exact ones.

    $$ \theta_{t+1} = \operatorname{SR}(\theta_t + u_t), \qquad E[\operatorname{SR}(x)] = x $$

    Rounded to nearest, a parameter does not move by steps of less than half a unit in its last place,
    1/512 to 1/256 of it. The update that leaves this link is $\theta_{t+1} - \theta_t$ in float32, which
    `optax.apply_updates` adds without error (unless the parameter shrinks to less than 1/65,536 in one
    step; then to within $2^{-24}$ of the old one). So it has to be the last link, behind weight decay and
    learning rate.

    State: only the step count. Parameters of other dtypes and their updates pass unchanged.

    Args:
      seed: of the random bits, see `gdx.storage.Dither`.

    Raises:
      TypeError: seed is no integer.
      ValueError: update is called without parameters.

    Source: Zamirai et al., Revisiting BFloat16 Training (2020), section 4.

    >>> import gdx, jax.numpy as jnp
    >>> tx = gdx.chain(gdx.sgd(1e-3), gdx.round_stochastically())
    >>> theta = jnp.ones(1000, "bfloat16")
    >>> updates, state = tx.update(jnp.ones(theta.shape), tx.init(theta), theta)
    >>> updates.dtype, f"{jnp.mean(theta.astype(jnp.float32) + updates):.3f}"
    (dtype('float32'), '0.999')
    """

    State: ClassVar = optax.ScaleByScheduleState

    seed: int = static(default=0, convert=to_integer)

    def step(self, shared: tuple, g: jax.Array, p: jax.Array, *, dither: Dither) -> tuple[jax.Array]:
        # the first two fields are those of moments, whose rounding is not to be correlated with this one
        bits = dither._replace(field=2).bits(p.shape, self.seed)
        return (rounded_at_random((p + g).astype(jnp.float32), bits).astype(p.dtype) - p,)


class round_with_compensation(_Rounding):
    r"""Rounds the new parameters to bfloat16, and adds what that left out to the next step (Kahan's summation).

    $$ s_t = u_t + c_{t-1}, \qquad \theta_{t+1} = \operatorname{bf16}(\theta_t + s_t), \qquad
       c_t = \operatorname{bf16}(s_t - (\theta_{t+1} - \theta_t)) $$

    Parameter and compensation together hold about 16 significant bits, as they do in `round_with_correction`, with half
    of the state. Prefer that one, but where a step must not draw random bits. The update that leaves this
    link is $\theta_{t+1} - \theta_t$ in float32: see `round_stochastically`.

    State: `CompensationState(compensation)`, in bfloat16. Parameters of other dtypes and their updates pass unchanged.

    Raises:
      ValueError: update is called without parameters.

    Sources: Kahan, Further remarks on reducing truncation errors (1965); Zamirai et al. (2020), section 4.

    >>> import gdx, jax.numpy as jnp
    >>> tx, theta = gdx.chain(gdx.sgd(1e-3), gdx.round_with_compensation()), jnp.ones(1, "bfloat16")
    >>> state = tx.init(theta)
    >>> for _ in range(100):
    ...     updates, state = tx.update(jnp.ones(theta.shape), state, theta)
    ...     theta += updates.astype("bfloat16")
    >>> theta.item()
    0.8984375
    """

    State: ClassVar = CompensationState

    def start(self, p: jax.Array) -> tuple[jax.Array]:
        return (jnp.zeros_like(p, jnp.bfloat16 if jnp.isrealobj(p) else None),)

    def step(
        self, shared: tuple, g: jax.Array, p: jax.Array, compensation: jax.Array, *, dither: Dither | None
    ) -> tuple[jax.Array, jax.Array]:
        s = _once_on_cpus(g + compensation)
        moved = _to_bfloat16(p + s) - p
        return moved, s - (_added(p, moved).astype(p.dtype) - p)


class round_with_correction(_Rounding):
    r"""Keeps the parameters in 24 bits: bfloat16's, and in the state a byte that continues them.

    $$ \Theta_t = \theta_t + 2^{-8} c_t \operatorname{ulp}(\theta_t), \qquad
       \Theta_{t+1} = \operatorname{SR}_{24}(\Theta_t + u_t), \qquad \theta_{t+1} = \operatorname{bf16}(\Theta_{t+1}) $$

    $\Theta$ is a float32 without its last 8 bits, which $\operatorname{SR}$ rounds at random, so that on average
    $\Theta_{t+1}$ is exact. Of the 24 bits that are left the lower 8 are $c$ as an int8, and the upper 16, rounded to
    nearest, are $\theta$: a tie goes to the larger magnitude, so that $c$ is from -128 to 127. That is exact for every
    exponent, subnormal numbers and 0 too (where the device does not flush them), and takes integer additions only.
    Below a power of two $\operatorname{ulp}$ is the smaller unit.

    A step's error is less than $2^{-8} \operatorname{ulp}$, at most $2^{-15}$ of the parameter, with mean 0. Rounded to
    nearest it would be half of that, but steps of less than $2^{-17}$ to $2^{-16}$ of a parameter would be lost: 1,000
    steps of $2^{-18}$ do not move it at all, at random by 1.00 of what they should.

    A parameter that something else changes between steps stays changed, to within half a unit in the last place of its
    new value, since $c$ counts from there. Beyond bfloat16's largest a parameter becomes infinite, and NaN in the step
    after that. The update that leaves this link is $\theta_{t+1} - \theta_t$ in float32: see
    `round_stochastically`.

    State: `CorrectionState(count, correction)`, 1 byte per parameter. With moments in 8 bits, parameters and state take
    5.03 bytes together. With moments in bfloat16 a step moves 16 bytes per parameter and needs no temporary memory, as
    compiled for TPU and H100; on CPUs, where a kernel writes one array only, it needs 4. Parameters of other dtypes and
    their updates pass unchanged.

    Args:
      seed: of the random bits, see `gdx.storage.Dither`.

    Raises:
      TypeError: seed is no integer.
      ValueError: update is called without parameters.

    Sources: Gonzalez Ortiz et al., FlashOptim (2026), who split a weight into a bfloat16 and $c / 127$ of half a unit,
    to nearest; rounding at random as in `gdx.storage.StochasticBfloat16`.

    >>> import gdx, jax.numpy as jnp
    >>> tx, theta = gdx.chain(gdx.sgd(1e-3), gdx.round_with_correction()), jnp.ones(1, "bfloat16")
    >>> updates, state = tx.update(jnp.ones(theta.shape), tx.init(theta), theta)
    >>> updates.item(), state[1].correction.item()  # 0.001 is 65.5 times 2^-16, and below 1 a unit is 2^-8
    (0.0, -65)
    """

    State: ClassVar = CorrectionState

    seed: int = static(default=0, convert=to_integer)

    def start(self, p: jax.Array) -> tuple[jax.Array]:
        return (jnp.zeros_like(p, jnp.int8 if jnp.isrealobj(p) else None),)

    def step(
        self, shared: tuple, g: jax.Array, p: jax.Array, correction: jax.Array, *, dither: Dither
    ) -> tuple[jax.Array, jax.Array]:
        bits = dither._replace(field=2).bits(p.shape, self.seed) & 0xFF
        exact = (_joined(p, correction) + g).astype(jnp.float32)
        master = _once_on_cpus(rounded_at_random(exact, bits, 8))
        moved = _upper_part(master).astype(p.dtype) - p
        return moved, _last_byte(master, _added(p, moved))


class round_with_master(_Rounding):
    r"""Keeps the parameters in float32 too, and rounds those anew in each step.

    $$ \Theta_{t+1} = \Theta_t + u_t, \qquad \theta_{t+1} = \operatorname{bf16}(\Theta_{t+1}) $$

    The reference for the others, at 4 bytes per parameter. Parameters that something else changes
    between steps are taken back to the master's. The update that leaves this link is
    $\theta_{t+1} - \theta_t$ in float32: see `round_stochastically`.

    State: `MasterState(master)`. Parameters of other dtypes and their updates pass unchanged, and
    their master stays what it was at first.

    Raises:
      ValueError: update is called without parameters.

    Source: Micikevicius et al., Mixed Precision Training (2018), section 3.1.

    >>> import gdx, jax.numpy as jnp
    >>> tx, theta = gdx.chain(gdx.sgd(1e-3), gdx.round_with_master()), jnp.ones(1, "bfloat16")
    >>> updates, state = tx.update(jnp.ones(theta.shape), tx.init(theta), theta)
    >>> updates.item(), state[1].master.item()
    (0.0, 0.9990000128746033)
    """

    State: ClassVar = MasterState

    def start(self, p: jax.Array) -> tuple[jax.Array]:
        if isinstance(p, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{type(self).__name__}: init copies the parameters, and a ShapeDtypeStruct holds none; for the shapes "
                f"of the state, jax.eval_shape(tx.init, params)"
            )
        return (jnp.asarray(p, np.promote_types(jnp.result_type(p), np.float32), copy=True),)

    def step(
        self, shared: tuple, g: jax.Array, p: jax.Array, master: jax.Array, *, dither: Dither | None
    ) -> tuple[jax.Array, jax.Array]:
        master = _once_on_cpus(master + g)
        return _to_bfloat16(master) - p, master


def _to_bfloat16(x: jax.Array) -> jax.Array:
    """Rounded to nearest, but in x's dtype: a pair of conversions is one that the compiler takes away."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)


def _added(p: jax.Array, moved: jax.Array) -> jax.Array:
    """The parameter that `optax.apply_updates` makes, in float32: in its words, so that one kernel does both."""
    return (p + moved).astype(jnp.bfloat16).astype(jnp.float32)


def _once_on_cpus(x: jax.Array) -> jax.Array:
    """The same number, on CPUs worked out once: else XLA does it for each result, from copies of parameter and state.

    What ends in a division is what it takes for expensive. That the divisor is 1 it does not see, but LLVM does.
    """

    def divided(x: jax.Array) -> jax.Array:
        is_bit = jax.lax.bitcast_convert_type(x, np.dtype(f"uint{8 * x.dtype.itemsize}")) & 1 < 2
        return x / jnp.where(is_bit, 1, 2).astype(x.dtype)

    return jax.lax.platform_dependent(x, cpu=divided, default=lambda x: x)


def _ordered(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.int32)


def _last_byte(master: jax.Array, rounded: jax.Array) -> jax.Array:
    """The third byte of a float32: as int8, what it is above this bfloat16, in 256ths of a unit in the last place.

    Written as a difference, from the new parameter, TPUs compute both in one kernel; on CPUs that would be a copy.
    """
    return jax.lax.platform_dependent(
        _ordered(master),
        _ordered(rounded),
        cpu=lambda master, rounded: master >> 8,
        default=lambda master, rounded: master - rounded >> 8,
    )


def _joined(p: jax.Array, correction: jax.Array) -> jax.Array:
    """The float32 that is so many 256ths of a unit in the last place larger in magnitude than the parameter."""
    raw = _ordered(p.astype(jnp.float32))
    # what something else made 0 may still have a negative correction
    magnitude = jnp.maximum((raw & 0x7FFFFFFF) + correction.astype(jnp.int32) * 256, 0)
    joined = jax.lax.bitcast_convert_type(raw & jnp.int32(-(2**31)) | magnitude, jnp.float32)
    return with_slope_of(p, jnp.where(jnp.isfinite(p), joined, p))


def _upper_part(x: jax.Array) -> jax.Array:
    """The nearest bfloat16, in float32; of two, that of larger magnitude, since no int8 is 128."""
    rounded = jax.lax.bitcast_convert_type(_ordered(x) + 0x8000 & -(2**16), jnp.float32)
    return with_slope_of(x, jnp.where(jnp.isnan(x), x, rounded))
