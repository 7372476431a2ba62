"""The specification of every sparse kernel, in plain jnp: mask, then multiply."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer


def keep_mask(x: jax.Array, threshold: jax.Array) -> jax.Array:
    """Channels that a threshold keeps, `|x_i| > t`, compared in float32.

    A bfloat16 comparison would round `t` first. NaN is kept: a broken activation must show, not vanish.

    Args:
      x: `[..., d_in]`, any float dtype.
      threshold: float32, broadcastable against `x`, >= 0.

    Returns:
      bool `[..., d_in]`.

    References:
      TEAL, arXiv 2408.14690, section 4.1.
    """
    return ~(jnp.abs(x.astype(jnp.float32)) <= threshold)


def check_thresholds(thresholds: jax.typing.ArrayLike) -> None:
    """Raise for a negative or NaN threshold, where its value is known (not under jit)."""
    if isinstance(thresholds, Tracer):
        return
    values = np.asarray(thresholds)
    if not (values >= 0).all():
        bad = values[~(values >= 0)].ravel()[0]
        raise ValueError(f"thresholds: expected every one >= 0 (inf keeps nothing), got {bad}")


def matmul(x: jax.Array, weight: jax.Array, *, out_dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """`x @ weight` with float32 sums, rounded to `out_dtype` (None: of x); x `[..., d_in]`, weight `[d_in, d_out]`.

    Float32 inputs are multiplied in float32: a GPU's default for them, tf32, keeps ten bits.
    """
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    y = jnp.matmul(x, weight, precision=precision, preferred_element_type=jnp.float32)
    return y.astype(out_dtype or x.dtype)


def masked_matmul(x: jax.Array, weight: jax.Array, threshold: jax.Array) -> jax.Array:
    """`y = sum over kept i of x_i W[i, :]`: reads all of W, multiplies the dropped rows by zero.

    Args:
      x: `[..., d_in]`.
      weight: `[d_in, d_out]`, the dtype of `x`.
      threshold: float32, broadcastable against `x`, >= 0.

    Returns:
      `[..., d_out]` in the dtype of `x`, summed in float32.
    """
    return matmul(jnp.where(keep_mask(x, threshold), x, 0), weight)
