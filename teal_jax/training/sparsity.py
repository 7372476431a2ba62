"""The gates of a training: those of a plan, their derivative straight through; and thresholds that keep their share."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from teal_jax.config import PROJECTIONS, SITE_OF_PROJECTION, SITES, ModelConfig
from teal_jax.errors import PlanError, SparsityError
from teal_jax.nn.block import Taps
from teal_jax.nn.compensation import Biased
from teal_jax.nn.gates import BlockGates, Dense, ModelGates, Threshold, TopK
from teal_jax.nn.straight_through import StraightThrough
from teal_jax.sparsity.gating import gates_of
from teal_jax.sparsity.plan import SparsityPlan, model_sparsity

GAIN = 0.5
"""Of a threshold's logarithm, for a share dropped that is wrong by one: settles in some ten steps, without ringing."""


def top_k_plan(config: ModelConfig, kept: float | Mapping[str, float], *, model: str = "model") -> SparsityPlan:
    """Q-Sparse: of every token the share `kept` of each projection's input channels, those of largest |x|.

    Args:
      config: of the model.
      kept: K in (0, 1], one for all, or by site (`SITES`) or projection (`PROJECTIONS`); 1 where none is named.
      model: its name.

    Raises:
      SparsityError: a share outside (0, 1], or a place that is neither.

    References:
      Q-Sparse, arXiv 2407.10969, section 2.
    """
    shares = {"all": kept} if not isinstance(kept, Mapping) else dict(kept)
    for place, share in shares.items():
        if place not in ("all", *SITES, *PROJECTIONS):
            raise SparsityError(
                f"no site or projection {place!r}", hint=f"{', '.join(SITES)}; {', '.join(PROJECTIONS)}"
            )
        if not 0 < share <= 1:
            raise SparsityError(
                f"K must lie in (0, 1], got {share:g} for {place}", hint="0.6 keeps 60 % of the channels: 40 % sparsity"
            )
    row = [
        shares.get(name, shares.get(SITES[site], shares.get("all", 1.0)))
        for name, site in zip(PROJECTIONS, SITE_OF_PROJECTION, strict=True)
    ]
    sparsity = np.tile(1 - np.array(row, np.float64), (config.num_layers, 1))
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
    inner = gates.gate if isinstance(gates, Biased) else gates
    if not isinstance(inner, Threshold | TopK) or inner.scale is not None:
        raise PlanError(
            f"a {plan.method} plan cannot be trained under: expected thresholds of |x|, top-k of |x|, and biases",
            hint="for example --method greedy, uniform or learned",
        )
    through: Any = StraightThrough(inner)
    return Biased(through, gates.bias) if isinstance(gates, Biased) else through


def has_thresholds(plan: SparsityPlan | None) -> bool:
    """Whether the plan's gates compare with thresholds, which `moved` can hold to their share."""
    return plan is not None and plan.gate == "threshold"


def with_thresholds(gates: Any, thresholds: jax.Array) -> Any:
    """The gates of `training_gates` with these thresholds, float32 `[layers, 7]`."""
    if isinstance(gates, Biased):
        return Biased(with_thresholds(gates.gate, thresholds), gates.bias)
    return StraightThrough(Threshold(thresholds))


def dropped_shares(taps: Taps, gates: BlockGates) -> jax.Array:
    """Share of channels that a block's seven gates drop, float32 `[7]`: an observer of `Decoder.hidden`."""
    kept = [jnp.mean(gates[i].keep(taps[site]), dtype=jnp.float32) for i, site in enumerate(SITE_OF_PROJECTION)]
    return 1 - jnp.stack(kept)


def moved(thresholds: jax.Array, dropped: jax.Array, target: jax.Array) -> jax.Array:
    """`t exp(GAIN (target - dropped))`, all `[layers, 7]`: weights that train change how many channels a threshold drops.

    Where nothing is to be dropped the threshold stays.
    """
    return jnp.where(target > 0, thresholds * jnp.exp(GAIN * (target - dropped)), thresholds)


def trained_plan(plan: SparsityPlan, thresholds: np.ndarray | None, notes: dict[str, Any]) -> SparsityPlan:
    """The plan that a trained model decodes under: where thresholds moved, with the new ones."""
    values = plan.thresholds if thresholds is None else thresholds
    return dataclasses.replace(plan, thresholds=values, notes={**plan.notes, "training": notes})
