"""A token's activations in eight bits, for kernels and plain jax alike: they compute the same bits."""

import jax
import jax.numpy as jnp

EPSILON = 1e-5
"""Added to the largest |x| of a token, so that a token of zeros stays one."""


def eight_bits(x: jax.Array, largest: jax.Array) -> jax.Array:
    """`q (largest + EPSILON) / 127` with `q = round(127 x / (largest + EPSILON))`, a half to the even.

    q lies in -127..127: nothing is left to clip, and a NaN shows. Rounded by floor, since kernels have no round.

    Args:
      x: float32.
      largest: float32, the largest |x| of the token.

    References:
      Q-Sparse, arXiv 2407.10969, section 2; BitNet b1.58, arXiv 2402.17764.
    """
    largest = largest + EPSILON
    scaled = x * (127 / largest)
    below = jnp.floor(scaled)
    over = scaled - below
    odd = below != 2 * jnp.floor(below * 0.5)
    return jnp.where((over > 0.5) | ((over == 0.5) & odd), below + 1, below) * (largest / 127)
