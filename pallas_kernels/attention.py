"""Attention of one new token a sequence: rope, cache write, context split over programs, kept rows for o."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.attention_combine import combine
from pallas_kernels.attention_share import DOT, attend
from pallas_kernels.attention_tile import LOWEST, Sizes
from pallas_kernels.checks import check_cut
from pallas_kernels.kept import Cut, KeptRows, kept_shapes, select_reference, write_kept
from pallas_kernels.launch import launch, power_of_two
from pallas_kernels.registers import begin
from pallas_kernels.split import last_to_finish
from pallas_kernels.support import FLOATS, MAX_BATCH

PROGRAMS = 256
"""Programs that share a long context: about two for each multiprocessor of an H200."""

STAGES = 3
"""Blocks of keys and values that a program has on their way to shared memory, the one in use included."""


def context_block(head_dim: int, dtype: jax.typing.DTypeLike) -> int:
    """Slots a step, a power of two: 64 of 128 channels in bfloat16, whose keys and values are 32 kB a stage."""
    return max(DOT, min(128, 16384 // (power_of_two(head_dim) * jnp.dtype(dtype).itemsize)))


def context_splits(slots: int, kv_heads: int, batch: int, block: int) -> int:
    """Programs that share a context, a power of two: at most `PROGRAMS` in all, and a block each.

    A program's time is its blocks, the time of the last one, which adds up, the programs: the root of the blocks
    balances them. 8 of 512 slots, 16 of 2048, 32 of 8192 were the best of those timed on an H200.
    """
    blocks = pl.cdiv(slots, block)
    most = max(1, min(blocks, math.isqrt(8 * blocks), PROGRAMS // (kv_heads * batch)))
    return 1 << (most.bit_length() - 1)


@functools.partial(jax.jit, static_argnames=("num_heads", "window", "splits", "block", "warps", "interpret"))
def decode_attention(
    qkv: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    length: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    counters: jax.Array,
    cut: Cut | None,
    *,
    num_heads: int,
    window: int | None = None,
    splits: int | None = None,
    block: int | None = None,
    warps: int = 4,
    interpret: bool = False,
) -> tuple[KeptRows | jax.Array, jax.Array, jax.Array, jax.Array]:
    """`softmax(q k^T / sqrt(head_dim)) v` of one new token a sequence, over the cache and the token itself.

    Slot s holds the newest position p < length with `p % slots == s`. Seen are distances `length - p` below the
    window and below `slots`: the new token takes the slot of the position that is `slots` away. What slots that are
    not seen hold has no effect, NaN included.

    Args:
      qkv: `[batch, (num_heads + 2 * kv_heads) * head_dim]`, before rope: query heads, key heads, value heads.
      rotary: cosine and sine of the new position's angles, float32 `[batch, head_dim / 2]` each.
      length: int32 `[batch]`, tokens in the cache: the new token's position.
      keys: `[batch, slots, kv_heads, head_dim]`, the dtype of qkv; slot `length % slots` is written, in place where
        the caller's jit is given the buffer.
      values: as keys.
      counters: int32 zeros, one or more for each kv head; updated in place, zeros again afterwards.
      cut: one threshold; None: dense.
      num_heads: query heads, a multiple of the kv heads.
      window: positions seen, the new one included; None: all.
      splits: programs that share a context, a power of two; None: `context_splits`.
      block: slots a step, a power of two; None: `context_block`.
      warps: of a program.
      interpret: run as plain jax, on any device.

    Returns:
      attn_out's kept rows, one list for the query heads of a kv head, or, dense, attn_out
      `[batch, num_heads * head_dim]`; keys, values, counters.

    Raises:
      TypeError: dtypes that do not fit together.
      ValueError: shapes that do not fit together, or a size that the kernel does not take.
    """
    _check((qkv, rotary, length, keys, values, counters), cut, num_heads, window)
    batch, slots, kv_heads, dim = keys.shape
    block = context_block(dim, qkv.dtype) if block is None else block
    splits = context_splits(slots, kv_heads, batch, block) if splits is None else splits
    for name, size, least in (("block", block, DOT), ("splits", splits, 1)):
        if size < least or size & (size - 1):
            raise ValueError(f"{name}: expected a power of two >= {least}, got {size}")
    group, limit = num_heads // kv_heads, min(window or slots, slots)
    sizes = Sizes(batch, slots, kv_heads, dim, group, limit, splits, block, warps)
    width = power_of_two(sizes.channels)

    def kernel(
        keys_in: Any, values_in: Any, counters_in: Any, qkv: Any, rotary: Any, length: Any, cut: Any,
        keys: Any, values: Any, counters: Any, out: Any, partials: Any,
    ) -> None:  # fmt: skip
        g, split, row = begin(pl.program_id(0)), pl.program_id(1), pl.program_id(2)
        # What the last program needs of the inputs is loaded before it waits for the counter.
        shares = [jnp.clip(sizes.blocks(length[b]), 1, sizes.splits) for b in range(batch)]
        thresholds = None if cut is None else cut.read()
        attend(sizes, (g, split, row), qkv, rotary, length[row], keys, values, partials)

        @pl.when(last_to_finish(counters, g, splits * batch, interpret))
        def _() -> None:
            xs = [combine(sizes, g, b, shares[b], partials).astype(qkv.dtype) for b in range(batch)]
            lane, first = jnp.arange(width, dtype=jnp.int32), g * sizes.channels
            valid = None if width == sizes.channels else lane < sizes.channels
            if thresholds is not None:
                scales = cut.read_scales(first + lane, valid)
                write_kept(out, g, first, [x.astype(jnp.float32) for x in xs], thresholds, valid, scales)
                return
            for b, x in enumerate(xs):
                plgpu.store(out.at[b, first + lane], x, mask=valid)

    shape = jax.ShapeDtypeStruct
    dense = shape((batch, num_heads * dim), qkv.dtype)
    sums = (kv_heads, splits, batch)
    keys, values, counters, out, _ = launch(
        kernel,
        (keys, values, counters, qkv, rotary, length, cut),
        out=(
            *(shape(x.shape, x.dtype) for x in (keys, values, counters)),
            dense if cut is None else kept_shapes(1, kv_heads, batch, width),
            (shape((*sums, sizes.channels), jnp.float32), shape((*sums, group), jnp.float32)),
        ),
        # Neighbouring programs read neighbouring heads of the same slots: whole rows of the cache at a time.
        grid=(kv_heads, splits, batch),
        warps=warps,
        name="decode_attention",
        stages=STAGES,
        aliases={0: 0, 1: 1, 2: 2},
        interpret=interpret,
    )
    return out, keys, values, counters


def _check(arrays: tuple[Any, ...], cut: Cut | None, num_heads: int, window: int | None) -> None:
    """Raise where the arguments of `decode_attention` do not fit together."""
    qkv, rotary, length, keys, values, counters = arrays
    if keys.ndim != 4:
        raise ValueError(f"keys: expected [batch, slots, kv_heads, head_dim], got {keys.shape}")
    batch, slots, kv_heads, dim = keys.shape
    if not 1 <= batch <= MAX_BATCH:
        raise ValueError(f"batch: expected 1 to {MAX_BATCH}, got {batch}")
    if not slots or not kv_heads:
        raise ValueError(f"keys: expected at least one slot and one kv head, got {keys.shape}")
    if dim % 2 or not 2 <= dim <= 256:
        raise ValueError(f"head_dim: expected an even number up to 256, got {dim}")
    if num_heads < 1 or num_heads % kv_heads:
        raise ValueError(f"num_heads: expected a multiple of {kv_heads} kv heads, got {num_heads}")
    if window is not None and window < 1:
        raise ValueError(f"window: expected >= 1 or None, got {window}")
    if qkv.dtype not in FLOATS:
        raise TypeError(f"qkv: expected one of {[jnp.dtype(d).name for d in FLOATS]}, got {qkv.dtype}")
    floats, half = jnp.dtype(jnp.float32), (batch, dim // 2)
    expected = [
        ("qkv", qkv, (batch, (num_heads + 2 * kv_heads) * dim), qkv.dtype),
        ("keys", keys, keys.shape, qkv.dtype),
        ("values", values, keys.shape, qkv.dtype),
        ("cosine", rotary[0], half, floats),
        ("sine", rotary[1], half, floats),
        ("length", length, (batch,), jnp.dtype(jnp.int32)),
        ("counters", counters, counters.shape, jnp.dtype(jnp.int32)),
    ]
    check_cut(cut, num_heads * dim, 1)
    for name, array, shape, dtype in expected:
        if array.shape != shape:
            raise ValueError(f"{name}: expected shape {shape}, got {array.shape}")
        if array.dtype != dtype:
            raise TypeError(f"{name}: expected {dtype}, got {array.dtype}")
    if counters.ndim != 1 or counters.shape[0] < kv_heads:
        raise ValueError(f"counters: expected [n] with n >= {kv_heads}, got {counters.shape}")


def decode_attention_reference(
    qkv: jax.Array,
    rotary: tuple[jax.Array, jax.Array],
    length: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    cut: Cut | None,
    *,
    num_heads: int,
    window: int | None = None,
) -> tuple[KeptRows | jax.Array, jax.Array, jax.Array]:
    """`decode_attention` in plain jnp: rows, keys, values."""
    batch, slots, kv_heads, dim = keys.shape
    heads = qkv.reshape(batch, -1, dim)
    cos, sin = (table[:, None] for table in rotary)
    x1, x2 = jnp.split(heads[:, :-kv_heads].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(qkv.dtype)

    slot, row = length % slots, jnp.arange(batch)
    keys = keys.at[row, slot].set(turned[:, num_heads:])
    values = values.at[row, slot].set(heads[:, -kv_heads:])
    s = jnp.arange(slots)
    distance = (slot[:, None] - s) % slots
    seen = (s <= length[:, None]) & (distance < (window or slots))

    precision = lax.Precision.HIGHEST if qkv.dtype == jnp.float32 else None
    einsum = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    q = turned[:, :num_heads].reshape(batch, kv_heads, -1, dim)
    k, v = (jnp.where(seen[:, :, None, None], cache, 0) for cache in (keys, values))
    scores = jnp.where(seen[:, None, None], einsum("bkgd,bskd->bkgs", q, k) * dim**-0.5, LOWEST)
    out = einsum("bkgs,bskd->bkgd", jax.nn.softmax(scores, axis=-1).astype(v.dtype), v).astype(qkv.dtype)
    if cut is None:
        return out.reshape(batch, -1), keys, values
    return select_heads(out.reshape(batch, kv_heads, -1), cut.values, cut.scales), keys, values


def select_heads(x: jax.Array, thresholds: jax.Array, scales: tuple[jax.Array, ...] | None = None) -> KeptRows:
    """The kept rows of x `[batch, kv_heads, channels]`, a list for each kv head, a power of two wide.

    What a list is padded with is never kept: it stands for the next list's channels.
    """
    batch, lists, channels = x.shape
    width = power_of_two(channels)
    pad = ((0, 0), (0, 0), (0, width - channels))
    padded = jnp.pad(x, pad, constant_values=0).reshape(batch, lists * width)
    if scales is not None:
        scales = tuple(jnp.pad(s.reshape(1, lists, channels), pad).reshape(lists * width) for s in scales)
    rows = select_reference(padded, thresholds, width, scales)
    padding = jnp.arange(lists, dtype=jnp.int32)[:, None] * (width - channels)
    return dataclasses.replace(rows, index=rows.index - padding)
