"""The kept rows of a top-K gate: of each token the K channels of largest |x|, as lists."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.checks import check_batch, check_cut, check_width
from pallas_kernels.eight_bits import eight_bits
from pallas_kernels.kept import Cut, KeptRows, kept_shapes, list_reference, write_lists
from pallas_kernels.launch import launch, power_of_two, whole_lists
from pallas_kernels.registers import begin
from pallas_kernels.top_k import largest_patterns, patterns, smallest_kept, top_k_mask, unused_bits


@functools.partial(jax.jit, static_argnames=("width", "block", "int8", "interpret"))
def select_largest(
    x: jax.Array,
    cut: Cut,
    *,
    width: int = 256,
    block: int | None = None,
    int8: bool = False,
    interpret: bool = False,
) -> KeptRows:
    """The `count` channels of largest `scale_i |x_i|`, as lists of `width` neighbouring channels.

    Exactly `count` for each row of the batch, of equal ones the lower channels, a NaN before all others. Every program
    searches all of x for the smallest kept pattern, which costs it less than waiting for another kernel to do so; with
    blocks, only its own list.

    Args:
      x: `[batch, d_in]`, batch at most 8.
      cut: int32 counts, 0 to d_in, in the place of thresholds.
      width: channels a list, a power of two.
      block: `count` of every `block` neighbouring channels, a power of two that divides d_in and `width`; None: of all.
      int8: x is quantised first, by `eight_bits`.
      interpret: run as plain jax, on any device.

    Raises:
      TypeError, ValueError: a dtype or size that the kernel does not take.
    """
    check_batch("x", x)
    check_width(width)
    batch, d_in = x.shape
    check_cut(cut, d_in, dtype=jnp.int32)
    lists, whole, segments = whole_lists(d_in, width), power_of_two(d_in), len(cut.projections)
    unused = unused_bits(x.dtype) if cut.scales is None else 0
    if block is not None and (block < 1 or block & (block - 1) or d_in % block or width % block):
        raise ValueError(f"block: expected a power of two that divides {d_in} and {width}, got {block}")

    def kernel(x: Any, cut: Any, out: Any) -> None:
        which = begin(pl.program_id(0))
        first = which * width
        counts = cut.read()

        def read(channels: jax.Array, exists: jax.Array | None) -> list[jax.Array]:
            """x of every row."""
            other = None if exists is None else 0.0
            return [plgpu.load(x.at[b, channels], mask=exists, other=other).astype(jnp.float32) for b in range(batch)]

        def score(xs: list[jax.Array], channels: jax.Array, exists: jax.Array | None) -> list[list[jax.Array]]:
            """By row the patterns for each segment, -1 where there is no channel."""
            scales = cut.read_scales(channels, exists)
            found = []
            for row in xs:
                bits = [patterns(row)] if scales is None else [patterns(row * scale) for scale in scales]
                bits = bits if exists is None else [jnp.where(exists, each, -1) for each in bits]
                found.append(bits * segments if scales is None else bits)
            return found

        lane = jnp.arange(whole, dtype=jnp.int32)
        channels = first + jnp.arange(width, dtype=jnp.int32)
        exists = None if whole == d_in else lane < d_in
        valid = None if d_in % width == 0 else channels < d_in
        rows, xs = [] if block and not int8 else read(lane, exists), read(channels, valid)
        if int8:
            tops = [jnp.max(jnp.abs(row)) for row in rows]
            rows, xs = ([_coded(each, top, x.dtype) for each, top in zip(of, tops, strict=True)] for of in (rows, xs))
        own_bits = score(xs, channels, valid)
        keeps: list[list[jax.Array]] = [[] for _ in range(segments)]
        if block is not None:
            for own in own_bits:
                for s in range(segments):
                    keeps[s].append(_largest_of_blocks(own[s], counts[s], block, unused))
            write_lists(out, which, first, xs, keeps)
            return
        for bits, own in zip(score(rows, lane, exists), own_bits, strict=True):
            lasts = smallest_kept(functools.partial(_at_least, bits), counts, unused)
            aboves = _numbers([each > last for each, last in zip(bits, lasts, strict=True)])
            earlier = _numbers([(each == last) & (lane < first) for each, last in zip(bits, lasts, strict=True)])
            for s in range(segments):
                equal = own[s] == lasts[s]
                rank = jnp.cumsum(equal.astype(jnp.int32)) + earlier[s]
                keeps[s].append((own[s] > lasts[s]) | (equal & (rank <= counts[s] - aboves[s])))
        write_lists(out, which, first, xs, keeps)

    out = kept_shapes(segments, lists, batch, width)
    warps = 4 if whole <= 4096 else 8
    (rows,) = launch(kernel, (x, cut), out=(out,), grid=(lists,), warps=warps, name="top_k", interpret=interpret)
    return rows


def _coded(x: jax.Array, largest: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """`eight_bits`, rounded to the dtype that x has outside the kernel."""
    return eight_bits(x, largest).astype(dtype).astype(jnp.float32)


def _largest_of_blocks(bits: jax.Array, count: jax.Array, block: int, unused: int) -> jax.Array:
    """`largest_patterns` of every `block` of the patterns `[width]`, bool `[width]`."""
    kept = largest_patterns(jnp.reshape(bits, (-1, block)), count, unused)
    return jnp.reshape(kept.astype(jnp.int32), bits.shape) != 0


def _at_least(bits: Sequence[jax.Array], lows: Sequence[jax.Array]) -> list[jax.Array]:
    return _numbers([each >= low for each, low in zip(bits, lows, strict=True)])


def _numbers(masks: Sequence[jax.Array]) -> list[jax.Array]:
    """How many are True in each, int32 scalars; as in `write_lists`, several share one sum."""
    bits = masks[0].shape[0].bit_length()
    together = 31 // bits
    counts = []
    for start in range(0, len(masks), together):
        part = masks[start : start + together]
        packed = sum((mask.astype(jnp.int32) << (i * bits) for i, mask in enumerate(part)), jnp.int32(0))
        total = jnp.sum(packed)
        counts += [(total >> (i * bits)) & ((1 << bits) - 1) for i in range(len(part))]
    return counts


def select_largest_reference(
    x: jax.Array, cut: Cut, *, width: int = 256, block: int | None = None, int8: bool = False
) -> KeptRows:
    """`select_largest` in plain jnp."""
    dtype, x = x.dtype, x.astype(jnp.float32)
    if int8:
        x = _coded(x, jnp.max(jnp.abs(x), axis=-1, keepdims=True), dtype)
    score = jnp.stack([x if cut.scales is None else x * cut.scales[s] for s in range(len(cut.projections))])
    blocks = score.reshape(*score.shape[:2], -1, block or x.shape[1])
    return list_reference(x, top_k_mask(blocks, cut.values[:, None, None, None]).reshape(score.shape), width)
