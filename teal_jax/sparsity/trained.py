"""The plan of a model that was trained through its gates: what it is saved with and decodes under."""

from typing import Any

import jax
import numpy as np

from teal_jax.errors import PlanError
from teal_jax.model import LanguageModel
from teal_jax.nn.block_top_k import BlockTopK
from teal_jax.nn.gates import TopK
from teal_jax.nn.int8 import Int8
from teal_jax.nn.straight_through import StraightThrough
from teal_jax.sparsity.plan import SparsityPlan, Trained, model_sparsity


def trained_plan(lm: LanguageModel, gates: StraightThrough, *, notes: dict[str, Any] | None = None) -> SparsityPlan:
    """The plan whose gates are `gates`, those that `q_sparse_gates` made: exact, count by count.

    A plan that training went through needs none: `dataclasses.replace(plan, trained=Trained())`.

    Args:
      lm: of which config and name are taken.
      gates: `StraightThrough` of `TopK` or `BlockTopK`, in `Int8` or not.
      notes: facts about the training.

    Raises:
      PlanError: other gates.
    """
    inner = gates.gate
    int8 = isinstance(inner, Int8)
    inner = inner.gate if int8 else inner
    if not isinstance(inner, TopK | BlockTopK) or (isinstance(inner, TopK) and inner.scale is not None):
        raise PlanError(f"expected top-K gates without scales, got {type(inner).__name__}")
    block = inner.block if isinstance(inner, BlockTopK) else None
    widths = np.array([d_in if block is None else block for d_in, _ in lm.config.projection_shapes])
    sparsity = 1 - np.asarray(jax.device_get(inner.count), np.float64) / widths
    return SparsityPlan(
        sparsity=sparsity,
        thresholds=np.zeros(sparsity.shape),
        target=model_sparsity(lm.config, sparsity),
        method="q-sparse",
        fingerprint=lm.config.fingerprint,
        projection_sizes=lm.config.projection_sizes,
        model=lm.name,
        notes=notes or {},
        gate="top_k",
        trained=Trained(int8=int8, block=block),
    )
