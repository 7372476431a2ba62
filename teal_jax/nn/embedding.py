"""Token vectors, whose derivative is summed in float32 and in the same order every time."""

import jax
import jax.numpy as jnp
from flax import nnx

from teal_jax.config import ModelConfig
from teal_jax.nn.product import product

ONES = 1 << 27
"""Most entries of the matrix of zeros and ones that stands for the tokens: 256 MB in bfloat16."""


class Embedding(nnx.Module):
    """Token vectors `[vocab, d_model]`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike):
        init = jax.nn.initializers.normal(0.02)
        self.weight = nnx.Param(init(rngs.params(), (config.vocab_size, config.d_model), dtype))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """The vectors `[..., d_model]` of tokens, int32 `[...]`."""
        return look_up(self.weight[...], tokens)


@jax.custom_vjp
def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
    """`table[tokens]`; table `[vocab, d]`, tokens int32 `[...]`, returns `[..., d]`.

    jax's own derivative is a scatter, which adds to a frequent token's row thousands of times in the table's dtype, on
    a GPU in any order. Here it is a product with zeros and ones, summed in float32.
    """
    return table[tokens]


def _forward(table: jax.Array, tokens: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return table[tokens], (table, tokens)


def _backward(saved: tuple[jax.Array, jax.Array], slope: jax.Array) -> tuple[jax.Array, None]:
    table, tokens = saved
    rows = table.shape[0]
    tokens, slope = tokens.reshape(-1), slope.reshape(-1, slope.shape[-1]).astype(table.dtype)
    width = min(rows, max(1, ONES // tokens.size))

    def sums(first: jax.Array) -> jax.Array:
        ones = tokens[:, None] == first + jnp.arange(width)
        return product("tv,td->vd", ones.astype(slope.dtype), slope).astype(table.dtype)

    if width == rows:
        return sums(jnp.zeros((), tokens.dtype)), None
    starts = jnp.arange(0, rows, width, dtype=tokens.dtype)
    return jax.lax.map(sums, starts).reshape(-1, slope.shape[-1])[:rows], None


look_up.defvjp(_forward, _backward)
