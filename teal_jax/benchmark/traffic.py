"""Bytes that a decoded token has to read: its weights and its kv_cache."""

import numpy as np

from teal_jax.config import ModelConfig
from teal_jax.memory import cache_bytes
from teal_jax.tables import decode_bytes


def token_bytes(
    config: ModelConfig, itemsize: int, sparsity: float, lengths: range, formats: dict[str, str] | None = None
) -> float:
    """Mean bytes that a token reads, decoded at each of `lengths` tokens before it: kept weights, lm_head, kv_cache.

    Norms and the embedding's one row, a hundred-thousandth of it, are not counted. `formats`: of quantised weights, by
    place, as an artifact has them.
    """
    caches = [cache_bytes(config, itemsize, length) for length in lengths]
    return decode_bytes(config, itemsize, sparsity, formats) + float(np.mean(caches))


def limit(config: ModelConfig, itemsize: int, sparsity: float, lengths: range, bandwidth: float) -> float:
    """Tokens a second that `bandwidth` (bytes a second) allows."""
    return bandwidth / token_bytes(config, itemsize, sparsity, lengths)
