"""What a request asks of the model, as token rows: which tokens are inputs, which are scored, which stay dense."""

from collections.abc import Sequence
from typing import NamedTuple

from teal_jax.model import dense_prefix_length
from teal_jax.scoring import windows


class Row(NamedTuple):
    """One forward pass: `tokens[:-1]` are its inputs, `tokens[1:]` what they predict.

    Attributes:
      tokens: at most one more than the model has positions; at least 2.
      score: the first token whose log-probability counts, >= 1; all later ones count, too.
      dense: inputs before this one stay dense, those from it on pass the gates.
    """

    tokens: list[int]
    score: int
    dense: int


class Semantics(NamedTuple):
    """Which inputs of a scored row the gates act on.

    Attributes:
      sparse_prefill: False, as in decoding: the context is read dense, and each token of the continuation passes the
        gates to predict the next one, so that the first is predicted dense. True: the context passes them, too.
      dense_prefix: leading tokens that stay dense all the same, a share (float) or a count (int).
    """

    sparse_prefill: bool = False
    dense_prefix: float | int = 0

    def __str__(self) -> str:
        contexts = "sparse" if self.sparse_prefill else "dense"
        prefix = f", dense_prefix {self.dense_prefix}" if self.dense_prefix else ""
        return f"contexts {contexts}, continuations and running text sparse{prefix}; prompts dense, answers sparse"


def continuation_row(
    context: Sequence[int], continuation: Sequence[int], *, max_length: int, semantics: Semantics
) -> Row:
    """The row that scores `continuation` after `context` (>= 1 token each).

    The last token of a continuation is predicted, never read: `max_length + 1` tokens fit, the newest ones.
    """
    tokens = [*context, *continuation][-(max_length + 1) :]
    score = max(1, len(tokens) - len(continuation))
    dense = dense_prefix_length(semantics.dense_prefix, len(tokens) - 1)
    return Row(tokens, score, dense if semantics.sparse_prefill else max(dense, score))


def rolling_rows(tokens: Sequence[int], prefix: int, *, max_length: int, dense_prefix: float | int = 0) -> list[Row]:
    """The rows that score every token of a text once, every input through the gates.

    `prefix` (bos) predicts the first token, and is not put before a text that begins with it. The windows are the
    harness's, which are `teal_jax.scoring`'s strided ones with one token of context: each but the last predicts
    `max_length` tokens, the last has its context full.
    """
    stream = [*tokens] if list(tokens[:1]) == [prefix] else [prefix, *tokens]
    rows = []
    for start, score, stop in windows(len(stream), 1, max_length, "strided"):
        if stop > score:
            dense = dense_prefix_length(dense_prefix, stop - start - 1)
            rows.append(Row(stream[start:stop], score - start, dense))
    return rows


def padded_length(length: int) -> int:
    """`length` rounded up to 16, 24, 32, 48, 64, 96, ...: few shapes to compile, at most a third of them padding."""
    power = max(16, 1 << (length - 1).bit_length())
    return power * 3 // 4 if power > 16 and length <= power * 3 // 4 else power
