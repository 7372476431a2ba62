"""The K largest of a vector, exactly and without sorting: their smallest is found bit by bit.

Float32 patterns of numbers >= 0 are ordered as the numbers are, so that a pattern is a threshold. Each bit costs one
count over the vector: 31 in all, or 15 where the numbers came from bfloat16 and the lower bits are 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

INFINITY, NAN = 0x7F800000, 0x7FC00000
"""Patterns."""

UNUSED_BITS = {jnp.dtype(jnp.bfloat16): 16, jnp.dtype(jnp.float16): 13}
"""Lowest bits of a float32 pattern that are 0 in every number of a dtype; a subnormal float16 is normal in float32."""


def patterns(score: jax.Array) -> jax.Array:
    """int32 patterns of `|score|`, float32: in its order, all NaN alike and above the rest."""
    bits = jax.lax.bitcast_convert_type(jax.lax.stop_gradient(score), jnp.int32) & 0x7FFFFFFF
    return jnp.where(bits > INFINITY, NAN, bits)


def smallest_kept(bits: jax.Array, count: jax.Array, unused: int = 0, *, unroll: bool = False) -> jax.Array:
    """The `count`-th largest of patterns `[..., d]` along the last axis, int32 `[..., 1]`; above all for a count of 0.

    Args:
      bits: int32, >= 0.
      count: int32, broadcastable against `[..., 1]`, 0 to d.
      unused: lowest bits that are 0 in all patterns.
      unroll: no loop around the steps.
    """

    def step(i: Any, found: jax.Array) -> jax.Array:
        higher = found | (jnp.int32(1) << (30 - i))
        enough = jnp.sum((bits >= higher).astype(jnp.int32), axis=-1, keepdims=True) >= count
        return jnp.where(enough, higher, found)

    start = jnp.zeros((*bits.shape[:-1], 1), jnp.int32)
    return jax.lax.fori_loop(0, 31 - unused, step, start, unroll=unroll)


def top_k_mask(score: jax.Array, count: jax.Array, unused: int = 0) -> jax.Array:
    """The `count` largest `|score|` along the last axis; of equal ones the lower index, NaN before all others.

    Args:
      score: float32 `[..., d]`.
      count: int32, broadcastable against `[..., 1]`, 0 to d; traced: one program serves every count.
      unused: as in `smallest_kept`.

    Returns:
      bool `[..., d]`, exactly `count` True in each row.
    """
    bits = patterns(score)
    last = smallest_kept(bits, count, unused)
    above, equal = bits > last, bits == last
    left = count - jnp.sum(above, axis=-1, keepdims=True, dtype=jnp.int32)
    return above | (equal & (jnp.cumsum(equal, axis=-1, dtype=jnp.int32) <= left))


def unused_bits(dtype: jax.typing.DTypeLike) -> int:
    """Lowest bits of the float32 patterns that are 0 in all numbers of `dtype`."""
    return UNUSED_BITS.get(np.dtype(dtype), 0)
