"""Bytes of weights that one decoded token reads."""

import jax
import numpy as np

from teal_jax.config import PROJECTIONS
from teal_jax.model import LanguageModel


def weight_bytes(lm: LanguageModel, realised: np.ndarray) -> int:
    """What a decoder that skips dropped rows reads for one token, in the model's own dtype.

    `sum_p (1 - realised_p) size_p` over all projections, the whole lm_head, and what the gates themselves hold in
    matrices (a compensation's factors, a rotation), once each. Norms, biases, scales and the one row of the
    embedding are left out: thousandths.

    Args:
      lm: dense or sparse.
      realised: share of input channels dropped, `[layers, 7]`.
    """
    sizes = np.array(lm.config.projection_sizes)
    blocks = ((1 - realised) * sizes).sum() + lm.config.vocab_size * lm.config.d_model
    return round(lm.dtype.itemsize * blocks) + _gate_bytes(lm)


def unread_share(lm: LanguageModel, realised: np.ndarray) -> float:
    """Share of the blocks' weight bytes that a token does not read: the realised sparsity, less what the gates hold.

    Below 0 where a compensation reads more than is dropped.
    """
    blocks = lm.config.num_layers * sum(lm.config.projection_sizes)
    head = lm.config.vocab_size * lm.config.d_model
    return 1 - (weight_bytes(lm, realised) / lm.dtype.itemsize - head) / blocks


def _gate_bytes(lm: LanguageModel) -> int:
    """Bytes of the matrices in the gates; one that several projections share counts once."""
    thresholds = (lm.config.num_layers, len(PROJECTIONS))
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(lm.params["gates"])}
    return sum(leaf.nbytes for leaf in leaves.values() if np.ndim(leaf) == 2 and np.shape(leaf) != thresholds)
