"""What a run keeps beside checkpoints: the configuration that it is resumed under, and a line a step of its course.

run.json     configuration: model, teacher, settings, plan, tokens
log.csv      step, loss and what else was measured
held_out.csv loss on text that is not learnt from, where there is some
checkpoints/ state, by step
loss.png     the losses
model/       the trained model, an artifact
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

from teal_jax.errors import TrainingError
from teal_jax.evaluation.run_directory import differences, read_json, weights_digest, write_json
from teal_jax.model import LanguageModel
from teal_jax.sparsity.plan import SparsityPlan
from teal_jax.training.settings import TrainSettings
from teal_jax.training.token_file import TokenFile

RECORD, LOG, CHECKPOINTS, MODEL, PLOT = "run.json", "log.csv", "checkpoints", "model", "loss.png"
TOKENS = "data.tokens"
COLUMNS = (
    "step",
    "tokens",
    "loss",
    "entropy",
    "divergence",
    "sparsity",
    "gradient_norm",
    "learning_rate",
    "seconds",
    "tokens_per_second",
    "share_of_peak",
)
_SHOWN = 3
"""Differences that a refusal names."""


def configuration(
    lm: LanguageModel, tokens: TokenFile, settings: TrainSettings, plan: SparsityPlan | None
) -> dict[str, Any]:
    """All that the losses of a run depend on once it has a checkpoint, as JSON has it; devices are not part of it.

    The start model is only where it teaches: random weights differ in their last bits from one machine to the next.
    """
    value = {
        "model": lm.config.to_dict(),
        "teacher": weights_digest(lm) if settings.distil > 0 else None,
        "settings": settings.to_dict(),
        "plan": None if plan is None else plan.to_dict(),
        "tokens": {"digest": tokens.digest, "source": tokens.source},
    }
    return json.loads(json.dumps(value))


def claim(directory: Path, here: dict[str, Any], *, resume: bool) -> None:
    """Take `directory` for a run of configuration `here`: a new one, or with `resume` the one that is there.

    Raises:
      TrainingError: it holds something and `resume` was not asked for; or a run of another configuration, or no run.
    """
    file = directory / RECORD
    if file.exists():
        if not resume:
            raise TrainingError(f"{directory} holds a run", hint="--resume goes on with it; or name another directory")
        found = list(differences(read_json(file), here))
        if found:
            more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            raise TrainingError(
                f"{directory} holds a run of another configuration: {'; '.join(found[:_SHOWN])}{more}",
                hint="repeat that run's command to go on with it, or name another directory",
            )
        return
    check_new(directory)
    write_json(file, here)


def check_new(directory: Path) -> None:
    """Raise `TrainingError` where `directory` holds anything but a token file made for a run that never began."""
    if directory.exists() and (not directory.is_dir() or any(not _ours(path) for path in directory.iterdir())):
        raise TrainingError(f"{directory} exists and holds no run", hint="name another directory")


def _ours(path: Path) -> bool:
    return path.name.startswith(TOKENS)


class Log:
    """log.csv: a line a step, written as it is known."""

    def __init__(self, path: Path, *, done: int):
        """Open `path` for the steps after `done`; lines of later steps, of a run that was killed, are dropped."""
        rows = [row for row in read_log(path) if row["step"] <= done] if path.exists() else []
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        aside = path.with_name(path.name + ".part")
        aside.write_text(text.getvalue(), "utf-8")
        aside.replace(path)
        self._file = path.open("a", encoding="utf-8", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS)

    def write(self, **values: Any) -> None:
        """One line; columns without a value stay empty."""
        self._writer.writerow(values)
        self._file.flush()

    def close(self) -> None:
        """No more lines."""
        self._file.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log.csv, numbers as numbers, empty columns left out; a line that a kill cut short is dropped."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return [_numbers(row) for row in rows]
    except (TypeError, ValueError):
        return [_numbers(row) for row in rows[:-1]]


def _numbers(row: dict[str, Any]) -> dict[str, Any]:
    if None in row.values():
        raise ValueError("a line cut short")
    return {name: int(text) if name in ("step", "tokens") else float(text) for name, text in row.items() if text}
