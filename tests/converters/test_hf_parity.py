"""The whole chain against transformers: checkpoint -> converter -> model gives its logits and its greedy tokens.

The numbers in golden.npz come from transformers in float32 (tests/fixtures/make_hf_fixtures.py).
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import teal_jax
from teal_jax.config import RopeConfig

MODELS = ("tiny_llama3", "tiny_mistral", "tiny_biases")


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, fixtures: Path) -> Path:
    return fixtures / request.param


@pytest.fixture(scope="module")
def golden(folder: Path) -> dict[str, np.ndarray]:
    return dict(np.load(folder / "golden.npz"))


@pytest.fixture(scope="module")
def lm(folder: Path):
    return teal_jax.load(str(folder), dtype="float32")


def greedy(lm, tokens: np.ndarray, new: int, *, split: int) -> np.ndarray:
    """Greedy continuation: prefill of `tokens[:, :split]` and then of the rest, and one token at a time."""
    prefill = jax.jit(lm.prefill, donate_argnums=2)
    decode_step = jax.jit(lm.decode_step, donate_argnums=2)
    cache = lm.init_cache(len(tokens), tokens.shape[1] + new)
    logits, cache = prefill(lm.params, jnp.asarray(tokens[:, :split]), cache)
    if split < tokens.shape[1]:
        logits, cache = prefill(lm.params, jnp.asarray(tokens[:, split:]), cache)
    picked = [jnp.argmax(logits, -1)]
    while len(picked) < new:
        logits, cache = decode_step(lm.params, picked[-1], cache)
        picked.append(jnp.argmax(logits, -1))
    return np.stack(picked, axis=1)


def test_logits(lm, golden):
    logits = np.asarray(lm.logits(golden["tokens"]))
    assert logits.dtype == np.float32
    assert np.abs(golden["logits"]).max() > 3  # else 1e-4 would say little
    assert np.abs(logits - golden["logits"]).max() <= 1e-4


@pytest.mark.parametrize("split", [48, 30])
def test_greedy_tokens(lm, golden, split: int):
    tokens = greedy(lm, golden["tokens"], golden["greedy"].shape[1], split=split)
    np.testing.assert_array_equal(tokens, golden["greedy"])


def test_decoding_from_the_first_token_on_gives_the_same_logits(lm, golden):
    tokens = jnp.asarray(golden["tokens"])
    decode_step = jax.jit(lm.decode_step, donate_argnums=2)
    cache = lm.init_cache(*tokens.shape)
    for position in range(tokens.shape[1]):
        logits, cache = decode_step(lm.params, tokens[:, position], cache)
        assert np.abs(np.asarray(logits) - golden["logits"][:, position]).max() <= 1e-4, position


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("tiny_llama3", {"rope": RopeConfig(theta=10000.0)}),
        ("tiny_llama3", {"norm_eps": 0.1}),
        ("tiny_mistral", {"sliding_window": None}),
        ("tiny_mistral", {"rope": RopeConfig(theta=10000.0)}),
        ("tiny_biases", {"rope": RopeConfig(theta=10000.0)}),
    ],
)
def test_the_fixtures_notice_what_they_are_there_for(fixtures: Path, name: str, wrong: dict):
    lm = teal_jax.load(str(fixtures / name), dtype="float32")
    golden = np.load(fixtures / name / "golden.npz")
    lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, **wrong))
    assert np.abs(np.asarray(lm.logits(golden["tokens"])) - golden["logits"]).max() > 0.1
