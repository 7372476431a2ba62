"""TEAL's block-wise greedy search (arXiv 2408.14690, section 4.3), for |x| and for scaled scores."""

import dataclasses
import warnings
from typing import Any

import numpy as np

from teal_jax.errors import SparsityError
from teal_jax.sparsity.divergence import nearest
from teal_jax.sparsity.greedy import GreedySettings, greedy_path
from teal_jax.sparsity.greedy_path import GreedyPath
from teal_jax.sparsity.methods.choice import Choice, Task, flat
from teal_jax.sparsity.score_statistics import ScoreStatistics


def choose(task: Task) -> Choice:
    """Thresholds of |x|, `magnitude_shares` of them."""
    sparsity, notes = magnitude_shares(task)
    return Choice(sparsity=sparsity, notes=notes)


def magnitude_shares(task: Task) -> tuple[np.ndarray, dict[str, Any]]:
    """Sparsities `[layers, 7]` along the greedy path under |x|, and notes.

    A block where uniform sparsity has less error takes that; so do all, where the whole model then is nearer to the
    dense one on calibration text: the search sees one block at a time, and its errors can add up.

    Raises:
      SparsityError: the path ends before the target.
    """
    sparsity, notes = shares(task, magnitude_path(task))
    if task.greedy.error == "teal" or task.target == 0:
        return sparsity, notes  # parity: the reference never looks at uniform
    tried = {"greedy": sparsity, "uniform": flat(task)}
    taken, found = nearest(task.lm, task.calibration, tried)
    if taken == "uniform":
        warnings.warn(
            "uniform sparsity leaves the model nearer to the dense one than greedy's: it is taken", stacklevel=4
        )
    return tried[taken], notes | {"model": {"taken": taken, "divergence": found}}


def magnitude_path(task: Task) -> GreedyPath:
    """The greedy path under |x|, kept in `calibration.path`: another target is then a look-up."""
    path = task.calibration.path
    if path is None or not _same(path, task.greedy):
        path = greedy_path(task.lm, task.calibration, settings=task.greedy, progress=task.progress)
        task.calibration.path = path
    return path


def scaled_path(task: Task, statistics: ScoreStatistics, name: str) -> GreedyPath:
    """The greedy path under scaled scores, kept in the calibration's memo under `name`."""
    memo = task.calibration.memo
    path = memo.get(name)
    if path is None or not _same(path, task.greedy):
        path = memo[name] = greedy_path(task.lm, statistics, settings=task.greedy, progress=task.progress)
    return path


def shares(task: Task, path: GreedyPath) -> tuple[np.ndarray, dict[str, Any]]:
    """Sparsities `[layers, 7]` of the path at the target, and notes; raises `SparsityError` beyond its end."""
    if task.target > path.effective[-1]:
        raise SparsityError(
            f"the greedy path ends at {path.effective[-1]:.3f}, got a target of {task.target}",
            hint="search further: GreedySettings(max_sparsity=...)",
        )
    if task.greedy.error == "teal":
        # Parity: the reference takes the nearest row, and never looks at uniform.
        return path.nearest(task.target)[0], dict(path.settings)
    sparsity, worse = path.at(task.target)
    sparsity[worse] = task.target
    layers = np.flatnonzero(worse).tolist()
    if layers:
        warnings.warn(f"uniform sparsity had less error than greedy in blocks {layers}: they take it", stacklevel=4)
    return sparsity, path.settings | {"uniform_blocks": layers}


def _same(path: GreedyPath, settings: GreedySettings) -> bool:
    return all(path.settings[name] == value for name, value in dataclasses.asdict(settings).items())
