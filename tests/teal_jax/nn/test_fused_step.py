"""The fused decode step, in interpret mode, against the plain decoder."""

import dataclasses
import functools
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import teal_jax
from pallas_kernels.tiles import DecodeTiles, Tile
from teal_jax.config import ModelConfig, RopeConfig
from teal_jax.model import model_functions
from teal_jax.nn.cache import KVCache
from teal_jax.nn.compensation import Biased
from teal_jax.nn.fused_step import bits_in, choose_tiles, counting_step, fused_step
from teal_jax.nn.gates import Dense, ModelGates, Threshold, TopK
from teal_jax.nn.implementation import use_fused_step
from teal_jax.nn.int8 import Int8
from teal_jax.nn.straight_through import StraightThrough

ROOT = Path(__file__).resolve().parents[3]

TINY = ModelConfig(
    vocab_size=50,
    d_model=64,
    d_mlp=72,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position=64,
    norm_eps=1e-5,
    rope=RopeConfig(theta=1000.0),
)
BIASED = dataclasses.replace(TINY, attention_bias=True, mlp_bias=True, tie_embeddings=True)
SHALLOW = dataclasses.replace(TINY, num_layers=1)
THREE = dataclasses.replace(TINY, num_heads=6)  # a list of 48 channels, filled up to 64
RELU2 = dataclasses.replace(THREE, hidden_act="relu2", num_layers=1)
WINDOWED = dataclasses.replace(BIASED, sliding_window=6)


def tile(columns: int, splits: int) -> Tile:
    return Tile(columns, splits, unroll=2, warps=1)


TILES = DecodeTiles(
    width=16, qkv=tile(16, 4), o=tile(16, 2), gate_up=tile(16, 2), down=tile(16, 3), lm_head=tile(16, 2)
)


@functools.cache
def model(config: ModelConfig) -> teal_jax.LanguageModel:
    lm = teal_jax.random_model(config)
    # Larger than the initialisation, so that a wrong layer shows in the logits.
    weights = jax.tree.map(lambda x: x * 5 if x.ndim == 2 else x + 0.1, lm.params["weights"])
    return dataclasses.replace(lm, params=lm.params | {"weights": weights})


def thresholds(config: ModelConfig) -> Threshold:
    rng = np.random.default_rng(0)
    return Threshold(jnp.asarray(rng.uniform(0.05, 0.6, (config.num_layers, 7)), jnp.float32))


def scaled(config: ModelConfig) -> Threshold:
    return dataclasses.replace(thresholds(config), scale=vectors(config, 0, 0.3, 3.0))


def top_k(config: ModelConfig) -> TopK:
    counts = np.random.default_rng(0).uniform(0.1, 1, (config.num_layers, 7))
    counts = jnp.asarray(counts * [d_in for d_in, _ in config.projection_shapes], jnp.int32)
    return TopK(counts, scale=vectors(config, 0, 0.3, 3.0))


def with_bias(gates: Threshold | Int8, config: ModelConfig) -> Biased:
    return Biased(gates, vectors(config, 1, -0.2, 0.2))


def vectors(config: ModelConfig, axis: int, low: float, high: float):
    """A vector for every projection, as long as its inputs (axis 0) or outputs (1)."""
    rng = np.random.default_rng(1)
    return tuple(
        tuple(jnp.asarray(rng.uniform(low, high, shape[axis]), jnp.float32) for shape in config.projection_shapes)
        for _ in range(config.num_layers)
    )


@pytest.mark.parametrize(
    ("config", "gates"),
    [
        (TINY, Dense()),
        (WINDOWED, thresholds(WINDOWED)),
        (TINY, with_bias(thresholds(TINY), TINY)),
        (THREE, scaled(THREE)),
        (BIASED, with_bias(scaled(BIASED), BIASED)),
        (RELU2, StraightThrough(with_bias(Int8(top_k(RELU2)), RELU2))),
    ],
    ids=["dense", "sliding window, biases, tied", "biased", "scaled, odd heads", "scaled, two biases", "top-k"],
)
def test_float32_gives_the_same_logits_and_tokens(config: ModelConfig, gates: ModelGates):
    lm = model(config)
    params = lm.params | {"gates": gates}
    prompt = jnp.asarray([[1, 2, 3, 4], [5, 6, 7, 8]])
    logits, plain = lm.prefill(params, prompt, lm.init_cache(2, 24))
    fused = plain
    step = jax.jit(lambda w, g, t, c: fused_step(config, w, g, t, c, TILES, interpret=True))
    reference = jax.jit(dataclasses.replace(lm, implementation="xla").decode_step)
    token = logits.argmax(-1).astype(jnp.int32)
    for _ in range(8):
        expected, plain = reference(params, token, plain)
        got, fused = step(params["weights"], gates, token, fused)
        np.testing.assert_allclose(got, expected, atol=2e-5, rtol=1e-5)
        token = expected.argmax(-1).astype(jnp.int32)
        assert (got.argmax(-1) == token).all()
    assert (fused.length == plain.length).all()
    for got, expected in zip(fused.keys + fused.values, plain.keys + plain.values, strict=True):
        np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "head", "gates"),
    [("int8", None, Dense()), ("int4-g8-asym", "int8", thresholds(SHALLOW))],
    ids=["dense int8", "int4 and an int8 lm_head"],
)
def test_quantised_weights_give_the_logits_of_their_values(spec, head, gates):
    lm = teal_jax.quantize(model(SHALLOW), spec, lm_head=head, progress=False)
    tiles = dataclasses.replace(TILES, o=dataclasses.replace(TILES.o, each=32))
    token, cache = jnp.asarray([3]), lm.init_cache(1, 8)
    expected, plain = jax.jit(dataclasses.replace(lm, implementation="xla").decode_step)(
        lm.params | {"gates": gates}, token, cache
    )
    got, fused = jax.jit(lambda w, c: fused_step(SHALLOW, w, gates, token, c, tiles, interpret=True))(
        lm.params["weights"], cache
    )
    np.testing.assert_allclose(got, expected, atol=2e-5, rtol=1e-5)
    for ours, theirs in zip(fused.keys + fused.values, plain.keys + plain.values, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    assert bits_in(lm.params["weights"]).lm_head == (8 if head else 32)
    assert bits_in(lm.params["weights"]).down == int(spec[3])


def test_counts_are_the_rows_that_the_thresholds_keep():
    lm = model(TINY)
    gates = thresholds(TINY)
    params = lm.params | {"gates": gates}
    cache = lm.init_cache(1, 24)
    token = jnp.asarray([3], jnp.int32)
    count = jax.jit(lambda w, g, t, c: counting_step(TINY, w, g, t, c, TILES, interpret=True)[2])
    kept = count(params["weights"], gates, token, cache)
    dropped = []

    def observe(taps, gate):
        sites = [taps.attn_in] * 3 + [taps.attn_out] + [taps.mlp_in] * 2 + [taps.mlp_hidden]
        dropped.append([int((jnp.abs(x[0, 0]) > gate.value[i]).sum()) for i, x in enumerate(sites)])

    model_functions(TINY).forward(params, jnp.asarray([[3]]), jnp.ones((1, 1), bool), None, observe)
    assert kept.tolist() == dropped
    dense = count(params["weights"], Dense(), token, cache)
    assert dense.tolist() == [[d_in for d_in, _ in TINY.projection_shapes]] * 2


def test_dispatch(monkeypatch: pytest.MonkeyPatch):
    assert not use_fused_step(TINY, "xla", jnp.float32, 1)
    if jax.default_backend() != "gpu":
        assert not use_fused_step(TINY, None, jnp.float32, 1)
        with pytest.raises(NotImplementedError, match="no GPU"):
            use_fused_step(TINY, "pallas", jnp.float32, 1)
        lm = dataclasses.replace(teal_jax.random_model(TINY), implementation="pallas")
        with pytest.raises(NotImplementedError, match="no GPU"):
            lm.decode_step(lm.params, jnp.asarray([1]), lm.init_cache(1, 8))
    with pytest.raises(ValueError, match="triton"):
        use_fused_step(TINY, "triton", jnp.float32, 1)
    wide = dataclasses.replace(TINY, head_dim=512)
    with pytest.raises(NotImplementedError, match="head_dim <= 256, got 512"):
        use_fused_step(wide, "pallas", jnp.float32, 1)
    for kind in ("int3-g64", "int2-g64-asym", "int4-g96", "int4-g64+int3-g64"):
        with pytest.raises(NotImplementedError, match=r"int8, and int4 in groups of a power of two, got int[234]-g"):
            use_fused_step(TINY, "pallas", jnp.bfloat16, 1, None, kind)
    # Where the kernels can run, they do, up to eight rows.
    monkeypatch.setattr("pallas_kernels.support.why_not", lambda: None)
    assert use_fused_step(TINY, None, jnp.bfloat16, 8)
    assert use_fused_step(TINY, "pallas", jnp.bfloat16, 1, Dense(), "int4-g64-asym+int8")
    assert not use_fused_step(TINY, None, jnp.bfloat16, 1, Dense(), "int3-g64")
    assert not use_fused_step(TINY, None, jnp.bfloat16, 9)
    with pytest.raises(NotImplementedError, match="1 to 8 rows, got 9"):
        use_fused_step(TINY, "pallas", jnp.bfloat16, 9)


def test_the_step_lowers_for_cuda_with_seven_kernels_a_layer():
    from jax.sharding import AbstractDevice, AbstractMesh

    config = dataclasses.replace(TINY, d_model=256, d_mlp=512, num_heads=4, num_kv_heads=2, head_dim=64)
    lm = jax.eval_shape(lambda: teal_jax.random_model(config, dtype=jnp.bfloat16).params["weights"])
    cache = jax.eval_shape(lambda: KVCache(*init(config), jnp.zeros((1,), jnp.int32), 32))
    gates = Threshold(jax.ShapeDtypeStruct((2, 7), jnp.float32))
    device = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(lambda w, g, t, c: fused_step(config, w, g, t, c)).trace(
            lm, gates, jax.ShapeDtypeStruct((1,), jnp.int32), cache
        )
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    calls = sum(text.count(f"call @{name}") for name in ("rms_norm_select", "matvec", "decode_attention", "gate_up"))
    assert calls == 7 * 2 + 2


def init(config: ModelConfig):
    shape = (1, 32, config.num_kv_heads, config.head_dim)
    return tuple(tuple(jnp.zeros(shape, jnp.bfloat16) for _ in range(config.num_layers)) for _ in range(2))


def test_tiles_fit_every_named_shape():
    for d_model, d_mlp, heads, kv, vocab in (
        (4096, 14336, 32, 8, 128256),
        (2048, 8192, 32, 8, 128256),
        (64, 72, 4, 2, 50),
    ):
        config = dataclasses.replace(
            TINY, d_model=d_model, d_mlp=d_mlp, num_heads=heads, num_kv_heads=kv, vocab_size=vocab
        )
        tiles = choose_tiles(config, 1)
        for t in (tiles.qkv, tiles.o, tiles.gate_up, tiles.down, tiles.lm_head):
            assert t.columns & (t.columns - 1) == 0
            assert t.splits >= 1


def test_a_jax_without_the_kernels_backend_decodes_through_xla():
    program = """
import sys
sys.modules["jax.experimental.pallas.triton"] = None  # importing it raises ImportError
import jax.numpy as jnp, teal_jax
from pallas_kernels import sparse_matvec, support
assert not support.backend_available()
lm = teal_jax.load("embedded", progress=False)
logits, _ = lm.decode_step(lm.params, jnp.asarray([1]), lm.init_cache(1, 8))
assert jnp.isfinite(logits).all()
assert jnp.isfinite(sparse_matvec(jnp.ones((1, 4)), jnp.ones((4, 4)), 0.5)).all()
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr
