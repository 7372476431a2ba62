"""The record of a block-wise greedy search: every step of every block, so that any target is a look-up."""

import dataclasses
from typing import Any

import numpy as np

_ARRAYS = ("sparsity", "effective", "error", "uniform_error", "candidate_error")


@dataclasses.dataclass(frozen=True)
class GreedyPath:
    """What the search committed, step by step; row 0 is the dense block.

    Attributes:
      sparsity: float64 `[layers, steps + 1, 7]`, after each step.
      effective: float64 `[steps + 1]`, size-weighted mean of `sparsity`: the same in every block, since each step
        drops the same number of weights.
      error: float32 `[layers, steps + 1]`, block error of the committed row.
      uniform_error: float32 `[layers, steps + 1]`, block error of uniform sparsity at the same `effective`.
      candidate_error: float32 `[layers, steps + 1, 7]`, error of each projection tried at that step; inf where
        it had no room left. Shows how near a tie was.
      settings: step, objective and positions it was made with.
    """

    sparsity: np.ndarray
    effective: np.ndarray
    error: np.ndarray
    uniform_error: np.ndarray
    candidate_error: np.ndarray
    settings: dict[str, Any]

    def nearest(self, target: float) -> tuple[np.ndarray, np.ndarray]:
        """Sparsities `[layers, 7]` of the row nearest `target`, and where (bool `[layers]`) uniform had less error."""
        row = int(np.abs(self.effective - target).argmin())
        return self.sparsity[:, row].copy(), self.uniform_error[:, row] < self.error[:, row]

    def at(self, target: float) -> tuple[np.ndarray, np.ndarray]:
        """Sparsities `[layers, 7]` whose size-weighted mean is `target` exactly: the last step taken in part.

        Also where (bool `[layers]`) uniform sparsity had less error, at the step before or after.

        Raises:
          ValueError: `target` is beyond the end of the path.
        """
        if not 0 <= target <= self.effective[-1] + 1e-9:
            raise ValueError(f"the greedy path ends at {self.effective[-1]:.3f}, got target {target}")
        after = min(int(np.searchsorted(self.effective, target)), len(self.effective) - 1)
        before = max(after - 1, 0)
        gap = self.effective[after] - self.effective[before]
        share = 0.0 if gap == 0 else (target - self.effective[before]) / gap
        sparsity = (1 - share) * self.sparsity[:, before] + share * self.sparsity[:, after]
        rows = [before, after] if 0 < share < 1 else [after if share else before]
        worse = (self.uniform_error[:, rows] < self.error[:, rows]).any(axis=1)
        return sparsity, worse

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Arrays for an .npz file, their names prefixed."""
        return {f"path_{name}": getattr(self, name) for name in _ARRAYS}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], settings: dict[str, Any]) -> "GreedyPath":
        """The path that `to_arrays` wrote."""
        return cls(*(arrays[f"path_{name}"] for name in _ARRAYS), settings=settings)
