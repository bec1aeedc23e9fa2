"""How moments and parameters are held in few bits.

Wherever an optimizer takes a dtype for a moment, it takes a format too: `StochasticBfloat16`, `SignedFourthRoot8`
(first moment, velocity), `FourthRoot8` (second moment), in 4 bits `SignedPowersOfTwo4` and `PowersOfTwo4`, or a
`Format` of your own. A dtype is the format that rounds to nearest. `convert` takes a state from one format to
another. A link of your own takes its moments' formats with `to_storage` and starts them with `moment_like`: see
`gdx.Leafwise`.

Parameters in bfloat16 need a link at the end of the chain that rounds them well: `gdx.round_stochastically` (no
state), `gdx.round_with_correction` (1 byte per parameter, with which it has 24 bits), `gdx.round_with_compensation`
(Kahan, 2 bytes, no random bits) or `gdx.round_with_master` (4 bytes). Random bits are a hash of seed, step, leaf and
position: nothing to carry, and the same on any mesh.

>>> import gdx, jax, jax.numpy as jnp
>>> tx = gdx.adamw(1e-3, mu_dtype=gdx.storage.SignedFourthRoot8(), nu_dtype=gdx.storage.FourthRoot8())
>>> state = tx.init({"w": jnp.zeros((16, 512))})
>>> state[0].nu["w"]
Packed(codes=uint8[16,512], scales=float32[16,2], format=storage.FourthRoot8())
>>> sum(x.nbytes for x in jax.tree.leaves((state[0].mu, state[0].nu))) / (16 * 512)
2.03125
>>> exact = gdx.adamw(1e-3).init({"w": jnp.zeros((16, 512))})  # a state in float32, taken there: one explicit call
>>> type(gdx.storage.convert(exact, state)[0].nu["w"]).__name__
'Packed'

Blocks of 8 bits fit real shapes, projections to heads and convolutions too: Adam's state of a ResNet-50 or a
transformer takes 2.05 bytes per parameter. Leaves of fewer than 4,096 numbers stay in float32: `init` warns if
nothing else is there, and `print(gdx.describe(tx, params))` lists them.

What fails silently is refused: a second moment rounded to nearest with `b2 >= 0.99` stands still once gradients
shrink, and linear 8-bit codes diverge.

8 bits cost no loss that was measurable over 24 seeds. A step takes 0.9 to 1.3 times as long as in float32 with a state
in bfloat16, by CPU, and 2 to 4 times with 8 bits. On a TPU take `block=None`, blocks of whole rows: 22 bytes of traffic
per parameter, as on a GPU, for the 28 of float32; parts of rows cost 65 there (`python -m benchmarks storage`). With
it, the error of an update grew by a tenth in rows of 1,024.

4 bits hold Adam's state in 1.06 to 1.1 bytes per parameter. They lose less than 0.005 on three small networks too,
but single steps are noisier: see `SignedPowersOfTwo4`. On a CPU a step takes 5 times as long as with 8 bits
(`python -m benchmarks storage time`).

Blocks along the last axis do best where rows differ, as in a layer whose inputs hardly fire or an embedding of rare
words: of the 8-bit update, 0.06 of its size is error on the digits, and 0.16 with `axis=-2`. Scales of whole rows and
whole columns, `block=None, axis=None`, leave 0.06 along either axis, so that none has to be chosen, for as many bytes
on a TPU, 28 to 40 on a GPU, and a reduction over devices for scales that a mesh cuts. Rows that are hit once in 1,000
steps are off by 0.02 with the last axis and with `axis=None`, and 0.07 with -2. Where columns differ in size too, by a
factor e, that is 0.04, 0.05 and 0.07: such a row shrinks between hits while a column's scale stays, and is rounded
anew. In 4 bits such rows want the last axis: with -2 their second moment is held too large.

Limits: slopes through several steps of moments in blocks are refused; `Simulated(format)` takes them. States in blocks
go through Orbax, pickle and equinox, but not through `flax.serialization` and `optax.tree.map_params` with the
parameters as a further tree. Two links that round at random, in one chain or in groups of `optax.partition`, need seeds
of their own. `optax.apply_if_finite` goes inside a rounding link, not around it.
"""

from gdx.storage.blocks import Blocks, FourthRoot8, Packed, PowersOfTwo4, SignedFourthRoot8, SignedPowersOfTwo4
from gdx.storage.conversion import convert
from gdx.storage.dither import Dither
from gdx.storage.formats import Format, Simulated, StochasticBfloat16, moment_like, to_storage

__all__ = [
    "Blocks",
    "Dither",
    "Format",
    "FourthRoot8",
    "Packed",
    "PowersOfTwo4",
    "SignedFourthRoot8",
    "SignedPowersOfTwo4",
    "Simulated",
    "StochasticBfloat16",
    "convert",
    "moment_like",
    "to_storage",
]
