"""The rows that every analysis scores: a prompt, and the tokens after it; none of them seen by the calibration."""

import dataclasses

import numpy as np

from teal_jax.data import TextSource, evaluation_streams
from teal_jax.errors import DataError
from teal_jax.evaluation.overlap import refuse_overlap
from teal_jax.model import LanguageModel


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Evaluation tokens.

    Attributes:
      tokens: int32 `[rows, seq]`, each row beginning with BOS where the model has one.
      prompt: leading tokens of a row that are not scored, in [1, seq).
      source: what they were read from.
    """

    tokens: np.ndarray
    prompt: int
    source: str

    @property
    def after_prompt(self) -> np.ndarray:
        """Bool `[seq]`: the positions that decoding would thin, and whose tokens are scored."""
        return np.arange(self.tokens.shape[1]) >= self.prompt

    @property
    def num_scored(self) -> int:
        """Tokens scored."""
        return len(self.tokens) * (self.tokens.shape[1] - self.prompt)


def evaluation_rows(
    lm: LanguageModel,
    data: TextSource,
    *,
    num_tokens: int,
    seq_len: int,
    prompt: int | None = None,
    multiple: int = 1,
    seed: int = 0,
    unseen_by: np.ndarray | None = None,
) -> Rows:
    """Rows of `data`, drawn without repeats.

    Args:
      lm: whose tokenizer and BOS are taken.
      data: text, path(s) of .txt or .jsonl, or tokens int `[rows, seq]`, taken as they are.
      num_tokens: of all rows together, prompts included.
      seq_len: tokens a row, >= 2.
      prompt: tokens of a row that are only read; None: a half.
      multiple: the number of rows is a multiple of this, the last ones being left out.
      seed: which rows, in which order, so that neighbours are not of one story.
      unseen_by: calibration tokens `[rows, seq]` that must not occur in `data`.

    Raises:
      DataError: too little text, or it overlaps with the calibration rows.
      ValueError: a prompt that leaves nothing to score.
    """
    streams, source = evaluation_streams(lm, data)
    if unseen_by is not None:
        refuse_overlap(streams, unseen_by, source)
    if isinstance(data, np.ndarray):
        tokens = np.stack(streams)
    else:
        tokens = _cut(lm, streams[0], source, seq_len, num_tokens, seed)
    if len(tokens) < multiple:
        raise DataError(
            f"{source}: expected at least {multiple} rows of {tokens.shape[1]} tokens, got {len(tokens)}",
            hint="raise --tokens, lower --seq-len, or give more text",
        )
    tokens = tokens[: len(tokens) // multiple * multiple]
    prompt = tokens.shape[1] // 2 if prompt is None else prompt
    if not 1 <= prompt < tokens.shape[1]:
        raise ValueError(f"prompt must lie in [1, {tokens.shape[1]}), the length of a row, got {prompt}")
    return Rows(tokens, prompt, source)


def _cut(lm: LanguageModel, stream: np.ndarray, source: str, seq_len: int, num_tokens: int, seed: int) -> np.ndarray:
    if not 2 <= seq_len <= lm.config.max_position:
        raise DataError(f"seq_len must lie in [2, {lm.config.max_position}] for {lm.name}, got {seq_len}")
    bos = lm.config.bos_token_id
    width = seq_len if bos is None else seq_len - 1
    available = len(stream) // width
    if not available or num_tokens < seq_len:
        raise DataError(
            f"expected at least one row of {seq_len} tokens, got {len(stream)} in {source}, {num_tokens} asked for",
            hint="give more text, or lower --seq-len",
        )
    rows = stream[: available * width].reshape(available, width)
    rows = rows[np.random.default_rng(seed).permutation(available)[: num_tokens // seq_len]]
    return rows if bos is None else np.concatenate([np.full((len(rows), 1), bos, np.int32), rows], axis=1)
