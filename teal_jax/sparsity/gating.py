"""From a plan to the gates of a model."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from teal_jax.config import PROJECTIONS, SITE_OF_PROJECTION, ModelConfig
from teal_jax.errors import PlanError
from teal_jax.nn.block_top_k import BlockTopK, check_block
from teal_jax.nn.compensation import Biased, LowRank, Rotated
from teal_jax.nn.gates import Dense, Gate, GateOutput, Gates, ModelGates, Threshold, TopK
from teal_jax.nn.int8 import Int8
from teal_jax.nn.quantized import to_dense
from teal_jax.nn.relu import Relu
from teal_jax.nn.straight_through import StraightThrough
from teal_jax.sparsity.plan import Score, SparsityPlan, array_place

type Vectors = tuple[tuple[jax.Array, ...], ...]
"""A float32 vector for each projection of each layer: scales `[d_in]`, biases `[d_out]`."""


type Places = dict[tuple[int, int], dict[str, Any]]
"""A plan's arrays by layer and projection, then by kind."""


def gates_of(plan: SparsityPlan, config: ModelConfig, weights: dict[str, Any]) -> ModelGates:
    """The gates that a plan describes, for the model with these weights.

    Raises:
      PlanError: the plan is for another model, or one of its arrays does not fit a projection.
    """
    gates = _gates_of(plan, config, weights)
    return gates if plan.trained is None else StraightThrough(gates)


def _gates_of(plan: SparsityPlan, config: ModelConfig, weights: dict[str, Any]) -> ModelGates:
    plan.check_fits(config)
    arrays = _by_place(plan, config)
    scale = None if plan.score is None else norm_scales(weights, config, plan.score)
    if any("scale" in own for own in arrays.values()):
        scale = _product(scale, arrays, config)
    base: ModelGates
    if plan.gate == "gate_output":
        base = _cats(plan)
    elif plan.trained is not None and plan.trained.block is not None:
        block = plan.trained.block
        base = BlockTopK(jnp.asarray(np.round((1 - plan.sparsity) * block).astype(np.int32)), block)
        for width in config.site_widths:
            check_block(block, width)
    elif plan.gate == "relu":
        base = Relu()
    elif plan.gate == "top_k":
        base = TopK(jnp.asarray(kept_counts(config, plan.sparsity)), scale=scale)
    else:
        base = Threshold(jnp.asarray(plan.thresholds, jnp.float32), scale=scale)
    if plan.trained is not None and plan.trained.int8:
        base = Int8(base)
    kinds = {kind for own in arrays.values() for kind in own if kind != "scale"}
    if not kinds:
        return base
    if kinds == {"bias"} and not isinstance(base, Gates):
        # Kept together, so that a kernel may take them.
        return Biased(base, biases_of(arrays, config))
    dtype = weights["embed"]["weight"].dtype
    layers, seven = range(config.num_layers), range(len(PROJECTIONS))
    return Gates(
        tuple(tuple(_wrapped(base[layer][i], arrays.get((layer, i), {}), dtype) for i in seven) for layer in layers)
    )


def biases_of(arrays: Places, config: ModelConfig) -> Vectors:
    """For `Biased`: of every projection of every layer, zeros where `arrays` has none."""

    def one(layer: int, i: int) -> jax.Array:
        own = arrays.get((layer, i), {}).get("bias", np.zeros(config.projection_shapes[i][1]))
        return jnp.asarray(own, jnp.float32)

    return tuple(tuple(one(layer, i) for i in range(len(PROJECTIONS))) for layer in range(config.num_layers))


def _cats(plan: SparsityPlan) -> Gates:
    """Dense but for up's outputs, and for down, which reads what they leave: what is not 0."""
    nonzero = Threshold(jnp.zeros(()))
    up = jnp.asarray(plan.thresholds[:, PROJECTIONS.index("up")], jnp.float32)
    return Gates(tuple((*[Dense()] * 5, GateOutput(up[layer]), nonzero) for layer in range(plan.num_layers)))


def _wrapped(gate: Gate, own: dict[str, Any], dtype: Any) -> Gate:
    if "rotation" in own:
        gate = Rotated(gate, own["rotation"])
    if "low_rank_a" in own:
        gate = LowRank(gate, jnp.asarray(own["low_rank_a"], dtype), jnp.asarray(own["low_rank_b"], dtype))
    if "bias" in own:
        gate = Biased(gate, jnp.asarray(own["bias"], jnp.float32))
    return gate


def _by_place(plan: SparsityPlan, config: ModelConfig) -> Places:
    places: Places = {}
    for name, array in plan.arrays.items():
        kind, layer, projection = array_place(name, config.num_layers)
        d_in, d_out = config.projection_shapes[projection]
        fits: dict[str, Callable[[tuple[int, ...]], bool]] = {
            "bias": lambda shape, n=d_out: shape == (n,),
            "scale": lambda shape, n=d_in: shape == (n,),
            "rotation": lambda shape, n=d_in: shape == (n, n),
            "low_rank_a": lambda shape, n=d_in: len(shape) == 2 and shape[0] == n,
            "low_rank_b": lambda shape, n=d_out: len(shape) == 2 and shape[1] == n,
        }
        if not fits[kind](array.shape):
            raise PlanError(f"plan.arrays[{name!r}] does not fit a projection [{d_in}, {d_out}]: {list(array.shape)}")
        if kind == "rotation":
            # One on the device, whichever projections read through it.
            turn, site = jnp.asarray(array, jnp.float32), SITE_OF_PROJECTION[projection]
            for sharing in (i for i, of in enumerate(SITE_OF_PROJECTION) if of == site):
                places.setdefault((layer, sharing), {})[kind] = turn
        else:
            places.setdefault((layer, projection), {})[kind] = array
    for (layer, projection), own in places.items():
        ranks = {own[kind].shape[axis] for kind, axis in (("low_rank_a", 1), ("low_rank_b", 0)) if kind in own}
        if ("low_rank_a" in own) != ("low_rank_b" in own) or len(ranks) > 1:
            raise PlanError(f"plan.arrays: low_rank_a and low_rank_b of {layer}.{PROJECTIONS[projection]} do not match")
    return places


def kept_counts(config: ModelConfig, sparsity: np.ndarray) -> np.ndarray:
    """Channels that a top-k gate keeps, `round((1 - sparsity) d_in)`, int32 `[layers, 7]`."""
    widths = np.array([d_in for d_in, _ in config.projection_shapes])
    return np.round((1 - np.asarray(sparsity, np.float64)) * widths).astype(np.int32)


def norm_scales(weights: dict[str, Any], config: ModelConfig, score: Score) -> Vectors:
    """`norm(W[i, :]) ** exponent` of every projection, over its largest: equal norms give 1 exactly."""
    exponents = score.exponents(config.num_layers)
    return tuple(
        tuple(
            row_norms(weight, score.norm) ** float(exponents[layer, i])
            for i, weight in enumerate(layer_weights(weights, layer))
        )
        for layer in range(config.num_layers)
    )


def row_norms(weight: jax.Array, order: int) -> jax.Array:
    """The norm of each row of W `[d_in, d_out]` over the largest of them, float32 `[d_in]`."""
    norms = jnp.linalg.norm(weight.astype(jnp.float32), ord=order, axis=1)
    return norms / jnp.max(norms)


def layer_weights(weights: dict[str, Any], layer: int) -> list[jax.Array]:
    """The seven matrices of a layer, in the order of `PROJECTIONS`; quantised ones dequantised."""
    parts = weights["layers"][layer]
    return [to_dense(parts["attn" if i < 4 else "mlp"][f"{name}_proj"]["weight"]) for i, name in enumerate(PROJECTIONS)]


def _product(scale: Vectors | None, arrays: Places, config: ModelConfig) -> Vectors:
    def one(layer: int, i: int) -> jax.Array:
        own = arrays.get((layer, i), {}).get("scale", np.ones(config.projection_shapes[i][0]))
        own = jnp.asarray(own, jnp.float32)
        return own if scale is None else own * scale[layer][i]

    return tuple(tuple(one(layer, i) for i in range(len(PROJECTIONS))) for layer in range(config.num_layers))
