"""A tiny model whose text does not run in circles, for the byte-level tokenizer."""

import dataclasses

import jax.numpy as jnp

from teal_jax.config import ModelConfig
from teal_jax.decode.tokenizer import Tokenizer
from teal_jax.model import LanguageModel
from teal_jax.nn.gates import Threshold
from tests.reference import tiny_model

CONFIG = ModelConfig(
    vocab_size=330,
    d_model=32,
    d_mlp=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=160,
    norm_eps=1e-5,
    bos_token_id=1,
    eos_token_ids=(2,),
)


def lively_model(config: ModelConfig, tokenizer: Tokenizer | None = None) -> LanguageModel:
    return dataclasses.replace(tiny_model(config, seed=3, scale=12.0), tokenizer=tokenizer)


def sparse(lm: LanguageModel, value: float = 0.3) -> LanguageModel:
    """Under equal thresholds, without a plan."""
    gates = Threshold(jnp.full((lm.config.num_layers, 7), value, jnp.float32))
    return dataclasses.replace(lm, params=lm.params | {"gates": gates})
