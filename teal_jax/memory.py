"""Whether a model fits the device's memory: asked before its weights are read, which takes minutes."""

from typing import Any

import jax
import jax.numpy as jnp

from teal_jax.config import ModelConfig
from teal_jax.errors import DeviceMemoryError

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

HEADROOM = 1.15
"""Memory that a model needs beyond its weights: kv_cache, activations, compiled programs."""


def fitting(memory_bytes: int) -> list[str]:
    """The aliases whose 16-bit weights fit `memory_bytes`, with room to run."""
    return [name for name, billions in BILLIONS.items() if 2e9 * billions * HEADROOM <= memory_bytes]


def free_bytes() -> int | None:
    """Bytes that jax may still take on the default device; None where the device does not say (a CPU)."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None


def check_fits(config: ModelConfig, dtype: Any = None, *, free: int | None = None) -> None:
    """Raise if a model's weights cannot fit the device.

    Args:
      config: of the model.
      dtype: of the weights; None: 16-bit, the least that a checkpoint has.
      free: bytes; None: asks the device.

    Raises:
      DeviceMemoryError: says how much is needed and what would fit.
    """
    free = free_bytes() if free is None else free
    if free is None:
        return
    itemsize = 2 if dtype is None else jnp.dtype(dtype).itemsize
    needed = int(config.num_params * itemsize * HEADROOM)
    if needed > free:
        names = ", ".join(fitting(free)) or "none of the aliases"
        raise DeviceMemoryError(
            f"{config.num_params / 1e9:.2f}G weights of {8 * itemsize} bits need {needed / 2**30:.1f} GiB with their "
            f"kv_cache, the device has {free / 2**30:.1f} GiB free",
            hint=f"fits in 16 bits: {names}; or set JAX_PLATFORMS=cpu",
        )
