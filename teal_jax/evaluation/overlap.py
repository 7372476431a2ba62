"""Calibration text and evaluation text must not overlap: a plan would be scored on what it was made from."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from teal_jax.errors import DataError

NEEDLE = 24
"""Tokens that two texts hardly share by chance."""

MOST = 0.01
"""Share of such sequences that may occur in both. Unlike texts of one kind shared at most 0.2 % (WikiText-2's
validation and test parts; children's stories, which all begin alike, 0.04 %)."""


class Overlap(NamedTuple):
    """Share of one text's `NEEDLE`-token sequences that occur in the other."""

    of_evaluation: float
    of_calibration: float


def overlap(streams: Sequence[np.ndarray], rows: np.ndarray) -> Overlap:
    """What evaluation streams (int `[seq]` each) and calibration rows (int `[rows, seq]`) share."""
    # A row begins with a bos of its own, which the text does not have there.
    length = max(1, min(NEEDLE, rows.shape[1] - 1))
    a = np.concatenate([_hashes(stream, length) for stream in streams])
    b = np.concatenate([_hashes(row, length) for row in rows])
    if not len(a) or not len(b):
        return Overlap(0.0, 0.0)
    return Overlap(float(np.isin(a, b).mean()), float(np.isin(b, a).mean()))


def refuse_overlap(streams: Sequence[np.ndarray], rows: np.ndarray, source: str) -> Overlap:
    """`overlap`; raises `DataError` where it is more than `MOST` of either text."""
    found = overlap(streams, rows)
    if max(found) > MOST:
        raise DataError(
            f"{source} is the calibration text, too: {100 * found.of_evaluation:.1f} % of its {NEEDLE}-token sequences "
            f"were calibrated on, and {100 * found.of_calibration:.1f} % of those in the calibration rows occur in it",
            hint="score text that the calibration has not seen, or calibrate on other text",
        )
    return found


def refuse_same_file(texts: Sequence[Path], calibration: Sequence[Path]) -> None:
    """Raise `DataError` where a file is in both lists, under whatever name."""
    for text in texts:
        if any(text.exists() and other.exists() and text.samefile(other) for other in calibration):
            raise DataError(
                f"{text} is the calibration text, too: its perplexity would flatter the plan",
                hint="score text that the calibration has not seen",
            )


def _hashes(tokens: np.ndarray, length: int) -> np.ndarray:
    """A 64-bit hash of every `length` tokens in a row that are not all the same: padding is alike in any two texts."""
    count = len(tokens) - length + 1
    if count < 1:
        return np.zeros(0, np.uint64)
    factors = np.random.default_rng(0).integers(1, 2**63, length, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
    values, found = tokens.astype(np.uint64), np.zeros(count, np.uint64)
    for i, factor in enumerate(factors):
        found += values[i : i + count] * factor
    changes = np.concatenate([[0], np.cumsum(tokens[1:] != tokens[:-1])])
    return found[changes[length - 1 :] > changes[:count]]
