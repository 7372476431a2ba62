"""One timed decode: a prompt in the cache, a compiled loop of greedy steps, its wall time, kernels and kept rows."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from teal_jax.benchmark.timing import DeviceTimer, wall_time
from teal_jax.config import PROJECTIONS, ModelConfig
from teal_jax.model import LanguageModel, Params
from teal_jax.nn.cache import KVCache

type Step = Callable[[Params, jax.Array, KVCache], tuple[jax.Array, KVCache]]
"""`LanguageModel.decode_step`."""

type CountingStep = Callable[[Params, jax.Array, KVCache], tuple[jax.Array, KVCache, jax.Array]]
"""The same step, and the rows it kept, int32 `[layers, 7]`."""


@dataclasses.dataclass(frozen=True)
class Start:
    """Where every run starts: after the same prompt.

    Attributes:
      token: int32 `[1]`, the first to decode.
      cache: with the prompt in it.
    """

    token: jax.Array
    cache: KVCache

    def __call__(self) -> tuple[jax.Array, KVCache]:
        """A copy, for a run that takes the cache's buffers."""
        return jax.tree.map(jnp.copy, (self.token, self.cache))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A loop of steps, compiled.

    Attributes:
      run: `(params, token, cache) -> (token, cache)`, or with the kept rows; takes the cache's buffers.
      seconds: of tracing and compiling.
      memory_bytes: on the device while it runs, weights included, where XLA says so.
    """

    run: Callable[..., Any]
    seconds: float
    memory_bytes: int | None


@dataclasses.dataclass(frozen=True)
class Speed:
    """What a timed run gave.

    Attributes:
      seconds: a token, the best repeat.
      repeats: seconds a token, of all.
      first_token: seconds until the first token, compiling included where this run compiled.
      last: int32 `[1]`, the last token: two runs of the same work end at the same.
    """

    seconds: float
    repeats: list[float]
    first_token: float
    last: np.ndarray


def prefill(lm: LanguageModel, prompt: np.ndarray, context: int) -> Start:
    """The start after `prompt` (int32 `[1, seq]`), dense, in a cache of `context` tokens."""
    cache = lm.init_cache(1, context)
    logits, cache = jax.jit(lm.prefill, donate_argnums=2)(lm.params, jnp.asarray(prompt), cache)
    return Start(jnp.argmax(logits, axis=-1).astype(jnp.int32), cache)


def compile_loop(step: Step, params: Params, start: Start, tokens: int) -> Compiled:
    """`tokens` greedy steps; the trip count is static, so that the host need not ask the device for the end."""

    def loop(params: Params, token: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        def one(_: Any, carry: tuple[jax.Array, KVCache]) -> tuple[jax.Array, KVCache]:
            logits, cache = step(params, *carry)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache

        return lax.fori_loop(0, tokens, one, (token, cache))

    return _compile(loop, params, start)


def compile_count(step: CountingStep, params: Params, start: Start, tokens: int) -> Compiled:
    """The same loop, also summing the kept rows."""
    layers = len(start.cache.keys)

    def loop(params: Params, token: jax.Array, cache: KVCache) -> tuple[jax.Array, KVCache, jax.Array]:
        def one(_: Any, carry: tuple[jax.Array, KVCache, jax.Array]) -> tuple[jax.Array, KVCache, jax.Array]:
            token, cache, total = carry
            logits, cache, kept = step(params, token, cache)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), cache, total + kept

        return lax.fori_loop(0, tokens, one, (token, cache, jnp.zeros((layers, len(PROJECTIONS)), jnp.int32)))

    return _compile(loop, params, start)


def _compile(loop: Callable[..., Any], params: Params, start: Start) -> Compiled:
    begin = time.perf_counter()
    program = jax.jit(loop, donate_argnums=2).lower(params, start.token, start.cache).compile()
    seconds = time.perf_counter() - begin
    used = program.memory_analysis()
    memory = None
    if used is not None:
        sizes = used.argument_size_in_bytes + used.output_size_in_bytes + used.temp_size_in_bytes
        memory = sizes - used.alias_size_in_bytes
    return Compiled(program, seconds, memory)


def time_loop(loop: Compiled, params: Params, start: Start, tokens: int, repeats: int, *, compiled_now: bool) -> Speed:
    """Wall time of the loop, outside any profiler: each repeat is one dispatch and one wait."""
    last: list[jax.Array] = []

    def call(fresh: tuple[jax.Array, KVCache]) -> jax.Array:
        last[:] = [loop.run(params, *fresh)[0]]
        return last[0]

    first, times = wall_time(start, call, repeats)
    best = min(times)
    extra = max(0.0, first - best) + (loop.seconds if compiled_now else 0.0)
    return Speed(best / tokens, [t / tokens for t in times], extra + best / tokens, np.asarray(last[0]))


def count_rows(
    loop: Compiled, config: ModelConfig, params: Params, start: Start, tokens: int
) -> tuple[np.ndarray, np.ndarray]:
    """Realised sparsity of every projection over the run, float64 `[layers, 7]`; and its last token."""
    last, _, kept = loop.run(params, *start())
    widths = np.array([d_in for d_in, _ in config.projection_shapes])
    return 1 - np.asarray(kept, np.float64) / (tokens * widths), np.asarray(last)


def profile(timer: DeviceTimer, loop: Compiled, params: Params, start: Start, tokens: int) -> dict[str, list[float]]:
    """By kernel name: launches a token, and seconds a token on the device; the greatest first."""
    # The timer runs the call once more than it is asked to; copies made inside would be kernels of the run.
    ready = [jax.block_until_ready(start()) for _ in range(2)]
    (launches,) = timer(lambda: loop.run(params, *ready.pop()), 1)
    found: dict[str, list[float]] = {}
    for name, seconds in launches:
        entry = found.setdefault(name, [0.0, 0.0])
        entry[0] += 1 / tokens
        entry[1] += seconds / tokens
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))
