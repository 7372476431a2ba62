"""The K largest of a vector, exactly and without sorting: their smallest is found bit by bit.

Float32 patterns of numbers >= 0 are ordered as the numbers are, so that a pattern is a threshold. Each bit costs one
count over the vector: 31 in all, or 15 where the numbers came from bfloat16 and the lower bits are 0.
"""

from collections.abc import Callable, Sequence
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
    bits = jax.lax.bitcast_convert_type(score, jnp.int32) & 0x7FFFFFFF
    return jnp.where(bits > INFINITY, NAN, bits)


def smallest_kept(
    at_least: Callable[[Sequence[jax.Array]], Sequence[jax.Array]], counts: Sequence[jax.Array], unused: int = 0
) -> Sequence[jax.Array]:
    """For each count K the K-th largest of some patterns, int32; a pattern above all of them where K is 0.

    Args:
      at_least: takes patterns, one for each count, and says of how many the patterns are at least that.
      counts: int32, 0 to the number of patterns.
      unused: lowest bits that are 0 in all patterns.
    """

    def step(i: Any, found: Sequence[jax.Array]) -> list[jax.Array]:
        higher = [low | (jnp.int32(1) << (30 - i)) for low in found]
        return [
            jnp.where(many >= count, high, low)
            for low, high, many, count in zip(found, higher, at_least(higher), counts, strict=True)
        ]

    return jax.lax.fori_loop(0, 31 - unused, step, [jnp.zeros_like(count) for count in counts])


def top_k_mask(score: jax.Array, count: jax.Array, unused: int = 0) -> jax.Array:
    """The `count` largest `|score|` along the last axis; of equal ones the lower index, NaN before all others.

    Args:
      score: float32 `[..., d]`.
      count: int32, broadcastable against `[..., 1]`, 0 to d; traced: one program serves every count.
      unused: as in `smallest_kept`.

    Returns:
      bool `[..., d]`, exactly `count` True in each row.
    """
    return largest_patterns(patterns(jax.lax.stop_gradient(score)), count, unused)


def largest_patterns(bits: jax.Array, count: jax.Array, unused: int = 0) -> jax.Array:
    """`top_k_mask` of patterns `[..., d]`; one below 0 is never kept."""

    def number(mask: jax.Array) -> jax.Array:
        return jnp.sum(mask.astype(jnp.int32), axis=-1, keepdims=True)

    count = jnp.broadcast_to(count, (*bits.shape[:-1], 1))
    (last,) = smallest_kept(lambda lows: [number(bits >= low) for low in lows], [count], unused)
    above, equal = bits > last, bits == last
    return above | (equal & (jnp.cumsum(equal.astype(jnp.int32), axis=-1) <= count - number(above)))


def unused_bits(dtype: jax.typing.DTypeLike) -> int:
    """Lowest bits of the float32 patterns that are 0 in all numbers of `dtype`."""
    return UNUSED_BITS.get(np.dtype(dtype), 0)
