"""Which implementation a decode step runs in. Imports no kernel; see `pallas_kernels.support`."""

from typing import Any

import jax

from pallas_kernels.support import Implementation as Implementation
from pallas_kernels.support import use_pallas
from teal_jax.config import ModelConfig
from teal_jax.nn.block_top_k import BlockTopK
from teal_jax.nn.compensation import Biased
from teal_jax.nn.gates import Dense, ModelGates, Threshold, TopK
from teal_jax.nn.int8 import Int8
from teal_jax.nn.straight_through import without_gradient

MAX_HEAD_DIM = 256
"""Of the attention kernel."""

MAX_BLOCK = 256
"""Channels of a block of N:M: a list holds whole blocks."""


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
    elif not _taken(inner := _inner(gates)):
        reason = (
            f"they take Dense gates, Threshold, TopK, BlockTopK of a power of two up to {MAX_BLOCK}, "
            f"Int8 of both TopK, and Biased of those, got {_name(inner)}"
        )
    elif quantization is not None:
        reason = f"they take no quantised weights, got {quantization}"
    return use_pallas(implementation, dtype, batch, reason)


def _taken(gates: ModelGates | None) -> bool:
    top_k = gates.gate if isinstance(gates, Int8) else gates
    if isinstance(top_k, BlockTopK):
        return top_k.block <= MAX_BLOCK and not top_k.block & (top_k.block - 1)
    return isinstance(top_k, TopK) or isinstance(gates, Dense | Threshold | None)


def _name(gates: Any) -> str:
    if isinstance(gates, Int8):
        return f"Int8 of {_name(gates.gate)}"
    return f"BlockTopK of {gates.block}" if isinstance(gates, BlockTopK) else type(gates).__name__


def _inner(gates: ModelGates | None) -> ModelGates | None:
    gates = without_gradient(gates)
    return gates.gate if isinstance(gates, Biased) else gates
