"""Whether a model fits the device's memory: asked before its weights are read, which takes minutes."""

from typing import Any

import jax
import jax.numpy as jnp

from teal_jax.config import ModelConfig
from teal_jax.errors import DeviceMemoryError
from teal_jax.nn.quantized import QuantSpec

BILLIONS = {
    "llama-3.2-1b": 1.24,
    "llama-3.2-3b": 3.21,
    "llama-2-7b": 6.74,
    "mistral-7b": 7.24,
    "llama-3-8b": 8.03,
    "llama-3.1-8b": 8.03,
    "llama-2-13b": 13.02,
    "llama-2-70b": 68.98,
    "llama-3-70b": 70.55,
}
"""Parameters by family; its chat and instruct forms are as large."""

ROOM = 1.1
"""Memory beyond weights and kv_cache: logits, partial sums, compiled programs."""

CONTEXT = 4096
"""Tokens for whose kv_cache there should be room where nobody says how many."""


def cache_bytes(config: ModelConfig, itemsize: int, context: int) -> int:
    """The kv_cache of `context` tokens; under a sliding window it holds no more than that."""
    slots = min(context, config.sliding_window or context)
    return 2 * itemsize * config.num_layers * config.num_kv_heads * config.head_dim * slots


def weight_bytes(config: ModelConfig, itemsize: int, quantize: QuantSpec | None = None) -> int:
    """All weights; while they are quantised also one block as it was."""
    whole = itemsize * config.num_params
    if quantize is None:
        return whole
    block = sum(config.projection_sizes)
    smaller = sum(quantize.bytes_of(*shape) for shape in config.projection_shapes)
    return whole - config.num_layers * (itemsize * block - smaller) + itemsize * block


def needed_bytes(config: ModelConfig, itemsize: int, context: int = CONTEXT, quantize: QuantSpec | None = None) -> int:
    """Device memory to decode one sequence of `context` tokens: weights, kv_cache, and a tenth."""
    return round(ROOM * (weight_bytes(config, itemsize, quantize) + cache_bytes(config, itemsize, context)))


def fitting(memory_bytes: int) -> list[str]:
    """The aliases whose 16-bit weights fit `memory_bytes`, with room to run."""
    return [name for name, billions in BILLIONS.items() if ROOM * 2e9 * billions <= memory_bytes]


def free_bytes() -> int | None:
    """Bytes that jax may still take on the default device; None where the device does not say (a CPU)."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def check_fits(
    config: ModelConfig,
    dtype: Any = None,
    *,
    context: int = CONTEXT,
    free: int | None = None,
    quantize: QuantSpec | None = None,
) -> None:
    """Raise if a model cannot run on the device.

    Args:
      config: of the model.
      dtype: of the weights; None: 16-bit, the least that a checkpoint has.
      context: tokens in the kv_cache.
      free: bytes; None: asks the device.
      quantize: the format that the blocks will have.

    Raises:
      DeviceMemoryError: says how much is needed and what would fit.
    """
    free = free_bytes() if free is None else free
    if free is None:
        return
    itemsize = 2 if dtype is None else jnp.dtype(dtype).itemsize
    needed = needed_bytes(config, itemsize, context, quantize)
    kind = f"{8 * itemsize} bits" if quantize is None else str(quantize)
    if needed > free:
        raise DeviceMemoryError(
            f"{config.num_params / 1e9:.2f}G weights of {kind} need {needed / 2**30:.1f} GiB "
            f"with a kv_cache of {context} tokens, the device has {free / 2**30:.1f} GiB free",
            hint=f"fits in 16 bits: {', '.join(fitting(free)) or 'none of the aliases'}; or set JAX_PLATFORMS=cpu",
        )
