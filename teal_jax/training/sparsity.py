"""The gates of a training: those of a plan, their derivative straight through; and thresholds that keep their share."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from teal_jax.config import PROJECTIONS, SITE_OF_PROJECTION, ModelConfig
from teal_jax.errors import PlanError
from teal_jax.model import LanguageModel
from teal_jax.nn.block import Taps
from teal_jax.nn.block_top_k import BlockTopK
from teal_jax.nn.compensation import Biased
from teal_jax.nn.gates import BlockGates, Dense, ModelGates, Threshold, TopK
from teal_jax.nn.int8 import Int8
from teal_jax.nn.per_site import FIRST_OF_SITE, PerSite
from teal_jax.nn.q_sparse import Shares, q_sparse_gates
from teal_jax.nn.relu import Relu
from teal_jax.nn.straight_through import StraightThrough
from teal_jax.sparsity.gating import gates_of
from teal_jax.sparsity.plan import SparsityPlan, Trained
from teal_jax.sparsity.trained import trained_plan

GAIN = 0.5
"""Of a threshold's logarithm, for a share dropped that is wrong by one: settles in some ten steps, without ringing."""


def q_sparse_plan(lm: LanguageModel, kept: Shares, *, block: int | None = None, int8: bool = False) -> SparsityPlan:
    """The plan of Q-Sparse for a model that is to be trained: of each token the share `kept`; see `q_sparse_gates`."""
    return trained_plan(lm, q_sparse_gates(lm.config, kept, block=block, int8=int8))


def relu_plan(lm: LanguageModel) -> SparsityPlan:
    """The plan of a model that is to be trained with `Relu` gates; how much they drop is not known before."""
    none = np.zeros((lm.config.num_layers, len(PROJECTIONS)))
    return SparsityPlan(
        sparsity=none,
        thresholds=none,
        target=0.0,
        method="relu",
        fingerprint=lm.config.fingerprint,
        projection_sizes=lm.config.projection_sizes,
        model=lm.name,
        gate="relu",
        trained=Trained(),
    )


def as_trained(plan: SparsityPlan) -> SparsityPlan:
    """The plan, saying that its model was trained through its gates."""
    return plan if plan.trained is not None else dataclasses.replace(plan, trained=Trained())


def training_gates(
    plan: SparsityPlan | None, config: ModelConfig, weights: dict[str, Any], *, straight_through: float = 1.0
) -> ModelGates:
    """The gates of `plan` for training: forwards as they decode, backwards as if they were not there, or partly so.

    Args:
      plan: None: dense.
      config: of the model.
      weights: its weights.
      straight_through: see `StraightThrough.slope`.

    Raises:
      PlanError: a plan for another model, or one whose gates follow from the weights, which change.
    """
    if plan is None:
        return Dense()
    gates: Any = gates_of(as_trained(plan), config, weights)
    inner = gates.gate
    while isinstance(inner, Biased | Int8):
        inner = inner.gate
    if not isinstance(inner, Threshold | TopK | BlockTopK | Relu) or getattr(inner, "scale", None) is not None:
        raise PlanError(
            f"a {plan.method} plan cannot be trained under: expected thresholds of |x|, top-k of |x|, relu, and biases",
            hint="for example --method greedy, uniform or learned",
        )
    if not isinstance(gates.gate, Biased | Relu) and _one_per_site(plan):
        gates = StraightThrough(PerSite(gates.gate))
    return dataclasses.replace(gates, slope=straight_through)


def _one_per_site(plan: SparsityPlan) -> bool:
    """Whether the projections of a site drop the same channels of it, also while thresholds move."""
    values = np.stack([plan.sparsity, plan.thresholds])
    return bool((values == values[..., list(FIRST_OF_SITE)]).all())


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
    return 1 - jnp.stack([_kept_share(gates[i], taps[site]) for i, site in enumerate(SITE_OF_PROJECTION)])


def _kept_share(gate: Any, x: jax.Array) -> jax.Array:
    inner = gate
    while isinstance(inner, StraightThrough | Biased | Int8):
        inner = inner.gate
    match inner:  # top-K keeps its count: a second search would cost as much as the first
        case TopK(where=None):
            return inner.count.astype(jnp.float32) / x.shape[-1]
        case BlockTopK(where=None):
            return inner.count.astype(jnp.float32) / inner.block
    return jnp.mean(gate.keep(x), dtype=jnp.float32)


def moved(thresholds: jax.Array, dropped: jax.Array, target: jax.Array) -> jax.Array:
    """`t exp(GAIN (target - dropped))`, all `[layers, 7]`: training changes how many channels a threshold drops.

    Where nothing is to be dropped the threshold stays.
    """
    return jnp.where(target > 0, thresholds * jnp.exp(GAIN * (target - dropped)), thresholds)


def plan_after(plan: SparsityPlan, thresholds: np.ndarray | None, notes: dict[str, Any]) -> SparsityPlan:
    """The plan that a trained model decodes under: where thresholds moved, with the new ones."""
    values = plan.thresholds if thresholds is None else thresholds
    return dataclasses.replace(as_trained(plan), thresholds=values, notes={**plan.notes, "training": notes})
