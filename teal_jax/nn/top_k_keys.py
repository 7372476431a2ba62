"""Top-K of many tokens in few passes over them: magnitude and index in one key, its digits found one after another."""

import jax
import jax.numpy as jnp

from pallas_kernels.top_k import patterns, top_k_mask, unused_bits

DIGIT = 2
"""Bits that a pass decides, by `2 ** DIGIT - 1` counts of what it reads once."""


def keep_largest(x: jax.Array, count: jax.Array) -> jax.Array:
    """The `count` largest `|x|` along the last axis; of equal ones the lower index, NaN before all others.

    As `top_k_mask`, bit for bit. Where the dtype leaves the lowest bits of its float32 patterns free, they hold the
    index: no two keys are equal, so that no running count has to tell ties apart, and a mask is one comparison.

    Args:
      x: `[..., d]`.
      count: int32, broadcastable against `[..., 1]`, 1 to d; traced.

    Returns:
      bool `[..., d]`, exactly `count` True in each row.
    """
    x = jax.lax.stop_gradient(x)
    free, width = unused_bits(x.dtype), (x.shape[-1] - 1).bit_length()
    score = x.astype(jnp.float32)
    if width >= free:
        return top_k_mask(score, count, free)
    backwards = (1 << width) - 1 - jnp.arange(x.shape[-1], dtype=jnp.int32)
    keys = (patterns(score) >> (free - width)) | backwards
    smallest = jnp.zeros((*x.shape[:-1], 1), jnp.int32)
    digits = jnp.arange(1, 1 << DIGIT, dtype=jnp.int32)
    for shift in reversed(range(0, 31 - free + width, DIGIT)):
        # Counts fall as the digit grows: how many of them reach K is the digit.
        above = keys[..., None, :] >= smallest[..., None] + (digits << shift)[:, None]
        reached = jnp.sum(above, axis=-1, dtype=jnp.int32) >= count
        smallest += jnp.sum(reached, axis=-1, keepdims=True, dtype=jnp.int32) << shift
    return keys >= smallest
