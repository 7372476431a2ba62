"""One cell of a sweep: everything that was measured of one method at one target, before any statistics."""

import dataclasses
import time
from typing import Any

import numpy as np

from teal_jax.decode.sampling import Greedy, Sampling
from teal_jax.evaluation.comparison import DenseSide, compare
from teal_jax.evaluation.generated import Prompted, agreement, continue_prompts, dense_sides, repeated_ngrams
from teal_jax.evaluation.settings import EvaluationSettings
from teal_jax.evaluation.text import EvaluationText
from teal_jax.evaluation.weight_bytes import unread_share, weight_bytes
from teal_jax.model import LanguageModel
from teal_jax.sparsity.plan import model_sparsity

DENSE = "dense"
"""The method's name at target 0."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """What was measured; JSON-ready.

    Attributes:
      method, target: which plan; `"dense"` at 0.
      documents, windows: sums over the scored tokens of each document and of each window: `nll` and `kl`, nats.
      realised: by layer and projection; `realised_sparsity`: their mean, weighted by size.
      depth_error: see `Comparison`.
      same, asked: see `agreement`; by prompt.
      repetition: by kind of sampling, by prompt: `[repeated n-grams, n-grams]`.
      sample: the greedy continuation of the first prompt, text; None without a tokenizer or prompts.
      weight_bytes: read for one token. unread: see `unread_share`.
      sparsity: the plan's, by layer and projection; None when dense.
      notes: the plan's, on its allocation.
      seconds: by stage.
    """

    method: str
    target: float
    documents: dict[str, list[float]]
    windows: dict[str, list[float]]
    realised: list[list[float]]
    realised_sparsity: float
    depth_error: list[float]
    same: list[int]
    asked: list[int]
    repetition: dict[str, list[list[int]]]
    sample: str | None
    weight_bytes: int
    unread: float
    sparsity: list[list[float]] | None
    notes: dict[str, Any]
    seconds: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Shared:
    """What the cells of one sweep have in common.

    Attributes:
      text, prompted, settings: of the sweep.
      scored: the dense model on the text. told: on its own continuations.
    """

    text: EvaluationText
    prompted: Prompted
    settings: EvaluationSettings
    scored: DenseSide
    told: list[tuple[DenseSide, list[int]]]

    @classmethod
    def of(
        cls, dense: LanguageModel, text: EvaluationText, prompted: Prompted, settings: EvaluationSettings
    ) -> "Shared":
        """For a sweep of `dense`; nothing runs yet."""
        return cls(text, prompted, settings, DenseSide(dense, text.layout), dense_sides(dense, prompted))


def measure(method: str, target: float, sparse: LanguageModel, shared: Shared, *, progress: bool = True) -> Cell:
    """Score, generate and count with `sparse`, the model under the plan of `method` for `target`."""
    text, prompted, settings = shared.text, shared.prompted, shared.settings
    name = method if method == DENSE else f"{method} {100 * target:g} %"
    start = time.perf_counter()
    found = compare(shared.scored, sparse, description=f"{name}: scoring", progress=progress)
    scored = time.perf_counter()
    count = len(prompted.prompts)
    same, asked = agreement(shared.told, sparse, count, description=f"{name}: agreement", progress=progress)
    repetition, sample = {}, None
    for kind, sampler in (("greedy", Greedy()), ("sampled", Sampling(temperature=settings.temperature))):
        if not prompted.prompts:
            break
        rows = continue_prompts(
            sparse,
            prompted.prompts,
            new_tokens=settings.new_tokens,
            sampler=sampler,
            seed=settings.seed,
            description=f"{name}: generating",
            progress=progress,
        )
        repetition[kind] = [list(repeated_ngrams(row, settings.ngram)) for row in rows]
        if kind == "greedy" and sparse.tokenizer is not None:
            sample = sparse.tokenizer.decode(rows[0])
    plan = sparse.plan if method != DENSE else None
    return Cell(
        method=method,
        target=target,
        documents=_sums(found.nll, found.kl, text.documents),
        windows=_sums(found.nll, found.kl, text.windows),
        realised=np.round(found.realised, 6).tolist(),
        realised_sparsity=model_sparsity(sparse.config, found.realised),
        depth_error=[float(f"{error:.6g}") for error in found.depth_error],
        same=same.tolist(),
        asked=asked.tolist(),
        repetition=repetition,
        sample=sample,
        weight_bytes=weight_bytes(sparse, found.realised),
        unread=unread_share(sparse, found.realised),
        sparsity=None if plan is None else np.round(plan.sparsity, 6).tolist(),
        notes={} if plan is None else dict(plan.notes.get("allocation", {})),
        seconds={"scoring": round(scored - start, 2), "generating": round(time.perf_counter() - scored, 2)},
    )


def _sums(nll: np.ndarray, kl: np.ndarray, units: np.ndarray) -> dict[str, list[float]]:
    from teal_jax.evaluation.bootstrap import unit_sums

    return {"nll": unit_sums(nll, units).tolist(), "kl": unit_sums(kl, units).tolist()}
