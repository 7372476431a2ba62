"""Learned: thresholds, exponents of the score and biases by autodiff, all at once. This library's own method.

Soft gates, KL to the dense model, a budget on the weights read; see `teal_jax.sparsity.distil`. Of what others do it
joins what costs nothing at decode time: allocation over all layers and projections (TEAL, arXiv 2408.14690, by greedy
search; WAS and WiSparse, arXiv 2602.14452, by black-box search), the norm of the row in the score (WINA, arXiv
2505.19427) with WiSparse's exponent, and SPON's bias (arXiv 2512.12744).
"""

import dataclasses

from teal_jax.sparsity.distil import distil
from teal_jax.sparsity.methods.choice import Choice, Task, flat
from teal_jax.sparsity.plan import Score, array_name, model_sparsity

TOLERANCE = 0.002
"""Of the model sparsity on the calibration text."""


def choose(task: Task) -> Choice:
    """From uniform thresholds; the sparsity of the plan is what its hard gates realised on the calibration text."""
    start = task.calibration.thresholds(flat(task))
    found = distil(task.lm, task.calibration.tokens, start, task.target, settings=task.distil, progress=task.progress)
    got = model_sparsity(task.lm.config, found.sparsity)
    return Choice(
        sparsity=found.sparsity,
        thresholds=found.thresholds,
        score=Score(norm=2, exponent=found.exponents.tolist()),
        arrays={array_name("bias", *place): bias for place, bias in found.biases.items()},
        notes=dataclasses.asdict(task.distil)
        | {"divergence": found.divergence, "reached": got, "met": abs(got - task.target) <= TOLERANCE},
    )
