"""What the harness measured, as rows: for JSON, for a table, for comparing sparsities."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.table import Table

from teal_jax.tables import percent


class TaskScore(NamedTuple):
    """One metric of one task, or of a group of tasks.

    Attributes:
      task: its name. kind: the harness's output type ("multiple_choice", "loglikelihood", "loglikelihood_rolling",
        "generate_until"), or "group".
      metric: its name. filter: what was done to the answers before, "none" if nothing.
      value: the score. stderr: its standard error, None where the harness gives none.
      higher_is_better: None where the harness does not say.
      samples: documents scored. shots: examples before each. version: the task's.
    """

    task: str
    kind: str
    metric: str
    filter: str
    value: float
    stderr: float | None
    higher_is_better: bool | None
    samples: int
    shots: int | None
    version: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResults:
    """What `run_tasks` measured.

    Attributes:
      model: its name.
      target_sparsity: the plan's; 0 for a dense model. method: how the plan was made; None for a dense model.
      realised_sparsity: share of the projections' input channels dropped over all tokens that the gates acted on; 0
        for a dense model, None if the gates acted on none.
      scoring: which inputs the gates act on, in words; see `Semantics`.
      scores: one for each task and metric, in the order given.
      limit: documents a task (or share of them), None for all.
      seed: of everything random.
      versions: of teal_jax, jax and lm_eval.
    """

    model: str
    target_sparsity: float
    realised_sparsity: float | None
    method: str | None
    scoring: str
    scores: tuple[TaskScore, ...]
    limit: int | float | None
    seed: int
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self) | {"scores": [score._asdict() for score in self.scores]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TaskResults":
        """What `as_dict` gave."""
        fields: dict[str, Any] = dict(values)
        fields["scores"] = tuple(TaskScore(**score) for score in fields["scores"])
        return cls(**fields)


def read_scores(results: Mapping[str, Any]) -> tuple[TaskScore, ...]:
    """The scores in what `lm_eval.simple_evaluate` returns: tasks in its order, then groups."""
    scores = []
    groups = results.get("groups", {})
    tasks = {name: row for name, row in results["results"].items() if name not in groups}
    for name, row in (tasks | dict(groups)).items():
        counted = results.get("n-samples", {}).get(name, {})
        for key, value in row.items():
            metric, comma, filtered = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = row.get(f"{metric}_stderr,{filtered}")
            scores.append(
                TaskScore(
                    task=name,
                    kind="group" if name in groups else str(results["configs"][name].get("output_type", "")),
                    metric=metric,
                    filter=filtered,
                    value=float(value),
                    stderr=float(stderr) if isinstance(stderr, int | float) else None,
                    higher_is_better=results.get("higher_is_better", {}).get(name, {}).get(metric),
                    samples=int(counted.get("effective", row.get("sample_len", 0))),
                    shots=results.get("n-shot", {}).get(name),
                    version=str(results.get("versions", {}).get(name, "")),
                )
            )
    return tuple(scores)


def task_table(runs: Sequence[TaskResults], title: str = "") -> Table:
    """Tasks down, runs across: a column for each sparsity, headed by target and realised sparsity."""
    table = Table(title=title or None, box=SIMPLE_HEAD, title_justify="left", title_style="bold")
    for column in ("task", "metric", "documents"):
        table.add_column(column, justify="right" if column == "documents" else "left", no_wrap=True)
    for run in runs:
        table.add_column(_heading(run), justify="right", no_wrap=True)
    found = [{(score.task, score.metric, score.filter): score for score in run.scores} for run in runs]
    last = None
    for key in dict.fromkeys(key for scores in found for key in scores):
        row = [scores.get(key) for scores in found]
        first = next(score for score in row if score is not None)
        arrow = {True: " ↑", False: " ↓", None: ""}[first.higher_is_better]
        metric = first.metric if first.filter == "none" else f"{first.metric}, {first.filter}"
        new = first.task != last
        table.add_row(first.task if new else "", metric + arrow, str(first.samples) if new else "", *map(_cell, row))
        last = first.task
    return table


def _heading(run: TaskResults) -> str:
    if run.method is None:
        return "dense"
    realised = "-" if run.realised_sparsity is None else percent(run.realised_sparsity)
    return f"{run.method} {percent(run.target_sparsity)}\nrealised {realised}"


def _cell(score: TaskScore | None) -> str:
    if score is None:
        return "-"
    return f"{score.value:.4g}" + ("" if score.stderr is None else f" ± {score.stderr:.2g}")
