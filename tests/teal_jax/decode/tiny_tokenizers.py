"""Tokenizers small enough to build in a test, saved as a checkpoint would have them."""

import json
from pathlib import Path

from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.models import BPE

TEXT = [
    "Once upon a time there was a small dog. The dog ran up the hill and saw the sun.",
    "The cat sat on the mat, and the dog looked at the cat. They were good friends.",
] * 3

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] | trim }}</s>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

SPECIAL = ["<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]


def byte_level(directory: Path, *, template: bool = True) -> Path:
    """A Llama-3-like tokenizer: byte-level BPE, no unknown token needed, a chat template."""
    raw = RawTokenizer(BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator(TEXT, trainer)
    return _save(raw, directory, template)


def byte_fallback(directory: Path, *, template: bool = False) -> Path:
    """A Llama-2-like tokenizer: sentencepiece's spaces, and <0xE4> for what the vocabulary lacks."""
    letters = [*sorted({c for text in TEXT for c in text} - {" "}), "\u2581"]
    tokens = SPECIAL[:3] + [f"<0x{b:02X}>" for b in range(256)] + letters + ["th", "the", "\u2581the"]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the")]
    raw = RawTokenizer(
        BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return _save(raw, directory, template)


def _save(raw: RawTokenizer, directory: Path, template: bool) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    raw.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    if template:
        config["chat_template"] = CHAT_TEMPLATE
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
