"""Text to tokens and back: a thin adapter over the checkpoint's own tokenizer, and text that streams."""

import contextlib
import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from teal_jax.config import ModelConfig
from teal_jax.errors import DataError, ModelNotFoundError, TealError

VOCABULARIES = ("tokenizer.json", "*.model", "vocab.json", "tekken.json")
"""Any of these files makes a tokenizer."""

FILES = (
    *VOCABULARIES,
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
"""What `Tokenizer.save` copies."""

CONTEXT = 8
"""Tokens of text before a stream that decide how its first token reads."""

LONGEST_CHARACTER = 8
"""Tokens that a character may span before a stream takes it for broken: UTF-8 needs 4 bytes at most."""


class Tokenizer:
    """A tokenizer that needs no network. Made by `from_directory`.

    Attributes:
      bos_token_id: token put before a text, or None.
      eos_token_ids: any of them ends a generation: the tokenizer's and the config's.
    """

    def __init__(self, backend: Any, config: ModelConfig | None = None, directory: str | Path | None = None):
        """Adapt `backend`, a transformers tokenizer, loaded from `directory`."""
        self._backend = backend
        self._directory = None if directory is None else Path(directory)
        own_bos, own_eos = backend.bos_token_id, backend.eos_token_id
        self.bos_token_id: int | None = own_bos if own_bos is not None or config is None else config.bos_token_id
        ends = {*(config.eos_token_ids if config else ()), *(() if own_eos is None else (own_eos,))}
        self.eos_token_ids: tuple[int, ...] = tuple(sorted(ends))

    @classmethod
    def from_directory(cls, path: str | Path, config: ModelConfig | None = None) -> "Tokenizer":
        """The tokenizer whose files lie in the local directory `path`; nothing is fetched.

        Args:
          path: directory with tokenizer.json, or with tokenizer.model if sentencepiece is installed.
          config: supplies the bos and eos ids that the tokenizer itself does not name.

        Raises:
          ModelNotFoundError: no tokenizer files there. TealError: they cannot be read.
        """
        path = Path(path)
        if not _found(path):
            raise ModelNotFoundError(
                f"no tokenizer files in {path}",
                hint="expected tokenizer.json beside config.json; download it from the model's page",
            )
        try:
            with _quiet_import():
                from transformers import AutoTokenizer
            backend = AutoTokenizer.from_pretrained(str(path), local_files_only=True)
        except Exception as error:  # the library raises whatever its parsers raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise TealError(
                f"cannot read the tokenizer in {path}: {reason}", hint="download the tokenizer files again"
            ) from error
        return cls(backend, config, path)

    @property
    def vocab_size(self) -> int:
        """Tokens it knows, added ones included; the model's embedding may have more rows."""
        return len(self._backend)

    @property
    def fingerprint(self) -> str:
        """16 hex digits over its vocabulary and what begins and ends a text."""
        vocabulary = sorted(self._backend.get_vocab().items(), key=lambda item: item[1])
        text = json.dumps([vocabulary, self.bos_token_id, self.eos_token_ids])
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat_tokens` works."""
        return self.chat_template is not None

    @property
    def chat_template(self) -> Any:
        """The checkpoint's template, Jinja text (some have several, by name); None for a base model."""
        return self._backend.chat_template

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """The tokens of `text`, after exactly one bos if `bos` and the model has one.

        Raises:
          DataError: the text holds lone surrogates, that is, bytes that were not UTF-8.
        """
        return self.encode_batch([text], bos)[0]

    def encode_batch(self, texts: Sequence[str], bos: bool = True) -> list[list[int]]:
        """`encode` of each text, faster than one by one."""
        try:
            for text in texts:
                text.encode()
        except UnicodeEncodeError as error:
            raise DataError("the text is not valid UTF-8", hint="save it as UTF-8 and try again") from error
        batch = self._backend(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        if not bos or self.bos_token_id is None:
            return batch
        return [ids if ids[:1] == [self.bos_token_id] else [self.bos_token_id, *ids] for ids in batch]

    def byte_lengths(self, texts: Sequence[str]) -> list[np.ndarray]:
        """UTF-8 bytes of its text that each token of `encode_batch(texts)` adds, int64; bos adds none.

        Those of a text sum to its length. A character spread over several tokens counts at the first that ends it.

        Raises:
          TealError: a tokenizer that does not tell where its tokens lie.
        """
        if not self._backend.is_fast:
            raise TealError("this tokenizer does not tell where its tokens lie", hint="convert it to tokenizer.json")
        batch = self._backend(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        lengths = []
        for text, ids, spans in zip(texts, self.encode_batch(texts), batch["offset_mapping"], strict=True):
            character = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            width = 1 + (character >= 0x80) + (character >= 0x800) + (character >= 0x10000)
            read = np.concatenate([[0], np.cumsum(width, dtype=np.int64)])
            ends = read[[end for _, end in spans]] if spans else np.zeros(0, np.int64)
            ends = np.maximum.accumulate(np.concatenate([np.zeros(len(ids) - len(ends), np.int64), ends]))
            if len(ends):
                ends[-1] = read[-1]  # what a normaliser strips at the end belongs to the text, too
            lengths.append(np.diff(ends, prepend=0))
        return lengths

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens, spaces as the tokens have them."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def chat_tokens(self, messages: list[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """The tokens of a conversation under the model's chat template, which brings its own bos; see `chat_text`."""
        return self.encode(self.chat_text(messages, add_generation_prompt), bos=False)

    def chat_text(
        self,
        messages: list[dict[str, str]],
        add_generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
    ) -> str:
        """The text of a conversation under the model's chat template, special tokens included.

        Args:
          messages: `{"role": "system" | "user" | "assistant", "content": text}`, oldest first.
          add_generation_prompt: end with what starts the assistant's answer.
          continue_final_message: leave the last message open, to be continued; without a generation prompt only.

        Raises:
          TealError: the model has no template, or the template refuses the messages.
        """
        if not self.has_chat_template:
            raise TealError("this model has no chat template", hint="it is a base model: generate without chat")
        try:
            return self._backend.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
            )
        except Exception as error:  # jinja's errors, and any the template raises itself
            raise TealError(
                f"the chat template refused the conversation: {error}",
                hint="some models take no system message, or want user and assistant in turn",
            ) from error

    def save(self, directory: str | Path) -> None:
        """Copy the tokenizer's files into `directory` (made if missing), so that `from_directory` reads them there."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        if self._directory is None or not _found(self._directory):
            self._backend.save_pretrained(str(directory))
            return
        for source in sorted({file for pattern in FILES for file in self._directory.glob(pattern)}):
            target = directory / source.relative_to(self._directory)
            if source.is_file() and source.resolve() != target.resolve():
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(source, target)


class TextStream:
    """Text from tokens as they come: whole characters only, and as the tokens read after what came before.

    Args:
      tokenizer: decodes.
      context: tokens before the first (a prompt): the text then continues it, leading space included, where a
        sentencepiece tokenizer would strip it. Without context the text starts on its own.
    """

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._ids = [int(i) for i in context][-CONTEXT:]
        self._read = len(self._ids)  # tokens of _ids whose text is out
        # The context may start within a character, which is dropped, and end within one, which then waits.
        for waiting, dropped in sorted(itertools.product(range(4), range(4)), key=sum):
            text = tokenizer.decode(self._ids[dropped : len(self._ids) - waiting])
            if "\ufffd" not in text:
                self._ids = self._ids[dropped:]
                self._read = max(0, len(self._ids) - waiting)
                break

    def push(self, ids: Sequence[int]) -> str:
        """The text that `ids`, the next tokens, complete; the rest waits."""
        return "".join(self._step(int(token)) for token in ids)

    def flush(self) -> str:
        """The text of what still waits: broken characters as U+FFFD. Ends the stream."""
        return self._emit(self._tokenizer.decode(self._ids))

    def _step(self, token: int) -> str:
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if text.endswith("\ufffd") and len(self._ids) - self._read < LONGEST_CHARACTER:
            return ""
        return self._emit(text)

    def _emit(self, text: str) -> str:
        # Both texts start at the same token, so that what a decoder does to the first of them cancels out.
        before = self._tokenizer.decode(self._ids[: self._read])
        if len(text) <= len(before):
            return ""
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return text[len(before) :]


def _found(path: Path) -> bool:
    return any(file.is_file() for pattern in VOCABULARIES for file in path.glob(pattern))


@contextlib.contextmanager
def _quiet_import() -> Generator[None]:
    """Keep transformers from advising, as it is first imported, to install PyTorch."""
    name = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    if "transformers" in sys.modules or name in os.environ:
        yield
        return
    os.environ[name] = "1"
    try:
        yield
    finally:
        del os.environ[name]
