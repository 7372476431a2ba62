"""A tiny model with a byte-level tokenizer and a chat template, lively enough that its text does not run in circles."""

import dataclasses

import jax
import jax.numpy as jnp

from teal_jax.config import ModelConfig
from teal_jax.decode.tokenizer import Tokenizer
from teal_jax.model import random_model
from teal_jax.nn.gates import Threshold
from tests.teal_jax.decode import tiny_tokenizers

CONFIG = ModelConfig(
    vocab_size=330,
    d_model=32,
    d_mlp=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position=96,
    norm_eps=1e-5,
    bos_token_id=1,
    eos_token_ids=(2,),
)


def tiny_speaker(directory, *, sparse=True, template=True):
    """The model; `sparse`: under thresholds of 0.3, without a plan."""
    lm = random_model(CONFIG, seed=3)
    weights = jax.tree.map(lambda w: w * 12 if w.ndim == 2 else w, lm.params["weights"])
    tokenizer = Tokenizer.from_directory(tiny_tokenizers.byte_level(directory, template=template), CONFIG)
    params = lm.params | {"weights": weights}
    if sparse:
        params["gates"] = Threshold(jnp.full((CONFIG.num_layers, 7), 0.3, jnp.float32))
    return dataclasses.replace(lm, params=params, tokenizer=tokenizer, name="tiny")
