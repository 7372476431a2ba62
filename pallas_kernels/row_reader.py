"""Inside a kernel: rows of W over a tile of outputs, read and summed by what W is made of: floats, bytes or halves."""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.coded import CodedMatrix
from pallas_kernels.dequantise import bytes_to_floats, nibbles_to_floats
from pallas_kernels.fma import fma
from pallas_kernels.split import tile_columns

type Values = list[jax.Array]
"""x at the rows that were read, float32 `[rows]`, of every batch row."""


class RowReader(Protocol):
    """Reads groups of rows of one matrix, at the outputs of one tile, and adds them up for every batch row."""

    def zeros(self, rows: int) -> Any:
        """The sum of nothing, for groups of `rows`."""
        ...

    def load(self, channels: jax.Array, used: jax.Array | None) -> Any:
        """Rows `channels` (int32 `[rows]`); those not `used` are not read and add nothing."""
        ...

    def add(self, sums: tuple[Any, ...], loaded: Any, xs: Values) -> tuple[Any, ...]:
        """The sums, one for each of `xs`, and `x * W`."""
        ...

    def total(self, sums: Any) -> jax.Array:
        """Float32 `[columns]`, the rows of a group added."""
        ...


def row_reader(weight: Any, which: jax.Array, columns: int) -> RowReader:
    """Of column tile `which` of a ref `[d_in, d_out]`, or of a `CodedMatrix` of refs."""
    if not isinstance(weight, CodedMatrix):
        return Floats(weight, *tile_columns(which, columns, weight.shape[1]))
    if weight.group is None:
        return Bytes(weight.codes, *tile_columns(which, columns, weight.shape[1]))
    return Nibbles(weight, which, columns)


def rescale(weight: Any, sums: jax.Array, columns: jax.Array, exists: jax.Array | None) -> jax.Array:
    """Sums over all rows, float32, times the scale of each output where it has one."""
    if not isinstance(weight, CodedMatrix) or weight.group is not None:
        return sums
    return sums * plgpu.load(weight.scale.at[columns], mask=exists, other=None if exists is None else 0.0)


def load_rows(
    weight: Any, channels: jax.Array, columns: jax.Array, used: jax.Array | None, exists: jax.Array | None
) -> jax.Array:
    """`weight[channels, columns]`, columns of any rank; what is not used or does not exist: zero, of codes any code."""
    channels = channels.reshape(-1, *[1] * columns.ndim)
    mask = exists
    if used is not None:
        used = used.reshape(channels.shape)
        mask = used if mask is None else mask & used
    columns = columns[None]
    if mask is not None:
        mask = jnp.broadcast_to(mask, jnp.broadcast_shapes(channels.shape, columns.shape))
    # Weights are read once a token: they should not push activations out of the cache.
    return plgpu.load(
        weight.at[channels, columns],
        mask=mask,
        other=None if mask is None or not jnp.issubdtype(weight.dtype, jnp.floating) else 0.0,
        eviction_policy="evict_first",
    )


@dataclasses.dataclass(frozen=True)
class Floats:
    """Rows of a ref of floats `[d_in, d_out]`."""

    weight: Any
    columns: jax.Array
    exists: jax.Array | None

    def zeros(self, rows: int) -> jax.Array:
        """See `RowReader`."""
        return jnp.zeros((rows, *self.columns.shape), jnp.float32)

    def load(self, channels: jax.Array, used: jax.Array | None) -> jax.Array:
        """See `RowReader`."""
        return load_rows(self.weight, channels, self.columns, used, self.exists)

    def floats(self, loaded: jax.Array) -> jax.Array:
        """What was loaded, float32."""
        return loaded.astype(jnp.float32)

    def add(self, sums: tuple[jax.Array, ...], loaded: jax.Array, xs: Values) -> tuple[jax.Array, ...]:
        """See `RowReader`."""
        weights = self.floats(loaded)
        return tuple(fma(weights, x[:, None], s) for s, x in zip(sums, xs, strict=True))

    def total(self, sums: jax.Array) -> jax.Array:
        """See `RowReader`."""
        return jnp.sum(sums, axis=0)


class Bytes(Floats):
    """Rows of int8 codes `[d_in, d_out]`; their scales are left to `rescale`."""

    def floats(self, loaded: jax.Array) -> jax.Array:
        """What was loaded, float32."""
        return bytes_to_floats(loaded)


@dataclasses.dataclass(frozen=True)
class Nibbles:
    """Rows of a `CodedMatrix` of refs, of 4 bits: `[rows, groups, bytes of a group]`, even and odd outputs apart."""

    weight: Any
    which: jax.Array
    columns: int

    @property
    def shape(self) -> tuple[int, int]:
        """Groups of a tile, and bytes of each; a group wider than the tile is one in it."""
        inside = min(self.weight.group, self.columns)
        return self.columns // inside, inside // 2

    def zeros(self, rows: int) -> tuple[jax.Array, jax.Array]:
        """See `RowReader`."""
        nothing = jnp.zeros((rows, *self.shape), jnp.float32)
        return nothing, nothing

    def load(self, channels: jax.Array, used: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """See `RowReader`."""
        weight, (groups, inside) = self.weight, self.shape
        group = jnp.arange(groups, dtype=jnp.int32)
        columns = (self.which * groups + group)[:, None] * inside + jnp.arange(inside, dtype=jnp.int32)
        group = jax.lax.div(self.which * self.columns, weight.group) + group
        even = weight.shape[1] % self.columns == 0
        codes = load_rows(weight.codes, channels, columns, used, None if even else columns < weight.codes.shape[1])
        exists = None if even else group < weight.scale.shape[1]
        scale = load_rows(weight.scale, channels, group, used, exists)
        zero = None if weight.zero is None else load_rows(weight.zero, channels, group, used, exists)
        return codes, scale, zero

    def add(self, sums: tuple[Any, ...], loaded: Any, xs: Values) -> tuple[Any, ...]:
        """See `RowReader`."""
        codes, scale, zero = loaded
        halves = nibbles_to_floats(codes, 8.0 if zero is None else zero.astype(jnp.float32)[:, :, None])
        new = []
        for both, x in zip(sums, xs, strict=True):
            scaled = (x[:, None] * scale.astype(jnp.float32))[:, :, None]
            new.append(tuple(fma(half, scaled, s) for half, s in zip(halves, both, strict=True)))
        return tuple(new)

    def total(self, sums: tuple[jax.Array, jax.Array]) -> jax.Array:
        """See `RowReader`."""
        return jnp.stack([jnp.sum(half, axis=0) for half in sums], axis=-1).reshape(self.columns)
