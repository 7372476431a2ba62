"""A projection of an AWQ or GPTQ checkpoint -> `QuantizedWeight`, and the error that this adds.

Those checkpoints have groups along the input axis; a decoder that skips rows wants a kept row's scales beside the row.
Both layouts hold the same numbers only where they repeat:

- int8: where each column has one scale (`group_size` -1), for a code less its zero point is a whole number in -15..15.
- int4: where the outputs of a group have one scale, which bfloat16 holds, and either one zero point (asymmetric) or
  codes that lie -8..7 steps from theirs (symmetric).

Everywhere else the weight is rounded to the nearest point of a grid of its own.
"""

import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from converters import GroupedWeight
from teal_jax.nn.quantized import QuantizedWeight, QuantSpec, assemble
from teal_jax.quantization.layer import check_matrix
from teal_jax.quantization.rtn import round_to_nearest


def regrouped(
    weight: GroupedWeight, spec: QuantSpec, dtype: jax.typing.DTypeLike, name: str
) -> tuple[QuantizedWeight, float]:
    """The weight in `spec`, and `||ours - theirs|| / ||theirs||` (Frobenius); 0: every number is theirs.

    Args:
      weight: the checkpoint's.
      spec: the format; its group divides the outputs.
      dtype: what the result dequantises to; the error is before that rounding.
      name: for messages.

    Raises:
      QuantizationError: the weight is not finite in float32, or zero throughout.
    """
    exact = weight.dequantize()
    check_matrix(exact, name)
    if (same := same_numbers(weight, spec)) is not None:
        return same.astype(dtype), 0.0
    found = round_to_nearest(exact, spec)
    # Rows in float32, their sum in float64: in float32 100 million squares no longer add up.
    squares = np.asarray(_squares(found, exact), np.float64).sum(axis=1)
    return found.astype(dtype), float(np.sqrt(squares[0] / squares[1]))


@jax.jit
def _squares(ours: QuantizedWeight, theirs: jax.Array) -> jax.Array:
    """Squared error and squared size of each row, float32 `[2, d_in]`."""
    return jnp.stack([((ours.dequantize() - theirs) ** 2).sum(axis=1), (theirs**2).sum(axis=1)])


def same_numbers(weight: GroupedWeight, spec: QuantSpec) -> QuantizedWeight | None:
    """The weight without any rounding, to dequantise to float32; None where `spec` cannot hold it."""
    if spec.bits not in (8, 4):
        return None
    scales = weight.scales.astype(np.float32)
    if spec.group is None:
        return _assembled(_steps(weight), scales[0], None, spec) if (scales == scales[0]).all() else None
    scales = scales.reshape(len(scales), -1, spec.group)
    zeros, scale = weight.zeros.reshape(scales.shape), scales[..., 0].astype(jnp.bfloat16)
    if (scales != scale.astype(np.float32)[..., None]).any():
        return None
    if not spec.symmetric:
        same_zeros = (zeros == zeros[..., :1]).all()
        return _assembled(weight.codes, scale, zeros[..., 0], spec, weight.group_of) if same_zeros else None
    codes = _steps(weight) + np.int8(8)
    return _assembled(codes, scale, None, spec, weight.group_of) if codes.min() >= 0 and codes.max() <= 15 else None


def _steps(weight: GroupedWeight) -> np.ndarray:
    return weight.codes.astype(np.int8) - weight.zeros.astype(np.int8)[weight.group_of]


def _assembled(
    codes: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, spec: QuantSpec, rows: np.ndarray | None = None
) -> QuantizedWeight:
    """On the device; `rows` says which row of scales and zero points each input channel has, None: there is one."""
    spread = lambda x: jnp.asarray(x if rows is None else x[rows])  # noqa: E731
    return assemble(jnp.asarray(codes), spread(scale), None if zero is None else spread(zero), spec, "float32")


def warn_of_error(errors: Mapping[str, float], formats: str | None, *, stacklevel: int) -> None:
    """Warn of the `errors` that rounding to `formats` has added, by name of the weight; silent where it added none."""
    if not any(errors.values()):
        return
    worst = max(errors, key=errors.__getitem__)
    warnings.warn(
        f"the checkpoint's 4-bit weights are rounded once more, to {formats}, which adds a relative error of "
        f"{np.mean(list(errors.values())):.3g} on average over {len(errors)} projections, {errors[worst]:.3g} at most "
        f"({worst})",
        stacklevel=stacklevel + 1,
    )
