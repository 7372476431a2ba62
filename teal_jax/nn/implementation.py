"""Which implementation a decode step runs in. Imports no kernel; see `pallas_kernels.support`."""

import jax

from pallas_kernels.support import Implementation as Implementation
from pallas_kernels.support import use_pallas
from teal_jax.config import ModelConfig

MAX_HEAD_DIM = 256
"""Of the attention kernel."""


def use_fused_step(
    config: ModelConfig, implementation: Implementation | None, dtype: jax.typing.DTypeLike, batch: int
) -> bool:
    """Whether a decode step runs in `fused_step`; raises `NotImplementedError` if it was asked for and cannot."""
    reason = None if config.head_dim <= MAX_HEAD_DIM else f"they take head_dim <= {MAX_HEAD_DIM}, got {config.head_dim}"
    return use_pallas(implementation, dtype, batch, reason)
