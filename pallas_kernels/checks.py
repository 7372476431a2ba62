"""Arguments that do not fit are refused before a kernel is launched: it would read or write where nothing is."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pallas_kernels.kept import Cut, KeptRows, kept_shapes
from pallas_kernels.support import FLOATS, MAX_BATCH
from pallas_kernels.tiles import Tile


def check_batch(name: str, x: jax.Array) -> None:
    """Raise unless x is `[batch, d]` of a dtype and batch that the kernels take."""
    if x.ndim != 2 or not 1 <= x.shape[0] <= MAX_BATCH or not x.shape[1]:
        raise ValueError(f"{name}: expected [batch, d] with batch 1 to {MAX_BATCH}, got {x.shape}")
    check_dtype(name, x.dtype)


def check_dtype(name: str, dtype: jax.typing.DTypeLike) -> None:
    """Raise unless the kernels take `dtype`."""
    if dtype not in FLOATS:
        raise TypeError(f"{name}: expected one of {[jnp.dtype(d).name for d in FLOATS]}, got {jnp.dtype(dtype).name}")


def check_width(width: int) -> None:
    """Raise unless a list can have `width` channels."""
    if width < 1 or width & (width - 1):
        raise ValueError(f"width: expected a power of two, got {width}")


def check_cut(
    cut: Cut | None, d_in: int, segments: int | None = None, dtype: jax.typing.DTypeLike = jnp.float32
) -> None:
    """Raise unless `cut` has thresholds `[layers, projections]` of `dtype`, `segments` picked; scales `[d_in]`."""
    if cut is None:
        return
    shape = cut.thresholds.shape
    if len(shape) != 2 or cut.thresholds.dtype != dtype:
        expected = f"{jnp.dtype(dtype).name} [layers, projections]"
        raise TypeError(f"thresholds: expected {expected}, got {cut.thresholds.dtype} {shape}")
    expect("layer", cut.layer, (1,), jnp.int32)
    if not cut.projections:
        raise ValueError("thresholds: expected at least one, got none")
    if not all(0 <= p < shape[1] for p in cut.projections):
        raise ValueError(f"projections: expected each within 0..{shape[1] - 1}, got {cut.projections}")
    if segments is not None and len(cut.projections) != segments:
        raise ValueError(f"thresholds: expected one for each of {segments} segments, got {len(cut.projections)}")
    if cut.scales is not None:
        if len(cut.scales) != len(cut.projections):
            raise ValueError(f"scales: expected one for each of {len(cut.projections)} segments, got {len(cut.scales)}")
        for scale in cut.scales:
            expect("scales", scale, (d_in,), jnp.float32)


def expect(name: str, x: jax.Array, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> None:
    """Raise unless x has this shape and dtype."""
    if x.shape != shape:
        raise ValueError(f"{name}: expected {shape}, got {x.shape}")
    if x.dtype != jnp.dtype(dtype):
        raise TypeError(f"{name}: expected {jnp.dtype(dtype).name}, got {x.dtype}")


def check_weights(
    rows: KeptRows | jax.Array,
    weights: Sequence[jax.Array],
    biases: Sequence[jax.Array] | None,
    tile: Tile,
    counters: jax.Array,
) -> None:
    """Raise unless a matvec of `rows` and `weights`, cut by `tile`, is possible."""
    if not weights:
        raise ValueError("weights: expected at least one matrix, got none")
    first = weights[0]
    check_dtype("weights", first.dtype)
    for weight in weights:
        if weight.ndim != 2 or weight.shape[0] != first.shape[0] or not weight.shape[1]:
            raise ValueError(f"weights: expected [{first.shape[0]}, d_out] each, got {weight.shape}")
        if weight.dtype != first.dtype:
            raise TypeError(f"weights: expected {first.dtype} throughout, got {weight.dtype}")
    if biases is not None:
        if len(biases) != len(weights):
            raise ValueError(f"biases: expected one for each of {len(weights)} weights, got {len(biases)}")
        for bias, weight in zip(biases, weights, strict=True):
            wide = bias.dtype == jnp.float32  # the dtype of the sums will do as well
            expect("biases", bias, weight.shape[1:], jnp.float32 if wide else first.dtype)
    check_rows(rows, first, len(weights))
    for name in ("columns", "warps"):
        check_power(name, getattr(tile, name))
    if tile.splits < 1 or tile.unroll < 1:
        raise ValueError(f"tile: expected splits and unroll >= 1, got {tile}")
    tiles = sum(-(-weight.shape[1] // tile.columns) for weight in weights)
    if counters.ndim != 1 or counters.dtype != jnp.int32 or counters.shape[0] < tiles:
        raise ValueError(f"counters: expected int32 [n] with n >= {tiles}, got {counters.dtype} {counters.shape}")


def check_rows(rows: KeptRows | jax.Array, weight: jax.Array, segments: int) -> None:
    """Raise unless `rows` are what `segments` matrices like `weight` are multiplied by."""
    d_in = weight.shape[0]
    if not isinstance(rows, KeptRows):
        check_batch("x", rows)
        if rows.shape[1] != d_in:
            raise ValueError(f"x: expected [batch, {d_in}] for weights [{d_in}, d_out], got {rows.shape}")
        if rows.dtype != weight.dtype:
            raise TypeError(f"x: expected the dtype of the weights, {weight.dtype}, got {rows.dtype}")
        return
    found, lists, width = rows.index.shape
    if found != segments:
        raise ValueError(f"rows: expected one segment for each of {segments} weights, got {found}")
    if lists * width < d_in:
        raise ValueError(f"rows: expected lists that cover {d_in} channels, got {lists} lists of {width}")
    if not 1 <= rows.batch <= MAX_BATCH:
        raise ValueError(f"rows: expected batch 1 to {MAX_BATCH}, got {rows.batch}")
    wanted = kept_shapes(segments, lists, rows.batch, width)
    for ref, shape in zip(jax.tree.leaves(rows), jax.tree.leaves(wanted), strict=True):
        expect("rows", ref, shape.shape, shape.dtype)


def check_power(name: str, value: int) -> None:
    """Raise unless `value` is a power of two, the only sizes that Triton takes."""
    if value < 1 or value & (value - 1):
        raise ValueError(f"{name}: expected a power of two, got {value}")
