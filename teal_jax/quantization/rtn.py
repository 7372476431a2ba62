"""Round to nearest: every weight to the nearest point of its grid, no data needed."""

import functools

import jax
import jax.numpy as jnp

from teal_jax.nn.quantized import QuantizedWeight, QuantSpec, assemble
from teal_jax.quantization.grid import encode, fit


@functools.partial(jax.jit, static_argnums=1)
def round_to_nearest(weight: jax.Array, spec: QuantSpec, shrink: jax.typing.ArrayLike = 1.0) -> QuantizedWeight:
    """W `[d_in, d_out]` quantised; it dequantises to the dtype of W.

    The error of a weight is at most half its scale's magnitude, but for weights beyond the grid: one full scale.

    Args:
      weight: finite.
      spec: the format; its group divides `d_out`.
      shrink: see `grid.fit`.
    """
    values = weight.astype(jnp.float32)
    grid = fit(values, spec, shrink)
    return assemble(encode(values, grid, spec), grid.scale, grid.zero, spec, weight.dtype)
