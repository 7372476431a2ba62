"""How the next token is chosen. A sampler is frozen and hashable: compiled decode loops are keyed by it.

References: nucleus sampling (top-p), arXiv 1904.09751; min-p, arXiv 2407.01082; repetition penalty, arXiv
1909.05858. Orders and edge cases are those of HuggingFace transformers.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

DROPPED = -jnp.inf
"""The logit of a token that cannot be sampled."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy:
    """The token with the highest logit; the lowest id among equals.

    Attributes:
      repetition_penalty: see `Sampling`.
    """

    repetition_penalty: float = 1.0

    def __post_init__(self):
        _check_penalty(self.repetition_penalty)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Random tokens from a thinned distribution. The filters act in the order of the attributes, penalty first.

    Attributes:
      temperature: logits are divided by it, >= 0; 0 is greedy.
      top_k: keep the k highest logits (more where the k-th is tied), >= 1.
      top_p: keep the smallest set of most likely tokens whose probability reaches this, in (0, 1]; at least one.
      min_p: keep tokens at least this share as likely as the likeliest, in [0, 1].
      repetition_penalty: for tokens already in the prompt or the text, a positive logit is divided by it and a
        negative one multiplied, > 0; 1 is none.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature must be a number >= 0, got {self.temperature}")
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k must be a whole number >= 1 or None, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must lie in (0, 1] or be None, got {self.top_p}")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must lie in [0, 1] or be None, got {self.min_p}")
        _check_penalty(self.repetition_penalty)


type Sampler = Greedy | Sampling


def penalise(logits: jax.Array, seen: jax.Array, penalty: float) -> jax.Array:
    """`l / penalty` where `l > 0`, else `l * penalty`, for tokens in `seen`; both `[batch, vocab]`."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """Logits below the k-th highest become -inf."""
    k = min(k, logits.shape[-1])
    return jnp.where(logits >= jax.lax.top_k(logits, k)[0][..., -1:], logits, DROPPED)


def keep_top_p(logits: jax.Array, p: float) -> jax.Array:
    """Keep a token iff the tokens before it, most likely first, have less than `p` together; the first always."""
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    probs = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    kept = jnp.cumsum(probs, axis=-1) - probs < p
    kept = kept.at[..., 0].set(True)
    kept = jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, kept, axis=-1, inplace=False)
    return jnp.where(kept, logits, DROPPED)


def keep_min_p(logits: jax.Array, p: float) -> jax.Array:
    """Keep a token iff its probability is at least `p` times the highest: `l >= max(l) + log(p)`."""
    if p == 0:
        return logits
    return jnp.where(logits >= jnp.max(logits, axis=-1, keepdims=True) + math.log(p), logits, DROPPED)


def process_logits(logits: jax.Array, sampler: Sampler, seen: jax.Array | None = None) -> jax.Array:
    """The logits that `sampler` draws from: float32 `[batch, vocab]`, -inf for what it excludes.

    Args:
      logits: float32 `[batch, vocab]`.
      sampler: what to apply.
      seen: bool `[batch, vocab]`, tokens that have occurred; needed iff `needs_seen(sampler)`.
    """
    if needs_seen(sampler):
        if seen is None:
            raise ValueError("a repetition penalty needs to know the tokens seen: pass seen [batch, vocab]")
        logits = penalise(logits, seen, sampler.repetition_penalty)
    if is_greedy(sampler):
        return logits
    assert isinstance(sampler, Sampling)
    # Shifted first, so that a tiny temperature cannot overflow.
    logits = (logits - jnp.max(logits, axis=-1, keepdims=True)) / sampler.temperature
    if sampler.top_k is not None:
        logits = keep_top_k(logits, sampler.top_k)
    if sampler.top_p is not None and sampler.top_p < 1:
        logits = keep_top_p(logits, sampler.top_p)
    if sampler.min_p is not None:
        logits = keep_min_p(logits, sampler.min_p)
    return logits


def sample(logits: jax.Array, keys: jax.Array, sampler: Sampler, seen: jax.Array | None = None) -> jax.Array:
    """The next token of every row, int32 `[batch]`.

    Args:
      logits: float32 `[batch, vocab]`.
      keys: random keys `[batch]`, one a row, so that a row does not depend on the others.
      sampler: static under jit.
      seen: see `process_logits`.
    """
    logits = process_logits(logits, sampler, seen)
    if is_greedy(sampler):
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)


def is_greedy(sampler: Sampler) -> bool:
    """Whether the sampler draws nothing at random."""
    return isinstance(sampler, Greedy) or sampler.temperature == 0


def needs_seen(sampler: Sampler) -> bool:
    """Whether the sampler needs the tokens seen so far."""
    return sampler.repetition_penalty != 1.0


def _check_penalty(penalty: float) -> None:
    if not (math.isfinite(penalty) and penalty > 0):
        raise ValueError(f"repetition_penalty must be a number > 0, got {penalty}")
