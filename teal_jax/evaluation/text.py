"""The text that is scored: its windows, the units that a bootstrap resamples, and its bytes."""

import dataclasses
import hashlib
from typing import Any

import numpy as np

from teal_jax.data import TextSource, check_tokens, read_documents, tokenize
from teal_jax.errors import TealError
from teal_jax.model import LanguageModel
from teal_jax.scoring import Layout, lay_windows


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationText:
    """Tokens to score, the same ones for every method.

    Attributes:
      layout: windows over the token streams.
      source: where the text is from.
      starts: per stream, where its documents begin, int64.
      documents, windows: which of them each scored token is of, int64 `[tokens]`, numbered from 0.
      num_bytes: UTF-8 bytes that each scored token adds, int64 `[tokens]`; None where the tokenizer cannot tell.
      wanted: the most tokens that were to be scored; None: all.
    """

    layout: Layout
    source: str
    starts: list[np.ndarray]
    documents: np.ndarray
    windows: np.ndarray
    num_bytes: np.ndarray | None
    wanted: int | None

    @property
    def num_tokens(self) -> int:
        """Tokens scored."""
        return len(self.windows)

    @property
    def digest(self) -> str:
        """16 hex digits over the tokens, what is scored of them, and what stays dense."""
        laid = (self.layout.pieces, self.layout.dense_prefix, self.layout.sparse_prefill)
        found = hashlib.sha256(repr(laid).encode())
        for stream in self.layout.streams:
            found.update(np.ascontiguousarray(stream, np.int32).tobytes())
        return found.hexdigest()[:16]

    def units(self, enough: int) -> tuple[np.ndarray, str]:
        """The unit of each scored token, numbered from 0, and what a unit is.

        Documents, where there are `enough` of them to resample; else windows, which are not quite independent.
        """
        if self.documents.max() + 1 >= enough:
            return self.documents, "document"
        return self.windows, "window"


def read_text(lm: LanguageModel, data: TextSource, **layout: Any) -> EvaluationText:
    """`data` laid out for scoring; `layout` and errors as in `teal_jax.scoring.lay_windows`."""
    if isinstance(data, np.ndarray) or hasattr(data, "__array__"):
        streams = list(check_tokens(np.atleast_2d(np.asarray(data)), lm.config.vocab_size))
        source, starts, lengths = "tokens", [np.zeros(1, np.int64) for _ in streams], None
    else:
        documents, source = read_documents(data)
        pieces = tokenize(lm, documents)
        streams = [np.concatenate(pieces)]
        starts = [np.cumsum([0, *map(len, pieces[:-1])], dtype=np.int64)]
        lengths = _byte_lengths(lm, documents)
    laid = lay_windows(lm.config, streams, source, **layout)
    before = np.cumsum([0, *map(len, starts)])
    documents_of, windows_of, bytes_of = [], [], []
    for i, (stream, piece) in enumerate(laid.pieces):
        scored = np.arange(piece.score, piece.stop)
        documents_of.append(before[stream] + np.searchsorted(starts[stream], scored, side="right") - 1)
        windows_of.append(np.full(len(scored), i))
        if lengths is not None:
            bytes_of.append(lengths[scored])
    return EvaluationText(
        layout=laid,
        source=source,
        starts=starts,
        documents=np.unique(np.concatenate(documents_of), return_inverse=True)[1],
        windows=np.concatenate(windows_of),
        num_bytes=np.concatenate(bytes_of) if bytes_of else None,
        wanted=layout.get("max_tokens"),
    )


def _byte_lengths(lm: LanguageModel, documents: list[str]) -> np.ndarray | None:
    assert lm.tokenizer is not None  # tokenize has been asked
    try:
        return np.concatenate(lm.tokenizer.byte_lengths(documents))
    except TealError:
        return None
