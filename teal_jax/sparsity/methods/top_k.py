"""Per-token top-K: the same number of channels for every token, the largest |x_i|.

What thresholds approximate, with a sparsity that does not vary from token to token. Q-Sparse, arXiv 2407.10969, trains
with it; here nothing is trained.
"""

from teal_jax.sparsity.methods.choice import Choice, Task, flat, no_thresholds


def choose(task: Task) -> Choice:
    """The target everywhere; realised to within half a channel of each projection's input."""
    return Choice(sparsity=flat(task), thresholds=no_thresholds(flat(task)), gate="top_k")
