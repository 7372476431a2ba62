"""Thinning up_proj by its input against thinning it by its output, at equal sparsity.

The output of up only counts where the hidden entry `silu(gate_proj) * up` does. A mask over outputs can therefore be
drawn from `|silu(gate_proj)|` before up is computed (CATS), and down then needs no other: one mask thins both.

References:
  TEAL, arXiv 2408.14690, section 5.4.1; CATS, arXiv 2404.08763.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import keep_mask
from teal_jax.analysis.cost import Cost, constant
from teal_jax.analysis.forward import KEEP_ALL, Limits, Scored, score, threshold_step
from teal_jax.analysis.rows import Rows
from teal_jax.config import PROJECTIONS, ModelConfig
from teal_jax.model import LanguageModel
from teal_jax.nn.gates import Dense
from teal_jax.nn.project import project
from teal_jax.progress import track
from teal_jax.sparsity.blocks import batches, block_graph, dense_block, embed
from teal_jax.sparsity.histogram import NUM_BINS, count_magnitudes, magnitude_quantiles
from teal_jax.sparsity.statistics import Calibration

UP, DOWN = PROJECTIONS.index("up"), PROJECTIONS.index("down")

RULES = {
    "input": "up's inputs by |x|",
    "output, by gate": "up's outputs and down's inputs by |silu(gate)| (CATS)",
    "output, by hidden": "down's inputs by |hidden|: the best mask over up's outputs, known too late to skip up",
    "input and down": "up's inputs by |x|, down's inputs by |hidden| (TEAL)",
}
"""What is thinned, and by what."""

_MASKS = ("input", "output, by gate", "output, by hidden")
"""The rules whose error within the layer is measured."""

MEASURES = ("up", "hidden", "mlp")
"""Where the error is taken: the output of up, the hidden entries, the output of down."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class UpRow:
    """One rule at one sparsity.

    Attributes:
      rule: a name in `RULES`. target: share asked for, of the channels that the rule drops.
      up, down: share counted, of up's inputs or outputs (those that need no reading), and of down's inputs.
      error: by measure, `||thinned - dense|| / ||dense||` within the layer on the dense model's inputs, float64
        `[layers]` as a list; empty for a rule that thins two things at once.
      cost: of thinning every layer in this way and nothing else.
    """

    rule: str
    target: float
    up: float
    down: float
    error: dict[str, list[float]]
    cost: Cost


@functools.partial(jax.jit, static_argnums=0)
def _count_gate(config: ModelConfig, layer_params: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    y, taps = dense_block(config, layer_params, x)
    mlp = nnx.merge(block_graph(config), layer_params).mlp
    return y, count_magnitudes(mlp.gated(taps.mlp_in, Dense()))


def gate_histograms(lm: LanguageModel, tokens: np.ndarray) -> np.ndarray:
    """Histograms of `|silu(gate_proj)|` in the dense model, int64 `[layers, NUM_BINS]`, for tokens `[rows, seq]`."""
    counts = np.zeros((lm.config.num_layers, NUM_BINS), np.int64)
    for part in batches(*tokens.shape):
        x = embed(lm, tokens[part])
        for layer, params in enumerate(_layers(lm)):
            x, found = _count_gate(lm.config, params, x)
            counts[layer] += np.asarray(found)
    return counts


@functools.partial(jax.jit, static_argnums=0)
def _layer_errors(
    config: ModelConfig, layer_params: dict, x: jax.Array, where: jax.Array, limits: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Dense output; squared errors `[masks, measures]` and squared norms `[measures]`, float32."""
    y, taps = dense_block(config, layer_params, x)
    mlp = nnx.merge(block_graph(config), layer_params).mlp
    gate = mlp.gated(taps.mlp_in, Dense())
    up = mlp.up_proj(taps.mlp_in, Dense())
    by_input, by_gate, by_hidden = limits
    thinned = (
        mlp.up_proj(jnp.where(keep_mask(taps.mlp_in, by_input), taps.mlp_in, 0), Dense()),
        jnp.where(keep_mask(gate, by_gate), up, 0),
        jnp.where(keep_mask(gate * up, by_hidden), up, 0),
    )

    def squares(up: jax.Array) -> jax.Array:
        hidden = gate * up
        parts = (up, hidden, project(hidden, mlp.down_proj.weight.get_value(), Dense()))
        return jnp.stack([jnp.sum(jnp.square(part.astype(jnp.float32)) * where[:, None]) for part in parts])

    return y, jnp.stack([squares(other - up) for other in thinned]), squares(up)


def layer_errors(lm: LanguageModel, rows: Rows, limits: Sequence[np.ndarray]) -> np.ndarray:
    """Relative errors within each layer, float64 `[masks, measures, layers]`, after the prompts of `rows`.

    Args:
      lm: its gates are ignored; every layer gets the dense model's input.
      rows: the text.
      limits: thresholds of |x|, `|silu(gate)|` and |hidden|, each `[layers]`.
    """
    shape = (lm.config.num_layers, len(_MASKS), len(MEASURES))
    errors, norms = np.zeros(shape), np.zeros((shape[0], 1, shape[2]))
    for part in batches(*rows.tokens.shape):
        x = embed(lm, rows.tokens[part])
        for layer, params in enumerate(_layers(lm)):
            of_layer = tuple(limit[layer] for limit in limits)
            x, error, norm = _layer_errors(lm.config, params, x, rows.after_prompt, of_layer)
            errors[layer] += np.asarray(error, np.float64)
            norms[layer] += np.asarray(norm, np.float64)
    return np.sqrt(errors / norms).transpose(1, 2, 0)


def compare_up_masks(
    lm: LanguageModel,
    calibration: Calibration,
    rows: Rows,
    dense: Scored,
    *,
    sparsities: Sequence[float],
    progress: bool = True,
) -> list[UpRow]:
    """Every rule of `RULES` at every sparsity: errors within the layers, and perplexity.

    Args:
      lm: its gates are ignored.
      calibration: gives the thresholds.
      rows: what to score; prompts stay dense.
      dense: the dense model's score of `rows`.
      sparsities: in (0, 1).
      progress: draw a progress bar.
    """
    gates = gate_histograms(lm, calibration.tokens)
    layers = lm.config.num_layers
    found = []
    for share in track(list(sparsities), "Input and output of up", enabled=progress):
        thresholds = calibration.thresholds(share)
        gate = np.array([magnitude_quantiles(counts, np.array(share)) for counts in gates], np.float32)
        none = np.full(layers, KEEP_ALL, np.float32)
        errors = layer_errors(lm, rows, (thresholds[:, UP], gate, thresholds[:, DOWN]))
        chosen = {
            "input": ((UP,), none),
            "output, by gate": ((), gate),
            "output, by hidden": ((DOWN,), none),
            "input and down": ((UP, DOWN), none),
        }
        for rule, (projections, limit) in chosen.items():
            inputs = constant(lm.config, KEEP_ALL)
            inputs[:, projections] = thresholds[:, projections]
            scored = score(lm, rows, threshold_step, Limits(inputs, limit))
            found.append(_row(lm.config, rule, share, scored, dense, errors))
    return found


def _row(config: ModelConfig, rule: str, share: float, scored: Scored, dense: Scored, errors: np.ndarray) -> UpRow:
    realised = scored.realised.copy()
    if rule == "output, by gate":
        # What down does not read, up need not compute: the same columns.
        realised[:, UP] = realised[:, DOWN]
    error = {}
    if rule in _MASKS:
        error = dict(zip(MEASURES, errors[_MASKS.index(rule)].tolist(), strict=True))
    up, down = realised[:, [UP, DOWN]].mean(axis=0)
    cost = Cost.of(config, Scored(scored.nll, realised), dense)
    return UpRow(rule=rule, target=share, up=float(up), down=float(down), error=error, cost=cost)


def _layers(lm: LanguageModel) -> list[Any]:
    layers = lm.params["weights"]["layers"]
    return [layers[i] for i in range(lm.config.num_layers)]
