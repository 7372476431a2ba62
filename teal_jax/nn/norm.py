"""RMSNorm, as Llama computes it."""

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """`y = w * x / sqrt(mean(x^2) + eps)`: the mean in float32, the product with w in the model's dtype."""

    def __init__(self, width: int, *, eps: float, dtype: jax.typing.DTypeLike):
        self.weight = nnx.Param(jnp.ones((width,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """The normed x, `[..., width]`, in the dtype of x and w."""
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return self.weight[...] * (x32 * scale).astype(x.dtype)
