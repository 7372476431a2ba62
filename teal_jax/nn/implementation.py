"""Which implementation a decode step runs in. Imports no kernel; see `pallas_kernels.support`."""

import jax

from pallas_kernels.support import Implementation as Implementation
from pallas_kernels.support import use_pallas
from teal_jax.config import ModelConfig
from teal_jax.nn.compensation import Biased
from teal_jax.nn.gates import Dense, ModelGates, Threshold
from teal_jax.nn.quantized import QuantSpec

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
    elif not isinstance(gates.gate if isinstance(gates, Biased) else gates, Dense | Threshold | None):
        reason = f"they take Dense gates, Threshold, and Biased of those, got {type(gates).__name__}"
    elif quantization is not None:
        reason = not_taken(quantization)
    return use_pallas(implementation, dtype, batch, reason)


def not_taken(quantization: str) -> str | None:
    """Why the kernels cannot read one of these formats, joined by +; None: they can."""
    for spec in map(QuantSpec.parse, quantization.split("+")):
        if spec.simulated or (spec.group is not None and spec.group & (spec.group - 1)):
            return f"they take int8, and int4 in groups of a power of two, got {spec}"
    return None
