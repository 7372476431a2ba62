"""The kept rows of an x that is already there; where a kernel makes x, it selects as well."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.checks import check_batch, check_cut, check_width
from pallas_kernels.kept import Cut, KeptRows, kept_shapes, write_kept
from pallas_kernels.launch import launch, whole_lists
from pallas_kernels.registers import begin


@functools.partial(jax.jit, static_argnames=("width", "interpret"))
def select(x: jax.Array, cut: Cut, *, width: int = 256, interpret: bool = False) -> KeptRows:
    """The channels of x that `cut` keeps, as lists of `width` neighbouring channels.

    Args:
      x: `[batch, d_in]`, batch at most 8.
      cut: a threshold for each segment.
      width: channels a list, a power of two.
      interpret: run as plain jax, on any device.

    Raises:
      TypeError, ValueError: a dtype or size that the kernel does not take.
    """
    check_batch("x", x)
    check_width(width)
    batch, d_in = x.shape
    check_cut(cut, d_in)
    lists = whole_lists(d_in, width)

    def kernel(x: Any, cut: Any, out: Any) -> None:
        which = begin(pl.program_id(0))
        channels = which * width + jnp.arange(width, dtype=jnp.int32)
        valid = None if d_in % width == 0 else channels < d_in
        other = None if valid is None else 0.0
        xs = [plgpu.load(x.at[b, channels], mask=valid, other=other).astype(jnp.float32) for b in range(batch)]
        write_kept(out, which, which * width, xs, cut.read(), valid, cut.read_scales(channels, valid))

    out = kept_shapes(len(cut.projections), lists, batch, width)
    (rows,) = launch(kernel, (x, cut), out=(out,), grid=(lists,), warps=4, name="select", interpret=interpret)
    return rows
