"""Learned: thresholds and biases by autodiff, all at once. This library's own method.

Soft gates, KL to the dense model, a budget on the weights read; see `teal_jax.sparsity.distil`. Of what others do it
joins what costs nothing at decode time: allocation over all layers and projections (TEAL, arXiv 2408.14690, by greedy
search; WAS and WiSparse, arXiv 2602.14452, by black-box search) and SPON's bias (arXiv 2512.12744); on request the norm
of the row in the score (WINA, arXiv 2505.19427) with WiSparse's exponent, which then is learnt as well.
"""

import dataclasses

import numpy as np

from teal_jax.sparsity.distil import distil
from teal_jax.sparsity.divergence import nearest
from teal_jax.sparsity.methods.choice import Choice, Task, flat
from teal_jax.sparsity.plan import Score, array_name


def choose(task: Task) -> Choice:
    """The sparsity of the plan is what its hard gates realised on the calibration text."""
    if task.target == 0:
        # The dense model: nothing to win back.
        return Choice(sparsity=flat(task), thresholds=task.calibration.thresholds(flat(task)))
    name, start = _start(task)
    exponents = task.distil.exponents
    found = distil(
        task.lm,
        task.calibration.tokens,
        start,
        task.target,
        learn=("threshold", "bias", "exponent") if exponents else ("threshold", "bias"),
        settings=task.distil,
        progress=task.progress,
    )
    return Choice(
        sparsity=found.sparsity,
        thresholds=found.thresholds,
        score=Score(norm=2, exponent=found.exponents.tolist()) if exponents else None,
        arrays={array_name("bias", *place): bias for place, bias in found.biases.items()},
        notes=dataclasses.asdict(task.distil) | {"start": name, "divergence": found.divergence},
    )


def _start(task: Task) -> tuple[str, np.ndarray]:
    """Thresholds to begin with: uniform ones or, where the calibration has a greedy path, its, if they are nearer."""
    shares = {"uniform": flat(task)}
    path = task.calibration.path
    if path is not None and task.target <= path.effective[-1]:
        shares["greedy"] = path.at(task.target)[0]
    name = nearest(task.lm, task.calibration, shares)[0] if len(shares) > 1 else "uniform"
    return name, task.calibration.thresholds(shares[name])
