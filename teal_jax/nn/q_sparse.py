"""Q-Sparse's gates from what a person says: the share of channels kept, per site, in blocks or not, in int8 or not."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from teal_jax.config import PROJECTIONS, SITE_OF_PROJECTION, SITES, ModelConfig
from teal_jax.errors import SparsityError
from teal_jax.nn.block_top_k import BlockTopK, check_block
from teal_jax.nn.gates import TopK
from teal_jax.nn.int8 import Int8
from teal_jax.nn.straight_through import StraightThrough

type Shares = float | Sequence[float] | np.ndarray
"""One for all, of the four sites, of the seven projections, or `[layers, 7]`."""


def q_sparse_gates(
    config: ModelConfig, kept: Shares, *, block: int | None = None, int8: bool = False
) -> StraightThrough:
    """The gates that Q-Sparse trains with: int8 if asked for, then top-K, then the gradient straight through.

    Args:
      config: of the model.
      kept: K as a share of the channels of each projection's input, in (0, 1].
      block: M of N:M: K of every M neighbouring channels; None: of all of them.
      int8: quantise the activations of every token first.

    Raises:
      SparsityError: a share outside (0, 1], another number of them, or blocks that do not fill a site.
    """
    counts = jnp.asarray(kept_of(config, kept, block))
    gates: Any = TopK(counts) if block is None else BlockTopK(counts, block)
    return StraightThrough(Int8(gates) if int8 else gates)


def kept_of(config: ModelConfig, kept: Shares, block: int | None = None) -> np.ndarray:
    """Channels kept of each projection's input, or of each block of it: `max(1, round(share * width))`.

    Returns int32 `[layers, 7]`; raises as `q_sparse_gates` does.
    """
    shares = kept_shares(config, kept)
    widths = np.array([d_in for d_in, _ in config.projection_shapes])
    if block is not None:
        for width in config.site_widths:
            check_block(block, width)
        widths = np.full_like(widths, block)
    return np.maximum(1, np.round(shares * widths)).astype(np.int32)


def kept_shares(config: ModelConfig, kept: Shares) -> np.ndarray:
    """`kept` spread over layers and projections, float64 `[layers, 7]`; raises `SparsityError`."""
    try:
        shares = np.asarray(kept, np.float64)
    except (TypeError, ValueError) as error:
        raise SparsityError(f"the share of channels to keep must be numbers, got {kept!r}") from error
    full = (config.num_layers, len(PROJECTIONS))
    if shares.shape == (len(SITES),):
        shares = shares[list(SITE_OF_PROJECTION)]
    if shares.shape not in ((), full[1:], full):
        raise SparsityError(
            f"the shares of channels to keep: expected one, one for each of {', '.join(SITES)}, of "
            f"{', '.join(PROJECTIONS)}, or {list(full)}, got {list(shares.shape)}"
        )
    bad = shares[~((shares > 0) & (shares <= 1))]
    if bad.size:
        raise SparsityError(
            f"the share of channels to keep must lie in (0, 1], got {bad[0]:g}", hint="0.6 drops 40 % of the channels"
        )
    return np.broadcast_to(shares, full).copy()
