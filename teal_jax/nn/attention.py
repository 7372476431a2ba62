"""Grouped-query attention over a full or sliding-window context, with or without a kv_cache."""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx

from teal_jax.config import ModelConfig
from teal_jax.nn.cache import KVCache, slot_positions, write, write_slots
from teal_jax.nn.gates import BlockGates, Gate
from teal_jax.nn.product import product
from teal_jax.nn.project import Projection
from teal_jax.nn.rope import rotary_table, rotate

type Library = Literal["xla", "cudnn"]
"""Of `jax.nn.dot_product_attention`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What attention needs beside the activations; one for all layers of a forward pass.

    Attributes:
      rotary: the table of `rotary_table` for the new tokens.
      visible: bool `[batch, 1, seq, keys]`, the keys each new token may see.
      slot: int32 `[batch, seq]`, where the cache keeps each new token; None without a cache.
      append: the keys are the cache's old slots followed by the new tokens; otherwise, with a cache, its slots
        after the write.
      library: whose `attend_causal` is taken, without a cache and where every token is real; None: `attend`.
    """

    rotary: tuple[jax.Array, jax.Array]
    visible: jax.Array
    slot: jax.Array | None = None
    append: bool = dataclasses.field(default=False, metadata={"static": True})
    library: Library | None = dataclasses.field(default=None, metadata={"static": True})


def make_context(config: ModelConfig, mask: jax.Array, cache: KVCache | None) -> Context:
    """The context for new tokens, of which `mask` (bool `[batch, seq]`) says which are real.

    A token's position is the count of real tokens before it, so that left and right padding give one result.
    """
    before = jnp.zeros((mask.shape[0],), jnp.int32) if cache is None else cache.length
    positions = jnp.maximum(before[:, None] + jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    rotary = rotary_table(positions, config.rope, config.head_dim)
    new = jnp.where(mask, positions, -1)

    def visible(key_positions: jax.Array) -> jax.Array:
        distance = positions[:, :, None] - key_positions[:, None, :]
        seen = (distance >= 0) & (key_positions >= 0)[:, None, :]
        if config.sliding_window is not None:
            seen &= distance < config.sliding_window
        return seen[:, None]

    if cache is None:
        return Context(rotary, visible(new))
    after = before + mask.sum(axis=1, dtype=jnp.int32)
    slot = write_slots(positions, mask, after, cache.slots)
    if cache.slots < cache.capacity and mask.shape[1] > 1:
        # A ring forgets keys that the first of several new tokens still sees: attend before writing.
        keys = jnp.concatenate([slot_positions(before, cache.slots), new], axis=1)
        return Context(rotary, visible(keys), slot, append=True)
    return Context(rotary, visible(slot_positions(after, cache.slots)), slot)


def attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """`softmax(q k^T / sqrt(head_dim)) v`, softmax in float32, each group of query heads sharing a key/value head.

    q `[batch, seq, num_heads, head_dim]`; k, v `[batch, keys, num_kv_heads, head_dim]`; visible bool
    `[batch, 1, seq, keys]`. Returns `[batch, seq, num_heads * head_dim]`.
    """
    batch, seq, heads, head_dim = q.shape
    q = q.reshape(batch, seq, k.shape[2], heads // k.shape[2], head_dim)
    # The order in which the product comes: with the keys last, a softmax reads its rows as they lie.
    scores = product("bskgd,btkd->bksgt", q, k)
    scores = jnp.where(visible[:, :, :, None], scores * head_dim**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    mixed = product("bksgt,btkd->bskgd", weights, v)
    return mixed.reshape(batch, seq, heads * head_dim).astype(v.dtype)


def attend_causal(q: jax.Array, k: jax.Array, v: jax.Array, window: int | None, library: Library) -> jax.Array:
    """`attend` where each token sees itself and those before it, `window` in all (None: no limit), by jax's function.

    library: `"cudnn"`, for half precision on a GPU, which never writes the scores down and adds the parts of a
    derivative in any order; or `"xla"`.
    """
    local = None if window is None else (window - 1, 0)
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=local, implementation=library)
    return mixed.reshape(*q.shape[:2], -1).astype(v.dtype)


class Attention(nnx.Module):
    """The q, k, v and o projections; `attend` between them."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike):
        q, k, v, o = config.projection_shapes[:4]
        bias = config.attention_bias
        self.q_proj = Projection(*q, bias=bias, rngs=rngs, dtype=dtype)
        self.k_proj = Projection(*k, bias=bias, rngs=rngs, dtype=dtype)
        self.v_proj = Projection(*v, bias=bias, rngs=rngs, dtype=dtype)
        self.o_proj = Projection(*o, bias=bias, rngs=rngs, dtype=dtype)
        self.head_dim, self.window = config.head_dim, config.sliding_window

    def queries(self, x: jax.Array, gate: Gate, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Rotated queries `[batch, seq, num_heads, head_dim]` of x `[batch, seq, d_model]`."""
        return rotate(self._heads(self.q_proj(x, gate)), rotary)

    def keys(self, x: jax.Array, gate: Gate, rotary: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Rotated keys `[batch, seq, num_kv_heads, head_dim]`."""
        return rotate(self._heads(self.k_proj(x, gate)), rotary)

    def values(self, x: jax.Array, gate: Gate) -> jax.Array:
        """Values `[batch, seq, num_kv_heads, head_dim]`."""
        return self._heads(self.v_proj(x, gate))

    def _heads(self, x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-1], x.shape[-1] // self.head_dim, self.head_dim)

    def __call__(
        self, x: jax.Array, gates: BlockGates, context: Context, cache: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """attn_out `[batch, seq, num_heads * head_dim]` (the input of o_proj) and the layer's updated cache."""
        q = self.queries(x, gates[0], context.rotary)
        k = self.keys(x, gates[1], context.rotary)
        v = self.values(x, gates[2])
        if cache is None:
            if context.library is not None:
                return attend_causal(q, k, v, self.window, context.library), None
            return attend(q, k, v, context.visible), None
        assert context.slot is not None, "make_context was not given the cache"
        written = (write(cache[0], k, context.slot), write(cache[1], v, context.slot))
        if context.append:
            k, v = (jnp.concatenate([old, new], axis=1) for old, new in zip(cache, (k, v), strict=True))
        else:
            k, v = written
        return attend(q, k, v, context.visible), written
