"""`KeptRows`: which channels a threshold keeps, as lists, so that a matvec reads those rows of W and no others."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.reference import check_thresholds, keep_mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeptRows:
    """The kept channels of x, cut into lists of `width` neighbouring channels.

    A segment is one projection with a threshold of its own; all segments see the same x. A channel is listed if
    any row of the batch keeps it; the value is 0 for the rows that do not. Entries at and after `count` are
    channels that no row keeps, with value 0: a kernel must not read their rows of W.

    Attributes:
      index: int32 `[segments, lists, width]`, channels of x, ascending within the first `count`.
      value: float32 `[segments, lists, batch, width]`.
      count: int32 `[segments, lists]`.
    """

    index: jax.Array
    value: jax.Array
    count: jax.Array

    @property
    def batch(self) -> int:
        """Rows of x."""
        return self.value.shape[2]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cut:
    """The thresholds of one kernel call, picked from those of all layers inside the kernel.

    Slicing them outside would be a kernel of its own for every call.

    Attributes:
      thresholds: float32 `[layers, projections]`, >= 0.
      layer: int32 `[1]`.
      projections: a threshold for each segment.
      scales: float32 `[d_in]`, > 0, for each segment: channel i is kept iff `scale_i * |x_i|` exceeds the threshold.
        None: 1.
    """

    thresholds: jax.Array
    layer: jax.Array
    projections: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    scales: tuple[jax.Array, ...] | None = None

    @classmethod
    def of(cls, thresholds: jax.typing.ArrayLike, scales: tuple[jax.Array, ...] | None = None) -> "Cut":
        """Of one call: float32 `[segments]`; raises `ValueError` for one below 0 or NaN."""
        check_thresholds(thresholds)
        thresholds = jnp.asarray(thresholds, jnp.float32)
        return cls(thresholds[None], jnp.zeros((1,), jnp.int32), tuple(range(thresholds.shape[0])), scales)

    @property
    def values(self) -> jax.Array:
        """Float32 `[segments]`, outside a kernel."""
        return self.thresholds[self.layer[0], jnp.asarray(self.projections)]

    def read(self) -> list[jax.Array]:
        """Inside a kernel: a float32 scalar for each segment."""
        layer = self.layer[0]
        return [self.thresholds[layer, p] for p in self.projections]

    def read_scales(self, channels: jax.Array, valid: jax.Array | None) -> list[jax.Array] | None:
        """Inside a kernel: float32, the scales of `channels`, for each segment; where not `valid`, 0."""
        if self.scales is None:
            return None
        scales: tuple[Any, ...] = self.scales
        return [plgpu.load(s.at[channels], mask=valid, other=None if valid is None else 0.0) for s in scales]


def kept_shapes(segments: int, lists: int, batch: int, width: int) -> Any:
    """The shapes and dtypes of a `KeptRows`, as one of `jax.ShapeDtypeStruct`."""
    leaves = (
        jax.ShapeDtypeStruct((segments, lists, width), jnp.int32),
        jax.ShapeDtypeStruct((segments, lists, batch, width), jnp.float32),
        jax.ShapeDtypeStruct((segments, lists), jnp.int32),
    )
    return KeptRows(*leaves)  # ty: ignore[invalid-argument-type]


def write_kept(
    rows: Any,
    which: jax.Array,
    first: jax.Array,
    xs: Sequence[jax.Array],
    thresholds: Sequence[jax.Array],
    valid: jax.Array | None = None,
    scales: Sequence[jax.Array] | None = None,
) -> None:
    """Inside a kernel: write list `which` of every segment, of the channels `first + 0..width`.

    Args:
      rows: a `KeptRows` of refs.
      which: int32 scalar, the list.
      first: int32 scalar, its first channel.
      xs: float32 `[width]` of every batch row.
      thresholds: a float32 scalar for each segment.
      valid: bool `[width]`, channels that exist; None: all.
      scales: float32 `[width]` for each segment, of x before it is compared; None: 1.
    """
    keeps = []
    for segment, threshold in enumerate(thresholds):
        scale = 1 if scales is None else scales[segment]
        keep = [keep_mask(x * scale, threshold) for x in xs]
        keeps.append(keep if valid is None else [k & valid for k in keep])
    write_lists(rows, which, first, xs, keeps)


def write_lists(
    rows: Any, which: jax.Array, first: jax.Array, xs: Sequence[jax.Array], keeps: Sequence[Sequence[jax.Array]]
) -> None:
    """Inside a kernel: `write_kept` of the channels that `keeps` says: bool `[width]` by segment and batch row.

    Positions are a permutation, kept channels from the front, the others from the back: every entry is written
    once, without a masked scatter, and none waits for the count. Running counts of several segments share one
    integer, since counting takes barriers and adding does not.
    """
    width = xs[0].shape[0]
    bits = width.bit_length()
    together = 31 // bits
    lane = jnp.arange(width, dtype=jnp.int32)
    for start in range(0, len(keeps), together):
        unions = [functools.reduce(jnp.logical_or, keep) for keep in keeps[start : start + together]]
        packed = jnp.zeros((width,), jnp.int32)
        for i, union in enumerate(unions):
            packed += union.astype(jnp.int32) << (i * bits)
        ranks, counts = jnp.cumsum(packed), jnp.sum(packed)
        for i, union in enumerate(unions):
            segment = start + i
            rank, count = ((n >> (i * bits)) & ((1 << bits) - 1) for n in (ranks, counts))
            position = jnp.where(union, rank, width - lane + rank) - 1
            plgpu.store(rows.index.at[segment, which, position], first + lane)
            for b, (x, kept) in enumerate(zip(xs, keeps[segment], strict=True)):
                plgpu.store(rows.value.at[segment, which, b, position], jnp.where(kept, x, 0.0))
            rows.count[segment, which] = count


def select_reference(
    x: jax.Array, thresholds: jax.Array, width: int, scales: Sequence[jax.Array] | None = None
) -> KeptRows:
    """What `write_kept` writes for all of x, in plain jnp.

    Args:
      x: `[batch, d_in]`; a last list that d_in does not fill is filled with channels never kept.
      thresholds: float32 `[segments]`, >= 0.
      width: channels a list.
      scales: float32 `[d_in]` for each segment; None: 1.
    """
    x = x.astype(jnp.float32)
    keep = keep_mask(x if scales is None else x * jnp.stack(list(scales))[:, None], thresholds[:, None, None])
    return list_reference(x, jnp.broadcast_to(keep, (len(thresholds), *x.shape)), width)


def list_reference(x: jax.Array, keep: jax.Array, width: int) -> KeptRows:
    """What `write_lists` writes for all of x `[batch, d_in]`, in plain jnp; keep is bool `[segments, batch, d_in]`."""
    batch, d_in = x.shape
    lists = -(-d_in // width)
    pad = ((0, 0), (0, lists * width - d_in))
    x = jnp.pad(x.astype(jnp.float32), pad)
    keep = jnp.pad(keep, ((0, 0), *pad))
    keep = keep.reshape(-1, batch, lists, width).transpose(0, 2, 1, 3)
    lane = jnp.arange(width, dtype=jnp.int32)
    order = jnp.argsort(jnp.where(keep.any(axis=2), lane, 2 * width - lane), axis=-1).astype(jnp.int32)
    value = jnp.where(keep, x.reshape(batch, lists, width).transpose(1, 0, 2), 0.0)
    value = jnp.take_along_axis(value, order[:, :, None, :], axis=-1)
    index = order + jnp.arange(lists, dtype=jnp.int32)[:, None] * width
    return KeptRows(index, value, keep.any(axis=2).sum(axis=-1, dtype=jnp.int32))
