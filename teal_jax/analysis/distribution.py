"""How a greedy search shares sparsity out over projections and depth: our searches, and the published tables.

References:
  TEAL, arXiv 2408.14690, section 5.4.2.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from converters import teal_published
from teal_jax.config import PROJECTIONS
from teal_jax.errors import CheckpointError
from teal_jax.sparsity.plan import SparsityPlan

THIRDS = ("first", "middle", "last")
"""Of the layers."""

PUBLISHED_FILE = "greedy_sparsities.json"
"""Model -> target -> `[layers][q k v o gate up down]`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distribution:
    """One greedy search at one target.

    Attributes:
      model, target: of the search. published: from TEAL's tables.
      sparsity: `[layers][7]`, in [0, 1].
      uniform_blocks: layers where uniform sparsity had less error and was taken instead.
    """

    model: str
    target: float
    published: bool
    sparsity: list[list[float]]
    uniform_blocks: list[int] = dataclasses.field(default_factory=list)

    @property
    def by_projection(self) -> np.ndarray:
        """Mean over layers, float64 `[7]`."""
        return np.mean(self.sparsity, axis=0)

    @property
    def by_depth(self) -> np.ndarray:
        """Mean over each third of the layers, float64 `[3, 7]`; a model of one or two layers leaves thirds NaN."""
        parts = np.array_split(np.array(self.sparsity), len(THIRDS))
        return np.stack([part.mean(axis=0) if len(part) else np.full(len(PROJECTIONS), np.nan) for part in parts])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; of a published search the means alone: its tables are their authors' to spread."""
        # JSON knows no NaN.
        by_depth = [[None if math.isnan(share) else share for share in row] for row in self.by_depth.tolist()]
        means = {"by_projection": self.by_projection.tolist(), "by_depth": by_depth}
        return dataclasses.asdict(self) | means | ({"sparsity": None} if self.published else {})


def shown_target(rows: Sequence[Any]) -> float:
    """Of the rows' targets the one nearest to 0.5, for what has room for one."""
    return min((row.target for row in rows), key=lambda target: abs(target - 0.5))


def of_plan(plan: SparsityPlan) -> Distribution:
    """The distribution of one of our own plans."""
    return Distribution(
        model=plan.model,
        target=plan.target,
        published=False,
        sparsity=plan.sparsity.tolist(),
        uniform_blocks=plan.notes.get("allocation", {}).get("uniform_blocks", []),
    )


def read_published(path: str | Path, targets: Sequence[float]) -> list[Distribution]:
    """TEAL's published greedy searches at the given targets; those that the tables do not hold are left out.

    Args:
      path: `greedy_sparsities.json`, a folder that holds it, or the folder of TEAL's models, each with a `lookup/`,
        of which the row nearest to the target is taken, as the reference takes it.
      targets: in (0, 1).

    Raises:
      CheckpointError: nothing of the kind there, or a file that is not a table of shares.
    """
    path = Path(path)
    if path.is_file() or (path / PUBLISHED_FILE).is_file():
        return _from_json(path if path.is_file() else path / PUBLISHED_FILE, targets)
    folders = sorted(folder.parent for folder in path.glob("*/lookup") if folder.is_dir())
    if not folders:
        raise CheckpointError(
            f"no {PUBLISHED_FILE} and no MODEL/lookup in {path}", hint="give the folder of TEAL's published models"
        )
    found = []
    for folder in folders:
        tables = teal_published.read_lookup(folder)
        for target in targets:
            rows = [table[np.abs(table[:, 0] - target).argmin(), 3:].tolist() for table in tables]
            found.append(Distribution(model=folder.name, target=target, published=True, sparsity=rows))
    return found


def _from_json(path: Path, targets: Sequence[float]) -> list[Distribution]:
    try:
        tables = json.loads(path.read_text("utf-8"))
        shares = {
            (model, float(target)): np.array(rows, np.float64)
            for model, by_target in tables.items()
            for target, rows in by_target.items()
        }
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a table of published sparsities: {error}") from error
    for (model, target), rows in shares.items():
        if rows.ndim != 2 or rows.shape[1] != len(PROJECTIONS) or not ((rows >= 0) & (rows <= 1)).all():
            raise CheckpointError(
                f"{path}: {model} at {target:g} must be shares in [0, 1], [layers][7], got shape {list(rows.shape)}"
            )
    return [
        Distribution(model=model, target=target, published=True, sparsity=rows.tolist())
        for (model, target), rows in shares.items()
        if any(abs(target - wanted) < 1e-9 for wanted in targets)
    ]
