"""Every decode kernel becomes machine code for four GPUs, and the decode loop copies neither weights nor cache."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.attention import decode_attention
from pallas_kernels.gate_up import gate_up
from pallas_kernels.kept import Cut, kept_shapes
from pallas_kernels.largest import select_largest
from pallas_kernels.matvec import matvec
from pallas_kernels.norm import rms_norm_select
from pallas_kernels.tiles import COUNTERS, decode_tiles
from teal_jax.config import ModelConfig
from teal_jax.model import random_model
from teal_jax.nn.cache import init_cache
from teal_jax.nn.compensation import Biased
from teal_jax.nn.fused_step import fused_step
from teal_jax.nn.gates import Dense, Threshold, TopK
from tests.pallas_kernels import aot

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

# Llama-3-8B
D, D_MLP, HEADS, KV_HEADS, HEAD_DIM, SLOTS = 4096, 14336, 32, 8, 128, 2048


def tiles(batch, dense=False):
    return decode_tiles(D, D_MLP, HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, 128256, batch=batch, dense=dense)


WIDTH = tiles(1).width


@pytest.fixture(autouse=True)
def _compiler():
    if reason := aot.missing():
        pytest.skip(reason)


def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype)


def cut(*projections):
    return Cut(shape(32, 7, dtype=jnp.float32), shape(1, dtype=jnp.int32), projections)


def counters():
    return shape(COUNTERS, dtype=jnp.int32)


def kept(segments, d_in, batch):
    return kept_shapes(segments, d_in // WIDTH, batch, WIDTH)


def norm(batch, dtype):
    f = functools.partial(rms_norm_select, eps=1e-5, width=WIDTH)
    return f, (shape(batch, D, dtype=dtype), shape(D, dtype=dtype), cut(0, 1, 2)), ()


def qkv(batch, dtype):
    weights = tuple(shape(D, heads * HEAD_DIM, dtype=dtype) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return functools.partial(matvec, tile=tiles(batch).qkv), (kept(3, D, batch), weights, counters()), (2,)


def o(batch, dtype):
    def f(rows, weights, counters, h):
        return matvec(rows, weights, counters, tile=tiles(batch).o, residual=h)

    h = shape(batch, D, dtype=dtype)
    return f, (kept_shapes(1, KV_HEADS, batch, D // KV_HEADS), (shape(D, D, dtype=dtype),), counters(), h), (2,)


def attention(batch, dtype):
    f = functools.partial(decode_attention, num_heads=HEADS)
    angles = shape(batch, HEAD_DIM // 2, dtype=jnp.float32)
    cache = shape(batch, SLOTS, KV_HEADS, HEAD_DIM, dtype=dtype)
    x = shape(batch, (HEADS + 2 * KV_HEADS) * HEAD_DIM, dtype=dtype)
    args = (x, (angles, angles), shape(batch, dtype=jnp.int32), cache, cache, counters(), cut(3))
    return f, args, (3, 4, 5)


def gates(batch, dtype):
    weights = (shape(D, D_MLP, dtype=dtype),) * 2
    return functools.partial(gate_up, tile=tiles(batch).gate_up), (kept(2, D, batch), weights, counters(), cut(6)), (2,)


def largest(batch, dtype):
    counts = Cut(shape(32, 7, dtype=jnp.int32), shape(1, dtype=jnp.int32), (6,))
    return functools.partial(select_largest, width=WIDTH, int8=True), (shape(batch, D_MLP, dtype=dtype), counts), ()


def largest_of_blocks(batch, dtype):
    f, (x, counts), donate = largest(batch, dtype)
    return functools.partial(f, block=32), (x, counts), donate


def dense(batch, dtype):
    x, weight = shape(batch, D, dtype=dtype), shape(D, D, dtype=dtype)
    return functools.partial(matvec, tile=tiles(batch, dense=True).o), (x, (weight,), counters()), (2,)


KERNELS = (norm, qkv, attention, o, gates, dense, largest, largest_of_blocks)


def check(target, kernel, batch=1, dtype=jnp.bfloat16, *, spills=False):
    f, args, donate = kernel(batch, dtype)
    compiled = aot.compile_for(target, f, *args, donate=donate, spills=spills)
    assert aot.kernels(compiled) == 1
    assert not list(aot.copies(compiled, D * KV_HEADS * HEAD_DIM))  # the smallest weight
    in_place = jax.tree.leaves([args[i] for i in donate])
    assert aot.aliased_bytes(compiled) == sum(math.prod(a.shape) * a.dtype.itemsize for a in in_place)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("target", aot.TARGETS)
def test_every_gpu_one_token_without_spills_or_copies(target, kernel):
    check(target, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
def test_other_dtypes(kernel, dtype):
    check("h200", kernel, dtype=dtype, spills=True)


@pytest.mark.parametrize("kernel", KERNELS)
def test_several_tokens(kernel):
    check("h200", kernel, batch=3, spills=True)


def test_a_cache_that_is_not_donated_would_show():
    f, args, _ = attention(1, jnp.bfloat16)
    compiled = aot.compile_for("h200", f, *args)
    assert list(aot.copies(compiled, SLOTS * KV_HEADS * HEAD_DIM))
    assert aot.aliased_bytes(compiled) == 0


def test_a_transposed_weight_would_show():
    def f(x, weight, counters):
        return matvec(x, (weight.T,), counters, tile=tiles(1).o)

    args = (shape(1, D), shape(D, D), counters())
    assert list(aot.copies(aot.compile_for("h200", f, *args), D * D))


@pytest.mark.parametrize("kind", ["dense", "threshold", "scaled and biased", "top-k"])
def test_the_decode_loop_copies_neither_weights_nor_cache(kind):
    config = ModelConfig(
        vocab_size=32000,
        d_model=1024,
        d_mlp=2816,
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
        head_dim=HEAD_DIM,
        max_position=4096,
        norm_eps=1e-5,
    )
    weights = jax.eval_shape(lambda: random_model(config, dtype=jnp.bfloat16).params["weights"])
    cache = jax.eval_shape(lambda: init_cache(config, 1, 4096, jnp.bfloat16))
    thresholds = Threshold(shape(2, 7, dtype=jnp.float32))
    scale, bias = (
        tuple(tuple(shape(sizes[axis], dtype=jnp.float32) for sizes in config.projection_shapes) for _ in range(2))
        for axis in (0, 1)
    )
    scaled = Biased(dataclasses.replace(thresholds, scale=scale), bias)
    top_k = TopK(shape(2, 7, dtype=jnp.int32))
    gates = {"dense": Dense(), "threshold": thresholds, "scaled and biased": scaled, "top-k": top_k}[kind]

    def decode(weights, gates, token, cache):
        def step(_, carry):
            logits, cache = fused_step(config, weights, gates, *carry)
            return logits.argmax(-1).astype(jnp.int32), cache

        return jax.lax.fori_loop(0, 8, step, (token, cache))

    compiled = aot.compile_for("h200", decode, weights, gates, shape(1, dtype=jnp.int32), cache, donate=(3,))
    assert aot.kernels(compiled) == (11 if kind == "top-k" else 7) * 2 + 2
    layer_cache = math.prod(cache.keys[0].shape)
    assert not list(aot.copies(compiled, min(layer_cache, config.d_model * 2 * HEAD_DIM)))
    assert aot.aliased_bytes(compiled) >= 2 * 2 * layer_cache * 2  # keys and values of both layers, bfloat16
