"""The block error that a greedy search minimises, for all its candidates at once, with no work done twice.

A step tries each projection at its next threshold. A candidate for `down` changes one product; one for `gate` or
`up` two; one for `q`, `k`, `v` or `o` everything after it. Products that candidates share are computed once, and
those of equal shape are stacked into one. Only positions that are scored go through o_proj and the MLP.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from teal_jax.config import ModelConfig
from teal_jax.nn.attention import attend, make_context
from teal_jax.nn.block import Block
from teal_jax.nn.gates import Dense, Threshold
from teal_jax.sparsity.blocks import block_graph

ERRORS = ("mse", "teal")


@dataclasses.dataclass(frozen=True)
class Positions:
    """Which tokens of a calibration row are dense, gated, scored.

    Attributes:
      dense: leading tokens left dense.
      scored: trailing tokens whose output is compared, at most the gated ones.
    """

    dense: int
    scored: int


def reduce_error(difference: jax.Array, error: str) -> jax.Array:
    """One number per candidate from `difference [candidates, batch, seq, d_model]`, float32.

    `"mse"`: mean square. `"teal"`: L2 norm over the positions, averaged over batch and channels.
    """
    if error == "mse":
        return jnp.mean(difference * difference, axis=(1, 2, 3))
    return jnp.mean(jnp.sqrt(jnp.sum(difference * difference, axis=2)), axis=(1, 2))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Prepared:
    """What no candidate changes, for rows x `[batch, seq, d_model]` of a block's dense input.

    Attributes:
      attn_in: normed input, `[batch, seq, d_model]`.
      keys, values: of the dense prefix, `[batch, dense, kv_heads, head_dim]`.
      residual: x at the scored positions, float32.
      output: the dense block's output at the scored positions, float32.
    """

    attn_in: jax.Array
    keys: jax.Array
    values: jax.Array
    residual: jax.Array
    output: jax.Array


def prepare(config: ModelConfig, layer_params: dict, x: jax.Array, positions: Positions) -> Prepared:
    """Compute what the whole search shares; x `[batch, seq, d_model]`."""
    block = nnx.merge(block_graph(config), layer_params)
    attn_in = block.attn_norm(x)
    rotary = make_context(config, jnp.ones(x.shape[:2], bool), None).rotary
    early = attn_in[:, : positions.dense]
    prepared = Prepared(
        attn_in,
        block.attn.keys(early, Dense(), _span(rotary, 0, positions.dense)),
        block.attn.values(early, Dense()),
        x[:, x.shape[1] - positions.scored :].astype(jnp.float32),
        jnp.zeros(()),
    )
    keep_all = jnp.full((1, 7), -1.0)
    parts = _Parts(config, block, prepared)
    only = jnp.zeros(1, jnp.int32)
    middle = parts.middle(parts.attend(keep_all, (only, only, only)), keep_all[:, 3])
    mlp_in = parts.mlp_in(middle)
    hidden = parts.gate(mlp_in, keep_all[:, 4]) * parts.up(mlp_in, keep_all[:, 5])
    return dataclasses.replace(prepared, output=(middle + parts.down(hidden, keep_all[:, 6]))[0])


def block_errors(
    config: ModelConfig,
    layer_params: dict,
    prepared: Prepared,
    now: jax.Array,
    tried: jax.Array,
    uniform: jax.Array,
    error: str,
    scale: tuple[jax.Array, ...] | None = None,
) -> jax.Array:
    """Errors of the seven candidates and of a uniform rival, float32 `[8]`.

    Args:
      config: of the model.
      layer_params: of the block.
      prepared: see `prepare`.
      now: thresholds `[7]` committed so far.
      tried: thresholds `[7]`; candidate i takes `tried[i]` for projection i and `now` for the others.
      uniform: thresholds `[7]` of the rival.
      error: see `reduce_error`.
      scale: of the scores, float32 `[d_in]` for each projection; None: 1.
    """
    parts = _Parts(config, nnx.merge(block_graph(config), layer_params), prepared, scale)
    # The ways to gate a projection: 0 with the committed threshold, 1 the tried one, 2 the rival's.
    ways = jnp.stack([now, tried, uniform])
    # Attention: committed; q, k, v tried; rival.
    mixed = parts.attend(ways, (jnp.array([0, 1, 0, 0, 2]), jnp.array([0, 0, 1, 0, 2]), jnp.array([0, 0, 0, 1, 2])))
    # After o_proj: the same five, then o tried on the committed attention.
    middle = parts.middle(mixed[jnp.array([0, 1, 2, 3, 4, 0])], ways[jnp.array([0, 0, 0, 0, 2, 1]), 3])
    # Inside the MLP: the same six, then gate (or up) tried on the committed input.
    mlp_in = parts.mlp_in(middle)[jnp.array([0, 1, 2, 3, 4, 5, 0])]
    chosen = jnp.array([0, 0, 0, 0, 2, 0, 1])
    gate, up = parts.gate(mlp_in, ways[chosen, 4]), parts.up(mlp_in, ways[chosen, 5])
    # Candidates in the order q k v o gate up down, then the rival.
    hidden = gate[jnp.array([1, 2, 3, 5, 6, 0, 0, 4])] * up[jnp.array([1, 2, 3, 5, 0, 6, 0, 4])]
    down = parts.down(hidden, ways[jnp.array([0, 0, 0, 0, 0, 0, 1, 2]), 6])
    result = middle[jnp.array([1, 2, 3, 5, 0, 0, 0, 4])] + down
    return reduce_error(result - prepared.output, error)


class _Parts:
    """The products of a block, each over a leading axis of thresholds, at the positions that need them."""

    def __init__(
        self, config: ModelConfig, block: Block, prepared: Prepared, scale: tuple[jax.Array, ...] | None = None
    ):
        self.attn, self.mlp, self.mlp_in_norm = block.attn, block.mlp, block.mlp_norm
        self.prepared, self.scale = prepared, scale
        seq = prepared.attn_in.shape[1]
        self.dense, self.first = prepared.keys.shape[1], seq - prepared.residual.shape[1]
        context = make_context(config, jnp.ones(prepared.attn_in.shape[:2], bool), None)
        self.visible = context.visible[:, :, self.first :]
        self.late_rotary = _span(context.rotary, self.dense, seq)
        self.scored_rotary = _span(context.rotary, self.first, seq)

    def attend(self, ways: jax.Array, pick: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        """attn_out `[variants, batch, scored, width]`, for thresholds `ways [n, 7]`; `pick` gives each variant's way
        of q, k and v. One variant at a time: the scores are large.
        """
        late, scored = self.prepared.attn_in[None, :, self.dense :], self.prepared.attn_in[None, :, self.first :]
        q = self.attn.queries(scored, self._gate(ways[:, 0], 0), self.scored_rotary)
        k = _join(self.prepared.keys, self.attn.keys(late, self._gate(ways[:, 1], 1), self.late_rotary))
        v = _join(self.prepared.values, self.attn.values(late, self._gate(ways[:, 2], 2)))
        return jax.lax.map(lambda i: attend(q[i[0]], k[i[1]], v[i[2]], self.visible), pick)

    def middle(self, attn_out: jax.Array, thresholds: jax.Array) -> jax.Array:
        """The residual stream before the MLP, float32: in less, small errors drown in large channels."""
        return self.prepared.residual + self.attn.o_proj(attn_out, self._gate(thresholds, 3)).astype(jnp.float32)

    def mlp_in(self, middle: jax.Array) -> jax.Array:
        """The MLP's input, in the model's dtype."""
        return self.mlp_in_norm(middle).astype(self.prepared.attn_in.dtype)

    def gate(self, mlp_in: jax.Array, thresholds: jax.Array) -> jax.Array:
        """`act(gate_proj)`, `[variants, batch, scored, d_mlp]`."""
        return self.mlp.gated(mlp_in, self._gate(thresholds, 4))

    def up(self, mlp_in: jax.Array, thresholds: jax.Array) -> jax.Array:
        """`up_proj`, the same shape."""
        return self.mlp.up_proj(mlp_in, self._gate(thresholds, 5))

    def down(self, hidden: jax.Array, thresholds: jax.Array) -> jax.Array:
        """`down_proj`, float32 `[variants, batch, scored, d_model]`."""
        return self.mlp.down_proj(hidden, self._gate(thresholds, 6)).astype(jnp.float32)

    def _gate(self, thresholds: jax.Array, projection: int) -> Threshold:
        """A threshold for each variant of x `[variants, batch, seq, width]`."""
        scale = None if self.scale is None else self.scale[projection]
        return Threshold(thresholds[:, None, None, None], scale=scale)


def _span(rotary: tuple[jax.Array, jax.Array], start: int, stop: int) -> tuple[jax.Array, jax.Array]:
    return rotary[0][:, start:stop], rotary[1][:, start:stop]


def _join(early: jax.Array, late: jax.Array) -> jax.Array:
    early = jnp.broadcast_to(early[None], (late.shape[0], *early.shape))
    return jnp.concatenate([early, late], axis=2)
