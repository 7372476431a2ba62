"""Loss on text that a run does not learn from, measured as it goes: a line a measurement in held_out.csv."""

import csv
from pathlib import Path

import numpy as np

from teal_jax.data import read_documents, tokenize
from teal_jax.errors import DataError
from teal_jax.model import LanguageModel

FILE = "held_out.csv"
COLUMNS = ("step", "loss", "sparsity")


class HeldOut:
    """A `Watcher` of `train`: `(step, model)` scores the model under its gates and adds a line to DIRECTORY/FILE.

    Attributes:
      rows: int `[n, seq_len]`, what is scored.
    """

    def __init__(self, lm: LanguageModel, data: Path, directory: Path, *, seq_len: int, max_tokens: int = 100_000):
        """Read `data` (.txt, .jsonl) before anything is trained; raises `DataError` where it fills not one row."""
        found = tokenize(lm, read_documents(data).texts)
        stream = np.concatenate(found)[: max(max_tokens, seq_len)] if found else np.zeros(0, np.int32)
        self.rows = stream[: len(stream) // seq_len * seq_len].reshape(-1, seq_len)
        if not len(self.rows) or seq_len < 2:
            raise DataError(
                f"{data} has {len(stream)} tokens, a row of held-out text needs {max(2, seq_len)}",
                hint="give more text, or shorter rows",
            )
        self._path = directory / FILE

    def __call__(self, step: int, model: LanguageModel) -> float:
        """The loss after `step` updates, nats a token; lines of later steps, of a run that was killed, are dropped."""
        from teal_jax.scoring import perplexity

        window = max(1, self.rows.shape[1] // 4)
        score = perplexity(model, self.rows, context=self.rows.shape[1] - window, window=window, progress=False)
        rows = [row for row in read_held_out(self._path.parent) if row[0] < step]
        aside = self._path.with_name(f"{FILE}.part")
        with aside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([COLUMNS, *rows, (step, score.nll, score.realised_sparsity)])
        aside.replace(self._path)
        return score.nll


def read_held_out(directory: Path) -> list[tuple[int, float, float]]:
    """The lines of a run's held_out.csv: step, loss, realised sparsity; none where it has none."""
    path = directory / FILE
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return [(int(row["step"]), float(row["loss"]), float(row["sparsity"] or 0)) for row in csv.DictReader(file)]
