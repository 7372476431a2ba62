"""`y = W^T x` for one to eight tokens, reading only kept rows: the kernel under every projection."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.checks import check_dtype, check_weights, expect
from pallas_kernels.coded import CodedMatrix, Matrix
from pallas_kernels.kept import KeptRows
from pallas_kernels.launch import launch
from pallas_kernels.reference import matmul
from pallas_kernels.registers import begin
from pallas_kernels.row_reader import RowReader, rescale, row_reader
from pallas_kernels.row_sum import Sums, lists_of_split, sum_dense_rows, sum_kept_rows
from pallas_kernels.split import add_partials, last_to_finish, tile_columns
from pallas_kernels.tiles import Tile

type Rows = KeptRows | jax.Array
"""What a matvec multiplies W by: kept channels with their values, or all of x `[batch, d_in]`."""


def real_splits(rows: Rows, tile: Tile) -> Tile:
    """`tile` with the splits that kept lists allow: a divisor of the lists, or a multiple of them."""
    if not isinstance(rows, KeptRows):
        return tile
    lists = rows.index.shape[1]
    own, parts = lists_of_split(lists, tile.splits)
    return dataclasses.replace(tile, splits=lists * parts if parts > 1 else -(-lists // own))


def program_sums(rows: Any, segment: int, split: jax.Array, tile: Tile, read: RowReader) -> Sums:
    """Inside a kernel: this program's share of one column tile."""
    split = begin(split, tile.registers, release=False)
    if isinstance(rows, KeptRows):
        return sum_kept_rows(rows, segment, split, tile, read)
    return sum_dense_rows(rows, split, tile, read)


@functools.partial(jax.jit, static_argnames=("tile", "out_dtype", "interpret"))
def matvec(
    rows: Rows,
    weights: Sequence[Matrix],
    counters: jax.Array,
    *,
    tile: Tile,
    biases: Sequence[jax.Array] | None = None,
    residual: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`y_s = sum over kept i of x_i W_s[i, :]` for every segment s, side by side in one output.

    Args:
      rows: kept channels, one segment for each of `weights`; or all of x `[batch, d_in]`.
      weights: `[d_in, d_out_s]` each, of one dtype; or `CodedMatrix`.
      counters: int32 zeros, one or more for each column tile; updated in place, zeros again afterwards.
      tile: how the work is cut.
      biases: `[d_out_s]` each, of the weights' dtype or float32, added to the sums before they are rounded.
      residual: `[batch, sum d_out]`, added after they are rounded.
      out_dtype: of y; None: of the weights.
      interpret: run as plain jax, on any device.

    Returns:
      y `[batch, sum of d_out_s]`, summed in float32 in a fixed order, and the counters.

    Raises:
      TypeError, ValueError: arguments that do not fit together, or a size that the kernel does not take.
    """
    check_weights(rows, weights, biases, tile, counters)
    out_dtype = jnp.dtype(out_dtype or weights[0].dtype)
    batch = rows.batch if isinstance(rows, KeptRows) else rows.shape[0]
    tile = real_splits(rows, tile)
    widths = [w.shape[1] for w in weights]
    tiles = [pl.cdiv(width, tile.columns) for width in widths]
    num_out = sum(widths)
    check_dtype("out_dtype", out_dtype)
    if residual is not None:
        expect("residual", residual, (batch, num_out), out_dtype)

    def kernel(
        rows: Any, weights: Any, counters_in: Any, biases: Any, residual: Any,
        y: Any, partials: Any, counters: Any,
    ) -> None:  # fmt: skip
        n, split = pl.program_id(0), pl.program_id(1)
        for s, weight in enumerate(weights):
            start, offset = sum(tiles[:s]), sum(widths[:s])

            @pl.when((n >= start) & (n < start + tiles[s]))
            def _(s: int = s, weight: Any = weight, start: int = start, offset: int = offset) -> None:
                cols, exists = tile_columns(n - start, tile.columns, widths[s])
                sums = program_sums(rows, s, split, tile, row_reader(weight, n - start, tile.columns))
                for b, total in enumerate(sums):
                    plgpu.store(partials.at[split, b, offset + cols], total, mask=exists)

                @pl.when(last_to_finish(counters, n, tile.splits, interpret))
                def _() -> None:
                    for b in range(batch):
                        total = rescale(weight, add_partials(partials, b, offset + cols, exists), cols, exists)
                        if biases is not None:
                            total += plgpu.load(biases[s].at[cols], mask=exists).astype(jnp.float32)
                        total = total.astype(out_dtype)
                        if residual is not None:
                            total += plgpu.load(residual.at[b, offset + cols], mask=exists)
                        plgpu.store(y.at[b, offset + cols], total, mask=exists)

    inputs = (rows, tuple(weights), counters, None if biases is None else tuple(biases), residual)
    y, _, counters = launch(
        kernel,
        inputs,
        out=(
            jax.ShapeDtypeStruct((batch, num_out), out_dtype),
            jax.ShapeDtypeStruct((tile.splits, batch, num_out), jnp.float32),
            jax.ShapeDtypeStruct(counters.shape, counters.dtype),
        ),
        grid=(sum(tiles), tile.splits),
        warps=tile.warps,
        name="kept_matvec" if isinstance(rows, KeptRows) else "dense_matvec",
        aliases={len(jax.tree.leaves((rows, tuple(weights)))): 2},
        interpret=interpret,
    )
    return y, counters


def matvec_reference(
    rows: Rows,
    weights: Sequence[Matrix],
    *,
    biases: Sequence[jax.Array] | None = None,
    residual: jax.Array | None = None,
    out_dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """`matvec` in plain jnp."""
    out_dtype = out_dtype or weights[0].dtype
    parts = []
    for s, weight in enumerate(weights):
        x = scatter(rows, s, weight)
        if isinstance(weight, CodedMatrix):
            x, weight = x.astype(jnp.float32), weight.decode()
        y = matmul(x, weight, out_dtype=jnp.float32)
        if biases is not None:
            y += biases[s].astype(jnp.float32)
        parts.append(y.astype(out_dtype))
    y = jnp.concatenate(parts, axis=-1)
    return y if residual is None else y + residual


def scatter(rows: Rows, segment: int, weight: Matrix) -> jax.Array:
    """x `[batch, d_in]` with zeros where it is not kept, in the dtype of `weight`."""
    if not isinstance(rows, KeptRows):
        return rows
    kept = jnp.arange(rows.index.shape[-1]) < rows.count[segment][:, None]
    index = jnp.where(kept, rows.index[segment], weight.shape[0])
    x = jnp.zeros((rows.batch, weight.shape[0]), weight.dtype)
    return x.at[:, index].set(rows.value[segment].transpose(1, 0, 2).astype(weight.dtype), mode="drop")
