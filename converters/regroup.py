"""A weight grouped along the input axis -> the layouts that a sparse decoder reads, and the error this adds.

A decoder that skips rows wants a kept row's scales beside the row, so its groups lie along the output axis; a published
4-bit checkpoint has them along the input axis. Both can hold the same numbers only where they repeat:

- int8, one scale a column: whenever a column of the checkpoint has one scale (`group_size` -1), for a code less its
  zero point is a whole number between -15 and 15.
- int4, groups of outputs: when the outputs of a group have one scale, which bfloat16 holds, and one zero point.

Everywhere else the weight is quantised again by rounding to nearest, and `error` says what that costs.
"""

import dataclasses

import ml_dtypes
import numpy as np

from converters.grouped import BITS, GroupedWeight
from teal_jax.errors import CheckpointError

BF16 = np.dtype(ml_dtypes.bfloat16)
_MOST = 2**BITS - 1


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RegroupedWeight:
    """A quantised weight, groups along the output axis.

    Attributes:
      codes: int8 `[d_in, d_out]`; of 4 bits uint8 `[d_in, d_out / 2]`, the even output in the low four bits.
      scale: float32 `[d_out]`; of 4 bits bfloat16 `[d_in, d_out / group]`.
      zero: of 4 bits uint8 like `scale`, 0 to 15; of 8 bits None: 0.
      bits: 8 or 4.
      group: outputs that share a scale and a zero point; of 8 bits None.
      error: `||ours - theirs|| / ||theirs||`, Frobenius; 0: every number is theirs.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None
    bits: int
    group: int | None
    error: float

    def dequantize(self) -> np.ndarray:
        """`scale * (codes - zero)`, float32 `[d_in, d_out]`."""
        if self.zero is None or self.group is None:
            return self.codes * self.scale
        codes = np.stack([self.codes & 15, self.codes >> 4], axis=-1).reshape(len(self.codes), -1, self.group)
        steps = codes.astype(np.float32) - self.zero[..., None]
        return (steps * self.scale.astype(np.float32)[..., None]).reshape(len(codes), -1)


def regroup_int8(weight: GroupedWeight) -> RegroupedWeight:
    """int8 with one scale an output channel, symmetric; lossless where a column has one scale."""
    scales = weight.scales.astype(np.float32)
    if (scales == scales[0]).all():
        steps = weight.codes.astype(np.int8) - weight.zeros.astype(np.int8)[weight.group_of]
        return RegroupedWeight(codes=steps, scale=scales[0], zero=None, bits=8, group=None, error=0.0)
    exact = weight.dequantize()
    scale = np.abs(exact).max(axis=0) / np.float32(127)
    codes = np.rint(exact / np.where(scale > 0, scale, 1)).astype(np.int8)
    ours = RegroupedWeight(codes=codes, scale=scale, zero=None, bits=8, group=None, error=0.0)
    return dataclasses.replace(ours, error=relative_error(ours.dequantize(), exact))


def regroup_int4(weight: GroupedWeight, group: int = 128) -> RegroupedWeight:
    """int4, asymmetric, groups of `group` outputs; lossless where a group's scales and zero points are equal.

    Raises `CheckpointError` when `group` is odd or does not divide the output.
    """
    d_in, d_out = weight.shape
    if group < 2 or group % 2 or d_out % group:
        raise CheckpointError(
            f"groups of {group} outputs do not divide {d_out} outputs in pairs",
            hint="choose an even group that divides the output width of every projection: 64 or 128",
        )
    scales = weight.scales.astype(np.float32).reshape(-1, d_out // group, group)
    zeros = weight.zeros.reshape(scales.shape)
    scale = scales[..., 0].astype(BF16)
    if (scales == scale.astype(np.float32)[..., None]).all() and (zeros == zeros[..., :1]).all():
        scale, zero = scale[weight.group_of], zeros[..., 0][weight.group_of]
        return _int4(weight.codes, scale, zero, group, error=0.0)
    exact = weight.dequantize()
    blocks = exact.reshape(d_in, -1, group)
    low, high = np.minimum(blocks.min(axis=-1), 0), np.maximum(blocks.max(axis=-1), 0)
    # Rounded first: codes and zero point are those of the scale that is stored.
    scale = ((high - low) / _MOST).astype(BF16)
    divisor = np.where(scale > 0, scale.astype(np.float32), 1)
    zero = np.clip(np.rint(-low / divisor), 0, _MOST)
    codes = np.clip(np.rint(blocks / divisor[..., None]) + zero[..., None], 0, _MOST)
    ours = _int4(codes.reshape(d_in, d_out).astype(np.uint8), scale, zero.astype(np.uint8), group, error=0.0)
    return dataclasses.replace(ours, error=relative_error(ours.dequantize(), exact))


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """`||ours - theirs|| / ||theirs||`, Frobenius, summed in float64; 0 when both are all zeros."""
    difference, size = (np.sqrt(np.sum(np.square(x), dtype=np.float64)) for x in (ours - theirs, theirs))
    return float(difference / size) if size else float(difference)


def _int4(codes: np.ndarray, scale: np.ndarray, zero: np.ndarray, group: int, *, error: float) -> RegroupedWeight:
    packed = codes[:, 0::2] | codes[:, 1::2] << 4
    return RegroupedWeight(codes=packed, scale=scale, zero=zero, bits=BITS, group=group, error=error)
