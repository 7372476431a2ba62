"""Running a model one block at a time: what calibration and allocation share."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from teal_jax.config import ModelConfig
from teal_jax.model import LanguageModel, abstract_decoder
from teal_jax.nn.attention import make_context
from teal_jax.nn.block import Block, Taps
from teal_jax.nn.gates import Dense

TOKENS_PER_BATCH = 4096
"""Tokens put through a block at once: enough to fill a GPU, small enough for its attention scores."""


@functools.cache
def block_graph(config: ModelConfig) -> nnx.GraphDef[Block]:
    """The graph of one block, for `nnx.merge(block_graph(config), layer_params)` inside jit."""
    graphdef, _ = nnx.split(abstract_decoder(config).layers[0])
    return graphdef


def batches(rows: int, seq: int) -> list[slice]:
    """Equal slices over `rows` sequences of `seq` tokens: one compiled program serves all of them."""
    size = max((n for n in range(1, rows + 1) if rows % n == 0 and n * seq <= TOKENS_PER_BATCH), default=1)
    return [slice(start, start + size) for start in range(0, rows, size)]


def embed(lm: LanguageModel, tokens: jax.typing.ArrayLike) -> jax.Array:
    """The input of the first block, `[rows, seq, d_model]`, for tokens int32 `[rows, seq]`."""
    return jnp.take(lm.params["weights"]["embed"]["weight"], jnp.asarray(tokens, jnp.int32), axis=0)


def dense_block(config: ModelConfig, layer_params: dict, x: jax.Array) -> tuple[jax.Array, Taps]:
    """One block without gates or cache: its output and taps, for x `[batch, seq, d_model]`."""
    block = nnx.merge(block_graph(config), layer_params)
    context = make_context(config, jnp.ones(x.shape[:2], bool), None)
    y, _, taps = block(x, Dense(), context)
    return y, taps
