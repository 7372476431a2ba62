"""Arithmetic of a training, for the share of a device's peak that it reaches."""

from typing import Any

from teal_jax.config import ModelConfig

PEAKS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "L4": 121e12,
    "L40S": 362e12,
}
"""Dense bfloat16 products with float32 sums, operations a second, by NVIDIA's data sheets."""


def peak_flops(device: Any) -> float | None:
    """Of a device, where it is known; its kind holds the name as a word."""
    words = f" {device.device_kind.replace('-', ' ')} "
    fitting = [name for name in PEAKS if f" {name} " in words]
    return PEAKS[max(fitting, key=len)] if fitting else None


def training_flops(config: ModelConfig, seq_len: int, *, teacher: bool = False) -> float:
    """Operations a token: 6 for each weight of a product, `6 heads head_dim seq_len` a layer for causal attention.

    Forwards a third of it, which a teacher adds once more. What remat computes twice counts once.

    References:
      PaLM, arXiv 2204.02311, appendix B, which does not halve attention for causality.
    """
    weights = config.num_layers * sum(config.projection_sizes) + config.vocab_size * config.d_model
    attention = config.num_layers * config.num_heads * config.head_dim * seq_len
    return (6 + 2 * teacher) * (weights + attention)
