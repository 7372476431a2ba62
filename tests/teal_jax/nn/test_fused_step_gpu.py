"""The fused step on a real GPU, through the public API, against the decoder that masks and reads every weight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import teal_jax
from teal_jax.nn.gates import Dense, Threshold

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

STEPS = 256


def models(dtype, *, sparse=True):
    """The embedded model with the kernels and without, under thresholds that keep about half."""
    lm = teal_jax.load("embedded", dtype=dtype, progress=False)
    gates = Threshold(jnp.full((lm.config.num_layers, 7), 0.2, jnp.float32)) if sparse else Dense()
    lm = dataclasses.replace(lm, params=lm.params | {"gates": gates})
    return (dataclasses.replace(lm, implementation=name) for name in ("pallas", "xla"))


def start(lm, batch=1):
    prompt = jnp.asarray(np.random.default_rng(0).integers(0, lm.config.vocab_size, (batch, 16)), jnp.int32)
    logits, cache = jax.jit(lm.prefill)(lm.params, prompt, lm.init_cache(batch, 16 + STEPS))
    return logits.argmax(-1).astype(jnp.int32), cache


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_float32_gives_the_same_tokens(sparse, batch):
    tokens = {}
    for lm in models("float32", sparse=sparse):
        token, cache = start(lm, batch)
        step = jax.jit(lm.decode_step, donate_argnums=2)
        tokens[lm.implementation] = []
        for _ in range(STEPS):
            logits, cache = step(lm.params, token, cache)
            token = logits.argmax(-1).astype(jnp.int32)
            tokens[lm.implementation].append(np.asarray(token))
    np.testing.assert_array_equal(tokens["pallas"], tokens["xla"])


def test_bfloat16_logits_agree_within_rounding():
    fused, plain = models("bfloat16")
    token, cache = start(fused)
    caches = {"pallas": cache, "xla": jax.tree.map(jnp.copy, cache)}
    steps = {lm.implementation: jax.jit(lm.decode_step, donate_argnums=2) for lm in (fused, plain)}
    apart, agree = [], 0
    for _ in range(STEPS):
        out = {}
        for name, step in steps.items():
            out[name], caches[name] = step(fused.params, token, caches[name])
        difference = np.asarray(out["pallas"] - out["xla"])
        apart.append(np.sqrt((difference**2).mean()) / np.asarray(out["xla"]).std())
        agree += int(out["pallas"].argmax() == out["xla"].argmax())
        token = out["xla"].argmax(-1).astype(jnp.int32)
    # 256 roundings of one part in 512 a layer; a channel at its threshold may fall on either side.
    assert np.median(apart) < 0.02
    assert max(apart) < 0.2
    assert agree >= 0.95 * STEPS


def test_the_same_bits_every_time():
    lm, _ = models("bfloat16")
    runs = []
    for _ in range(3):
        token, cache = start(lm)
        step = jax.jit(lm.decode_step, donate_argnums=2)
        for _ in range(16):
            logits, cache = step(lm.params, token, cache)
            token = logits.argmax(-1).astype(jnp.int32)
        runs.append(np.asarray(logits))
    assert all((run == runs[0]).all() for run in runs)


def test_generate_uses_the_kernels_and_stops_where_xla_stops():
    texts = [teal_jax.generate(lm, "Once upon a time", max_new_tokens=48).text for lm in models("float32")]
    assert texts[0] == texts[1]
