"""One decoder block: attention and gated MLP, each behind a norm, each added to the residual stream."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from teal_jax.config import ModelConfig
from teal_jax.nn.attention import Attention, Context
from teal_jax.nn.gates import BlockGates, Gate, GateOutput
from teal_jax.nn.norm import RMSNorm
from teal_jax.nn.project import Projection


class Taps(NamedTuple):
    """The four sites of a block, before any gate: `[batch, seq, width]` each, in the order of `SITES`."""

    attn_in: jax.Array
    attn_out: jax.Array
    mlp_in: jax.Array
    mlp_hidden: jax.Array


class MLP(nnx.Module):
    """`down(act(gate(x)) * up(x))`, act by `ModelConfig.hidden_act`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike):
        gate, up, down = config.projection_shapes[4:]
        bias, self.hidden_act = config.mlp_bias, config.hidden_act
        self.gate_proj = Projection(*gate, bias=bias, rngs=rngs, dtype=dtype)
        self.up_proj = Projection(*up, bias=bias, rngs=rngs, dtype=dtype)
        self.down_proj = Projection(*down, bias=bias, rngs=rngs, dtype=dtype)

    def gated(self, x: jax.Array, gate: Gate) -> jax.Array:
        """`act(gate(x))`, `[..., d_mlp]`, for the MLP's input x."""
        y = self.gate_proj(x, gate)
        return jax.nn.silu(y) if self.hidden_act == "silu" else jnp.square(jax.nn.relu(y))


class Block(nnx.Module):
    """A decoder block whose seven projections take their gates as an argument."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike):
        self.attn_norm = RMSNorm(config.d_model, eps=config.norm_eps, dtype=dtype)
        self.attn = Attention(config, rngs=rngs, dtype=dtype)
        self.mlp_norm = RMSNorm(config.d_model, eps=config.norm_eps, dtype=dtype)
        self.mlp = MLP(config, rngs=rngs, dtype=dtype)

    def __call__(
        self, x: jax.Array, gates: BlockGates, context: Context, cache: tuple[jax.Array, jax.Array] | None = None
    ) -> tuple[jax.Array, Any, Taps]:
        """The residual stream after the block `[batch, seq, d_model]`, the layer's cache, and the taps.

        Args:
          x: residual stream `[batch, seq, d_model]`.
          gates: of the seven projections: `Dense()`, a `Threshold` or `TopK` with `[7]` values, or a tuple.
          context: what the tokens may see.
          cache: keys and values of this layer, or None.
        """
        attn_in = self.attn_norm(x)
        attn_out, cache = self.attn(attn_in, gates, context, cache)
        x = x + self.attn.o_proj(attn_out, gates[3])
        mlp_in = self.mlp_norm(x)
        gated = self.mlp.gated(mlp_in, gates[4])
        if isinstance(gates[5], GateOutput):
            gated = jnp.where(gates[5].keep(gated), gated, 0)
        mlp_hidden = gated * self.mlp.up_proj(mlp_in, gates[5])
        x = x + self.mlp.down_proj(mlp_hidden, gates[6])
        return x, cache, Taps(attn_in, attn_out, mlp_in, mlp_hidden)
