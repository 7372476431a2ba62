"""The embedded model is what its card says: small, GQA, bfloat16, fluent, with texts of its own."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

import converters
from teal_jax import embedded
from teal_jax.config import ModelConfig
from teal_jax.decode.tokenizer import Tokenizer
from teal_jax.model import LanguageModel
from teal_jax.nn.gates import Dense

HF_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return converters.read_config(embedded.path())


@pytest.fixture(scope="module")
def model(config) -> LanguageModel:
    params = {"weights": converters.read_params(embedded.path(), config, dtype="float32"), "gates": Dense()}
    tokenizer = Tokenizer.from_directory(embedded.path(), config)
    return LanguageModel(config=config, params=params, tokenizer=tokenizer, plan=None, name="embedded")


def stories(path: Path) -> list[str]:
    return [story.strip("\n") for story in path.read_text(encoding="utf-8").split("<|endoftext|>")]


def bits_per_byte(model: LanguageModel, texts: list[str], batch: int = 10) -> float:
    """Each story alone after BOS, every token of it scored."""
    rows = sorted(model.tokenizer.encode_batch(texts), key=len)
    width, nats = len(rows[-1]), 0.0
    assert width <= model.config.max_position
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        tokens = np.zeros((len(part), width), np.int32)
        scored = np.zeros((len(part), width - 1), bool)
        for i, ids in enumerate(part):
            tokens[i, : len(ids)] = ids
            scored[i, : len(ids) - 1] = True
        logits = np.asarray(model.logits(tokens), np.float64)[:, :-1]
        logp = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        nats -= np.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0][scored].sum()
    return nats / math.log(2) / sum(len(text.encode()) for text in texts)


def test_files_are_there_and_fit():
    for name in (*HF_FILES, "README.md"):
        assert (embedded.path() / name).is_file(), name
    size = sum(file.stat().st_size for file in embedded.path().iterdir() if file.is_file())
    assert size <= 16_000_000


def test_model_is_a_llama_with_gqa_in_bfloat16(config):
    assert config.model_type == "llama"
    assert config.num_params >= 3_000_000
    assert config.num_kv_heads < config.num_heads
    assert config.d_model > 64 * config.num_layers  # width before depth
    weights = converters.read_params(embedded.path(), config)
    assert weights["embed"]["weight"].dtype == "bfloat16"


def test_config_and_tokenizer_agree(config):
    tokenizer = Tokenizer.from_directory(embedded.path(), config)
    assert tokenizer.vocab_size == config.vocab_size
    assert tokenizer.bos_token_id == config.bos_token_id
    assert tokenizer.eos_token_ids == config.eos_token_ids
    generation = json.loads((embedded.path() / "generation_config.json").read_text())
    assert generation["eos_token_id"] in config.eos_token_ids


@pytest.mark.parametrize(
    "text",
    [
        "Once upon a time",
        " two  spaces\n\n\ttab ",
        "naïve café — “quotes” 漢字 🙂👩‍👩‍👧",
        "\x00\x7f\r\n",
        "".join(map(chr, range(0x3000))),
    ],
    ids=["plain", "spaces", "unicode", "controls", "many"],
)
def test_tokenizer_round_trips(config, text):
    from tokenizers import Tokenizer as Raw

    raw = Raw.from_file(str(embedded.path() / "tokenizer.json"))
    ids = raw.encode(text).ids
    assert ids[0] == config.bos_token_id
    assert raw.decode(ids) == text
    ours = Tokenizer.from_directory(embedded.path(), config)
    assert ours.encode(text) == ids
    assert ours.decode(ids) == text


def test_texts_share_no_story():
    calibration, heldout = stories(embedded.CALIBRATION_TEXT), stories(embedded.HELDOUT_TEXT)
    assert len(calibration) > 200
    assert len(heldout) > 100
    assert all(story.strip() for story in calibration + heldout)
    assert len({*calibration, *heldout}) == len(calibration) + len(heldout)


def test_heldout_text_is_no_worse_than_what_was_measured(model):
    texts = [story for story in stories(embedded.HELDOUT_TEXT) if len(story) < 1200][:20]
    assert bits_per_byte(model, texts) < 0.75


def test_bits_per_byte_on_real_stories(model, shared):
    lines = (shared / "data" / "text" / "tinystories_test.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [story for story in map(json.loads, lines[:60]) if len(story) < 1200][:40]
    assert bits_per_byte(model, texts) <= 0.62


def test_says_when_a_story_ends(model):
    eos, before, at_end = model.config.eos_token_ids[0], [], []
    rows = [model.tokenizer.encode(story)[: model.config.max_position] for story in stories(embedded.HELDOUT_TEXT)[:12]]
    tokens = np.zeros((len(rows), max(map(len, rows))), np.int32)  # one program for all lengths
    for padded, row in zip(tokens, rows, strict=True):
        padded[: len(row)] = row
    for logits, row in zip(model.logits(tokens), rows, strict=True):
        logits = np.asarray(logits[: len(row)], np.float64)
        share = np.exp(logits[:, eos]) / np.exp(logits).sum(axis=-1)
        before.append(share[:-1].mean())
        at_end.append(share[-1])
    assert np.mean(before) < 0.02
    assert np.mean(at_end) > 0.3
