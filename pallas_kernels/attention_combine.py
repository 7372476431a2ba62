"""Inside the last program of a kv head: the outputs of its query heads, from all shares of the context."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.attention_tile import LOWEST, Sizes, load
from pallas_kernels.launch import power_of_two

IN_FLIGHT = 128
"""Partial outputs that a thread loads together: registers."""


def combine(sizes: Sizes, g: jax.Array, b: int, shares: jax.Array, partials: Any) -> jax.Array:
    """`sum over shares of weight * output / sum of weights`, float32 `[power_of_two(group * head_dim)]`.

    The heads of a kv head are one vector: every thread adds up channels of its own, over all shares.

    Args:
      sizes: static.
      g: int32 scalar, kv head.
      b: row of the batch.
      shares: int32 scalar, the shares that may hold something: the first ones.
      partials: refs, as `attend` writes them.
    """
    accs, weights = partials
    # Vectors within a head, as wide as a load.
    vector = math.gcd(sizes.head_dim, 4)
    lanes = power_of_two(sizes.channels)
    chunk = min(sizes.splits, max(1, IN_FLIGHT * 32 * sizes.warps // lanes))
    part = jnp.arange(chunk, dtype=jnp.int32)[:, None, None]
    first = (jnp.arange(lanes // vector, dtype=jnp.int32) * vector)[None, :, None]
    exists = None if lanes == sizes.channels else first < sizes.channels
    lane = first + jnp.arange(vector, dtype=jnp.int32)[None, None, :]
    shape = (chunk, lanes // vector, vector)

    def add(c: jax.Array | int, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, out = sums
        split = c * chunk + part
        acc = load(accs.at[g, split, b, lane], shape, exists)
        weight = load(weights.at[g, split, b, lax.div(first, sizes.head_dim)], (*shape[:2], 1), exists)
        higher = jnp.maximum(top, jnp.max(weight, axis=0, keepdims=True))
        fade, weight = jnp.exp2(top - higher), jnp.exp2(weight - higher)
        total = total * fade + jnp.sum(weight, axis=0, keepdims=True)
        return higher, total, out * fade + jnp.sum(acc * weight, axis=0, keepdims=True)

    one = (1, lanes // vector, 1)
    sums: Any = (jnp.full(one, LOWEST), jnp.zeros(one), jnp.zeros((1, *shape[1:])))
    if chunk == sizes.splits:
        sums = add(0, sums)
    else:
        sums = lax.fori_loop(0, lax.div(shares + (chunk - 1), chunk), add, sums)
    _, total, out = sums
    return jnp.reshape(out / total, (lanes,))
