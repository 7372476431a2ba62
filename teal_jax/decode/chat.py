"""A conversation that keeps its kv_cache: each turn reads only the tokens that are new."""

import dataclasses
from collections.abc import Generator, Iterator, Sequence

import jax.numpy as jnp

from teal_jax.decode.run import STREAM_CHUNK, Run, check_prompts
from teal_jax.decode.sampling import Sampler
from teal_jax.errors import ContextError, TealError
from teal_jax.model import LanguageModel
from teal_jax.nn.cache import KVCache

DEFAULT_CONTEXT = 4096
"""Tokens that a conversation may have, if the model has as many positions."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatStats:
    """The latest turn in figures.

    Attributes:
      turns: answers given.
      prefilled_tokens: tokens read in the latest turn; the rest of the conversation was in the cache.
      generated_tokens: tokens of the latest answer.
      tokens_per_second: its decoding speed.
      finish_reason: how it ended, see `Generation`; None if it was broken off.
      context_used, context_size: tokens in the cache, and how many it holds.
    """

    turns: int = 0
    prefilled_tokens: int = 0
    generated_tokens: int = 0
    tokens_per_second: float = 0.0
    finish_reason: str | None = None
    context_used: int = 0
    context_size: int = 0


class Chat:
    """A conversation with a model, under its chat template.

    Messages are read dense. Answers stay in the cache as they were decoded, sparse under a plan; only what the
    template renders differently from what was generated is read again.

    A base model has no template: it then continues a story that each message is appended to (as it is, a space
    between where neither side has white space), and `system` is how the story starts.

    Attributes:
      messages: `{"role", "content"}` of every turn, oldest first.
      stats: figures of the latest turn.

    Example:
      chat = Chat(lm, system="You are terse.")
      for piece in chat.send("Hello!"):
          print(piece, end="", flush=True)
    """

    def __init__(
        self,
        lm: LanguageModel,
        system: str | None = None,
        *,
        sampler: Sampler | None = None,
        seed: int = 0,
        max_len: int | None = None,
        max_new_tokens: int = 512,
        stop: str | Sequence[str] = (),
    ):
        """Start a conversation; nothing runs yet.

        Args:
          lm: the model, with a tokenizer.
          system: the system message, if any.
          sampler: None is greedy.
          seed: the same seed and messages give the same answers.
          max_len: tokens that the conversation may have; None: 4096 or, if fewer, the model's positions.
          max_new_tokens: at most so many tokens an answer.
          stop: strings that end an answer.
        """
        if lm.tokenizer is None:
            raise TealError("chat needs a tokenizer, and this model has none", hint="load it from a full checkpoint")
        self.lm = lm
        self.has_template = lm.tokenizer.has_chat_template
        self._tokenizer = lm.tokenizer
        self._system = system
        self._capacity = min(max_len or DEFAULT_CONTEXT, lm.config.max_position)
        self._sampler, self._seed, self._max_new_tokens, self._stop = sampler, seed, max_new_tokens, stop
        self._turn: Generator[str] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the conversation, all but the system message; the seed starts again, too."""
        self._end_turn()
        self.messages: list[dict[str, str]] = []
        if self._system is not None:
            self.messages.append({"role": "system", "content": self._system})
        self._cache: KVCache | None = None
        self._cached: list[int] = []  # the tokens in the cache
        self.stats = ChatStats(context_size=self._capacity)

    def send(self, text: str) -> Iterator[str]:
        """Say `text` and yield the answer as it comes.

        An answer that is not read to its end is broken off at the next `send`: what had come stays in the
        conversation. The message is checked at once, and left out of the conversation if it does not fit.

        Raises:
          ContextError: the conversation does not fit the context. TealError: the template refuses it.
        """
        self._end_turn()
        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = self._tokens(messages)
        try:
            check_prompts(self.lm, [tokens], self._capacity)
        except ContextError as error:
            hint = "reset the conversation" + (
                " or raise max_len" if self._capacity < self.lm.config.max_position else ""
            )
            raise ContextError(f"the conversation is too long: {error.message}", hint=hint) from error
        self._turn = self._answer(messages, tokens)
        return self._turn

    def _answer(self, messages: list[dict[str, str]], tokens: list[int]) -> Generator[str]:
        cache, cached = self._rewound(tokens)
        # A turn that is broken off within a call loses the cache, which was donated to it: the next one starts afresh.
        self._cache, self._cached = None, []
        run = Run(
            self.lm,
            [tokens],
            max_new_tokens=self._max_new_tokens,
            sampler=self._sampler,
            seed=self._seed,
            stop=self._stop,
            max_len=self._capacity,
            continues=not self.has_template,
            cache=cache,
            cached=cached,
        )
        row = run.rows[0]
        self.messages = messages
        try:
            for pieces in run.pieces(STREAM_CHUNK):
                if pieces[0] is not None and pieces[0].text:
                    yield pieces[0].text
        finally:
            self.messages = [*messages, {"role": "assistant", "content": row.text}]
            if run.state is not None:
                self._cache, self._cached = run.state.cache, [*tokens, *run.sampled[0][:-1]]
            self.stats = ChatStats(
                turns=self.stats.turns + 1,
                prefilled_tokens=len(tokens) - cached,
                generated_tokens=len(row.tokens),
                tokens_per_second=run.tokens_per_second,
                finish_reason=row.finish_reason,
                context_used=len(self._cached),
                context_size=self._capacity,
            )

    def _tokens(self, messages: list[dict[str, str]]) -> list[int]:
        if self.has_template:
            return self._tokenizer.chat_tokens(messages)
        story = ""
        for message in messages:
            text = message["content"]
            # An answer says itself whether a space comes first; a message typed by a user does not.
            joined = not story or not text or story[-1].isspace() or text[0].isspace()
            story += text if joined or message["role"] == "assistant" else f" {text}"
        return self._tokenizer.encode(story)

    def _rewound(self, tokens: list[int]) -> tuple[KVCache, int]:
        """The cache set back to what it shares with `tokens`, and how many tokens that is; a new one if it cannot be.

        Slot p holds position p, so that shortening the length is enough, unless a sliding window wrapped around:
        it then lacks the oldest tokens that the rewound one would see.
        """
        cache, cached = self._cache, self._cached
        # One token at least must be read again: its logits are needed.
        shared = next(
            (i for i, (a, b) in enumerate(zip(cached, tokens[:-1], strict=False)) if a != b),
            min(len(cached), len(tokens) - 1),
        )
        if cache is None or (len(cached) > cache.slots and shared < len(cached) - 1):
            return self.lm.init_cache(1, self._capacity), 0
        return dataclasses.replace(cache, length=jnp.full((1,), shared, jnp.int32)), shared

    def _end_turn(self) -> None:
        turn, self._turn = self._turn, None
        if turn is not None:
            turn.close()
