"""Bytes of weights that one decoded token reads."""

import jax
import numpy as np

from teal_jax.config import PROJECTIONS
from teal_jax.model import LanguageModel
from teal_jax.quantization.layer import matrix


def weight_bytes(lm: LanguageModel, realised: np.ndarray) -> int:
    """What a decoder that skips dropped rows reads for one token, in the format that each weight has.

    `sum_p (1 - realised_p) bytes_p` over all projections, the whole lm_head, and what the gates themselves hold in
    matrices (a compensation's factors, a rotation), once each. Norms, biases, scales and the one row of the
    embedding are left out: thousandths.

    Args:
      lm: dense or sparse.
      realised: share of input channels dropped, `[layers, 7]`.
    """
    return round(float(((1 - realised) * _block_bytes(lm)).sum())) + _head_bytes(lm) + _gate_bytes(lm)


def unread_share(lm: LanguageModel, realised: np.ndarray) -> float:
    """Share of the blocks' weight bytes that a token does not read: the realised sparsity, less what the gates hold.

    Below 0 where a compensation reads more than is dropped.
    """
    return float(1 - (weight_bytes(lm, realised) - _head_bytes(lm)) / _block_bytes(lm).sum())


def _block_bytes(lm: LanguageModel) -> np.ndarray:
    """Of every projection, int64 `[layers, 7]`; scales of quantised ones are in it."""
    layers = lm.params["weights"]["layers"]
    seven = range(len(PROJECTIONS))
    return np.array([[matrix(layers[i], j).nbytes for j in seven] for i in range(lm.config.num_layers)], np.int64)


def _head_bytes(lm: LanguageModel) -> int:
    weights = lm.params["weights"]
    return weights["embed" if lm.config.tie_embeddings else "lm_head"]["weight"].nbytes


def _gate_bytes(lm: LanguageModel) -> int:
    """Bytes of the matrices in the gates; one that several projections share counts once."""
    thresholds = (lm.config.num_layers, len(PROJECTIONS))
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(lm.params["gates"])}
    return sum(leaf.nbytes for leaf in leaves.values() if np.ndim(leaf) == 2 and np.shape(leaf) != thresholds)
