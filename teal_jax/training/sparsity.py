"""The gates of a training: those of a plan, their derivative straight through; and thresholds that keep their share."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from teal_jax.config import SITE_OF_PROJECTION, ModelConfig
from teal_jax.errors import PlanError
from teal_jax.nn.block import Taps
from teal_jax.nn.block_top_k import BlockTopK
from teal_jax.nn.compensation import Biased
from teal_jax.nn.gates import BlockGates, Dense, ModelGates, Threshold, TopK
from teal_jax.nn.int8 import Int8
from teal_jax.nn.q_sparse import Shares, kept_shares
from teal_jax.nn.straight_through import StraightThrough
from teal_jax.sparsity.gating import gates_of
from teal_jax.sparsity.plan import SparsityPlan, model_sparsity

GAIN = 0.5
"""Of a threshold's logarithm, for a share dropped that is wrong by one: settles in some ten steps, without ringing."""


def top_k_plan(config: ModelConfig, kept: Shares, *, model: str = "model") -> SparsityPlan:
    """Q-Sparse: of every token the share `kept` of each projection's input channels, those of largest |x|.

    Args:
      config: of the model.
      kept: K as a share, in (0, 1]; see `q_sparse_gates`.
      model: its name.

    Raises:
      SparsityError: a share outside (0, 1], or another number of them.

    References:
      Q-Sparse, arXiv 2407.10969, section 2.
    """
    sparsity = 1 - kept_shares(config, kept)
    return SparsityPlan(
        sparsity=sparsity,
        thresholds=np.zeros_like(sparsity, np.float32),
        target=model_sparsity(config, sparsity),
        method="q_sparse",
        fingerprint=config.fingerprint,
        projection_sizes=config.projection_sizes,
        model=model,
        gate="top_k",
    )


def training_gates(plan: SparsityPlan | None, config: ModelConfig, weights: dict[str, Any]) -> ModelGates:
    """The gates of `plan` for training: forwards as they decode, backwards as if they were not there.

    Raises:
      PlanError: a plan for another model, or one whose gates follow from the weights, which change.
    """
    if plan is None:
        return Dense()
    gates = gates_of(plan, config, weights)
    inner: Any = gates.gate if isinstance(gates, Biased) else gates
    bare = inner.gate if isinstance(inner, Int8) else inner
    if not isinstance(bare, Threshold | TopK | BlockTopK) or getattr(bare, "scale", None) is not None:
        raise PlanError(
            f"a {plan.method} plan cannot be trained under: expected thresholds of |x|, top-k of |x|, and biases",
            hint="for example --method greedy, uniform or learned",
        )
    return StraightThrough(gates)


def has_thresholds(plan: SparsityPlan | None) -> bool:
    """Whether the plan's gates compare with thresholds, which `moved` can hold to their share."""
    return plan is not None and plan.gate == "threshold"


def with_thresholds(gates: Any, thresholds: jax.Array) -> Any:
    """The gates of a plan of thresholds with these, float32 `[layers, 7]`."""
    if isinstance(gates, Threshold):
        return Threshold(thresholds)
    return dataclasses.replace(gates, gate=with_thresholds(gates.gate, thresholds))


def dropped_shares(taps: Taps, gates: BlockGates) -> jax.Array:
    """Share of channels that a block's seven gates drop, float32 `[7]`: an observer of `Decoder.hidden`."""
    kept = [jnp.mean(gates[i].keep(taps[site]), dtype=jnp.float32) for i, site in enumerate(SITE_OF_PROJECTION)]
    return 1 - jnp.stack(kept)


def moved(thresholds: jax.Array, dropped: jax.Array, target: jax.Array) -> jax.Array:
    """`t exp(GAIN (target - dropped))`, all `[layers, 7]`: training changes how many channels a threshold drops.

    Where nothing is to be dropped the threshold stays.
    """
    return jnp.where(target > 0, thresholds * jnp.exp(GAIN * (target - dropped)), thresholds)


def trained_plan(plan: SparsityPlan, thresholds: np.ndarray | None, notes: dict[str, Any]) -> SparsityPlan:
    """The plan that a trained model decodes under: where thresholds moved, with the new ones."""
    values = plan.thresholds if thresholds is None else thresholds
    return dataclasses.replace(plan, thresholds=values, notes={**plan.notes, "training": notes})
