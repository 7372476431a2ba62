"""The grid that codes lie on: scales and zero points for given weights, and the nearest codes."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from teal_jax.nn.quantized import QuantSpec, decode

SHRINKS = tuple(1 - step / 40 for step in range(21))
"""Factors on a grid's span that AWQ and GPTQ try: weights beyond it are cut, the others lie finer."""

_SMALLEST = float(jnp.finfo(jnp.bfloat16).tiny)


class Grid(NamedTuple):
    """Scales and zero points, shaped as in `QuantizedWeight`; the scales float32, of values that it can hold."""

    scale: jax.Array
    zero: jax.Array | None


def fit(weight: jax.Array, spec: QuantSpec, shrink: jax.typing.ArrayLike = 1.0) -> Grid:
    """The grid that spans the weights `[rows, d_out]`.

    Symmetric: `scale = -extreme / 2^(bits - 1)`, where the extreme is the weight of largest magnitude with its sign:
    it takes the one code that has no opposite, so that no level goes unused (at 4 bits a quarter less squared error
    than `max|w| / 7` on normal weights, at 2 bits two thirds). Asymmetric: from the least to the largest weight, 0
    included. All-zero groups get scale 1: they come back as zeros.

    Args:
      weight: float32.
      spec: the format; with 8 bits the scales are of whole columns, so the rows must be all of them.
      shrink: factor on the span, broadcastable against the scales.
    """
    half = 2 ** (spec.bits - 1)
    if spec.group is None:
        values, axis = weight, 0
    else:
        values, axis = weight.reshape(weight.shape[0], -1, spec.group), 2
    high, low = jnp.maximum(values.max(axis), 0), jnp.minimum(values.min(axis), 0)
    if spec.symmetric:
        extreme = jnp.where(high > -low, high, low)
        return Grid(_rounded(extreme * shrink / -half, spec), None)
    scale = _rounded((high - low) * shrink / (2 * half - 1), spec)
    return Grid(scale, jnp.clip(jnp.round(-low * shrink / scale), 0, 2 * half - 1))


def _rounded(scale: jax.Array, spec: QuantSpec) -> jax.Array:
    """As it will be stored, so that the codes are chosen for it; 1 where it is 0 or less than normal numbers are."""
    if spec.group is not None:
        scale = scale.astype(jnp.bfloat16).astype(jnp.float32)
    return jnp.where(jnp.abs(scale) < _SMALLEST, 1.0, scale)


def encode(weight: jax.Array, grid: Grid, spec: QuantSpec) -> jax.Array:
    """The nearest codes, as float32 `[rows, d_out]`, for weights of that shape."""
    half = 2 ** (spec.bits - 1)
    if spec.group is None:
        return jnp.clip(jnp.round(weight / grid.scale), -half, half - 1)
    values = weight.reshape(weight.shape[0], -1, spec.group) / grid.scale[:, :, None]
    middle = half if grid.zero is None else grid.zero[:, :, None]
    return jnp.clip(jnp.round(values + middle), 0, 2 * half - 1).reshape(weight.shape)


def nearest(weight: jax.Array, grid: Grid, spec: QuantSpec) -> jax.Array:
    """The weights `[rows, d_out]` moved to the grid, float32."""
    return decode(encode(weight, grid, spec), grid.scale, grid.zero, spec)


@functools.partial(jax.jit, static_argnums=1)
def best_shrink(weight: jax.Array, spec: QuantSpec, importance: jax.Array, shrinks: jax.Array) -> jax.Array:
    """The factor on each grid's span of least `sum_ij importance_i (W_ij - Q_ij)^2`, float32, shaped as the scales.

    Args:
      weight: `[d_in, d_out]`.
      spec: the format.
      importance: mean square of each input, float32 `[d_in]`; within a row's group it cancels.
      shrinks: what to try, float32 `[n]`.
    """
    values = weight.astype(jnp.float32)

    def error(shrink: jax.Array) -> jax.Array:
        squared = (nearest(values, fit(values, spec, shrink), spec) - values) ** 2
        if spec.group is None:
            return (importance[:, None] * squared).sum(axis=0)
        return squared.reshape(values.shape[0], -1, spec.group).sum(axis=2)

    # One row is little work: all tries at once.
    tried = jax.vmap(error)(shrinks) if len(values) == 1 else jax.lax.map(error, shrinks)
    return shrinks[jnp.argmin(tried, axis=0)]
