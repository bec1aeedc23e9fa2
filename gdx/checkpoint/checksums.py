"""The checksum of an array: one for one content, on any mesh."""

import contextlib
import reprlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gdx.fields import is_key
from gdx.storage.dither import lowbias32, positions
from gdx.trees import is_array


def checksum(x: Any) -> str:
    r"""16 hexadecimal digits that tell apart arrays of one shape and dtype: two sums over the elements.

    $$ c_k = \sum_{i,j} h(w_{ij} \oplus h(i + h(2 j + k))) \bmod 2^{32}, \qquad k = 0, 1 $$

    with $w_{ij}$ word $j$ of the bits of element $i$ (up to 32 bits are one word) and $h$ the integer hash
    lowbias32. Integer sums have no rounding, so that the result does not depend on how the array is sharded, nor
    on how many processes hold it: each adds up its own part.

    As $h$ is one to one, a change within one word always changes both sums. Any other change goes unnoticed with
    probability $2^{-64}$; it is no protection from who wants to deceive. Places $i$ count modulo $2^{32}$.

    Args:
      x: an array of numbers or random keys; of an array that several processes hold, all of them must call.

    Raises:
      TypeError: it is neither, or traced.
      ValueError: it was donated or deleted.

    Source: lowbias32 is Wellons, Prospecting for hash functions (2018).

    >>> import gdx, jax.numpy as jnp
    >>> gdx.checkpoint.checksum(jnp.arange(4.0)) == gdx.checkpoint.checksum(jnp.arange(4.0)[::-1])
    False
    """
    x = plain("checksum: x", x)
    if isinstance(x, jax.Array):
        x = _on_device(x)
    if not isinstance(x, jax.Array) and x.dtype.itemsize >= 8:  # JAX would cast it to 32 bits
        x = tuple(np.moveaxis(np.ascontiguousarray(x)[..., None].view(np.uint32), -1, 0))
    return "".join(f"{int(number):08x}" for number in np.asarray(_sums(x)))


def plain(label: str, x: Any) -> Any:
    """A leaf as an array of numbers, such as the data of random keys.

    Raises:
      TypeError, ValueError: as `checksum`.
    """
    if isinstance(x, jax.core.Tracer):
        raise TypeError(f"{label} is {reprlib.repr(x)}, which has no value while jax.jit traces it; call this outside")
    if isinstance(x, jax.Array):
        if x.is_deleted():
            raise ValueError(f"{label} was donated or deleted; call this before the step that it is donated to")
        return jax.random.key_data(x) if is_key(x) else x
    array = np.asarray(None)
    with contextlib.suppress(ValueError):  # a list of lists of several lengths
        array = np.asarray(x)
    if not is_array(array):
        raise TypeError(
            f"{label} is {reprlib.repr(x)}; expected an array or a number. Leave out what is neither, as "
            f"equinox.filter(model, equinox.is_array) does"
        )
    return array


def _on_device(x: jax.Array) -> jax.Array:
    """An array that waits in the host's memory, in the device's."""
    device: Any = next(iter(x.sharding.addressable_devices))
    kind = device.default_memory().kind
    return x if x.sharding.memory_kind in (None, kind) else jax.device_put(x, x.sharding.with_memory_kind(kind))


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
