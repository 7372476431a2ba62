"""How a projection's input is thinned. A gate is a pytree: an argument of the model, never a part of it."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """Every input channel is kept."""

    def __getitem__(self, index: int) -> "Dense":
        return self

    def on(self, where: jax.Array) -> "Dense":
        """Dense on any choice of tokens is dense."""
        return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Threshold:
    """Input channel i is kept iff `|x_i| > value`, compared in float32.

    Attributes:
      value: float32, >= 0. `[layers, 7]` for a model, `[7]` for a block, a scalar for one projection:
        indexing takes the step down.
      where: bool `[batch, seq]`, the tokens that are thinned; None thins all.
    """

    value: jax.Array
    where: jax.Array | None = None

    def __getitem__(self, index: int) -> "Threshold":
        return Threshold(self.value[index], self.where)

    def on(self, where: jax.Array) -> "Threshold":
        """The same thresholds, acting only on the tokens where `where` (bool `[batch, seq]`) is True."""
        return Threshold(self.value, where)

    def per_token(self) -> jax.Array:
        """The threshold of every token, float32, broadcastable against x `[batch, seq, d_in]`.

        A token that stays dense gets -1, which every `|x|` exceeds.
        """
        if self.where is None:
            return self.value
        return jnp.where(self.where, self.value, -1.0)[..., None]


type Gate = Dense | Threshold
