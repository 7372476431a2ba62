"""A 4-bit weight whose groups lie along the input axis, as AWQ and GPTQ checkpoints have it, once unpacked.

    w[i, o] = scales[g, o] * (codes[i, o] - zeros[g, o]),  g = group_of[i]

A scale of 16 bits times a whole number below 16 has 15 significant bits at most: in float32 this is exact.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from teal_jax.errors import CheckpointError

BITS = 4
PER_WORD = 32 // BITS
"""Numbers in an int32; the first in its lowest bits."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class GroupedWeight:
    """Plain integers, scales and zero points.

    Attributes:
      codes: uint8 `[d_in, d_out]`, 0 to 15.
      scales: float16, bfloat16 or float32 `[groups, d_out]`, finite.
      zeros: uint8 `[groups, d_out]`, 0 to 15.
      group_of: int32 `[d_in]`, the group of each input channel.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray
    group_of: np.ndarray

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_in, d_out)`."""
        d_in, d_out = self.codes.shape
        return d_in, d_out

    def dequantize(self, dtype: jax.typing.DTypeLike = "float32") -> jax.Array:
        """The weight `[d_in, d_out]`: exact in float32, rounded once to any other `dtype`."""
        # On the device: many times faster than numpy, and a byte a weight travels there.
        return _dequantize(self.codes, self.scales, self.zeros, self.group_of, dtype=jnp.dtype(dtype).name)


@functools.partial(jax.jit, static_argnames="dtype")
def _dequantize(codes: jax.Array, scales: jax.Array, zeros: jax.Array, group_of: jax.Array, *, dtype: str) -> jax.Array:
    steps = codes.astype(jnp.int8) - zeros.astype(jnp.int8)[group_of]
    return (steps.astype(jnp.float32) * scales.astype(jnp.float32)[group_of]).astype(dtype)


def unpack_rows(words: np.ndarray) -> np.ndarray:
    """int32 `[n, d]` -> uint8 `[8 n, d]`: a word holds eight numbers of its column, in order."""
    numbers = np.empty((PER_WORD * words.shape[0], words.shape[1]), np.uint8)
    for place in range(PER_WORD):
        numbers[place::PER_WORD] = words >> (BITS * place) & 15
    return numbers


def unpack_columns(words: np.ndarray, order: tuple[int, ...] = tuple(range(PER_WORD))) -> np.ndarray:
    """int32 `[n, d]` -> uint8 `[n, 8 d]`: the `p`-th four bits of a word are number `order[p]` of its eight."""
    numbers = np.empty((words.shape[0], PER_WORD * words.shape[1]), np.uint8)
    for place, column in enumerate(order):
        numbers[:, column::PER_WORD] = words >> (BITS * place) & 15
    return numbers


def in_sequence(d_in: int, group_size: int | None) -> np.ndarray:
    """The group of each input channel where neighbours form one, int32 `[d_in]`."""
    return np.arange(d_in, dtype=np.int32) // (group_size or d_in)


def check_packable(module: str, d_in: int, d_out: int, *, rows: bool) -> None:
    """Raise `CheckpointError` unless the outputs, and with `rows` the inputs, fill whole words of eight."""
    for what, width in (("outputs", d_out), ("inputs", d_in if rows else PER_WORD)):
        if width % PER_WORD:
            raise CheckpointError(
                f"{module} has {width} {what}: 4-bit packing needs a multiple of {PER_WORD}",
                hint="do config.json and the weights belong together?",
            )


def check_scales(module: str, scales: np.ndarray) -> None:
    """Raise `CheckpointError` if a scale is NaN or infinite, naming the first one's place."""
    if (bad := np.argwhere(~np.isfinite(scales.astype(np.float32)))).size:
        group, output = bad[0]
        raise CheckpointError(
            f"{module}.scales holds NaN or infinite numbers: {len(bad)}, the first for group {group}, output {output}",
            hint="the file is damaged: download the checkpoint again",
        )
