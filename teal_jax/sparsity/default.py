"""The method that is taken where none is named."""

from teal_jax.config import ModelConfig
from teal_jax.memory import free_bytes
from teal_jax.model import LanguageModel
from teal_jax.sparsity.distil import COUNTED, KEPT_BYTES, DistilSettings, activation_bytes
from teal_jax.sparsity.statistics import Calibration

LEAST_TOKENS = 8192
"""Calibration tokens below which training would learn the text: biases alone are some 10^5 numbers."""


def default_method(lm: LanguageModel, calibration: Calibration, *, free: int | None = None) -> tuple[str, str | None]:
    """`"learned"`; `"greedy"` where that cannot be trained, and then the reason.

    Args:
      lm: the model, loaded: what it takes is no longer free.
      calibration: the text to train on.
      free: bytes; None asks the device, and one that does not say (a CPU) is taken to have enough.
    """
    rows, seq = calibration.tokens.shape
    if rows * seq < LEAST_TOKENS:
        return "greedy", f"learned needs {LEAST_TOKENS:,} calibration tokens, got {rows * seq:,}"
    free = free_bytes() if free is None else free
    needed = learning_bytes(lm.config, lm.dtype.itemsize, seq)
    if free is not None and needed > free:
        return "greedy", f"learned needs {needed / 2**30:.1f} GiB beside the weights, {free / 2**30:.1f} are free"
    return "learned", None


def learning_bytes(config: ModelConfig, itemsize: int, seq: int) -> int:
    """What `distil` takes beside the weights, for rows of `seq` tokens, at most; XLA plans 1.2 to 2 times less.

    A step has float32 logits of both models with their slopes, and what its backward pass keeps; counting realised
    sparsity has the attention scores of `COUNTED` tokens, float32, and their exponentials in the weights' dtype.
    """
    rows = max(1, DistilSettings().tokens_per_step // seq)
    kept = activation_bytes(config, rows * seq, itemsize)
    if kept > KEPT_BYTES:
        kept = config.num_layers * rows * seq * config.d_model * itemsize
    logits = 4 * rows * seq * config.vocab_size
    scores = max(1, COUNTED // seq) * config.num_heads * seq**2
    return max(4 * logits + kept, (4 + itemsize) * scores)
