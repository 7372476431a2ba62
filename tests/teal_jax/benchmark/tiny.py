"""A model small enough for a CPU, and stand-ins for what only a GPU has."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.tiles import DecodeTiles, Tile
from teal_jax.config import ModelConfig
from teal_jax.model import random_model
from teal_jax.nn import fused_step

CONFIG = ModelConfig(
    vocab_size=96,
    d_model=64,
    d_mlp=160,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=128,
    norm_eps=1e-5,
)

_TILE = Tile(32, 1, 1, 1)
TILES = DecodeTiles(width=32, qkv=_TILE, o=_TILE, gate_up=_TILE, down=_TILE, lm_head=_TILE)


@functools.cache
def model():
    return random_model(CONFIG, dtype=jnp.float32)


def counting_step(params, token, cache):
    return fused_step.counting_step(CONFIG, params["weights"], params["gates"], token, cache, TILES, interpret=True)


def fake_timer(call, iterations):
    """As if every run had launched two kernels."""
    jax.block_until_ready([call() for _ in range(1 + iterations)])
    return [[("kept_matvec", 2e-3), ("copy", 1e-3)]] * iterations
