"""`StraightThrough`: a gate that training passes through: forwards it thins, backwards it is not there."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StraightThrough:
    """`y = W^T thin(x)`, `thin(x) = keep(x) x`, whose derivative with respect to x is taken as 1.

    Attributes:
      gate: `Threshold` or `TopK`, of a model, a block or one projection; indexing steps down.

    References:
      Q-Sparse, arXiv 2407.10969, section 2.2; Bengio et al., arXiv 1308.3432.
    """

    gate: Any

    def __getitem__(self, index: int) -> "StraightThrough":
        return StraightThrough(self.gate[index])

    def on(self, where: jax.Array) -> "StraightThrough":
        """The same, acting only on the tokens where `where` is True."""
        return StraightThrough(self.gate.on(where))

    def keep(self, x: jax.Array) -> jax.Array:
        """The kept channels of x."""
        return self.gate.keep(x)

    def thin(self, x: jax.Array) -> jax.Array:
        """x with its dropped channels exactly 0: `x + (0 - x)`, and `x + (x - x)` is x."""
        return x + jax.lax.stop_gradient(jnp.where(self.keep(x), x, 0) - x)
