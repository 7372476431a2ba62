"""Inside a kernel: split sums, reduced in a fixed order by the last program of a tile to finish."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.launch import synchronise

GROUP = 8
"""Partial sums loaded before any is added."""


def last_to_finish(counters: Any, which: jax.Array, total: int, interpret: bool) -> jax.Array:
    """Whether this program is the last of `total` to come here, a bool scalar; then the counter is 0 again.

    What the others stored before they came is visible to the last one: the atomic releases and acquires.
    """
    synchronise(interpret)
    one = which * 0 + 1  # the interpreter takes no literal here
    last = plgpu.atomic_add(counters, (which,), one) == total - 1

    @pl.when(last)
    def _() -> None:
        counters[which] = 0

    return last


def add_partials(partials: Any, batch_row: int, columns: jax.Array, exists: jax.Array | None) -> jax.Array:
    """Sum over splits of `partials [splits, batch, d_out]` at `columns`, float32, split 0 first."""
    splits = partials.shape[0]

    def load(split: jax.Array | int) -> jax.Array:
        other = None if exists is None else 0.0
        return plgpu.load(partials.at[split, batch_row, columns], mask=exists, other=other)

    def group(i: jax.Array, total: jax.Array) -> jax.Array:
        for part in [load(i * GROUP + u) for u in range(GROUP)]:
            total = total + part
        return total

    total = lax.fori_loop(0, splits // GROUP, group, jnp.zeros(columns.shape, jnp.float32))
    for part in [load(split) for split in range(splits - splits % GROUP, splits)]:
        total = total + part
    return total


def tile_columns(tile: jax.Array, columns: int, d_out: int) -> tuple[jax.Array, jax.Array | None]:
    """The output columns of a tile, and which of them exist (None: all)."""
    cols = tile * columns + jnp.arange(columns, dtype=jnp.int32)
    return cols, None if d_out % columns == 0 else cols < d_out
