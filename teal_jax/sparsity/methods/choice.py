"""What a method is given and what it hands back."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from teal_jax.model import LanguageModel
from teal_jax.sparsity.distil import DistilSettings
from teal_jax.sparsity.greedy import GreedySettings
from teal_jax.sparsity.plan import Score
from teal_jax.sparsity.statistics import Calibration


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What a method works from.

    Attributes:
      lm: the model; its gates are ignored.
      calibration: of this model.
      target: model sparsity, in [0, 1).
      greedy: settings of the greedy search, for the methods that need one.
      distil: settings of the training, for the methods that learn.
      progress: draw progress bars.
    """

    lm: LanguageModel
    calibration: Calibration
    target: float
    greedy: GreedySettings
    distil: DistilSettings
    progress: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """What a method chose; the fields are those of `SparsityPlan`.

    Attributes:
      sparsity: `[layers, 7]`.
      thresholds: `[layers, 7]`; None: the quantiles of |x| that `sparsity` asks for.
    """

    sparsity: np.ndarray
    thresholds: np.ndarray | None = None
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    gate: str = "threshold"
    score: Score | None = None
    arrays: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


type Method = Callable[[Task], Choice]
"""A method of `teal_jax.allocate`."""


def flat(task: Task) -> np.ndarray:
    """The target for every projection of every block, `[layers, 7]`."""
    return np.full((task.lm.config.num_layers, 7), task.target)


def no_thresholds(sparsity: np.ndarray) -> np.ndarray:
    """Thresholds of a plan whose gate reads none, the shape of `sparsity`."""
    return np.zeros(np.shape(sparsity), np.float32)
