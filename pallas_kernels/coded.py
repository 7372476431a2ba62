"""`CodedMatrix`: a matrix in 8 or 4 bits a weight, as the kernels read it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CodedMatrix:
    """`W[i, j] = (code - zero) * scale`, in the place of an array `[d_in, d_out]`.

    8 bits: one scale an output. 4 bits: one scale for each `group` outputs of a row, so that it lies with the row.

    Attributes:
      codes: int8 `[d_in, d_out]`; or uint8 `[d_in, d_out / 2]`, of 0..15, the even output in the low half.
      scale: float32 `[d_out]`; or bfloat16 `[d_in, d_out / group]`.
      zero: uint8, as the scale of 4 bits; None: 8, and with 8 bits 0.
      group: a power of two >= 2; None: 8 bits.
      float_dtype: name of the dtype of what is multiplied and, by default, of the product.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    group: int | None = dataclasses.field(default=None, metadata={"static": True})
    float_dtype: str = dataclasses.field(default="bfloat16", metadata={"static": True})

    ndim = 2

    @property
    def shape(self) -> tuple[int, ...]:
        """`(d_in, d_out)`."""
        return (*self.codes.shape[:-1], self.codes.shape[-1] * (1 if self.group is None else 2))

    @property
    def dtype(self) -> Any:
        """Of what it is multiplied by."""
        return jnp.dtype(self.float_dtype)

    def decode(self) -> jax.Array:
        """W, float32 `[d_in, d_out]`."""
        scale = self.scale.astype(jnp.float32)
        if self.group is None:
            return self.codes.astype(jnp.float32) * scale
        codes = jnp.stack([self.codes & 15, self.codes >> 4], axis=-1).astype(jnp.float32)
        zero = 8.0 if self.zero is None else self.zero.astype(jnp.float32)[:, :, None]
        values = (codes.reshape(*self.scale.shape, self.group) - zero) * scale[:, :, None]
        return values.reshape(self.shape)


type Matrix = jax.Array | CodedMatrix
"""What a matvec takes as W."""


def bits_of(weight: Any) -> int:
    """Bits of a weight's code: 8, 4, or those of a float."""
    if isinstance(weight, CodedMatrix):
        return 8 if weight.group is None else 4
    return 8 * weight.dtype.itemsize
