"""SPON (arXiv 2512.12744): TEAL's thresholds, and biases learnt by distillation to give back what dropping takes.

The paper learns an input a and adds `W a`; that is a bias, and here the bias itself is learnt. It reads no weight.
"""

from teal_jax.sparsity.distil import distil
from teal_jax.sparsity.methods import greedy
from teal_jax.sparsity.methods.choice import Choice, Task
from teal_jax.sparsity.plan import array_name


def choose(task: Task) -> Choice:
    """Greedy TEAL with a bias for every projection."""
    sparsity, notes = greedy.magnitude_shares(task)
    thresholds = task.calibration.thresholds(sparsity)
    found = distil(
        task.lm,
        task.calibration.tokens,
        thresholds,
        task.target,
        learn=("bias",),
        settings=task.distil,
        progress=task.progress,
    )
    arrays = {array_name("bias", *place): bias for place, bias in found.biases.items()}
    return Choice(
        sparsity=sparsity, thresholds=thresholds, arrays=arrays, notes=notes | {"divergence": found.divergence}
    )
