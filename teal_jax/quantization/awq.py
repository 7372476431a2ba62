"""AWQ: channels scaled before rounding, by a search on calibration batches, and undone elsewhere for nothing.

A site's input channels are divided by `s` and the rows that read them multiplied by it. The division goes into what
makes the site: the norm before `attn_in` and `mlp_in`, the columns of v before `attn_out`, those of up before
`mlp_hidden`. The scales are powers of two, so that folding them rounds nothing.

With groups along the outputs a row has scales of its own, and to multiply it changes no code: the two norms then have
nothing to gain. The columns of v and up do: a column that matters takes more of its group's grid. So there the search
goes over both signs of the exponent.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from teal_jax.config import SITE_OF_PROJECTION, SITES, ModelConfig
from teal_jax.nn.quantized import QuantSpec
from teal_jax.quantization.grid import SHRINKS, best_shrink
from teal_jax.quantization.layer import Layer, map_matrices, matrix, with_matrices
from teal_jax.quantization.rtn import round_to_nearest
from teal_jax.sparsity.blocks import dense_block

MOST_DOUBLINGS = 6
"""A scale lies in 2^-6..2^6: in float16 too, folding it leaves ordinary weights normal numbers."""

_V, _UP = 2, 5


@dataclasses.dataclass(frozen=True)
class AwqSettings:
    """What the search tries.

    Attributes:
      ratios: exponents in [0, 1]: `s_i = mean|x_i| ** ratio`; 0 is rounding to nearest. At `attn_out` and
        `mlp_hidden` also their negatives.
      shrinks: factors on the span of each grid, the best taken by weighted squared error; (1.0,): none.
    """

    ratios: tuple[float, ...] = tuple(np.linspace(0, 1, 11).tolist())
    shrinks: tuple[float, ...] = SHRINKS


def awq_block(
    config: ModelConfig, spec: QuantSpec, layer: Layer, parts: Sequence[jax.Array], settings: AwqSettings
) -> Layer:
    """The block with seven quantised matrices, its scales folded in.

    Args:
      config: of the model.
      spec: the format.
      layer: the parameters of the block.
      parts: its inputs, `[batch, seq, d_model]` each.
      settings: see `AwqSettings`.

    References:
      AWQ, arXiv 2306.00978, section 3.2; the search for the span is of its code.
    """
    means, squares = _statistics(config, layer, parts)
    for site in range(len(SITES)):
        mean = _shared(config, site, means[site])
        ratios = settings.ratios if site % 2 == 0 else (*settings.ratios, *(-r for r in settings.ratios if r))
        if site % 2 == 0 and spec.group is not None:
            continue
        candidates = jnp.stack([_scales(mean, ratio) for ratio in ratios])
        errors = sum(np.asarray(_errors(config, spec, site, layer, x, candidates), np.float64) for x in parts)
        best = candidates[int(np.argmin(errors))]
        layer = _fold(config, layer, site, best)
        squares[site] = squares[site] / _per_channel(config, site, best) ** 2
    shrinks = jnp.asarray(settings.shrinks, jnp.float32)

    def quantised(projection: int, weight: jax.Array) -> object:
        importance = squares[SITE_OF_PROJECTION[projection]]
        return round_to_nearest(weight, spec, best_shrink(weight, spec, importance, shrinks))

    return map_matrices(layer, quantised)


@functools.partial(jax.jit, static_argnums=0)
def _sums(config: ModelConfig, layer: Layer, x: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
    _, taps = dense_block(config, layer, x)
    sites = [tap.reshape(-1, tap.shape[-1]).astype(jnp.float32) for tap in taps]
    return [(jnp.abs(site).sum(axis=0), (site * site).sum(axis=0)) for site in sites]


def _statistics(
    config: ModelConfig, layer: Layer, parts: Sequence[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Mean magnitude and mean square of each channel of each site."""
    totals = functools.reduce(functools.partial(jax.tree.map, jnp.add), (_sums(config, layer, x) for x in parts))
    tokens = sum(x.shape[0] * x.shape[1] for x in parts)
    return [total[0] / tokens for total in totals], [total[1] / tokens for total in totals]


def _shared(config: ModelConfig, site: int, channels: jax.Array) -> jax.Array:
    """One value for each channel that can be scaled: query heads that share values share a scale."""
    if SITES[site] != "attn_out":
        return channels
    return channels.reshape(config.num_kv_heads, -1, config.head_dim).mean(axis=1).reshape(-1)


def _per_channel(config: ModelConfig, site: int, scale: jax.Array) -> jax.Array:
    """The scale of each channel of the site."""
    if SITES[site] != "attn_out":
        return scale
    heads = scale.reshape(config.num_kv_heads, 1, config.head_dim)
    repeated = (config.num_kv_heads, config.num_heads // config.num_kv_heads, config.head_dim)
    return jnp.broadcast_to(heads, repeated).reshape(-1)


def _scales(mean: jax.Array, ratio: float) -> jax.Array:
    """`mean ** ratio` around a middle of 1, to the nearest power of two; 1 where a channel was never active."""
    active = mean > 0
    logarithm = jnp.where(active, jnp.log2(jnp.where(active, mean, 1)), 0) * ratio
    low = jnp.min(jnp.where(active, logarithm, jnp.inf))
    high = jnp.max(jnp.where(active, logarithm, -jnp.inf))
    centred = jnp.where(active, logarithm - (low + high) / 2, 0)
    return jnp.exp2(jnp.clip(jnp.round(centred), -MOST_DOUBLINGS, MOST_DOUBLINGS))


def _fold(config: ModelConfig, layer: Layer, site: int, scale: jax.Array) -> Layer:
    """The same function: the site's channels divided by `scale`, the rows that read them multiplied."""

    def times(x: jax.Array, factor: jax.Array) -> jax.Array:
        return (x.astype(jnp.float32) * factor).astype(x.dtype)

    rows = _per_channel(config, site, scale)[:, None]
    readers = [i for i, of in enumerate(SITE_OF_PROJECTION) if of == site]
    layer = with_matrices(layer, {i: times(matrix(layer, i), rows) for i in readers})
    if SITES[site] in ("attn_in", "mlp_in"):
        norm = "attn_norm" if SITES[site] == "attn_in" else "mlp_norm"
        return layer | {norm: {"weight": times(layer[norm]["weight"], 1 / scale)}}
    part, name = ("attn", "v_proj") if SITES[site] == "attn_out" else ("mlp", "up_proj")
    maker = {key: times(value, 1 / scale) for key, value in layer[part][name].items()}  # its bias as well
    return layer | {part: layer[part] | {name: maker}}


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _errors(
    config: ModelConfig, spec: QuantSpec, site: int, layer: Layer, x: jax.Array, candidates: jax.Array
) -> jax.Array:
    """Squared error of the block's output for each candidate scale, with what it touches rounded to nearest."""
    expected, _ = dense_block(config, layer, x)
    touched = [i for i, of in enumerate(SITE_OF_PROJECTION) if of == site]
    touched += {"attn_out": [_V], "mlp_hidden": [_UP]}.get(SITES[site], [])

    def error(scale: jax.Array) -> jax.Array:
        folded = _fold(config, layer, site, scale)
        rounded = {i: round_to_nearest(matrix(folded, i), spec).dequantize() for i in touched}
        got, _ = dense_block(config, with_matrices(folded, rounded), x)
        return jnp.sum((got.astype(jnp.float32) - expected.astype(jnp.float32)) ** 2)

    return jax.lax.map(error, candidates)
