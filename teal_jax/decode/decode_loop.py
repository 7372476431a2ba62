"""The compiled part of generation: prompts in buckets of fixed sizes, then a loop that stays on the device."""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from teal_jax.config import ModelConfig
from teal_jax.decode.sampling import Sampler, needs_seen, sample
from teal_jax.model import LanguageModel, Params, model_functions
from teal_jax.nn.cache import KVCache
from teal_jax.nn.gates import prompt_gates
from teal_jax.nn.implementation import Implementation

PREFILL_CHUNK = 512
"""Tokens of a prompt taken in one call; longer prompts take several."""

SMALLEST_BUCKET = 16
CACHE_STEP = 256
"""kv_caches have a multiple of this many positions, so that new lengths find a compiled function."""

DECODE_CHUNK = 64
"""Most tokens that one call of the loop decodes."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """What the decode loop carries, all on the device.

    Attributes:
      token: int32 `[batch]`, the newest token of each row: sampled, not yet in the cache.
      cache: everything before it.
      keys: random keys `[batch]`; the token at position p is drawn with `fold_in(key, p)`, whatever the batch.
      done: bool `[batch]`, rows that want no more tokens; they run along and their tokens mean nothing.
      budget: int32 `[batch]`, tokens that each row may still get.
      eos: int32 `[n]`, tokens that end a row.
      seen: bool `[batch, vocab]`, tokens that occurred; None unless the sampler needs it.
    """

    token: jax.Array
    cache: KVCache
    keys: jax.Array
    done: jax.Array
    budget: jax.Array
    eos: jax.Array
    seen: jax.Array | None = None


def bucket_length(tokens: int, capacity: int) -> int:
    """The length that a prompt chunk of `tokens` is padded to: a power of two from 16 to 512, at most `capacity`."""
    return min(capacity, max(SMALLEST_BUCKET, 1 << (tokens - 1).bit_length()))


def cache_capacity(config: ModelConfig, tokens: int) -> int:
    """Positions of the cache for `tokens`: rounded up to a multiple of 256, at most the model's."""
    return min(config.max_position, -(-tokens // CACHE_STEP) * CACHE_STEP)


def advance(sampler: Sampler, state: DecodeState, logits: jax.Array, cache: KVCache) -> DecodeState:
    """The state after sampling one token of every row from `logits [batch, vocab]`; `cache` is what led to them."""
    token = sample(logits, jax.vmap(jax.random.fold_in)(state.keys, cache.length), sampler, state.seen)
    budget = state.budget - 1
    done = state.done | (token[:, None] == state.eos).any(axis=1) | (budget <= 0)
    seen = None if state.seen is None else state.seen.at[jnp.arange(len(token)), token].set(True)
    return dataclasses.replace(state, token=token, cache=cache, done=done, budget=budget, seen=seen)


@functools.cache
def prefill_function(config: ModelConfig) -> Callable[..., tuple[jax.Array, KVCache]]:
    """Jitted `(params, tokens [b, s], mask [b, s], cache, logits [b, vocab]) -> (logits, cache)`; cache donated.

    Rows without a token in this chunk keep the logits they bring.
    """
    prefill = model_functions(config).prefill

    def chunk(
        params: Params, tokens: jax.Array, mask: jax.Array, cache: KVCache, logits: jax.Array
    ) -> tuple[jax.Array, KVCache]:
        new, cache = prefill(params, tokens, cache, mask)
        return jnp.where(mask.any(axis=1, keepdims=True), new, logits), cache

    return jax.jit(chunk, donate_argnums=(3, 4))


@functools.cache
def first_token_function(sampler: Sampler) -> Callable[[DecodeState, jax.Array], DecodeState]:
    """Jitted `(state, logits [b, vocab]) -> state`: the first token, from the prompt's logits; state donated."""
    return jax.jit(lambda state, logits: advance(sampler, state, logits, state.cache), donate_argnums=0)


@functools.cache
def decode_function(
    config: ModelConfig, sampler: Sampler, implementation: Implementation | None
) -> Callable[..., tuple[DecodeState, jax.Array, jax.Array]]:
    """Jitted `(params, state, n) -> (state, tokens int32 [b, 64], steps int32)`; state donated, n <= 64 traced.

    Decodes until every row is done, at most n tokens: `tokens[:, :steps]` are new. One program serves every n
    and, thresholds being arrays in params, every sparsity.
    """
    decode_step = model_functions(config, implementation).decode_step

    def chunk(params: Params, state: DecodeState, n: jax.Array) -> tuple[DecodeState, jax.Array, jax.Array]:
        def step(carry: tuple[jax.Array, DecodeState, jax.Array]) -> tuple[jax.Array, DecodeState, jax.Array]:
            i, state, tokens = carry
            logits, cache = decode_step(params, state.token, state.cache)
            state = advance(sampler, state, logits, cache)
            return i + 1, state, tokens.at[:, i].set(state.token)

        def unfinished(carry: tuple[jax.Array, DecodeState, jax.Array]) -> jax.Array:
            return (carry[0] < n) & ~carry[1].done.all()

        tokens = jnp.zeros((len(state.token), DECODE_CHUNK), jnp.int32)
        steps, state, tokens = lax.while_loop(unfinished, step, (jnp.int32(0), state, tokens))
        return state, tokens, steps

    return jax.jit(chunk, donate_argnums=1)


def decode_chunk(lm: LanguageModel, state: DecodeState, n: int, sampler: Sampler) -> tuple[DecodeState, np.ndarray]:
    """Decode up to `n <= 64` tokens of every row; returns the new state and int32 `[batch, steps]`, `steps <= n`."""
    function = decode_function(lm.config, sampler, lm.implementation)
    state, tokens, steps = function(lm.params, state, np.int32(min(n, DECODE_CHUNK)))
    return state, np.asarray(tokens)[:, : int(steps)]


@dataclasses.dataclass
class Clock:
    """Seconds spent compiling, reading the prompt and decoding; the second and third hold no compilation."""

    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    def compile(self, function: Any, *args: Any) -> None:
        """Compile the jitted `function` for `args` without running it; a later call finds it compiled."""
        start = time.perf_counter()
        function.lower(*args).compile()
        self.compile_seconds += time.perf_counter() - start


def place_like(params: Params, tree: Any) -> Any:
    """`tree` (donated) on the device that `params` are committed to; as it is where they are not.

    Jit compiles anew for an argument that is committed where an earlier one was not, as a loop's output is.
    """
    embedding = params["weights"]["embed"]["weight"]
    if not (embedding.committed and len(embedding.devices()) == 1):
        return tree
    move = functools.partial(jax.device_put, device=embedding.sharding, donate=True)
    return jax.tree.map(lambda x: x if x.committed else move(x), tree)


def prefill_rows(
    lm: LanguageModel, rows: Sequence[Sequence[int]], cache: KVCache, clock: Clock | None = None
) -> tuple[jax.Array, KVCache]:
    """Append prompts of any lengths (each >= 1) to the cache, under `prompt_gates`, in buckets.

    Args:
      lm: the model.
      rows: new tokens of each row; the caller sees to it that they fit the cache.
      cache: donated.
      clock: told the seconds.

    Returns:
      Float32 logits `[batch, vocab]` after each row's last token, and the cache.
    """
    clock = clock or Clock()
    # Without gates that do not act on prompts, all plans share one program.
    function, params = prefill_function(lm.config), lm.params | {"gates": prompt_gates(lm.params["gates"])}
    logits = jnp.zeros((len(rows), lm.config.vocab_size), jnp.float32)
    cache, logits = place_like(lm.params, (cache, logits))
    longest = max(map(len, rows))
    for start in range(0, longest, PREFILL_CHUNK):
        length = bucket_length(min(PREFILL_CHUNK, longest - start), cache.capacity)
        tokens = np.zeros((len(rows), length), np.int32)
        mask = np.zeros((len(rows), length), bool)
        for row, ids in enumerate(rows):
            part = ids[start : start + length]
            tokens[row, : len(part)], mask[row, : len(part)] = part, True
        clock.compile(function, params, tokens, mask, cache, logits)
        began = time.perf_counter()
        logits, cache = function(params, tokens, mask, cache, logits)
        logits.block_until_ready()
        clock.prefill_seconds += time.perf_counter() - began
    return logits, cache


def begin(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    cache: KVCache,
    *,
    cached: int = 0,
    sampler: Sampler,
    seeds: Sequence[int],
    budgets: Sequence[int],
    eos: Sequence[int],
    clock: Clock | None = None,
) -> DecodeState:
    """Read the prompts and sample the first token of every row; compiles the decode loop, too.

    Args:
      lm: the model.
      prompts: whole prompts; the first `cached` tokens of each are in the cache already.
      cache: donated.
      cached: less than the length of any prompt.
      sampler: how tokens are chosen.
      seeds: one a row, in [0, 2**32).
      budgets: the most tokens that each row may get, >= 1.
      eos: tokens that end a row.
      clock: told the seconds.
    """
    clock = clock or Clock()
    logits, cache = prefill_rows(lm, [p[cached:] for p in prompts], cache, clock)
    seen = None
    if needs_seen(sampler):
        seen = np.zeros((len(prompts), lm.config.vocab_size), bool)
        for row, ids in enumerate(prompts):
            seen[row, np.asarray(ids)] = True
    state = DecodeState(
        token=jnp.zeros((len(prompts),), jnp.int32),
        cache=cache,
        keys=jax.vmap(jax.random.key)(jnp.asarray(np.asarray(seeds, np.uint32))),
        done=jnp.zeros((len(prompts),), bool),
        budget=jnp.asarray(budgets, jnp.int32),
        eos=jnp.asarray(eos, jnp.int32),
        seen=None if seen is None else jnp.asarray(seen),
    )
    state = place_like(lm.params, state)
    clock.compile(first_token_function(sampler), state, logits)
    began = time.perf_counter()
    state = first_token_function(sampler)(state, logits)
    state.token.block_until_ready()
    clock.prefill_seconds += time.perf_counter() - began
    clock.compile(decode_function(lm.config, sampler, lm.implementation), lm.params, state, np.int32(0))
    return state
