"""`project`: the single switch between dense, sparse and quantised, for every projection of every model."""

import jax
import jax.numpy as jnp
from flax import nnx

from teal_jax.nn.block_top_k import BlockTopK
from teal_jax.nn.compensation import Biased, LowRank, Rotated, only
from teal_jax.nn.gates import Dense, Gate, GateOutput, Soft, Threshold, TopK
from teal_jax.nn.int8 import Int8
from teal_jax.nn.product import matmul
from teal_jax.nn.quantized import QuantizedWeight, to_dense
from teal_jax.nn.relu import Relu
from teal_jax.nn.straight_through import StraightThrough, passed, passed_partly


def project(x: jax.Array, weight: jax.Array | QuantizedWeight, gate: Gate) -> jax.Array:
    """`y = W^T (keep(x) * x)`, the way to compute it chosen by the types of `weight` and `gate`.

    Args:
      x: `[..., d_in]`.
      weight: `[d_in, d_out]`, the dtype of `x`; a quantised one is dequantised first.
      gate: of one projection, from `teal_jax.nn.gates` or `teal_jax.nn.compensation`.

    Returns:
      `[..., d_out]`, the dtype of `x`, summed in float32.

    Raises:
      TypeError: `gate` is none of them.
    """
    weight = to_dense(weight)
    match gate:
        case Dense() | GateOutput():  # what CATS drops of up is dropped by the block
            return matmul(x, weight)
        case StraightThrough(gate=Biased()):
            return project(x, weight, gate.inside())
        case Threshold() | TopK() | BlockTopK() | Relu() | Int8() | Rotated() | StraightThrough():
            return matmul(thin(x, gate), weight)
        case Soft():
            return matmul((x * gate.mask(x)).astype(x.dtype), weight)
        case Biased():
            return project(x, weight, gate.gate) + only(gate.where, gate.bias, 0.0).astype(x.dtype)
        case LowRank():
            return project(x, weight, gate.gate) + gate.remainder(x)
    raise TypeError(f"gate must be one of teal_jax.nn.gates or teal_jax.nn.compensation, got {type(gate).__name__}")


def thin(x: jax.Array, gate: Gate) -> jax.Array:
    """What `gate` leaves of x `[..., d_in]`, in its dtype; raises `TypeError` for a gate that does more than that."""
    match gate:
        case Dense():
            return x
        case Threshold() | TopK() | BlockTopK() | Relu():
            return jnp.where(gate.keep(x), x, 0)
        case Int8():
            return thin(gate.quantised(x), gate.gate)
        case Rotated():
            return only(gate.where, gate.thin(x), x)
        case StraightThrough():
            y = thin(x, gate.gate)
            return passed(x, y) if gate.slope == 1 else passed_partly(x, y, gate.slope)
    raise TypeError(f"a gate that only thins its input was expected, got {type(gate).__name__}")


class Projection(nnx.Module):
    """A projection matrix `[d_in, d_out]`, with a bias `[d_out]` where the config has one."""

    def __init__(self, d_in: int, d_out: int, *, bias: bool, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike):
        init = jax.nn.initializers.normal(0.02)
        self.weight = nnx.Param(init(rngs.params(), (d_in, d_out), dtype))
        if bias:
            self.bias = nnx.Param(jax.numpy.zeros((d_out,), dtype))

    def __call__(self, x: jax.Array, gate: Gate) -> jax.Array:
        """`project`, and the bias; x `[..., d_in]`, returns `[..., d_out]`."""
        y = project(x, self.weight.get_value(), gate)
        return y + self.bias[...] if hasattr(self, "bias") else y
