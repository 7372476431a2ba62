"""Bootstrap confidence intervals of ratios of sums, paired: every method is resampled with the same draws."""

import math
from typing import NamedTuple

import numpy as np

_CHUNK = 1 << 22
"""Draws held at once."""


class Interval(NamedTuple):
    """`low <= high`."""

    low: float
    high: float


def units_needed(confidence: float) -> int:
    """The fewest units to resample for an interval of this confidence: `1 / (1 - confidence)`, 20 for 95 %.

    Fewer cannot show a value as rare as those that the interval leaves out.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie in (0, 1), got {confidence}")
    return math.ceil(1 / (1 - confidence) - 1e-9)


def unit_sums(values: np.ndarray, units: np.ndarray) -> np.ndarray:
    """Sum of `values [tokens]` in each unit, float64 `[units]`; `units` int `[tokens]` numbers them from 0."""
    return np.bincount(units, weights=values.astype(np.float64))


def resampled_sums(sums: np.ndarray, *, resamples: int, seed: int) -> np.ndarray:
    """Sums over units drawn with replacement, as many as there are, float64 `[resamples, k]`.

    Args:
      sums: per unit, float64 `[k, units]`.
      resamples: draws, >= 1.
      seed: same seed and number of units, same draws: differences between methods are then paired.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be >= 1, got {resamples}")
    count = sums.shape[1]
    generator = np.random.default_rng(seed)
    parts, done, chunk = [], 0, max(1, _CHUNK // count)
    while done < resamples:
        size = min(chunk, resamples - done)
        parts.append(generator.multinomial(count, np.full(count, 1 / count), size=size) @ sums.T)
        done += size
    return np.concatenate(parts)


def percentile_interval(values: np.ndarray, confidence: float) -> Interval:
    """The central share `confidence` of resampled `values [resamples]`; NaN, from an empty draw, is left out."""
    values = values[~np.isnan(values)]
    if not len(values):
        return Interval(math.nan, math.nan)
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))
