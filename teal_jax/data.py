"""Text and tokens for calibration and evaluation: read, tokenise, cut."""

import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from teal_jax.errors import DataError
from teal_jax.model import LanguageModel


class Documents(NamedTuple):
    """Texts, none empty, and a short name for where they came from."""

    texts: list[str]
    source: str


type TextSource = str | Path | Sequence[str | Path] | Documents | np.ndarray
"""Text; path(s) of .txt or .jsonl (a `Path`, or a string with that ending); or int tokens `[rows, seq]`.

For scoring also `[seq]`, one stream.
"""

DOCUMENT_SEPARATOR = "<|endoftext|>"
"""Separates documents within a .txt file."""

_SUFFIXES = (".txt", ".jsonl")


class Rows(NamedTuple):
    """Calibration tokens int32 `[rows, seq]`, and what they were read from."""

    tokens: np.ndarray
    source: str


def read_documents(source: str | Path | Sequence[str | Path] | Documents) -> Documents:
    """The documents of a text source.

    A .jsonl line is a JSON string, or an object whose `"text"` is one.

    Raises:
      DataError: a missing file, another ending, bytes that are not UTF-8, a line that is not JSON, no text.
    """
    if isinstance(source, Documents):
        return source
    if isinstance(source, (str, Path)):
        source = [source]
    documents, names = [], []
    for item in source:
        if isinstance(item, Path) or (item.endswith(_SUFFIXES) and "\n" not in item):
            documents += _read_file(Path(item))
            names.append(Path(item).name)
        else:
            documents.append(item)
            names.append("text")
    documents = [document for document in documents if document.strip()]
    name = ", ".join(dict.fromkeys(names)) or "text"
    if not documents:
        raise DataError(f"{name} holds no text", hint="give at least a few hundred words")
    return Documents(documents, name)


def _read_file(path: Path) -> list[str]:
    if path.suffix not in _SUFFIXES:
        raise DataError(f"{path}: expected a .txt or .jsonl file", hint="convert it, or pass the text itself")
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError as error:
        raise DataError(f"no text file at {path}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}",
            hint="convert it, for example: iconv -f latin1 -t utf-8",
        ) from error
    if path.suffix == ".txt":
        return [document.strip("\n") for document in text.split(DOCUMENT_SEPARATOR)]
    return [_json_line(line, f"{path}:{number}") for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _json_line(line: str, place: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON: {error}") from error
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise DataError(f'{place}: expected a string or an object with "text", got {line[:60]}')
    return text


def tokenize(lm: LanguageModel, documents: Iterable[str]) -> list[np.ndarray]:
    """Tokens of each document, int32, each beginning with the model's BOS where it has one."""
    if lm.tokenizer is None:
        raise DataError(f"{lm.name} has no tokenizer", hint="pass tokens instead of text")
    return [np.array(ids, np.int32) for ids in lm.tokenizer.encode_batch(list(documents))]


def check_tokens(tokens: np.ndarray, vocab_size: int) -> np.ndarray:
    """`tokens` as int32; raises `DataError` unless they are integers `[rows, seq]` inside the vocabulary."""
    tokens = np.asarray(tokens)
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise DataError(f"tokens must be integers [rows, seq], got {tokens.dtype} {list(tokens.shape)}")
    if tokens.size == 0:
        raise DataError("tokens are empty")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise DataError(
            f"tokens must lie in [0, {vocab_size}), got {tokens.min()} to {tokens.max()}",
            hint="were they made with another tokenizer?",
        )
    return tokens.astype(np.int32)


def calibration_rows(lm: LanguageModel, data: TextSource, *, num_tokens: int, seq_len: int | None, seed: int) -> Rows:
    """Rows of `seq_len` tokens for calibration, each beginning with BOS where the model has one.

    Documents are drawn in an order set by `seed` and laid end to end; the stream is cut into rows, of which
    `num_tokens // seq_len` are used, again drawn by `seed`. An int array is taken as it is.
    """
    if isinstance(data, np.ndarray) or hasattr(data, "__array__"):
        return Rows(check_tokens(np.asarray(data), lm.config.vocab_size), "tokens")
    limit = lm.config.max_position
    seq_len = min(2048, limit) if seq_len is None else seq_len
    if not 2 <= seq_len <= limit:
        raise DataError(f"seq_len must lie in [2, {limit}] for {lm.name}, got {seq_len}")
    if num_tokens < seq_len:
        raise DataError(f"num_tokens must be at least one row of {seq_len}, got {num_tokens}", hint="lower seq_len")
    documents, source = read_documents(data)
    generator = np.random.default_rng(seed)
    bos = lm.config.bos_token_id
    width = seq_len if bos is None else seq_len - 1
    stream = _draw_tokens(lm, documents, num_tokens, generator)
    available = len(stream) // width
    if not available:
        raise DataError(
            f"calibration text is too short: {source} gives {len(stream)} tokens, one row needs {width}",
            hint=f"give more text, or a seq_len of at most {max(len(stream), 2)}",
        )
    wanted = num_tokens // seq_len
    if available < wanted:
        message = f"{source} gives {available * seq_len} calibration tokens of the {num_tokens} asked for"
        warnings.warn(message, stacklevel=3)
    rows = stream[: available * width].reshape(available, width)
    rows = rows[np.sort(generator.permutation(available)[:wanted])]
    if bos is not None:
        rows = np.concatenate([np.full((len(rows), 1), bos, np.int32), rows], axis=1)
    return Rows(rows, source)


def _draw_tokens(
    lm: LanguageModel, documents: list[str], num_tokens: int, generator: np.random.Generator
) -> np.ndarray:
    order = generator.permutation(len(documents))
    parts, count, group = [], 0, 64
    for start in range(0, len(order), group):
        for ids in tokenize(lm, [documents[i] for i in order[start : start + group]]):
            parts.append(ids)
            count += len(ids)
        if count >= 2 * num_tokens:
            break
    return np.concatenate(parts)


def evaluation_streams(lm: LanguageModel, data: TextSource) -> tuple[list[np.ndarray], str]:
    """Token streams to score, and the source's name: all documents end to end, or each row of an int array alone."""
    if isinstance(data, np.ndarray) or hasattr(data, "__array__"):
        return list(check_tokens(np.atleast_2d(np.asarray(data)), lm.config.vocab_size)), "tokens"
    documents, source = read_documents(data)
    return [np.concatenate(tokenize(lm, documents))], source
