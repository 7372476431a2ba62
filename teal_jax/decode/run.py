"""One generation under way: drives the compiled loop and turns its tokens into text, chunk by chunk."""

import dataclasses
import time
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from teal_jax.decode.decode_loop import Clock, DecodeState, begin, cache_capacity, decode_chunk, place_like
from teal_jax.decode.sampling import Greedy, Sampler
from teal_jax.decode.stops import StopMatcher, stop_strings
from teal_jax.decode.tokenizer import TextStream
from teal_jax.errors import ContextError, DataError, TealError
from teal_jax.model import LanguageModel
from teal_jax.nn.cache import KVCache

STREAM_CHUNK = 8
"""Tokens between two pieces of a stream: text comes smoothly, the host looks seldom."""

WHOLE_CHUNK = 32
"""Tokens between two looks of the host when nobody watches and no stop string can end the text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Piece:
    """What a stream yields: the newest text and where the generation stands.

    Attributes:
      text: newly complete text; may be empty while a character or a stop string is half there.
      tokens: new tokens, as in `Generation.tokens`.
      num_tokens: tokens so far.
      tokens_per_second: speed of decoding so far; 0 at the first token.
      finish_reason: None until the last piece; see `Generation`.
    """

    text: str
    tokens: tuple[int, ...]
    num_tokens: int
    tokens_per_second: float
    finish_reason: str | None


class Row:
    """One sequence under way: turns its tokens into text and notices its end."""

    def __init__(
        self, lm: LanguageModel, *, budget: int, eos: Sequence[int], stop: Sequence[str], context: Sequence[int]
    ):
        self.budget = budget
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self._eos = frozenset(eos)
        self._stream = None if lm.tokenizer is None else TextStream(lm.tokenizer, context)
        self._stops = StopMatcher(stop)

    def take(self, ids: Sequence[int]) -> tuple[str, tuple[int, ...]]:
        """The text and the tokens that `ids`, the next tokens sampled, add; those after the end are ignored."""
        text, before = "", len(self.tokens)
        for token in ids:
            if self.finish_reason is not None:
                break
            if token in self._eos:
                text += self._finish("eos")
                break
            self.tokens.append(token)
            if self._stream is not None:
                text += self._stops.push(self._stream.push((token,)))
            if self._stops.found:
                self.finish_reason = "stop"
            elif len(self.tokens) >= self.budget:
                text += self._finish("length")
        self.text += text
        return text, tuple(self.tokens[before:])

    def _finish(self, reason: str) -> str:
        text = self._stops.push(self._stream.flush()) if self._stream is not None else ""
        self.finish_reason = "stop" if self._stops.found else reason
        return text + self._stops.flush()


class Run:
    """One generation of a batch: iterate over `pieces`, then read the rest.

    Attributes:
      rows: the sequences. clock: seconds so far. steps: tokens decoded after the first, per row.
      sampled: every token that a row's device state has seen, also those after its end; the newest of them is
        the only one that is not in the cache.
      state: what the device holds; None before the first token and while a chunk is being decoded.
    """

    def __init__(
        self,
        lm: LanguageModel,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 64,
        sampler: Sampler | None = None,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        max_len: int | None = None,
        continues: bool = True,
        cache: KVCache | None = None,
        cached: int = 0,
    ):
        """Check everything; nothing runs yet.

        Args:
          lm: the model.
          prompts: tokens of each row.
          max_new_tokens: at most so many, >= 1; fewer where `max_len` or the model's positions end.
          sampler: None is greedy.
          seed: row i draws with `seed + i`, or with `seed[i]`.
          stop: strings that end a row.
          ignore_eos: decode past eos.
          max_len: tokens that the cache holds, prompt included; None: as many as needed.
          continues: the text continues the prompt, rather than answering it.
          cache: one that holds the first `cached` tokens of the only prompt; taken over. None: a new one.
          cached: see `cache`.
        """
        if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be a whole number >= 1, got {max_new_tokens}")
        if max_len is not None and max_len < 1:
            raise ValueError(f"max_len must be >= 1 or None, got {max_len}")
        stops = stop_strings(stop)
        if stops and lm.tokenizer is None:
            raise TealError("stop strings need a tokenizer, and this model has none", hint="pass stop=()")
        check_prompts(lm, prompts, max_len)
        self._lm, self._prompts, self._cache, self._cached = lm, prompts, cache, cached
        self._sampler = sampler or Greedy()
        self._seeds = [seed + i for i in range(len(prompts))] if isinstance(seed, int | np.integer) else list(seed)
        if len(self._seeds) != len(prompts):
            raise ValueError(
                f"seed must be one number or one for each prompt, got {len(self._seeds)} for {len(prompts)}"
            )
        if not all(0 <= seed < 2**32 for seed in self._seeds):
            raise ValueError(f"seed must lie in [0, 2**32), got {self._seeds}")
        self._eos = () if ignore_eos else end_tokens(lm)
        limit = min(max_len or lm.config.max_position, lm.config.max_position)
        longest = max(map(len, prompts))
        self._capacity = limit if max_len is not None else cache_capacity(lm.config, longest + max_new_tokens)
        self._chunk = STREAM_CHUNK if stops else WHOLE_CHUNK
        self.rows = [
            Row(
                lm,
                budget=min(max_new_tokens, limit - len(prompt)),
                eos=self._eos,
                stop=stops,
                context=prompt if continues else (),
            )
            for prompt in prompts
        ]
        self.clock = Clock()
        self.steps = 0
        self.sampled: list[list[int]] = [[] for _ in prompts]
        self.state: DecodeState | None = None

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed of each row so far."""
        return self.steps / self.clock.decode_seconds if self.steps else 0.0

    def pieces(self, chunk: int | None = None) -> Iterator[list[Piece | None]]:
        """A piece of every row (None for rows that have ended): the first token, then up to `chunk` at a time."""
        lm = self._lm
        cache = self._cache if self._cache is not None else lm.init_cache(len(self.rows), self._capacity)
        self._cache = None
        self.state = begin(
            lm,
            self._prompts,
            cache,
            cached=self._cached,
            sampler=self._sampler,
            seeds=self._seeds,
            budgets=[row.budget for row in self.rows],
            eos=self._eos,
            clock=self.clock,
        )
        new = np.asarray(self.state.token)[:, None]
        while True:
            yield self._take(new)
            if all(row.finish_reason for row in self.rows):
                return
            state, self.state = self.state, None
            if any(row.finish_reason == "stop" for row in self.rows):  # the device does not know of these ends
                done = jnp.array([row.finish_reason is not None for row in self.rows])
                state = dataclasses.replace(state, done=place_like(lm.params, done))
            start = time.perf_counter()
            self.state, new = decode_chunk(lm, state, chunk or self._chunk, self._sampler)
            self.clock.decode_seconds += time.perf_counter() - start
            self.steps += new.shape[1]

    def _take(self, new: np.ndarray) -> list[Piece | None]:
        pieces: list[Piece | None] = []
        for row, ids, sampled in zip(self.rows, new.tolist(), self.sampled, strict=True):
            sampled += ids
            if row.finish_reason is not None:
                pieces.append(None)
                continue
            text, tokens = row.take(ids)
            pieces.append(
                Piece(
                    text=text,
                    tokens=tokens,
                    num_tokens=len(row.tokens),
                    tokens_per_second=self.tokens_per_second,
                    finish_reason=row.finish_reason,
                )
            )
        return pieces


def end_tokens(lm: LanguageModel) -> tuple[int, ...]:
    """The tokens that end a text: the tokenizer's and the config's."""
    return lm.config.eos_token_ids if lm.tokenizer is None else lm.tokenizer.eos_token_ids


def check_prompts(lm: LanguageModel, prompts: Sequence[Sequence[int]], max_len: int | None = None) -> None:
    """Raise unless every prompt has tokens, all in the vocabulary, and leaves room for one more.

    Raises:
      DataError: no prompt, an empty one, or a token id outside the vocabulary. ContextError: one is too long.
    """
    if not prompts:
        raise DataError("no prompt given", hint="pass a text or a list of texts")
    limit = min(max_len or lm.config.max_position, lm.config.max_position)
    for prompt in prompts:
        if not prompt:
            raise DataError("the prompt is empty", hint="this model has no bos token to start from: give some text")
        if min(prompt) < 0 or max(prompt) >= lm.config.vocab_size:
            raise DataError(
                f"token ids must lie in [0, {lm.config.vocab_size}), got {min(prompt)} to {max(prompt)}",
                hint="was the text encoded with another model's tokenizer?",
            )
        if len(prompt) >= limit:
            raise ContextError(
                f"the prompt has {len(prompt)} tokens, but at most {limit - 1} fit: "
                f"{'max_len' if limit != lm.config.max_position else 'the model'} holds {limit}, one of them new",
                hint="shorten the prompt" + (" or raise max_len" if limit < lm.config.max_position else ""),
            )
