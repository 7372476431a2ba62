"""What a sweep leaves behind: one JSON with everything that the tables, the figures and the page are drawn from."""

import dataclasses
import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from teal_jax.benchmark.report import commit, versions
from teal_jax.errors import ArtifactError
from teal_jax.evaluation.activation_fit import fit_sites
from teal_jax.evaluation.cell import DENSE, Cell
from teal_jax.evaluation.generated import Prompted
from teal_jax.evaluation.overlap import Overlap
from teal_jax.evaluation.run_directory import read_json
from teal_jax.evaluation.settings import EvaluationSettings
from teal_jax.evaluation.statistics import Statistics
from teal_jax.evaluation.sweep import Failure
from teal_jax.evaluation.text import EvaluationText
from teal_jax.model import LanguageModel
from teal_jax.quantization.storage import split_quantized
from teal_jax.sparsity.statistics import Calibration
from teal_jax.tables import model_facts

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """One sweep, JSON-ready throughout.

    Attributes:
      model, protocol, tokens: what was scored, how, and how many tokens of it.
      rows: `Row`s as dicts, dense first. comparisons: `Versus`es. failures: `Failure`s.
      plans: by row, `method`, `target`, `sparsity` and `realised` `[layers, 7]`, and `notes` on the allocation.
      activations: `ActivationFit`s of the calibration, each with `better`; empty where nothing was calibrated.
      samples: the first prompt, and what the dense model and each row made of it, greedily.
      settings, text, calibration, facts: what was measured, on what, with which calibration, of which model.
      notes: what a reader must know before trusting a number.
      made: command, versions, hardware, commit, date, seeds, seconds.
    """

    model: str
    protocol: str
    tokens: int
    rows: list[dict[str, Any]]
    comparisons: list[dict[str, Any]]
    failures: list[dict[str, Any]]
    plans: list[dict[str, Any]]
    activations: list[dict[str, Any]]
    samples: dict[str, Any]
    settings: dict[str, Any]
    text: dict[str, Any]
    calibration: dict[str, Any]
    facts: dict[str, Any]
    notes: list[str]
    made: dict[str, Any]
    format_version: int = FORMAT_VERSION

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def load(cls, path: Path) -> "EvaluationReport":
        """What `to_dict` gave, from a file; raises `ArtifactError` where it is not one."""
        fields = read_json(path)
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(fields, dict) or not {"format_version", "rows"} <= set(fields):
            raise ArtifactError(f"{path} is not a report of teal eval", hint="it writes one as report.json")
        if fields["format_version"] > FORMAT_VERSION:
            raise ArtifactError(
                f"{path} has format version {fields['format_version']}; this teal_jax reads up to {FORMAT_VERSION}",
                hint="upgrade teal_jax: pip install -U teal-jax",
            )
        if missing := names - set(fields):
            raise ArtifactError(f"{path} lacks {', '.join(sorted(missing))}", hint="run teal eval again")
        return cls(**{name: fields[name] for name in names})


def make_report(
    lm: LanguageModel,
    text: EvaluationText,
    cells: Sequence[Cell],
    failures: Sequence[Failure],
    prompted: Prompted,
    settings: EvaluationSettings,
    *,
    calibration: Calibration | None,
    shared: Overlap | None,
    command: str,
    hardware: str,
    seeds: dict[str, int],
    notes: Sequence[str] = (),
) -> EvaluationReport:
    """The report of measured cells, the dense one first.

    Args:
      lm: the model.
      text, cells, failures, prompted, settings: of the sweep.
      calibration: that the plans came from; None where nothing was planned.
      shared: what calibration and evaluation text have in common; None likewise.
      command, hardware, seeds: how it was made.
      notes: what a reader must know beside what is found here.
    """
    statistics = Statistics(text, settings, cells[0])
    decode = lambda ids: "" if lm.tokenizer is None else lm.tokenizer.decode(ids)  # noqa: E731
    samples = {}
    if prompted.prompts and lm.tokenizer is not None:
        samples = {
            "prompt": decode(prompted.prompts[0]),
            "texts": [{"method": c.method, "target": c.target, "text": c.sample} for c in cells],
        }
    fits = [] if calibration is None else fit_sites(calibration)
    return EvaluationReport(
        model=lm.name,
        protocol=text.layout.protocol,
        tokens=text.num_tokens,
        rows=[dataclasses.asdict(statistics.row(cell)) for cell in cells],
        comparisons=[dataclasses.asdict(found) for found in statistics.compared(cells)],
        failures=[failure._asdict() for failure in failures],
        plans=[
            {key: getattr(c, key) for key in ("method", "target", "sparsity", "realised", "notes")}
            for c in cells
            if c.method != DENSE
        ],
        activations=[dataclasses.asdict(fit) | {"better": fit.better} for fit in fits],
        samples=samples,
        settings=dataclasses.asdict(settings),
        text={
            "source": text.source,
            "tokens": text.num_tokens,
            "bytes": None if text.num_bytes is None else int(text.num_bytes.sum()),
            "documents": int(text.documents.max()) + 1,
            "windows": int(text.windows.max()) + 1,
            "resampled": f"{statistics.count} {statistics.unit}s",
            "digest": text.digest,
            "prompts": len(prompted.prompts),
        },
        calibration=_about(calibration, shared),
        facts=model_facts(lm.config, lm.dtype.itemsize, str(lm.dtype), split_quantized(lm.params["weights"])[1]),
        notes=[*_warnings(statistics, cells, failures, prompted), *notes],
        made={
            "command": command,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "commit": commit(),
            "hardware": hardware,
            "seeds": seeds,
            "seconds": round(sum(sum(cell.seconds.values()) for cell in cells), 1),
        },
    )


def _about(calibration: Calibration | None, shared: Overlap | None) -> dict[str, Any]:
    if calibration is None or shared is None:
        return {}
    search = None if calibration.path is None else calibration.path.settings
    tokens = int(calibration.tokens.size)
    return {**calibration.notes, "tokens": tokens, "search": search, "overlap": shared._asdict()}


def _warnings(
    statistics: Statistics, cells: Sequence[Cell], failures: Sequence[Failure], prompted: Prompted
) -> list[str]:
    text, settings, needed = statistics.text, statistics.settings, statistics.needed
    confidence, found = f"{100 * settings.confidence:g} %", []
    if text.wanted is not None and text.num_tokens < text.wanted:
        found.append(f"Too little text: {text.wanted:,} tokens were to be scored, there are {text.num_tokens:,}.")
    if statistics.count < needed:
        found.append(
            f"Too little text for a {confidence} interval: it takes {needed} documents or windows to resample, and "
            f"there are {statistics.count} windows. No intervals are given for perplexity, bits per byte and KL."
        )
    elif statistics.unit == "window":
        found.append(
            f"The text has fewer than {needed} documents, so the bootstrap resamples {statistics.count} windows of it, "
            "which are not independent: the intervals are too narrow for conclusions about other texts."
        )
    if 0 < len(prompted.prompts) < needed:
        found.append(
            f"{len(prompted.prompts)} prompts are too few for a {confidence} interval, which needs {needed}: none is "
            "given for agreement and repetition."
        )
    if settings.prompts > len(prompted.prompts):
        found.append(f"Too little text for {settings.prompts} prompts: there are {len(prompted.prompts)}.")
    for cell in cells:
        if abs(cell.unread - cell.target) > settings.tolerance:
            own = abs(cell.unread - cell.realised_sparsity) > 0.001
            found.append(
                f"{cell.method} did not reach its target of {100 * cell.target:g} %: "
                + (f"{100 * cell.realised_sparsity:.1f} % of the rows were dropped, but with its own matrices " * own)
                + f"{100 * cell.unread:.1f} % of the block weights were left unread (tolerance "
                f"{100 * settings.tolerance:g} points)."
            )
    found += [f"{f.method} has no plan for {100 * f.target:g} %: {f.reason}." for f in failures]
    return found
