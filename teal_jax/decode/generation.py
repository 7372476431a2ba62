"""Text from a model: `generate` for whole answers, `stream` for pieces as they come; both drive one `Run`."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import numpy as np

from teal_jax.decode.run import STREAM_CHUNK, Piece, Run
from teal_jax.decode.sampling import Sampler
from teal_jax.errors import DataError, TealError
from teal_jax.model import LanguageModel
from teal_jax.progress import Bar

type Prompt = str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | np.ndarray | jax.Array
"""One text or token sequence, or several."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """What a model answered; `str()` of it is the text.

    Attributes:
      text: the text after the prompt, without the stop string; empty for a model without a tokenizer.
      tokens: its tokens, the ending eos left out, those of a stop string included.
      prompt_tokens: tokens of the prompt.
      finish_reason: `"eos"`, `"stop"` (a stop string) or `"length"` (max_new_tokens, max_len or the model's positions).
      compile_seconds: time spent on compiling; 0 when an earlier call had done so. Held by no other figure.
      prefill_seconds: from the prompt to the first token.
      decode_seconds: from there to the end; for a batch, to the end of this row.
      tokens_per_second: speed of decoding, after the first token; 0 if there was but one.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    finish_reason: str
    compile_seconds: float
    prefill_seconds: float
    decode_seconds: float
    tokens_per_second: float

    def __str__(self) -> str:
        return self.text


def as_tokens(lm: LanguageModel, prompt: Prompt, chat: bool = False) -> tuple[list[list[int]], bool]:
    """Token rows of a prompt, and whether it is a single one; see `generate`.

    Raises:
      TealError: text for a model without a tokenizer, or chat without a template.
    """
    if isinstance(prompt, str) or (isinstance(prompt, list | tuple) and prompt and isinstance(prompt[0], str)):
        if lm.tokenizer is None:
            raise TealError("this model has no tokenizer", hint="pass token ids instead of text")
        texts = [prompt] if isinstance(prompt, str) else [str(text) for text in prompt]
        if chat:
            rows = [lm.tokenizer.chat_tokens([{"role": "user", "content": text}]) for text in texts]
        else:
            rows = lm.tokenizer.encode_batch(texts)
        return rows, isinstance(prompt, str)
    if chat:
        raise ValueError("chat=True takes text, not token ids")
    ids = [np.asarray(row) for row in (np.asarray(prompt) if isinstance(prompt, jax.Array) else prompt)]
    single = bool(ids) and all(row.ndim == 0 for row in ids)
    if single:
        ids = [np.asarray(prompt)]
    if not all(row.ndim == 1 and (row.size == 0 or np.issubdtype(row.dtype, np.integer)) for row in ids):
        raise DataError("a prompt must be text or whole-number token ids, [seq] or [batch, seq]")
    return [row.tolist() for row in ids], single


def generate(
    lm: LanguageModel,
    prompt: Prompt,
    *,
    max_new_tokens: int = 64,
    sampler: Sampler | None = None,
    seed: int | Sequence[int] = 0,
    stop: str | Sequence[str] = (),
    chat: bool = False,
    max_len: int | None = None,
    ignore_eos: bool = False,
    progress: bool = False,
) -> Generation | list[Generation]:
    """Continue a prompt, or several at once; the prompt is read dense, the answer decoded under the model's plan.

    A batch gives each prompt the tokens it would get alone (exactly so in float32; in bfloat16 near-ties may
    fall differently). Compiled functions are kept: new prompts, lengths, seeds and sparsities reuse them; a
    new sampler, batch size or cache size (a multiple of 256 tokens) compiles once more.

    Args:
      lm: the model.
      prompt: a text, a list of texts, or token ids int `[seq]` or `[batch, seq]` or a list of sequences.
      max_new_tokens: at most so many tokens, >= 1. A generation that reaches `max_len` or the model's last
        position ends there, with finish_reason `"length"`.
      sampler: `Greedy()` (also None) or `Sampling(...)`.
      seed: for `Sampling`; prompt i of a batch draws with `seed + i`, or with `seed[i]`.
      stop: a string, or strings, that end the text and are left out of it.
      chat: put each text into the model's chat template as the user's message.
      max_len: tokens that the kv_cache holds, prompt included; None: as many as needed.
      ignore_eos: go on past the end of the text, as benchmarks do.
      progress: draw a bar.

    Returns:
      A `Generation`; a list of them for a list of prompts.

    Raises:
      ContextError: a prompt leaves no room for a token. DataError: an empty prompt or unknown token ids.
    """
    rows, single = as_tokens(lm, prompt, chat)
    run = Run(
        lm,
        rows,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        seed=seed,
        stop=stop,
        ignore_eos=ignore_eos,
        max_len=max_len,
        continues=not chat,
    )
    done: dict[int, Generation] = {}
    with Bar(enabled=progress) as bar:
        bar.start("Generating", total=sum(row.budget for row in run.rows))
        for pieces in run.pieces():
            for i, piece in enumerate(pieces):
                if piece is None:
                    continue
                row = run.rows[i]
                bar.advance(
                    row.budget - piece.num_tokens + len(piece.tokens) if row.finish_reason else len(piece.tokens)
                )
                if piece.finish_reason is not None:
                    done[i] = Generation(
                        text=row.text,
                        tokens=tuple(row.tokens),
                        prompt_tokens=len(rows[i]),
                        finish_reason=piece.finish_reason,
                        compile_seconds=run.clock.compile_seconds,
                        prefill_seconds=run.clock.prefill_seconds,
                        decode_seconds=run.clock.decode_seconds,
                        tokens_per_second=run.tokens_per_second,
                    )
    return done[0] if single else [done[i] for i in range(len(rows))]


def stream_pieces(
    lm: LanguageModel,
    prompt: Prompt,
    *,
    max_new_tokens: int = 64,
    sampler: Sampler | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    chat: bool = False,
    max_len: int | None = None,
    ignore_eos: bool = False,
) -> Iterator[Piece]:
    """Continue one prompt, piece by piece: the first token at once, then a few at a time, with the speed so far.

    Arguments as in `generate`. Checked at once; the work is done as the pieces are asked for, so that two
    models can be streamed side by side.
    """
    rows, single = as_tokens(lm, prompt, chat)
    if not single:
        raise ValueError("a stream takes one prompt; use generate for several")
    run = Run(
        lm,
        rows,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        seed=seed,
        stop=stop,
        ignore_eos=ignore_eos,
        max_len=max_len,
        continues=not chat,
    )
    return (pieces[0] for pieces in run.pieces(STREAM_CHUNK) if pieces[0] is not None)


def stream(
    lm: LanguageModel,
    prompt: Prompt,
    *,
    max_new_tokens: int = 64,
    sampler: Sampler | None = None,
    seed: int = 0,
    stop: str | Sequence[str] = (),
    chat: bool = False,
    max_len: int | None = None,
    ignore_eos: bool = False,
) -> Iterator[str]:
    """Continue one prompt and yield its text as it comes: whole characters, never part of a stop string.

    Arguments as in `generate`, and joined the pieces are its text. `stream_pieces` also tells tokens and speed.
    """
    if lm.tokenizer is None:
        raise TealError("this model has no tokenizer, so it has no text", hint="use stream_pieces for tokens")
    pieces = stream_pieces(
        lm,
        prompt,
        max_new_tokens=max_new_tokens,
        sampler=sampler,
        seed=seed,
        stop=stop,
        chat=chat,
        max_len=max_len,
        ignore_eos=ignore_eos,
    )
    return (piece.text for piece in pieces if piece.text)
