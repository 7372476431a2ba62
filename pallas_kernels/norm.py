"""RMSNorm that leaves behind the kept rows of what it produced: the input of q, k, v, and of gate, up."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.checks import check_batch, check_cut, check_width
from pallas_kernels.kept import Cut, KeptRows, kept_shapes, select_reference, write_kept
from pallas_kernels.launch import launch, power_of_two, whole_lists
from pallas_kernels.registers import begin

WARPS = 4
"""Of a program: 1.8 us for lists of 128 on an H200, where one, two and eight took 1.9, 2.2 and 1.9."""


@functools.partial(jax.jit, static_argnames=("eps", "width", "interpret"))
def rms_norm_select(
    h: jax.Array,
    weight: jax.Array,
    cut: Cut | None,
    *,
    eps: float,
    width: int,
    interpret: bool = False,
) -> KeptRows | jax.Array:
    """`x = w * h / sqrt(mean(h^2) + eps)`, and the channels of x that `cut` keeps.

    Every program norms all of h, which costs it less than waiting for the others, and writes one list.

    Args:
      h: `[batch, d]`.
      weight: `[d]`, the dtype of h.
      cut: a threshold for each segment; None: dense.
      eps: of the norm.
      width: channels a list, a power of two.
      interpret: run as plain jax, on any device.

    Returns:
      The kept rows, a segment for each threshold; dense: x `[batch, d]`.

    Raises:
      TypeError, ValueError: a dtype or size that the kernel does not take.
    """
    check_batch("h", h)
    check_width(width)
    batch, d = h.shape
    check_cut(cut, d)
    if weight.shape != (d,) or weight.dtype != h.dtype:
        raise ValueError(f"weight: expected {h.dtype} ({d},), got {weight.dtype} {weight.shape}")
    lists = whole_lists(d, width)
    whole = power_of_two(d)

    def kernel(h: Any, weight: Any, cut: Any, out: Any) -> None:
        which = begin(pl.program_id(0))
        thresholds = None if cut is None else cut.read()
        lane = jnp.arange(whole, dtype=jnp.int32)
        exists = None if whole == d else lane < d
        channels = which * width + jnp.arange(width, dtype=jnp.int32)
        valid = None if d % width == 0 else channels < d
        scales = None if cut is None else cut.read_scales(channels, valid)
        xs = []
        for b in range(batch):
            row = plgpu.load(h.at[b, lane], mask=exists, other=None if exists is None else 0.0).astype(jnp.float32)
            scale = jax.lax.rsqrt(jnp.sum(row * row) / d + eps)
            part = plgpu.load(h.at[b, channels], mask=valid, other=None if valid is None else 0.0)
            gain = plgpu.load(weight.at[channels], mask=valid, other=None if valid is None else 0.0)
            x = gain * (part.astype(jnp.float32) * scale).astype(gain.dtype)
            if thresholds is None:
                plgpu.store(out.at[b, channels], x, mask=valid)
            xs.append(x.astype(jnp.float32))
        if thresholds is not None:
            write_kept(out, which, which * width, xs, thresholds, valid, scales)

    if cut is None:
        out: Any = jax.ShapeDtypeStruct((batch, d), h.dtype)
    else:
        out = kept_shapes(len(cut.projections), lists, batch, width)
    (rows,) = launch(
        kernel, (h, weight, cut), out=(out,), grid=(lists,), warps=WARPS, name="norm_select", interpret=interpret
    )
    return rows


def rms_norm_select_reference(
    h: jax.Array, weight: jax.Array, cut: Cut | None, *, eps: float, width: int
) -> KeptRows | jax.Array:
    """`rms_norm_select` in plain jnp."""
    h32 = h.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(h32 * h32, axis=-1, keepdims=True) + eps)
    x = weight * (h32 * scale).astype(h.dtype)
    return x if cut is None else select_reference(x, cut.values, width, cut.scales)
