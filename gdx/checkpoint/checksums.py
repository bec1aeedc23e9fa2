"""The checksum of an array: one for one content, on any mesh."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdx.storage.dither import lowbias32, positions


def checksum(x: Any) -> str:
    r"""16 hexadecimal digits that tell apart arrays of one shape and dtype: two sums over the elements.

    $$ c_k = \sum_{i,j} h(w_{ij} \oplus h(i + h(2 j + k))) \bmod 2^{32}, \qquad k = 0, 1 $$

    with $w_{ij}$ word $j$ of the bits of element $i$ (up to 32 bits are one word) and $h$ the integer hash
    lowbias32. Integer sums have no rounding, so that the result does not depend on how the array is sharded, nor
    on how many processes hold it: each adds up its own part.

    As $h$ is one to one, a change within one word always changes both sums. Any other change goes unnoticed with
    probability $2^{-64}$; it is no protection from who wants to deceive. Places $i$ count modulo $2^{32}$.

    Args:
      x: an array of numbers; of an array that several processes hold, all of them must call.

    Source: lowbias32 is Wellons, Prospecting for hash functions (2018).

    >>> import gdx, jax.numpy as jnp
    >>> gdx.checkpoint.checksum(jnp.arange(4.0)) == gdx.checkpoint.checksum(jnp.arange(4.0)[::-1])
    False
    """
    if not isinstance(x, jax.Array):
        x = np.asarray(x)
        if x.dtype.itemsize >= 8:  # JAX would cast it to 32 bits
            x = tuple(np.moveaxis(np.ascontiguousarray(x)[..., None].view(np.uint32), -1, 0))
    return "".join(f"{int(number):08x}" for number in np.asarray(_sums(x)))


@jax.jit
def _sums(x: Any) -> jax.Array:
    words = x if isinstance(x, tuple) else _words(x)
    sums = []
    for k in range(2):
        terms = [_hashed(word, 2 * j + k) for j, word in enumerate(words)]
        sums.append(sum(jnp.sum(term, dtype=jnp.uint32) for term in terms))
    return jnp.stack(sums)


def _hashed(word: jax.Array, salt: int) -> jax.Array:
    return lowbias32(word ^ lowbias32(positions(word.shape, lowbias32(jnp.uint32(0x9E3779B9 + salt)))))


def _words(x: jax.Array) -> Sequence[jax.Array]:
    """The bits of each element as one uint32 or more, the low ones first."""
    if jnp.iscomplexobj(x):
        return [*_words(x.real), *_words(x.imag)]
    if x.dtype == bool:
        return [x.astype(jnp.uint32)]
    bits = (jnp.finfo if jnp.issubdtype(x.dtype, np.floating) else jnp.iinfo)(x.dtype).bits
    if bits > 32:
        halves = jax.lax.bitcast_convert_type(x, jnp.uint32)
        return [halves[..., 0], halves[..., 1]]
    return [jax.lax.bitcast_convert_type(x, f"uint{bits}").astype(jnp.uint32)]
