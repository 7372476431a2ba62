"""A streaming histogram of |x| with no range to guess: its bins are the leading bits of the float32 pattern.

Sign dropped, a float32's bits grow with its value, so `bits >> 15` (8 exponent bits, 8 of the mantissa) is a bin
index: 65,536 bins, each 0.2 to 0.4 % wide relative to its value, finer than bfloat16. Any two histograms add up.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

NUM_BINS = 1 << 16
_SHIFT = 15


def count_magnitudes(x: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Histogram of |x|, uint32 `[NUM_BINS]`.

    Args:
      x: `[batch, seq, width]`, any float dtype; at most 2^32 - 1 values.
      mask: bool `[batch, seq]`, the tokens to count; None counts all.
    """
    bits = lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.uint32)
    index = (bits >> _SHIFT).astype(jnp.int32)
    if mask is not None:
        index = jnp.where(mask[..., None], index, NUM_BINS)
    return jnp.zeros((NUM_BINS,), jnp.uint32).at[index.reshape(-1)].add(1, mode="drop")


def bin_edges() -> np.ndarray:
    """Lower edge of every bin, float32 `[NUM_BINS]`, ascending; inf and NaN beyond the largest finite value."""
    return (np.arange(NUM_BINS, dtype=np.uint32) << _SHIFT).view(np.float32)


def magnitude_quantiles(counts: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """The thresholds under which the given shares of the counted |x| lie, float32, >= 0, the shape of `shares`.

    Of all bin edges the one whose share is nearest is taken, and the float just below it: a value on an edge
    belongs to the bin above, and must be kept. No interpolation: the share under a threshold is known exactly.

    Args:
      counts: integers `[NUM_BINS]`, at least one positive.
      shares: in [0, 1].
    """
    total = counts.sum(dtype=np.float64)
    below = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)]) / total
    shares = np.asarray(shares, np.float64)
    right = np.clip(np.searchsorted(below, shares), 1, NUM_BINS)
    nearer_left = shares - below[right - 1] <= below[right] - shares
    edge = np.where(nearer_left, right - 1, right)
    # The same share can belong to a run of empty bins: the lowest edge of the run keeps the most.
    edge = np.searchsorted(below, below[edge])
    edges = np.append(bin_edges(), np.float32(np.nan))
    edges[~np.isfinite(edges)] = np.finfo(np.float32).max
    return np.nextafter(edges[edge], np.float32(0))


def share_below(counts: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Share of the counted values with |x| <= threshold, float64, to within the threshold's own bin."""
    below = np.concatenate([[0.0], np.cumsum(counts, dtype=np.float64)]) / counts.sum(dtype=np.float64)
    edge = np.searchsorted(bin_edges()[: _first_infinite()], np.asarray(thresholds, np.float32), side="right")
    return below[edge]


def _first_infinite() -> int:
    return 0x7F800000 >> _SHIFT
