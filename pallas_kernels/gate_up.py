"""The gate and up projections, `act(gate) * up`, and the kept rows of that: the input of down."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels.checks import check_cut, check_weights
from pallas_kernels.kept import Cut, KeptRows, kept_shapes, select_reference, write_kept
from pallas_kernels.launch import launch
from pallas_kernels.matvec import Rows, matvec_reference, program_sums, real_splits
from pallas_kernels.row_sum import row_loader
from pallas_kernels.split import add_partials, last_to_finish, tile_columns
from pallas_kernels.tiles import Tile


def gate_and_up(gate: jax.Array, up: jax.Array, dtype: jax.typing.DTypeLike, activation: str = "silu") -> jax.Array:
    """`act(gate) * up` of float32 sums, rounded to `dtype` where the model rounds: gate, up and the product."""
    gate, up = gate.astype(dtype).astype(jnp.float32), up.astype(dtype).astype(jnp.float32)
    if activation == "relu2":
        return (jnp.maximum(gate, 0) * jnp.maximum(gate, 0) * up).astype(dtype)
    return (gate / (1 + jnp.exp(-gate)) * up).astype(dtype)


@functools.partial(jax.jit, static_argnames=("tile", "activation", "interpret"))
def gate_up(
    rows: Rows,
    weights: tuple[jax.Array, jax.Array],
    counters: jax.Array,
    cut: Cut | None,
    *,
    tile: Tile,
    biases: tuple[jax.Array, jax.Array] | None = None,
    activation: str = "silu",
    interpret: bool = False,
) -> tuple[Rows, jax.Array]:
    """`x = act(W_gate^T x) * (W_up^T x)` over kept rows, and the channels of it that `cut` keeps.

    Args:
      rows: as for `matvec`, two segments: gate and up.
      weights: gate and up, `[d_model, d_mlp]` each.
      counters: as for `matvec`, one or more for each column tile of `d_mlp`.
      cut: one threshold, of down; None: dense.
      tile: how the work is cut; a list of the result has `tile.columns` channels.
      biases: `[d_mlp]` each.
      activation: `"silu"` or `"relu2"`, `max(x, 0) ** 2`.
      interpret: run as plain jax, on any device.

    Returns:
      The kept rows of x, one segment; dense: x `[batch, d_mlp]`; and the counters.

    Raises:
      TypeError, ValueError: arguments that do not fit together, or a size that the kernel does not take.
    """
    check_weights(rows, weights, biases, tile, counters)
    if len(weights) != 2:
        raise ValueError(f"weights: expected two, gate and up, got {len(weights)}")
    check_cut(cut, weights[0].shape[1], 1)
    if weights[0].shape != weights[1].shape:
        raise ValueError(f"weights: expected gate and up of one shape, got {weights[0].shape} and {weights[1].shape}")
    batch = rows.batch if isinstance(rows, KeptRows) else rows.shape[0]
    tile = real_splits(rows, tile)
    d_mlp, dtype = weights[0].shape[1], weights[0].dtype
    tiles = pl.cdiv(d_mlp, tile.columns)

    def kernel(
        rows: Any, weights: Any, counters_in: Any, cut: Any, biases: Any,
        out: Any, partials: Any, counters: Any,
    ) -> None:  # fmt: skip
        n, split = pl.program_id(0), pl.program_id(1)
        for s in range(2):

            @pl.when((n >= s * tiles) & (n < (s + 1) * tiles))
            def _(s: int = s) -> None:
                cols, exists = tile_columns(n - s * tiles, tile.columns, d_mlp)
                sums = program_sums(rows, s, split, tile, row_loader(weights[s], cols, exists))
                for b, total in enumerate(sums):
                    plgpu.store(partials.at[split, b, s * d_mlp + cols], total, mask=exists)

        pair = jax.lax.rem(n, tiles)

        @pl.when(last_to_finish(counters, pair, 2 * tile.splits, interpret))
        def _() -> None:
            cols, exists = tile_columns(pair, tile.columns, d_mlp)
            xs = []
            for b in range(batch):
                both = [add_partials(partials, b, s * d_mlp + cols, exists) for s in range(2)]
                if biases is not None:
                    both = [
                        y + plgpu.load(bias.at[cols], mask=exists).astype(jnp.float32)
                        for y, bias in zip(both, biases, strict=True)
                    ]
                x = gate_and_up(*both, dtype, activation)
                if cut is None:
                    plgpu.store(out.at[b, cols], x, mask=exists)
                xs.append(x.astype(jnp.float32))
            if cut is not None:
                scales = cut.read_scales(cols, exists)
                write_kept(out, pair, pair * tile.columns, xs, cut.read(), exists, scales)

    if cut is None:
        out: Any = jax.ShapeDtypeStruct((batch, d_mlp), dtype)
    else:
        out = kept_shapes(1, tiles, batch, tile.columns)
    rows, _, counters = launch(
        kernel,
        (rows, tuple(weights), counters, cut, biases),
        out=(
            out,
            jax.ShapeDtypeStruct((tile.splits, batch, 2 * d_mlp), jnp.float32),
            jax.ShapeDtypeStruct(counters.shape, counters.dtype),
        ),
        grid=(2 * tiles, tile.splits),
        warps=tile.warps,
        name="gate_up",
        aliases={len(jax.tree.leaves((rows, tuple(weights)))): len(jax.tree.leaves(out)) + 1},
        interpret=interpret,
    )
    return rows, counters


def gate_up_reference(
    rows: Rows,
    weights: tuple[jax.Array, jax.Array],
    cut: Cut | None,
    *,
    width: int,
    biases: tuple[jax.Array, jax.Array] | None = None,
    activation: str = "silu",
) -> Rows:
    """`gate_up` in plain jnp; `width` is the columns of its tile."""
    both = matvec_reference(rows, weights, biases=biases, out_dtype=jnp.float32)
    x = gate_and_up(*jnp.split(both, 2, axis=-1), weights[0].dtype, activation)
    return x if cut is None else select_reference(x, cut.values, width, cut.scales)
