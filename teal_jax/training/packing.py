"""From text to a token file: documents with an end token between them, or prompts with their answers."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from teal_jax.data import read_documents
from teal_jax.decode.tokenizer import Tokenizer
from teal_jax.errors import DataError
from teal_jax.model import LanguageModel
from teal_jax.training.token_file import TokenFile, open_token_file, write_token_file

_AT_ONCE = 256
"""Documents that the tokenizer gets in one call."""


def pack(lm: LanguageModel, sources: Sequence[str | Path], path: str | Path) -> TokenFile:
    """Write the token file of `sources` by `lm`'s tokenizer, and open it.

    Args:
      lm: brings tokenizer, bos and eos.
      sources: .txt or .jsonl files of documents; or .jsonl files whose lines are objects with "prompt" and "answer".
      path: of the token file; it must not exist.

    Raises:
      DataError: no tokenizer, no end token, a source that cannot be read or is empty, pairs and text together.
    """
    if lm.tokenizer is None:
        raise DataError(f"{lm.name} has no tokenizer", hint="give a token file made with its tokenizer")
    files = [Path(source) for source in sources]
    if not files:
        raise DataError("no training data", hint="--data FILE, .txt or .jsonl")
    pairs = [is_pairs(file) for file in files]
    if any(pairs) and not all(pairs):
        raise DataError(
            f"{files[pairs.index(True)]} holds prompts and answers, {files[pairs.index(False)]} text",
            hint="train on one kind at a time",
        )
    end = end_token(lm)
    read = _answers if pairs[0] else _texts
    write_token_file(
        path,
        (document for file in files for document in read(file, lm.tokenizer, end)),
        tokenizer=lm.tokenizer.fingerprint,
        vocab_size=max(lm.tokenizer.vocab_size, lm.config.vocab_size),
        source=", ".join(dict.fromkeys(file.name for file in files)),
    )
    return open_token_file(path)


def end_token(lm: LanguageModel) -> int:
    """The token after a document: the config's first end token, else the tokenizer's; raises `DataError` without."""
    ids = lm.config.eos_token_ids or (lm.tokenizer.eos_token_ids if lm.tokenizer else ())
    if not ids:
        raise DataError(f"{lm.name} names no end token", hint="set eos_token_id in its config.json")
    return ids[0]


def is_pairs(path: Path) -> bool:
    """Whether the first line of a .jsonl file is an object with "prompt" and "answer"."""
    if path.suffix != ".jsonl":
        return False
    try:
        with path.open(encoding="utf-8") as file:
            value = json.loads(next((line for line in file if line.strip()), "null"))
    except (OSError, ValueError):
        return False  # said by whoever reads it as text
    return isinstance(value, dict) and {"prompt", "answer"} <= value.keys()


def _texts(path: Path, tokenizer: Tokenizer, end: int) -> Iterator[tuple[np.ndarray, None]]:
    documents = read_documents(path).texts
    # Where one token is both begin and end, the next document's begin ends this one.
    after = [] if tokenizer.bos_token_id == end else [end]
    for start in range(0, len(documents), _AT_ONCE):
        for ids in tokenizer.encode_batch(documents[start : start + _AT_ONCE]):
            yield np.array([*ids, *after]), None
    if not after:
        yield np.array([end]), None


def _answers(path: Path, tokenizer: Tokenizer, end: int) -> Iterator[tuple[np.ndarray, int]]:
    with path.open(encoding="utf-8") as file:
        lines = [(f"{path}:{number}", line) for number, line in enumerate(file, 1) if line.strip()]
    for start in range(0, len(lines), _AT_ONCE):
        values = [_pair(line, place) for place, line in lines[start : start + _AT_ONCE]]
        prompts = tokenizer.encode_batch([prompt for prompt, _ in values])
        wholes = tokenizer.encode_batch([prompt + answer for prompt, answer in values])
        for prompt, whole in zip(prompts, wholes, strict=True):
            # A token may span the border: the answer then begins with it.
            same = (a == b for a, b in zip(prompt, whole, strict=False))
            begin = next((i for i, equal in enumerate(same) if not equal), min(len(prompt), len(whole)))
            yield np.array([*whole, end]), begin


def _pair(line: str, place: str) -> tuple[str, str]:
    try:
        value: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place} is not JSON: {error}") from error
    prompt, answer = (value.get("prompt"), value.get("answer")) if isinstance(value, dict) else (None, None)
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise DataError(f'{place}: expected an object with "prompt" and "answer", got {line.strip()[:60]}')
    return prompt, answer
