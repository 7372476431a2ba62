"""What the parts of the attention kernel share: static sizes and masked access."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plgpu

LOWEST = float(jnp.finfo(jnp.float32).min)
"""The highest score of no slots. Finite: -inf minus -inf would be NaN."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Static sizes of a launch: one program takes every `splits`-th block of one kv head's slots.

    Attributes:
      batch: tokens, one a sequence.
      slots: of the cache.
      kv_heads: heads of keys and values.
      head_dim: width of a head.
      group: query heads that share a kv head.
      limit: distances seen are below it.
      splits: programs that share a context, a power of two.
      block: slots a step, a power of two.
      warps: of a program.
    """

    batch: int
    slots: int
    kv_heads: int
    head_dim: int
    group: int
    limit: int
    splits: int
    block: int
    warps: int

    @property
    def channels(self) -> int:
        """Outputs of a kv head: its query heads side by side."""
        return self.group * self.head_dim

    def blocks(self, tokens: jax.Array) -> jax.Array:
        """Blocks of slots that hold some of the tokens."""
        return lax.div(jnp.minimum(tokens, self.slots) + (self.block - 1), self.block)

    def seen(self, slots: jax.Array, tokens: jax.Array) -> jax.Array:
        """Which slots hold what the new token at position `tokens` sees."""
        # The slot that the new token takes is at distance `slots`: it held a position that far away, or nothing.
        new = lax.rem(tokens, self.slots)
        distance = jnp.where(slots < new, new - slots, new - slots + self.slots)
        return (slots < jnp.minimum(tokens, self.slots)) & (distance < self.limit)


def load(ref: Any, shape: tuple[int, ...], mask: jax.Array | None = None) -> jax.Array:
    """What `ref` points to, of `shape`; 0 where the mask says that nothing is there."""
    if mask is None:
        return plgpu.load(ref)
    return plgpu.load(ref, mask=jnp.broadcast_to(mask, shape), other=0)


def store(ref: Any, x: jax.Array, mask: jax.Array | None) -> None:
    """Write x where the mask allows it."""
    plgpu.store(ref, x, mask=None if mask is None else jnp.broadcast_to(mask, x.shape))


def both(a: jax.Array | None, b: jax.Array | None) -> jax.Array | None:
    """Where a and b hold; None holds everywhere."""
    if a is None or b is None:
        return a if b is None else b
    return a & b
