"""The token file: a header line of JSON, then the tokens as they are memory-mapped, then where the examples lie.

TEAL TOKENS {"version": 1, ...}     one line, padded with spaces to 1024 bytes
uint16 or uint32 [num_tokens]       documents one after another
int64 [num_examples, 2]             of prompt/answer pairs: where each begins, and where its answer does
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from teal_jax.errors import DataError

SUFFIX = ".tokens"
_MAGIC, _VERSION = b"TEAL TOKENS ", 1
_HEADER_BYTES = 1024
"""Room for the header, which is written when everything else is known."""

_FIELDS = {"dtype", "num_tokens", "num_examples", "tokenizer", "vocab_size", "source", "digest"}


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """Tokens on disk, mapped into memory: what is not read costs nothing.

    Attributes:
      tokens: uint16 or uint32 `[num_tokens]`.
      examples: int64 `[num_examples, 2]`, begin of each prompt and of its answer; None for running text.
      tokenizer: fingerprint of the tokenizer that made them.
      vocab_size: tokens that it knows.
      source: names of the files they were read from.
      digest: 16 hex digits over tokens and examples.
      path: where the file lies.
    """

    tokens: np.ndarray
    examples: np.ndarray | None
    tokenizer: str
    vocab_size: int
    source: str
    digest: str
    path: Path

    def check_tokenizer(self, fingerprint: str, name: str) -> None:
        """Raise `DataError` unless the tokens were made by the tokenizer with this fingerprint, `name`'s."""
        if fingerprint != self.tokenizer:
            raise DataError(
                f"{self.path} was made with another tokenizer: {self.tokenizer}, {name} has {fingerprint}",
                hint="make a token file with this model, from the text",
            )


def write_token_file(
    path: str | Path,
    documents: Iterable[tuple[np.ndarray, int | None]],
    *,
    tokenizer: str,
    vocab_size: int,
    source: str,
) -> Path:
    """Write documents as they come, so that they need not fit in memory; aside first, then renamed.

    Args:
      path: of the file; it must not exist.
      documents: tokens of each, and where in them the answer begins; None for running text.
      tokenizer: its fingerprint.
      vocab_size: of the tokenizer.
      source: what to call the text.

    Raises:
      DataError: the file exists, cannot be written, or there are no tokens.
    """
    path = Path(path)
    if path.exists():
        raise DataError(f"{path} exists", hint="choose another name")
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    aside = path.with_name(f"{path.name}.part")
    found, examples, count = hashlib.sha256(), [], 0
    try:
        with aside.open("wb") as file:
            file.seek(_HEADER_BYTES)
            for ids, answer in documents:
                if answer is not None:
                    examples.append((count, count + answer))
                data = np.asarray(ids).astype(dtype).tobytes()
                file.write(data)
                found.update(data)
                count += len(ids)
            if not count:
                raise DataError(f"{source} holds no tokens", hint="give more text")
            file.write(b"\0" * (-file.tell() % 8))
            table = np.array(examples, "<i8").tobytes()
            file.write(table)
            found.update(table)
            header = {
                "version": _VERSION,
                "dtype": dtype.name,
                "num_tokens": count,
                "num_examples": len(examples),
                "tokenizer": tokenizer,
                "vocab_size": vocab_size,
                "source": source[:400],
                "digest": found.hexdigest()[:16],
            }
            line = _MAGIC + json.dumps(header).encode()
            file.seek(0)
            file.write(line.ljust(_HEADER_BYTES - 1) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except OSError as error:
        raise DataError(
            f"cannot write {path}: {error.strerror}", hint="is the disk full or write-protected?"
        ) from error
    finally:
        aside.unlink(missing_ok=True)
    return path


def open_token_file(path: str | Path) -> TokenFile:
    """The tokens at `path`; raises `DataError` where there is no token file, or one cut short."""
    path = Path(path)
    header = _read_header(path)
    dtype, count, pairs = np.dtype(header["dtype"]).newbyteorder("<"), header["num_tokens"], header["num_examples"]
    table = -(-(_HEADER_BYTES + count * dtype.itemsize) // 8) * 8
    size = path.stat().st_size
    if size != table + 16 * pairs:
        raise DataError(f"{path} has {size} bytes, its header asks for {table + 16 * pairs}", hint="make it again")
    tokens = np.memmap(path, dtype, "r", _HEADER_BYTES, (count,))
    examples = np.memmap(path, "<i8", "r", table, (pairs, 2)) if pairs else None
    named = {name: header[name] for name in ("tokenizer", "vocab_size", "source", "digest")}
    return TokenFile(tokens=tokens, examples=examples, path=path, **named)


def _read_header(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            line = file.read(_HEADER_BYTES)
        header = json.loads(line.removeprefix(_MAGIC)) if line.startswith(_MAGIC) else None
    except FileNotFoundError as error:
        raise DataError(f"no token file at {path}") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}", hint="make it again") from error
    if not isinstance(header, dict) or not header.keys() >= _FIELDS:
        raise DataError(f"{path} is not a token file", hint="give text (.txt, .jsonl): it is made from that")
    if header.get("version") != _VERSION:
        raise DataError(f"{path} has format version {header.get('version')}; this teal_jax reads {_VERSION}")
    return header
