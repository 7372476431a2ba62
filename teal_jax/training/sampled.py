"""Text that a model writes itself, as tokens: what a sparse copy of it learns from where its training text is gone."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from teal_jax.decode.generation import generate
from teal_jax.decode.sampling import Sampling
from teal_jax.errors import DataError, TrainingError
from teal_jax.model import LanguageModel
from teal_jax.progress import Bar
from teal_jax.training.token_file import TokenFile, open_token_file, write_token_file


def sample_tokens(
    lm: LanguageModel,
    path: str | Path,
    *,
    rows: int,
    length: int,
    batch: int = 1024,
    temperature: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> TokenFile:
    """Write the token file of `rows` texts sampled from `lm`, each `length` tokens from the begin token on.

    A text that ends is followed by what the model writes after its end, as in the packed text that it was trained on;
    rows of `length` tokens, as training reads them, begin with the begin token.

    Args:
      lm: the model; dense, or under its plan.
      path: of the token file; it must not exist.
      rows: texts, >= 1.
      length: tokens of each, >= 2, at most the model's positions.
      batch: texts written side by side: they share the reading of the weights.
      temperature: 1 is the model's own distribution.
      seed: text i draws with `seed + i`, whatever the batch.
      progress: draw a bar.

    Raises:
      TrainingError: no begin token. DataError: a length that the model cannot write, or a file that exists.
    """
    bos = lm.config.bos_token_id
    if bos is None:
        raise TrainingError(f"{lm.name} names no begin token to write from", hint="set bos_token_id in its config.json")
    if rows < 1 or batch < 1 or not 2 <= length <= lm.config.max_position:
        raise DataError(
            f"rows and batch must be >= 1, length lie in [2, {lm.config.max_position}], got {rows}, {batch}, {length}"
        )
    # Without a tokenizer no text is made, which would take longer than the tokens.
    bare = dataclasses.replace(lm, tokenizer=None)

    def texts(bar: Bar) -> Iterator[tuple[np.ndarray, None]]:
        for first in range(0, rows, batch):
            # The last batch is as large as the others, whose program it shares; what is too much is dropped.
            written = generate(
                bare,
                [[bos]] * min(batch, rows),
                max_new_tokens=length - 1,
                sampler=Sampling(temperature=temperature),
                seed=seed + first,
                ignore_eos=True,
            )
            assert isinstance(written, list)
            for one in written[: rows - first]:
                yield np.array([bos, *one.tokens]), None
            bar.advance(min(batch, rows - first))

    with Bar(enabled=progress) as bar:
        bar.start(f"Sampling from {lm.name}", rows)
        write_token_file(
            path,
            texts(bar),
            tokenizer=lm.tokenizer.fingerprint if lm.tokenizer else "none",
            vocab_size=lm.config.vocab_size,
            source=f"{rows} texts sampled from {lm.name}",
        )
    return open_token_file(path)
