"""The analyses together: one calibration, one set of rows, one result that can be written down."""

import dataclasses
import functools
import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from teal_jax.analysis.batch import BATCHES, BatchRow, compare_batches
from teal_jax.analysis.cost import constant
from teal_jax.analysis.distribution import Distribution, of_plan, read_published
from teal_jax.analysis.forward import KEEP_ALL, Limits, score, threshold_step
from teal_jax.analysis.prefill import PrefillRow, compare_prefill, first_token_attention
from teal_jax.analysis.rows import Rows
from teal_jax.analysis.up import UpRow, compare_up_masks
from teal_jax.benchmark.report import commit, device_name, versions
from teal_jax.errors import DataError
from teal_jax.model import LanguageModel
from teal_jax.sparsity.allocation import allocate
from teal_jax.sparsity.greedy import GreedySettings
from teal_jax.sparsity.plan import SparsityPlan
from teal_jax.sparsity.statistics import Calibration

WHAT = ("up", "distribution", "prefill", "batch")
"""The analyses, in the order in which they run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """What was found; a list is empty where its analysis was not asked for.

    Attributes:
      model, fingerprint: of the model.
      setting: text, tokens, prompt, method, seed.
      dense_ppl: perplexity of the dense model on the scored tokens.
      up, distribution, prefill, batch: see their rows.
      first_token_attention: `[layers]`, see the function; with `prefill`.
    """

    model: str
    fingerprint: str
    setting: dict[str, Any]
    dense_ppl: float
    up: list[UpRow] = dataclasses.field(default_factory=list)
    distribution: list[Distribution] = dataclasses.field(default_factory=list)
    prefill: list[PrefillRow] = dataclasses.field(default_factory=list)
    first_token_attention: list[float] = dataclasses.field(default_factory=list)
    batch: list[BatchRow] = dataclasses.field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, six significant digits."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= {name: [dataclasses.asdict(row) for row in fields[name]] for name in ("up", "prefill", "batch")}
        fields["distribution"] = [row.to_dict() for row in self.distribution]
        return _rounded(fields | {"hardware": device_name(), "versions": versions(), "commit": commit()})

    def write(self, folder: Path) -> Path:
        """`analysis-MODEL.json` in `folder`; returns its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"analysis-{Path(self.model).name}.json"
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", "utf-8")
        return path


def analyse(
    lm: LanguageModel,
    calibration: Calibration,
    rows: Rows,
    *,
    what: Collection[str] = WHAT,
    sparsities: Sequence[float] = (0.25, 0.4, 0.5),
    method: str = "greedy",
    settings: GreedySettings | None = None,
    published: str | Path | None = None,
    batches: Sequence[int] = BATCHES,
    seed: int = 0,
    progress: bool = True,
) -> Analysis:
    """TEAL's own analyses of a model.

    Args:
      lm: its gates are ignored.
      calibration: of this model, on other text than `rows`.
      rows: what is scored.
      what: names in `WHAT`.
      sparsities: targets, in (0, 1).
      method: `"greedy"` or `"uniform"`, of the plans under which prefill and batches are looked at.
      settings: of the greedy search; None as in `allocate`.
      published: TEAL's published tables, see `read_published`; None leaves them out.
      batches: sizes, see `compare_batches`.
      seed: which calibration rows meet in a batch.
      progress: draw progress bars.

    Raises:
      ValueError: an unknown analysis, or a target outside (0, 1).
      DataError: the dense model's perplexity is not finite.
    """
    if unknown := set(what) - set(WHAT):
        raise ValueError(f"what must be of {', '.join(WHAT)}, got {', '.join(sorted(unknown))}")
    if not sparsities or not all(0 < share < 1 for share in sparsities):
        raise ValueError(f"sparsities must lie in (0, 1), got {list(sparsities)}")
    if method not in ("greedy", "uniform"):
        raise ValueError(f"method must be greedy or uniform, which set one threshold a projection, got {method!r}")
    # First what can fail without work.
    tables = read_published(published, sparsities) if "distribution" in what and published is not None else []
    nothing = Limits(constant(lm.config, KEEP_ALL), np.full(lm.config.num_layers, KEEP_ALL, np.float32))
    dense = score(lm, rows, threshold_step, nothing)
    if not np.isfinite(dense.nll).all():
        raise DataError(
            f"the dense model's perplexity on {rows.source} is not finite",
            hint="check the checkpoint, or load it with --dtype float32",
        )
    found: dict[str, Any] = {}
    if "up" in what:
        found["up"] = compare_up_masks(lm, calibration, rows, dense, sparsities=sparsities, progress=progress)

    @functools.cache
    def plans(method: str) -> list[SparsityPlan]:
        return [
            allocate(lm, calibration, share, method=method, settings=settings, progress=progress)
            for share in sparsities
        ]

    if "distribution" in what:
        found["distribution"] = [*map(of_plan, plans("greedy")), *tables]
    if "prefill" in what:
        found["prefill"] = compare_prefill(lm, plans(method), rows, dense, progress=progress)
        found["first_token_attention"] = first_token_attention(lm, rows).tolist()
    if "batch" in what:
        found["batch"] = compare_batches(
            lm, plans(method), calibration, rows, dense, batches=batches, seed=seed, progress=progress
        )
    return Analysis(
        model=lm.name,
        fingerprint=lm.config.fingerprint,
        setting=_setting(lm, calibration, rows, method, seed),
        dense_ppl=math.exp(min(float(dense.nll.mean()), 700.0)),
        **found,
    )


def _setting(
    lm: LanguageModel,
    calibration: Calibration,
    rows: Rows,
    method: str,
    seed: int,
) -> dict[str, Any]:
    count, seq = rows.tokens.shape
    return {
        "data": rows.source,
        "rows": count,
        "seq_len": seq,
        "prompt": rows.prompt,
        "scored_tokens": rows.num_scored,
        "calibration": calibration.notes,
        "method": method,
        "greedy": calibration.path.settings if calibration.path else None,
        "seed": seed,
        "dtype": str(lm.dtype),
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value
