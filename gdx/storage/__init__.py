"""How moments and parameters are held in few bits.

Wherever an optimizer takes a dtype for a moment, it takes a format too: `StochasticBfloat16`,
`SignedFourthRoot8` (first moment, velocity), `FourthRoot8` (second moment), or a `Format` of your own. A
dtype is the format that rounds to nearest. `convert` takes a state from one format to another. A link of your own
takes its moments' formats with `to_storage` and starts them with `moment_like`: see `gdx.Leafwise`.

>>> import gdx, jax, jax.numpy as jnp
>>> tx = gdx.adamw(1e-3, mu_dtype=gdx.storage.SignedFourthRoot8(), nu_dtype=gdx.storage.FourthRoot8())
>>> state = tx.init({"w": jnp.zeros((16, 512))})
>>> state[0].nu["w"]
Packed(codes=uint8[16,512], scales=float32[16,2], format=storage.FourthRoot8())
>>> sum(x.nbytes for x in jax.tree.leaves((state[0].mu, state[0].nu))) / (16 * 512)
2.03125
"""

from gdx.storage.blocks import Blocks, FourthRoot8, Packed, SignedFourthRoot8
from gdx.storage.conversion import convert
from gdx.storage.dither import Dither
from gdx.storage.formats import Format, StochasticBfloat16, moment_like, to_storage

__all__ = [
    "Blocks",
    "Dither",
    "Format",
    "FourthRoot8",
    "Packed",
    "SignedFourthRoot8",
    "StochasticBfloat16",
    "convert",
    "moment_like",
    "to_storage",
]
