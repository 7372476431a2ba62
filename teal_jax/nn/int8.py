"""`Int8`: the quantised form of Q-Sparse and the activations of BitNet: eight bits a token, then the gate."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.eight_bits import eight_bits


def through_int8(x: jax.Array) -> jax.Array:
    """x `[..., d]` as eight bits would hold it, in its dtype; see `eight_bits`."""
    wide = x.astype(jnp.float32)
    return eight_bits(wide, jnp.max(jnp.abs(wide), axis=-1, keepdims=True)).astype(x.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """`gate` of x in eight bits: what is compared and what is multiplied is the quantised x.

    Attributes:
      gate: of the projection; for a model or a block what indexing steps down.
      where: bool `[batch, seq]`, the tokens that are quantised and thinned; None: all.
    """

    gate: Any
    where: jax.Array | None = None

    def __getitem__(self, index: int) -> "Int8":
        return Int8(self.gate[index], self.where)

    def on(self, where: jax.Array) -> "Int8":
        """The same, acting only on the tokens where `where` is True."""
        return Int8(self.gate.on(where), where)

    def quantised(self, x: jax.Array) -> jax.Array:
        """What the gate sees."""
        y = through_int8(x)
        return y if self.where is None else jnp.where(self.where[..., None], y, x)

    def keep(self, x: jax.Array) -> jax.Array:
        """The kept channels of x."""
        return self.gate.keep(self.quantised(x))
