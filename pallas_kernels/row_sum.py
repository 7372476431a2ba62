"""Inside a kernel: the sum of weighted rows of W over one tile of output columns, many rows in flight."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.row_reader import RowReader
from pallas_kernels.tiles import Tile

type Sums = tuple[jax.Array, ...]
"""Float32 `[columns]` of every batch row."""


def sum_kept_rows(rows: Any, segment: int, split: jax.Array, tile: Tile, read: RowReader) -> Sums:
    """`sum over entries j of value_j W[index_j, columns]`, over the lists that `split` of `tile.splits` owns.

    `rows` is a `KeptRows` of refs.

    A split owns whole lists where there are enough, and every `parts`-th group of rows of one list otherwise.
    Several lists advance together, so that `tile.unroll` groups of rows are in flight whatever a list's length.
    """
    lists, batch, _ = rows.value.shape[1:]
    own, parts = lists_of_split(lists, tile.splits)
    first, part = (split * own, 0) if parts == 1 else (lax.div(split, parts), lax.rem(split, parts))
    # As many at once as are in flight, in equal groups.
    groups = pl.cdiv(own, tile.unroll)
    together = pl.cdiv(own, groups)
    ahead = max(1, tile.unroll // together)
    lane = jnp.arange(tile.rows, dtype=jnp.int32)

    def some_lists(g: jax.Array | int, sums: Sums) -> Sums:
        numbers = [first + g * together + v for v in range(together)]
        # Past the end there are no lists; the last one is looked at again, as empty.
        ids = [jnp.minimum(n, lists - 1) for n in numbers]
        counts = [jnp.where(n < lists, rows.count[segment, i], 0) for n, i in zip(numbers, ids, strict=True)]
        if own % together:
            counts = [jnp.where(g * together + v < own, n, 0) for v, n in enumerate(counts)]
        longest = counts[0]
        for n in counts[1:]:
            longest = jnp.maximum(longest, n)

        def step(i: jax.Array | int, sums: Sums) -> Sums:
            loaded = []
            for which, count in zip(ids, counts, strict=True):
                for a in range(ahead):
                    entry = ((i * ahead + a) * parts + part) * tile.rows + lane
                    used = entry < count
                    channels = plgpu.load(rows.index.at[segment, which, entry], mask=used, other=0)
                    xs = [
                        plgpu.load(rows.value.at[segment, which, b, entry], mask=used, other=0.0) for b in range(batch)
                    ]
                    loaded.append((read.load(channels, used), xs))
            return add_rows(read, sums, loaded)

        return lax.fori_loop(0, pl.cdiv(longest, ahead * parts * tile.rows), step, sums)

    sums = tuple(read.zeros(tile.rows) for _ in range(batch))
    sums = some_lists(0, sums) if groups == 1 else lax.fori_loop(0, groups, some_lists, sums)
    return tuple(read.total(s) for s in sums)


def sum_dense_rows(x: Any, split: jax.Array, tile: Tile, read: RowReader) -> Sums:
    """`sum over i of x_i W[i, columns]`, over the share of `split`; x is a ref `[batch, d_in]`."""
    batch, d_in = x.shape
    step_rows = tile.rows * tile.unroll
    share = -(-d_in // (tile.splits * step_rows)) * step_rows
    even = d_in == tile.splits * share
    lane = jnp.arange(tile.rows, dtype=jnp.int32)

    def step(i: jax.Array, sums: Sums) -> Sums:
        loaded = []
        for u in range(tile.unroll):
            channels = split * share + (i * tile.unroll + u) * tile.rows + lane
            used = None if even else channels < d_in
            xs = [
                plgpu.load(x.at[b, channels], mask=used, other=None if even else 0.0).astype(jnp.float32)
                for b in range(batch)
            ]
            loaded.append((read.load(channels, used), xs))
        return add_rows(read, sums, loaded)

    steps = share // step_rows if even else pl.cdiv(jnp.clip(d_in - split * share, 0, share), step_rows)
    sums = tuple(read.zeros(tile.rows) for _ in range(batch))
    sums = lax.fori_loop(0, steps, step, sums)
    return tuple(read.total(s) for s in sums)


def add_rows(read: RowReader, sums: tuple[Any, ...], loaded: list[tuple[Any, list[jax.Array]]]) -> tuple[Any, ...]:
    """Running sums plus `x * W`, in this order, for every batch row."""
    for weights, xs in loaded:
        sums = read.add(sums, weights, xs)
    return sums


def lists_of_split(lists: int, splits: int) -> tuple[int, int]:
    """Lists that a split owns, and the splits that share one list: one of the two is 1.

    About `splits` splits in all; as even as the number of lists allows.
    """
    if splits > lists:
        return 1, splits // lists

    def unevenness(own: int) -> float:
        real = -(-lists // own)
        return (own * real / lists) ** 4 * max(real / splits, splits / real) ** 0.5

    return min(range(1, lists + 1), key=unevenness), 1
