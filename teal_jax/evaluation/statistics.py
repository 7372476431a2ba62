"""From measured cells to the rows of a table: point values, and paired bootstrap intervals where the text allows."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from teal_jax.evaluation.bootstrap import Interval, percentile_interval, resampled_sums, unit_sums, units_needed
from teal_jax.evaluation.cell import DENSE, Cell
from teal_jax.evaluation.settings import EvaluationSettings
from teal_jax.evaluation.text import EvaluationText


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One method at one target; an interval is None where there were too few units to resample.

    Attributes:
      method, target: `"dense"` at 0.
      realised: model sparsity counted on the scored tokens.
      unread: share of the blocks' weight bytes left unread: `realised`, less what a method's own matrices read.
      reached: whether that is within the tolerance of the target.
      ppl: `exp(nll per token)`. ratio: over the dense model's. kl: KL(dense || sparse), nats a token.
      bits_per_byte: nll of all scored tokens over the bytes of their text; None without a tokenizer that tells.
      agreement: share of the dense model's own tokens that the sparse model ranks first; None without prompts.
      repetition: share of repeated n-grams in generated text, by kind of sampling.
      weight_bytes: read for one token, and as a share of the dense model's.
      depth_error: see `Comparison`, by layer.
      seconds: that the cell took.
    """

    method: str
    target: float
    realised: float
    unread: float
    reached: bool
    ppl: float
    ppl_interval: Interval | None
    ratio: float
    ratio_interval: Interval | None
    kl: float
    kl_interval: Interval | None
    bits_per_byte: float | None
    bits_per_byte_interval: Interval | None
    agreement: float | None
    agreement_interval: Interval | None
    repetition: dict[str, float]
    repetition_intervals: dict[str, Interval | None]
    weight_bytes: int
    weight_bytes_share: float
    depth_error: list[float]
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Versus:
    """A method against another at the same target, on the same draws.

    Attributes:
      method, against, target: which.
      difference: in log perplexity, nats a token; below 0: `method` is better.
      excess_ratio: `log ppl - log dense ppl` over that of `against`; None where `against` is no worse than dense.
    """

    method: str
    against: str
    target: float
    difference: float
    difference_interval: Interval | None
    excess_ratio: float | None
    excess_ratio_interval: Interval | None


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Cells of one sweep as numbers; `unit` is what the bootstrap resamples, `count` how many there are."""

    text: EvaluationText
    settings: EvaluationSettings
    dense: Cell

    @property
    def needed(self) -> int:
        """Units that an interval needs."""
        return units_needed(self.settings.confidence)

    @property
    def unit(self) -> str:
        """`"document"` or `"window"`."""
        return self.text.units(self.needed)[1]

    @property
    def count(self) -> int:
        """Units in the text."""
        return int(self.text.units(self.needed)[0].max()) + 1

    def row(self, cell: Cell) -> Row:
        """The numbers of a cell."""
        tokens, num_bytes = self._tokens(), self._bytes()
        nll, kl, dense = self._nll(cell), np.array(self._of(cell)["kl"]), self._nll(self.dense)
        total, count = nll.sum(), tokens.sum()
        draws = self._draws(nll, kl, dense, tokens, tokens if num_bytes is None else num_bytes)
        interval = lambda values: None if draws is None else self._interval(values(*draws.T))  # noqa: E731
        counted = np.array([cell.same, cell.asked], np.float64)
        repeated = {kind: np.array(pairs, np.float64).reshape(-1, 2).T for kind, pairs in cell.repetition.items()}
        bits = math.log(2)
        return Row(
            method=cell.method,
            target=cell.target,
            realised=cell.realised_sparsity,
            unread=cell.unread,
            reached=abs(cell.unread - cell.target) <= self.settings.tolerance,
            ppl=_exp(total / count),
            ppl_interval=interval(lambda a, k, d, n, b: _exp(a / n)),
            ratio=_exp((total - dense.sum()) / count),
            ratio_interval=interval(lambda a, k, d, n, b: _exp((a - d) / n)),
            kl=float(kl.sum() / count),
            kl_interval=interval(lambda a, k, d, n, b: k / n),
            bits_per_byte=None if num_bytes is None else float(total / bits / num_bytes.sum()),
            bits_per_byte_interval=None if num_bytes is None else interval(lambda a, k, d, n, b: a / bits / b),
            agreement=_share(counted),
            agreement_interval=self._share_interval(counted),
            repetition={kind: share for kind, pairs in repeated.items() if (share := _share(pairs)) is not None},
            repetition_intervals={kind: self._share_interval(pairs) for kind, pairs in repeated.items()},
            weight_bytes=cell.weight_bytes,
            weight_bytes_share=cell.weight_bytes / self.dense.weight_bytes,
            depth_error=cell.depth_error,
            seconds=round(sum(cell.seconds.values()), 2),
        )

    def versus(self, cell: Cell, other: Cell) -> Versus:
        """`cell` against `other`."""
        a, b, d, tokens = self._nll(cell), self._nll(other), self._nll(self.dense), self._tokens()
        draws = self._draws(a - b, a - d, b - d, tokens)
        excess = (b - d).sum()
        ratios = draws is not None and excess > 0 and (draws[:, 2] > 0).all()
        return Versus(
            method=cell.method,
            against=other.method,
            target=cell.target,
            difference=float((a - b).sum() / tokens.sum()),
            difference_interval=None if draws is None else self._interval(draws[:, 0] / draws[:, 3]),
            excess_ratio=float((a - d).sum() / excess) if excess > 0 else None,
            excess_ratio_interval=self._interval(draws[:, 1] / draws[:, 2]) if ratios else None,
        )

    def compared(self, cells: Sequence[Cell]) -> list[Versus]:
        """Every method against greedy (or the first one there is), target by target."""
        sparse = [cell for cell in cells if cell.method != DENSE]
        names = list(dict.fromkeys(cell.method for cell in sparse))
        if len(names) < 2:
            return []
        against = "greedy" if "greedy" in names else names[0]
        others = {cell.target: cell for cell in sparse if cell.method == against}
        pairs = [(cell, others[cell.target]) for cell in sparse if cell.target in others and cell.method != against]
        return [self.versus(*pair) for pair in pairs]

    def _of(self, cell: Cell) -> dict[str, list[float]]:
        return cell.documents if self.unit == "document" else cell.windows

    def _nll(self, cell: Cell) -> np.ndarray:
        return np.array(self._of(cell)["nll"])

    def _tokens(self) -> np.ndarray:
        units, _ = self.text.units(self.needed)
        return unit_sums(np.ones(len(units)), units)

    def _bytes(self) -> np.ndarray | None:
        units, _ = self.text.units(self.needed)
        found = None if self.text.num_bytes is None else unit_sums(self.text.num_bytes, units)
        return None if found is None or not found.sum() else found

    def _draws(self, *sums: np.ndarray) -> np.ndarray | None:
        """`[resamples, len(sums)]`, or None for too few units."""
        if len(sums[0]) < self.needed:
            return None
        return resampled_sums(np.stack(sums), resamples=self.settings.resamples, seed=self.settings.seed)

    def _interval(self, values: np.ndarray) -> Interval:
        return percentile_interval(values, self.settings.confidence)

    def _share_interval(self, pairs: np.ndarray) -> Interval | None:
        """Of `sum(pairs[0]) / sum(pairs[1])`, the columns resampled."""
        draws = self._draws(*pairs)
        if draws is None or not (draws[:, 1] > 0).any():
            return None
        with np.errstate(invalid="ignore"):
            return self._interval(draws[:, 0] / draws[:, 1])


def _share(pairs: np.ndarray) -> float | None:
    return float(pairs[0].sum() / pairs[1].sum()) if pairs[1].sum() else None


def _exp(value: Any) -> Any:
    found = np.exp(np.minimum(value, 700.0))
    return float(found) if np.ndim(found) == 0 else found
