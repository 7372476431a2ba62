"""One decode step on the GPU: seven sparse kernels a layer, which hand each other lists of kept rows.

Under a top-K gate eleven: what a threshold decides where x is made, K largest need all of x for.
"""

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention import decode_attention
from pallas_kernels.gate_up import gate_up
from pallas_kernels.kept import Cut, KeptRows
from pallas_kernels.largest import select_largest
from pallas_kernels.matvec import matvec
from pallas_kernels.norm import rms_norm_select
from pallas_kernels.reference import matmul
from pallas_kernels.tiles import COUNTERS, DecodeTiles, decode_tiles
from teal_jax.config import PROJECTIONS, ModelConfig
from teal_jax.nn.block_top_k import BlockTopK
from teal_jax.nn.cache import KVCache
from teal_jax.nn.compensation import Biased
from teal_jax.nn.gates import Dense, ModelGates, Threshold, TopK
from teal_jax.nn.int8 import Int8
from teal_jax.nn.rope import rotary_table
from teal_jax.nn.straight_through import without_gradient

type Matrices = tuple[jax.Array, ...]


def fused_step(
    config: ModelConfig,
    weights: dict[str, Any],
    gates: ModelGates,
    token: jax.Array,
    cache: KVCache,
    tiles: DecodeTiles | None = None,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, KVCache]:
    """As `Decoder.extend` and `Decoder.logits` for one token a row, in kernels that read only the kept rows.

    Args:
      config: of the model.
      weights: nested dict, as in `LanguageModel.params["weights"]`.
      gates: `Dense()`, or a `Threshold` or `TopK` with `[layers, 7]` values, with or without scales; `Int8` of a
        `TopK`; `BlockTopK` in the place of `TopK`; or `Biased` or `StraightThrough` of one of these.
      token: int32 `[batch]`, batch at most 8.
      cache: its arrays are updated in place where the caller's jit is given them.
      tiles: how each kernel is cut; None: `choose_tiles`.
      interpret: run the kernels as plain jax, on any device.

    Returns:
      Float32 logits `[batch, vocab]`, and the cache with the token in it.
    """
    logits, cache, _ = counting_step(config, weights, gates, token, cache, tiles, interpret=interpret)
    return logits, cache


def counting_step(
    config: ModelConfig,
    weights: dict[str, Any],
    gates: ModelGates,
    token: jax.Array,
    cache: KVCache,
    tiles: DecodeTiles | None = None,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, KVCache, jax.Array]:
    """`fused_step`, and the rows of W that each projection read, int32 `[layers, 7]`."""
    gates = without_gradient(gates)
    gates, given = (gates.gate, gates.bias) if isinstance(gates, Biased) else (gates, None)
    if tiles is None:
        tiles = choose_tiles(config, token.shape[0], dense=isinstance(gates, Dense))
    int8 = isinstance(gates, Int8)
    gates = gates.gate if isinstance(gates, Int8) else gates
    block = gates.block if isinstance(gates, BlockTopK) else None
    top_k = isinstance(gates, TopK | BlockTopK)
    limits = (
        gates.count if isinstance(gates, TopK | BlockTopK) else gates.value if isinstance(gates, Threshold) else None
    )
    scale = gates.scale if isinstance(gates, Threshold | TopK) else None
    counters = jnp.zeros((COUNTERS,), jnp.int32)
    cos, sin = (table[:, 0, 0] for table in rotary_table(cache.length[:, None], config.rope, config.head_dim))
    h = weights["embed"]["weight"][token]
    keys, values = list(cache.keys), list(cache.values)

    def limit(limits: jax.Array, projections: tuple[int, ...]) -> Cut:
        scales = None if scale is None else tuple(scale[i][p] for p in projections)
        return Cut(limits, jnp.full((1,), i, jnp.int32), projections, scales)

    def cut(*projections: int) -> Cut | None:
        """For the kernel that makes x, which leaves it dense for a top-K gate."""
        return None if limits is None or top_k else limit(limits, projections)

    def largest(x: Any, *projections: int) -> Any:
        if limits is None or not top_k:
            return x
        width = max(tiles.width, block or 1)
        counts = limit(limits, projections)
        return select_largest(x, counts, width=width, block=block, int8=int8, interpret=interpret)

    def of(parameters: dict[str, Any], *projections: int) -> tuple[Matrices, Matrices | None]:
        """Their matrices, and their biases where the model or the gates have some."""
        own = [parameters[f"{PROJECTIONS[p]}_proj"] for p in projections]
        biases = tuple(o["bias"] for o in own) if "bias" in own[0] else None
        if given is not None:
            more = [given[i][p] for p in projections]
            biases = tuple(more) if biases is None else tuple(b + m for b, m in zip(biases, more, strict=True))
        return tuple(o["weight"] for o in own), biases

    kept: list[jax.Array] = []

    def note(rows: Any, width: int, segments: int = 1) -> None:
        # Costs nothing where nobody asks: XLA leaves out what is not used.
        whole = jnp.full((segments,), width, jnp.int32)
        kept.append(rows.count.sum(axis=1) if isinstance(rows, KeptRows) else whole)

    def norm(parameters: dict[str, Any], cut: Cut | None) -> Any:
        return rms_norm_select(
            h, parameters["weight"], cut, eps=config.norm_eps, width=tiles.width, interpret=interpret
        )

    for i in range(config.num_layers):
        layer = weights["layers"][i]
        attn, mlp = layer["attn"], layer["mlp"]

        rows = largest(norm(layer["attn_norm"], cut(0, 1, 2)), 0, 1, 2)
        note(rows, config.d_model, 3)
        matrices, biases = of(attn, 0, 1, 2)
        qkv, counters = matvec(rows, matrices, counters, biases=biases, tile=tiles.qkv, interpret=interpret)
        rows, keys[i], values[i], counters = decode_attention(
            qkv, (cos, sin), cache.length, keys[i], values[i], counters, cut(3),
            num_heads=config.num_heads, window=config.sliding_window, interpret=interpret,
        )  # fmt: skip
        rows = largest(rows, 3)
        note(rows, config.num_heads * config.head_dim)
        matrices, biases = of(attn, 3)
        h, counters = matvec(rows, matrices, counters, biases=biases, residual=h, tile=tiles.o, interpret=interpret)

        rows = largest(norm(layer["mlp_norm"], cut(4, 5)), 4, 5)
        note(rows, config.d_model, 2)
        matrices, biases = of(mlp, 4, 5)
        rows, counters = gate_up(
            rows, matrices, counters, cut(6),
            biases=biases, activation=config.hidden_act, tile=tiles.gate_up, interpret=interpret,
        )  # fmt: skip
        rows = largest(rows, 6)
        note(rows, config.d_mlp)
        matrices, biases = of(mlp, 6)
        h, counters = matvec(rows, matrices, counters, biases=biases, residual=h, tile=tiles.down, interpret=interpret)

    x = norm(weights["final_norm"], None)
    if config.tie_embeddings:
        logits = matmul(x, weights["embed"]["weight"].T, out_dtype=jnp.float32)
    else:
        matrices = (weights["lm_head"]["weight"],)
        logits, _ = matvec(x, matrices, counters, out_dtype=jnp.float32, tile=tiles.lm_head, interpret=interpret)
    cache = KVCache(tuple(keys), tuple(values), cache.length + 1, cache.capacity)
    return logits, cache, jnp.concatenate(kept).reshape(-1, 7)


def choose_tiles(config: ModelConfig, batch: int, *, dense: bool = False) -> DecodeTiles:
    """The tiles of a model's decode step."""
    attn, attn_kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return decode_tiles(config.d_model, config.d_mlp, attn, attn_kv, config.vocab_size, batch=batch, dense=dense)
