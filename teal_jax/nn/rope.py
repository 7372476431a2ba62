"""Rotary position embedding: the first half of a head's channels rotates against the second half."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from teal_jax.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each channel pair, float32 `[head_dim / 2]`.

    default: `f_i = theta^(-2i / head_dim)`; linear: `f_i / factor`; llama3: `f_i` where the original context
    holds more than `high_freq_factor` turns, `f_i / factor` where fewer than `low_freq_factor`, in between a
    linear blend over the number of turns.
    """
    freq = rope.theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.type == "linear":
        freq = freq / rope.factor
    elif rope.type == "llama3":
        turns = rope.original_max_position * freq / (2 * math.pi)
        blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        blend = np.clip(blend, 0.0, 1.0)
        freq = blend * freq + (1 - blend) * freq / rope.factor
    return freq.astype(np.float32)


def rotary_table(positions: jax.Array, rope: RopeConfig, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every angle, float32 `[batch, seq, 1, head_dim / 2]`; positions int32 `[batch, seq]`."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(rope, head_dim)
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def rotate(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """x `[batch, seq, heads, head_dim]` turned by its position's angles; float32 inside, the dtype of x outside."""
    cos, sin = table
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
