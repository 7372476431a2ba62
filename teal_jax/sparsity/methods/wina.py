"""WINA (arXiv 2505.19427): per token the channels of largest |x_i| ||W[i, :]||_2, as many as TEAL's greedy search says.

The paper's offline rotation, which makes the columns of W orthogonal, is left out: it changes the weights of every
layer and the residual stream, and what is compared here is the score.
"""

from teal_jax.sparsity.methods import greedy
from teal_jax.sparsity.methods.choice import Choice, Task, no_thresholds
from teal_jax.sparsity.plan import Score


def choose(task: Task) -> Choice:
    """The shares of TEAL's greedy path under |x|, and top-K of the score; within half a channel of the target."""
    sparsity, notes = greedy.magnitude_shares(task)
    return Choice(sparsity=sparsity, thresholds=no_thresholds(sparsity), gate="top_k", score=Score(norm=2), notes=notes)
