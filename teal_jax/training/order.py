"""Which rows a step reads: a pure function of the seed and the step, so that a resumed run needs no other state."""

import functools

import numpy as np

from teal_jax.errors import DataError, TrainingError
from teal_jax.training.settings import TrainSettings
from teal_jax.training.token_file import TokenFile

_LOOKED_AT = 1 << 20


def num_rows(tokens: TokenFile, seq_len: int) -> int:
    """Rows of an epoch: windows of `seq_len` tokens and the one after, or one a prompt/answer pair.

    Raises:
      DataError: not one row.
    """
    rows = (len(tokens.tokens) - 1) // seq_len if tokens.examples is None else len(tokens.examples)
    if rows < 1:
        raise DataError(
            f"{tokens.path} has {len(tokens.tokens)} tokens, one row needs {seq_len + 1}",
            hint="give more text, or shorter rows",
        )
    return rows


def row_numbers(step: int, batch: int, rows: int, seed: int) -> np.ndarray:
    """The rows of a step, int64 `[batch]`: every epoch reads each row once, in an order of its own."""
    positions = np.arange(step * batch, (step + 1) * batch)
    return np.array(
        [_permutation(seed, int(epoch), rows)[i] for epoch, i in zip(*divmod(positions, rows), strict=True)]
    )


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, rows: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(rows)


def batch_of(tokens: TokenFile, settings: TrainSettings, step: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a step, int32 `[batch, seq_len + 1]`, and what of them is scored, bool `[batch, seq_len]`.

    Column j of the second says whether token j + 1 counts. Of running text all do; of a pair the answer and its end,
    and what lies beyond `seq_len + 1` is cut off. A pair is alone in its row, so that it sees no other.
    """
    width = settings.seq_len + 1
    numbers = row_numbers(step, settings.batch, num_rows(tokens, settings.seq_len), settings.seed)
    if tokens.examples is None:
        starts = numbers * settings.seq_len
        rows = np.stack([tokens.tokens[start : start + width] for start in starts]).astype(np.int32)
        return rows, np.ones((settings.batch, settings.seq_len), bool)
    rows = np.zeros((settings.batch, width), np.int32)
    scored = np.zeros((settings.batch, width), bool)
    for i, number in enumerate(numbers):
        begin, answer = tokens.examples[number]
        end = tokens.examples[number + 1, 0] if number + 1 < len(tokens.examples) else len(tokens.tokens)
        ids = tokens.tokens[begin : min(end, begin + width)]
        rows[i, : len(ids)] = ids
        scored[i, max(1, answer - begin) : len(ids)] = True
    return rows, scored[:, 1:]


def check_answers(tokens: TokenFile, seq_len: int) -> None:
    """Raise `TrainingError` where not one answer begins within a row."""
    if tokens.examples is not None and not (np.diff(tokens.examples, axis=1) <= seq_len).any():
        raise TrainingError(
            f"no answer of {tokens.path} begins within the first {seq_len} tokens of its row", hint="longer rows"
        )


def check_vocabulary(tokens: TokenFile, vocab_size: int) -> None:
    """Raise `DataError` where the first million tokens hold one outside `[0, vocab_size)`."""
    largest = int(tokens.tokens[:_LOOKED_AT].max())
    if largest >= vocab_size:
        raise DataError(
            f"{tokens.path} holds token {largest}, the model knows {vocab_size}",
            hint="make a token file with this model's tokenizer",
        )
