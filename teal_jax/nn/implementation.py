"""Which implementation a decode step runs in. Imports no kernel; see `pallas_kernels.support`."""

import jax

from pallas_kernels.support import Implementation as Implementation
from pallas_kernels.support import use_pallas
from teal_jax.config import ModelConfig
from teal_jax.nn.compensation import Biased
from teal_jax.nn.gates import Dense, ModelGates, Threshold, TopK
from teal_jax.nn.straight_through import without_gradient

MAX_HEAD_DIM = 256
"""Of the attention kernel."""


def use_fused_step(
    config: ModelConfig,
    implementation: Implementation | None,
    dtype: jax.typing.DTypeLike,
    batch: int,
    gates: ModelGates | None = None,
    quantization: str | None = None,
) -> bool:
    """Whether a decode step runs in `fused_step`; raises `NotImplementedError` if it was asked for and cannot.

    `gates` are those of the step; None leaves them out of the question. `quantization` is the format of the weights.
    """
    reason = None
    if config.head_dim > MAX_HEAD_DIM:
        reason = f"they take head_dim <= {MAX_HEAD_DIM}, got {config.head_dim}"
    elif not isinstance(_inner(gates), Dense | Threshold | TopK | None):
        reason = f"they take Dense gates, Threshold, TopK, and Biased of those, got {type(_inner(gates)).__name__}"
    elif quantization is not None:
        reason = f"they take no quantised weights, got {quantization}"
    return use_pallas(implementation, dtype, batch, reason)


def _inner(gates: ModelGates | None) -> ModelGates | None:
    gates = without_gradient(gates)
    return gates.gate if isinstance(gates, Biased) else gates
