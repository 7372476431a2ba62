"""How a benchmark shares sparsity out over layers and projections: evenly, or as unevenly as a greedy plan does."""

import numpy as np

from teal_jax.config import PROJECTIONS, ModelConfig
from teal_jax.sparsity.plan import model_sparsity


def uniform(config: ModelConfig, target: float) -> np.ndarray:
    """Float64 `[layers, 7]`, all `target`."""
    return np.full((config.num_layers, len(PROJECTIONS)), target)


def greedy_like(config: ModelConfig, target: float, *, spread: float = 0.15, seed: int = 0) -> np.ndarray:
    """Float64 `[layers, 7]` that differ by up to `spread` from `target`, with just its model sparsity: equal bytes.

    A greedy plan needs trained weights; what it costs the kernels is that every projection keeps another share.
    """
    spread = min(spread, target, 0.99 - target)
    offsets = np.random.default_rng(seed).uniform(-1, 1, (config.num_layers, len(PROJECTIONS)))
    offsets -= model_sparsity(config, offsets)
    return target + spread * offsets / np.abs(offsets).max()
