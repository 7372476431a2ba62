"""The whole decoder: embedding, blocks, final norm, lm_head. Layers are unrolled: a scan would copy the weights."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from teal_jax.config import ModelConfig
from teal_jax.nn.attention import Library, make_context
from teal_jax.nn.block import Block, Taps
from teal_jax.nn.cache import KVCache
from teal_jax.nn.embedding import Embedding
from teal_jax.nn.gates import BlockGates, ModelGates
from teal_jax.nn.norm import RMSNorm
from teal_jax.nn.product import matmul
from teal_jax.nn.quantized import to_dense

type Observer = Callable[[Taps, BlockGates], Any]
"""Called once a layer, inside jit, with the layer's taps and gates; what it returns is collected in a list."""


class Head(nnx.Module):
    """The lm_head `[d_model, vocab]`; always dense."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike):
        init = jax.nn.initializers.normal(0.02)
        self.weight = nnx.Param(init(rngs.params(), (config.d_model, config.vocab_size), dtype))


class Decoder(nnx.Module):
    """A Llama- or Mistral-family decoder. Initialised at random; the converters bring trained weights."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: jax.typing.DTypeLike = jnp.float32):
        self.config = config
        self.embed = Embedding(config, rngs=rngs, dtype=dtype)
        self.layers = nnx.List([Block(config, rngs=rngs, dtype=dtype) for _ in range(config.num_layers)])
        self.final_norm = RMSNorm(config.d_model, eps=config.norm_eps, dtype=dtype)
        if not config.tie_embeddings:
            self.lm_head = Head(config, rngs=rngs, dtype=dtype)

    def hidden(
        self,
        tokens: jax.Array,
        gates: ModelGates,
        *,
        mask: jax.Array | None = None,
        observe: Observer | None = None,
        remat: bool = False,
        attention: Library | None = None,
    ) -> tuple[jax.Array, list[Any]]:
        """The residual stream after the last block, before the final norm, for whole sequences.

        Args:
          tokens: int32 `[batch, seq]`.
          gates: `Dense()`, a `Threshold` or `TopK` with `[layers, 7]` values, or `Gates`.
          mask: bool `[batch, seq]`, False for padding, on either side; None: all real.
          observe: see `Observer`.
          remat: a backward pass computes each block again instead of keeping what it computed.
          attention: library of `attend_causal`, without a mask; None: `attend`.

        Returns:
          `[batch, seq, d_model]`, and the observations (empty without an observer).
        """
        assert mask is None or attention is None, "a library's attention takes every token for real"
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        context = dataclasses.replace(make_context(self.config, mask, None), library=attention)
        x = self.embed(tokens)
        observed = []
        for i, block in enumerate(self.layers):

            def run(x: jax.Array, gate: Any, block: Block = block) -> tuple[jax.Array, Any]:
                y, _, taps = block(x, gate, context)
                return y, None if observe is None else observe(taps, gate)

            x, found = (jax.checkpoint(run) if remat else run)(x, gates[i])
            if observe is not None:
                observed.append(found)
        return x, observed

    def extend(
        self, tokens: jax.Array, gates: ModelGates, cache: KVCache, *, mask: jax.Array | None = None
    ) -> tuple[jax.Array, KVCache]:
        """As `hidden`, for tokens `[batch, seq]` that follow those in the cache; also the cache with them in it."""
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask
        context = make_context(self.config, mask, cache)
        x = self.embed(tokens)
        keys, values = [], []
        for i, block in enumerate(self.layers):
            x, written, _ = block(x, gates[i], context, (cache.keys[i], cache.values[i]))
            keys.append(written[0])
            values.append(written[1])
        length = cache.length + mask.sum(axis=1, dtype=jnp.int32)
        return x, KVCache(tuple(keys), tuple(values), length, cache.capacity)

    def logits(self, x: jax.Array) -> jax.Array:
        """Float32 logits `[..., vocab]` of the residual stream `[..., d_model]`."""
        x = self.final_norm(x)
        weight = self.embed.weight[...].T if self.config.tie_embeddings else to_dense(self.lm_head.weight.get_value())
        return matmul(x, weight, out_dtype=jnp.float32)
