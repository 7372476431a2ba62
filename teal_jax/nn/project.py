"""`project`: the single switch between dense and sparse, for every projection of every model."""

import jax
from flax import nnx

from pallas_kernels import masked_matmul
from pallas_kernels.reference import matmul
from teal_jax.nn.gates import Dense, Gate, Threshold


def project(x: jax.Array, weight: jax.Array, gate: Gate) -> jax.Array:
    """`y = W^T (keep(x) * x)`, the way to compute it chosen by the types of `weight` and `gate`.

    Args:
      x: `[..., d_in]`.
      weight: `[d_in, d_out]`, the dtype of `x`.
      gate: `Dense()`, or a `Threshold` of one projection.

    Returns:
      `[..., d_out]`, the dtype of `x`, summed in float32.
    """
    match gate:
        case Dense():
            return matmul(x, weight)
        case Threshold():
            return masked_matmul(x, weight, gate.per_token())
    raise TypeError(f"gate must be Dense or Threshold, got {type(gate).__name__}")


class Projection(nnx.Module):
    """A projection matrix `[d_in, d_out]`, with a bias `[d_out]` where the config has one."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike):
        init = jax.nn.initializers.normal(0.02)
        self.weight = nnx.Param(init(rngs.params(), (d_in, d_out), dtype))
        if bias:
            self.bias = nnx.Param(jax.numpy.zeros((d_out,), dtype))

    def __call__(self, x: jax.Array, gate: Gate) -> jax.Array:
        """`project`, and the bias; x `[..., d_in]`, returns `[..., d_out]`."""
        y = project(x, self.weight[...], gate)
        return y + self.bias[...] if hasattr(self, "bias") else y
