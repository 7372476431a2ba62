"""The kv_cache: slot p holds position p (p modulo the window under a sliding window), whatever the padding was."""

import dataclasses

import jax
import jax.numpy as jnp

from teal_jax.config import ModelConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of every layer, and how many tokens each sequence has.

    Attributes:
      keys, values: one `[batch, slots, num_kv_heads, head_dim]` a layer.
      length: int32 `[batch]`, tokens seen so far; the next token gets this position.
      capacity: the most tokens a sequence may have. Slots are fewer only under a sliding window, where the
        oldest position is overwritten.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array
    capacity: int = dataclasses.field(metadata={"static": True})

    @property
    def slots(self) -> int:
        """Positions held at once."""
        return self.keys[0].shape[1]


def init_cache(config: ModelConfig, batch: int, max_len: int, dtype: jax.typing.DTypeLike) -> KVCache:
    """An empty cache for `batch` sequences of at most `max_len` tokens each."""
    slots = min(max_len, config.sliding_window or max_len)
    shape = (batch, slots, config.num_kv_heads, config.head_dim)
    keys = tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))
    values = tuple(jnp.zeros(shape, dtype) for _ in range(config.num_layers))
    return KVCache(keys, values, jnp.zeros((batch,), jnp.int32), capacity=max_len)


def write_slots(positions: jax.Array, mask: jax.Array, length: jax.Array, slots: int) -> jax.Array:
    """The slot of each new token, int32 `[batch, seq]`; `slots` (out of range, so dropped) for tokens not to be kept.

    Not kept are padding (mask False) and, under a sliding window, tokens that a later one of the same call
    would overwrite. `length` is the length after the call.
    """
    kept = mask & (positions >= length[:, None] - slots)
    return jnp.where(kept, positions % slots, slots)


def write(cache: jax.Array, new: jax.Array, slot: jax.Array) -> jax.Array:
    """Put `new [batch, seq, heads, head_dim]` into slots `[batch, seq]` of a layer's cache, in place if donated."""
    rows = jnp.arange(cache.shape[0])[:, None]
    return cache.at[rows, slot].set(new, mode="drop")


def slot_positions(length: jax.Array, slots: int) -> jax.Array:
    """The position each slot holds after `length` tokens, int32 `[batch, slots]`; negative where it holds none."""
    last = length[:, None] - 1
    return last - (last - jnp.arange(slots)) % slots
