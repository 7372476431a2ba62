"""Cross-block allocation: blocks whose loss hurts less drop more; inside a block, TEAL's greedy path.

WAS (EMNLP 2025, main 57) and WiSparse (arXiv 2602.14452) search the shares of blocks by TPE and by evolution. Here they
follow from measured curves: the divergence from the dense model with one block thinned, the others dense, at every
sparsity of a grid. The budget then goes step by step to whichever block's curve rises least. Of that and equal shares,
whichever diverges less on the calibration text is taken.
"""

import numpy as np

from teal_jax.progress import track
from teal_jax.sparsity.divergence import divergence, nearest, sample
from teal_jax.sparsity.greedy_path import GreedyPath
from teal_jax.sparsity.methods import greedy
from teal_jax.sparsity.methods.choice import Choice, Task

GRID = np.linspace(0, 0.9, 10)
STEP = 0.01


def choose(task: Task) -> Choice:
    """Thresholds of |x|; the mean over blocks is the target."""
    alike, notes = greedy.magnitude_shares(task)
    path = greedy.magnitude_path(task)
    end = min(float(path.effective[-1]), float(GRID[-1]))
    unlike = share_out(task.target, end, curves(task, path))
    candidate = np.stack([path.at(share)[0][layer] for layer, share in enumerate(unlike)])
    tried = {"alike": alike, "unlike": candidate}
    taken, found = nearest(task.lm, task.calibration, tried)
    facts = {"blocks": unlike.tolist(), "taken": taken, "divergence": found}
    return Choice(sparsity=tried[taken], notes=notes | facts)


def curves(task: Task, path: GreedyPath) -> np.ndarray:
    """Divergence of the model with one block at each sparsity of the grid, `[layers, len(GRID)]`; kept in the memo."""
    memo, layers = task.calibration.memo, task.lm.config.num_layers
    if "cross_block" not in memo:
        tokens = sample(task.calibration)
        found = np.zeros((layers, len(GRID)))
        for layer in track(range(layers), "Sensitivity of blocks", enabled=task.progress):
            for i, share in enumerate(GRID[1:], 1):
                shares = np.zeros((layers, 7))
                shares[layer] = path.at(float(min(share, path.effective[-1])))[0][layer]
                found[layer, i] = divergence(task.lm, task.calibration.thresholds(shares), tokens)
        memo["cross_block"] = found
    return memo["cross_block"]


def share_out(target: float, end: float, damage: np.ndarray) -> np.ndarray:
    """Shares of blocks `[layers]`, each at most `end`, of mean `target`: steps to where `damage` rises least.

    The curves are made convex first, so that no step waits behind a dear one.
    """
    fine = np.arange(0, end + 1e-9, STEP)
    slopes = np.diff([np.interp(fine, GRID, np.maximum.accumulate(curve)) for curve in damage], axis=1)
    slopes = np.maximum.accumulate(slopes, axis=1)
    if target >= end:
        return np.full(len(damage), target)
    budget = target * len(damage) / STEP
    order = np.argsort(slopes, axis=None, kind="stable") // slopes.shape[1]
    shares = np.bincount(order[: int(budget)], minlength=len(damage)) * STEP
    shares[order[int(budget)]] += target * len(damage) - shares.sum()
    return shares
