"""A model and tokens small enough that a training step compiles in seconds."""

import dataclasses
import functools

import jax
import numpy as np

from teal_jax.config import ModelConfig
from teal_jax.model import random_model
from teal_jax.training.settings import TrainSettings
from teal_jax.training.token_file import open_token_file, write_token_file

CONFIG = ModelConfig(
    vocab_size=64,
    d_model=16,
    d_mlp=24,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_position=32,
    norm_eps=1e-5,
)
SETTINGS = TrainSettings(steps=6, batch=8, seq_len=8, dtype="float32", warmup=2, learning_rate=1e-2)


@functools.cache
def model():
    """Random weights, large enough that a gate that drops channels is felt."""
    lm = random_model(CONFIG)
    weights = jax.tree.map(lambda leaf: 6 * leaf if leaf.ndim > 1 else leaf, lm.params["weights"])
    return dataclasses.replace(lm, params=lm.params | {"weights": weights})


def documents(count=8, length=40, seed=0):
    """Tokens whose next one is nearly certain, so that there is something to learn."""
    generator = np.random.default_rng(seed)
    return [(generator.integers(0, 64) + 3 * np.arange(length)) % 64 for _ in range(count)]


def token_file(path, rows=None, *, tokenizer="of a test", vocab_size=64):
    rows = [(row, None) for row in documents()] if rows is None else rows
    write_token_file(path, rows, tokenizer=tokenizer, vocab_size=vocab_size, source="test")
    return open_token_file(path)
