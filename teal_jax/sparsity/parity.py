"""The reference TEAL code's own rules, kept for comparison: a signed histogram that assumes a zero median.

Our default thresholds are quantiles of |x|. These reproduce published tables; see the module's functions for
where they differ.
"""

import dataclasses

import numpy as np

NUM_BINS = 10_000


@dataclasses.dataclass(frozen=True)
class SignedHistogram:
    """Counts over the signed values of one site.

    Attributes:
      counts: float `[bins]`.
      centers: float32 `[bins]`, ascending.
    """

    counts: np.ndarray
    centers: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> "SignedHistogram":
        """The reference's histogram: 9,998 even bins between the 1 % tails, one bin for each tail.

        Args:
          values: float32, any shape, at least 100 of them.
        """
        ordered = np.sort(np.asarray(values, np.float32), axis=None)
        tail = int(0.01 * ordered.size)
        inner = np.linspace(ordered[tail], ordered[-tail], NUM_BINS - 1, dtype=np.float32)
        edges = np.concatenate([ordered[:1], inner, ordered[-1:]])
        # Counting by searchsorted on the sorted values is torch.histogram's rule: right edges open, the last closed.
        position = np.searchsorted(ordered, edges)
        position[-1] = ordered.size
        return cls(np.diff(position).astype(np.float32), ((edges[:-1] + edges[1:]) / 2).astype(np.float32))

    def threshold(self, sparsity: float) -> float:
        """`icdf(0.5 + sparsity / 2)`, linear between bin centres; 0 for sparsity 0. May be negative."""
        if sparsity == 0:
            return 0.0
        total = np.cumsum(self.counts, dtype=np.float64)
        target = (0.5 + sparsity / 2) * total[-1]
        right = int(np.searchsorted(total, target))
        if right == 0:
            return float(self.centers[0])
        if right == len(total):
            return float(self.centers[-1])
        share = (target - total[right - 1]) / (total[right] - total[right - 1])
        return float(self.centers[right - 1] + share * (self.centers[right] - self.centers[right - 1]))
