"""Inside a kernel: one program's share of a token's attention, and the cache's new slot."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.attention_tile import LOWEST, Sizes, both, load, store
from pallas_kernels.launch import power_of_two
from pallas_kernels.reference import matmul

DOT = 16
"""The least size of a tensor core's operand; what is smaller is padded."""

type Tiles = tuple[jax.Array, jax.Array, jax.Array]
"""A block of the cache: the two halves of the keys, transposed, `[half, block]`, and the values `[block, dim]`."""


def attend(
    sizes: Sizes,
    program: tuple[jax.Array, jax.Array, jax.Array],
    qkv: Any,
    rotary: Any,
    tokens: jax.Array,
    keys: Any,
    values: Any,
    partials: Any,
) -> None:
    """Write the outputs of the query heads of one kv head over one share, and log2 of the sum of `exp(score)`.

    Keys and queries are taken in halves, which rope turns against each other, so that none is put together again.

    Args:
      sizes: static.
      program: kv head, split, row of the batch.
      qkv: ref, as `decode_attention` takes it.
      rotary: as qkv.
      tokens: int32 scalar, of this row in the cache.
      keys: as qkv.
      values: as qkv.
      partials: refs, float32 `[kv_heads, splits, batch, group * head_dim]` and `[kv_heads, splits, batch, group]`.
    """
    g, split, b = program
    dim, half, group = sizes.head_dim, sizes.head_dim // 2, sizes.group
    channel, exists = lanes(half)
    wide, wide_exists = lanes(dim)
    head = jnp.arange(max(DOT, power_of_two(group)), dtype=jnp.int32)[:, None]

    def fetch(s: jax.Array, there: jax.Array) -> Tiles:
        down = channel.T
        mask = both(there[None, :], None if exists is None else exists.T)
        shape = (down.shape[0], sizes.block)
        return (
            load(keys.at[b, s[None, :], g, down], shape, mask),
            load(keys.at[b, s[None, :], g, half + down], shape, mask),
            load(values.at[b, s[:, None], g, wide], (sizes.block, wide.shape[1]), both(there[:, None], wide_exists)),
        )

    cos, sin = (load(table.at[b, channel], channel.shape, exists) for table in rotary)

    def turned(first: jax.Array, shape: tuple[int, ...], mask: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        x1 = load(qkv.at[b, first + channel], shape, mask).astype(jnp.float32)
        x2 = load(qkv.at[b, first + half + channel], shape, mask).astype(jnp.float32)
        # Rounded as the model rounds.
        return (x1 * cos - x2 * sin).astype(qkv.dtype), (x2 * cos + x1 * sin).astype(qkv.dtype)

    key = sizes.kv_heads * group + g
    q1, q2 = turned((g * group + head) * dim, (head.shape[0], channel.shape[1]), both(head < group, exists))
    k1, k2 = turned(key * dim, channel.shape, exists)
    v = load(qkv.at[b, (key + sizes.kv_heads) * dim + wide], wide.shape, wide_exists)
    first = split == 0

    @pl.when(first)
    def _() -> None:
        slot = lax.rem(tokens, sizes.slots)
        store(keys.at[b, slot, g, channel], k1, exists)
        store(keys.at[b, slot, g, half + channel], k2, exists)
        store(values.at[b, slot, g, wide], v, wide_exists)

    scale = dim**-0.5 * math.log2(math.e)  # exp2 is what a GPU has
    product = functools.partial(matmul, out_dtype=jnp.float32)
    new = [x.astype(jnp.float32) * k.astype(jnp.float32) for x, k in ((q1, k1), (q2, k2))]
    top = jnp.where(first, jnp.sum(new[0] + new[1], axis=1) * scale, LOWEST)
    total = jnp.where(first, jnp.ones_like(top), 0.0)
    acc = jnp.broadcast_to(jnp.where(first, v.astype(jnp.float32), 0.0), (head.shape[0], wide.shape[1]))

    def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        top, total, acc = carry
        slots = (split + i * sizes.splits) * sizes.block + jnp.arange(sizes.block, dtype=jnp.int32)
        mask = sizes.seen(slots, tokens)
        old1, old2, old_v = fetch(slots, mask)
        scores = jnp.where(mask[None, :], (product(q1, old1) + product(q2, old2)) * scale, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - higher[:, None])
        fade = jnp.exp2(top - higher)
        acc = acc * fade[:, None] + product(weights.astype(old_v.dtype), old_v)
        return higher, total * fade + jnp.sum(weights, axis=1), acc

    # Every splits-th block: shares differ by one block at most, whatever the length.
    steps = lax.div(sizes.blocks(tokens) + (sizes.splits - 1) - split, sizes.splits)
    top, total, acc = lax.fori_loop(0, steps, step, (top, total, acc))

    # A share in which nothing is seen: 0, of weight exp2(-inf).
    out = acc / jnp.maximum(total, 1e-30)[:, None]
    there = head < group
    store(partials[0].at[g, split, b, head * dim + wide], out, both(there, wide_exists))
    store(partials[1].at[g, split, b, head], (top + jnp.log2(total))[:, None], there)


def lanes(size: int) -> tuple[jax.Array, jax.Array | None]:
    """Indices `[1, size]`, padded to what a tensor core takes, and which of them exist (None: all)."""
    padded = max(DOT, power_of_two(size))
    lane = jnp.arange(padded, dtype=jnp.int32)[None, :]
    return lane, None if padded == size else lane < size
