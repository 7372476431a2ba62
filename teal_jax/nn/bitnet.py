"""BitNet b1.58: weights of -1, 0 and 1 with one scale a matrix, learnt through float32 ones."""

from typing import Any

import jax
import jax.numpy as jnp

from teal_jax.config import PROJECTIONS
from teal_jax.nn.straight_through import passed

EPSILON = 1e-5
"""Added to the mean |W|."""


def ternary(weight: jax.Array) -> jax.Array:
    """`clip(round(W / s), -1, 1) * s` with `s = mean |W| + EPSILON`, and the gradient of W.

    Args:
      weight: `[d_in, d_out]`; float32 where it is learnt.

    Returns:
      The same shape and dtype; three values.

    References:
      BitNet b1.58, arXiv 2402.17764, section 2; Q-Sparse, arXiv 2407.10969, section 2.
    """
    wide = weight.astype(jnp.float32)
    scale = jnp.mean(jnp.abs(wide)) + EPSILON
    return passed(weight, (jnp.clip(jnp.round(wide / scale), -1, 1) * scale).astype(weight.dtype))


def ternary_weights(weights: dict[str, Any]) -> dict[str, Any]:
    """`ternary` of the seven projections of every layer; embeddings, norms, biases and lm_head as they are.

    `weights` is as in `LanguageModel.params["weights"]`: a training step calls this on its float32 master before it
    casts; a trained model is saved with what it returns.
    """

    def one(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        names = [getattr(part, "key", None) for part in path]
        return ternary(leaf) if names[-1] == "weight" and names[-2] in _MATRICES else leaf

    return jax.tree_util.tree_map_with_path(one, weights)


_MATRICES = {f"{name}_proj" for name in PROJECTIONS}
