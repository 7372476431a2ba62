"""WAS (EMNLP 2025, main 57): thresholds of |x_i| ||W[i, :]||_1, the greedy search inside each block under that score.

The paper also shares the target out over blocks, by a search of its own; here that is the method `cross_block`.
"""

from teal_jax.sparsity.gating import norm_scales
from teal_jax.sparsity.methods import greedy
from teal_jax.sparsity.methods.choice import Choice, Task
from teal_jax.sparsity.plan import Score
from teal_jax.sparsity.score_statistics import ScoreStatistics, count_scores


def choose(task: Task) -> Choice:
    """Thresholds of the L1 score along its own greedy path."""
    score = Score(norm=1)
    found = statistics(task, score, "was")
    sparsity, notes = greedy.shares(task, greedy.scaled_path(task, found, "was path"))
    return Choice(sparsity=sparsity, thresholds=found.thresholds(sparsity), score=score, notes=notes)


def statistics(task: Task, score: Score, name: str) -> ScoreStatistics:
    """Histograms of the score on the calibration text, kept in the memo under `name`."""
    memo, lm = task.calibration.memo, task.lm
    if name not in memo:
        scales = norm_scales(lm.params["weights"], lm.config, score)
        memo[name] = count_scores(lm, task.calibration, scales, progress=task.progress)
    return memo[name]
