"""What thinning costs, against the dense model on the same tokens."""

import dataclasses
import math

import numpy as np

from teal_jax.analysis.forward import Scored
from teal_jax.config import ModelConfig
from teal_jax.sparsity.plan import model_sparsity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """Perplexity, and how far it is from dense.

    Attributes:
      ppl: `exp` of the mean negative log-likelihood.
      excess: mean negative log-likelihood less the dense model's, nats a token.
      standard_error: of `excess`, from its spread over rows (paired: both models scored the same tokens); None for
        a single row.
      realised_sparsity: share of the block weights that were not needed, at the positions that were thinned.
    """

    ppl: float
    excess: float
    standard_error: float | None
    realised_sparsity: float

    @classmethod
    def of(cls, config: ModelConfig, scored: Scored, dense: Scored) -> "Cost":
        """The cost of `scored`; both of the same rows."""
        difference = scored.nll - dense.nll
        rows = len(difference)
        return cls(
            ppl=math.exp(min(float(scored.nll.mean()), 700.0)),
            excess=float(difference.mean()),
            standard_error=float(difference.std(ddof=1) / math.sqrt(rows)) if rows > 1 else None,
            realised_sparsity=model_sparsity(config, scored.realised),
        )


def constant(config: ModelConfig, value: float) -> np.ndarray:
    """Thresholds `[layers, 7]`, all of them `value`."""
    return np.full((config.num_layers, 7), value, np.float32)
