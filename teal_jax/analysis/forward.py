"""A forward pass whose masks are any function of the activations, block by block, with what each mask drops."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from pallas_kernels import keep_mask
from teal_jax.analysis.rows import Rows
from teal_jax.config import PROJECTIONS, ModelConfig
from teal_jax.model import LanguageModel, abstract_decoder
from teal_jax.nn.attention import attend, make_context
from teal_jax.nn.gates import Dense
from teal_jax.scoring import token_nll
from teal_jax.sparsity.blocks import batches, block_graph, embed

type Keep = Callable[[int, jax.Array, jax.Array | None], jax.Array]
"""`keep(i, x, gate)`: bool `[batch, seq, width]`, the channels of x that projection i keeps.

`gate` is `silu(gate_proj)` for the last projection, down, whose input it is a factor of; None for the others.
"""

type Step = Callable[..., tuple[jax.Array, jax.Array]]
"""`step(config, layer_params, x, where, arguments) -> (y, dropped [7])`, jitted; see `threshold_step`."""

KEEP_ALL = -1.0
"""A threshold that every |x| exceeds."""


def thinned_block(
    config: ModelConfig, layer_params: dict, x: jax.Array, keep: Keep
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """One block over x `[batch, seq, d_model]` under any masks: its output, and the seven masks."""
    block = nnx.merge(block_graph(config), layer_params)
    context = make_context(config, jnp.ones(x.shape[:2], bool), None)
    attn, mlp = block.attn, block.mlp
    masks = []

    def thin(x: jax.Array, gate: jax.Array | None = None) -> jax.Array:
        masks.append(keep(len(masks), x, gate))
        return jnp.where(masks[-1], x, 0)

    attn_in = block.attn_norm(x)
    q = attn.queries(thin(attn_in), Dense(), context.rotary)
    k = attn.keys(thin(attn_in), Dense(), context.rotary)
    v = attn.values(thin(attn_in), Dense())
    x = x + attn.o_proj(thin(attend(q, k, v, context.visible)), Dense())
    mlp_in = block.mlp_norm(x)
    gate = mlp.gated(thin(mlp_in), Dense())
    hidden = gate * mlp.up_proj(thin(mlp_in), Dense())
    return x + mlp.down_proj(thin(hidden, gate), Dense()), tuple(masks)


def count_dropped(masks: tuple[jax.Array, ...], where: jax.Array) -> jax.Array:
    """Channels that each mask drops at the positions `where` (bool `[seq]`), float32 `[7]`."""
    return jnp.stack([(~mask & where[:, None]).sum(dtype=jnp.int32).astype(jnp.float32) for mask in masks])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Limits:
    """Thresholds of a block, or of all with a leading axis of layers.

    Attributes:
      inputs: `[7]`, `|x_i| > t` is kept.
      gate: scalar, `|silu(gate_proj)_i| > t` is kept of the hidden entries, beside what `inputs` says of them.
    """

    inputs: Any
    gate: Any


@functools.partial(jax.jit, static_argnums=0)
def threshold_step(
    config: ModelConfig, layer_params: dict, x: jax.Array, where: jax.Array, limits: Limits
) -> tuple[jax.Array, jax.Array]:
    """A block under thresholds, thinned at the positions `where` (bool `[seq]`): output and dropped channels `[7]`."""

    def keep(i: int, x: jax.Array, gate: jax.Array | None) -> jax.Array:
        kept = keep_mask(x, limits.inputs[i])
        if gate is not None:
            kept &= keep_mask(gate, limits.gate)
        return kept | ~where[:, None]

    y, masks = thinned_block(config, layer_params, x, keep)
    return y, count_dropped(masks, where)


@functools.cache
def _scorer(config: ModelConfig) -> Callable[..., jax.Array]:
    graphdef, _ = nnx.split(abstract_decoder(config))
    return jax.jit(lambda weights, x, tokens: token_nll(nnx.merge(graphdef, weights), x, tokens))


@dataclasses.dataclass(frozen=True, eq=False)
class Scored:
    """What a forward pass over `Rows` gave.

    Attributes:
      nll: float64 `[rows]`, mean negative log-likelihood of a row's scored tokens, nats.
      realised: float64 `[layers, 7]`, share of the channels dropped at the thinned positions.
    """

    nll: np.ndarray
    realised: np.ndarray


def score(
    lm: LanguageModel,
    rows: Rows,
    step: Step,
    arguments: Any,
    *,
    where: np.ndarray | None = None,
    rows_at_once: int | None = None,
) -> Scored:
    """Run the model with `step` for its blocks and score what follows the prompts.

    Args:
      lm: its gates are ignored.
      rows: what to score.
      step: of one block.
      arguments: of `step`, a pytree of arrays with a leading axis of layers.
      where: bool `[seq]`, the positions thinned; None: those after the prompt, as in decoding.
      rows_at_once: rows that one step sees; None: what fits.
    """
    where = rows.after_prompt if where is None else where
    count, seq = rows.tokens.shape
    slices = batches(count, seq)
    if rows_at_once is not None:
        slices = [slice(start, start + rows_at_once) for start in range(0, count, rows_at_once)]
    layers = lm.params["weights"]["layers"]
    nll, dropped = [], np.zeros((lm.config.num_layers, len(PROJECTIONS)))
    for part in slices:
        tokens = jnp.asarray(rows.tokens[part])
        x, drops = embed(lm, tokens), []
        for layer in range(lm.config.num_layers):
            of_layer = jax.tree.map(lambda leaf, layer=layer: leaf[layer], arguments)
            x, drop = step(lm.config, layers[layer], x, where, of_layer)
            drops.append(drop)
        dropped += np.array(drops, np.float64)
        # The token after the prompt comes from the prompt's last position.
        nll.append(np.asarray(_scorer(lm.config)(lm.params["weights"], x, tokens), np.float64)[:, rows.prompt - 1 :])
    widths = np.array([d_in for d_in, _ in lm.config.projection_shapes])
    thinned = count * max(int(where.sum()), 1)
    return Scored(np.concatenate(nll).mean(axis=1), dropped / (thinned * widths))
