"""Uniform: every projection of every block at the target. TEAL, arXiv 2408.14690, section 5, as the baseline."""

from teal_jax.sparsity.methods.choice import Choice, Task, flat


def choose(task: Task) -> Choice:
    """Thresholds of |x|, the same share everywhere."""
    return Choice(sparsity=flat(task))
