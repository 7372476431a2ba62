"""`sparse_matvec`: the kernels behind one call, for an x that is already there."""

import jax
import jax.numpy as jnp

from pallas_kernels.reference import check_thresholds, masked_matmul
from pallas_kernels.support import Implementation, use_pallas


def sparse_matvec(
    x: jax.Array,
    weight: jax.Array,
    threshold: jax.typing.ArrayLike,
    *,
    implementation: Implementation | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`y = sum over i with |x_i| > t of x_i W[i, :]`; on a GPU only those rows of W are read.

    Args:
      x: `[batch, d_in]`; the rows of a batch share what is read, each with its own values.
      weight: `[d_in, d_out]`, the dtype of x: bfloat16, float16 or float32.
      threshold: float32 scalar, >= 0.
      implementation: `"pallas"`: the GPU kernels, batch 1 to 8; `"xla"`: masks x and reads all of W, anywhere;
        None: the kernels where they can run.
      interpret: run the kernels as plain jax, on any device.

    Returns:
      `[batch, d_out]` in the dtype of x, summed in float32; the same bits every time.

    Raises:
      ValueError, TypeError: shapes or dtypes that do not fit, or a threshold below 0 or NaN.
      NotImplementedError: `"pallas"` was asked for and cannot run here.
    """
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[0]:
        raise ValueError(f"expected x [batch, d_in] and weight [d_in, d_out], got {x.shape} and {weight.shape}")
    if x.dtype != weight.dtype:
        raise TypeError(f"weight: expected the dtype of x, {x.dtype}, got {weight.dtype}")
    check_thresholds(threshold)
    threshold = jnp.asarray(threshold, jnp.float32)
    if threshold.shape:
        raise ValueError(f"threshold: expected a scalar, got {threshold.shape}")
    if not interpret and not use_pallas(implementation, x.dtype, x.shape[0]):
        return masked_matmul(x, weight, threshold)
    from pallas_kernels.kept import Cut
    from pallas_kernels.matvec import matvec
    from pallas_kernels.select import select
    from pallas_kernels.tiles import matvec_tile

    rows = select(x, Cut.of(threshold[None]), interpret=interpret)
    tile = matvec_tile(weight.shape[0], (weight.shape[1],), batch=x.shape[0])
    counters = jnp.zeros((-(-weight.shape[1] // tile.columns),), jnp.int32)
    return matvec(rows, (weight,), counters, tile=tile, interpret=interpret)[0]
