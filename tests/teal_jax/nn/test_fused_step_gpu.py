"""The fused step on a real GPU, through the public API, against the decoder that masks and reads every weight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import teal_jax
from teal_jax.nn.gates import Dense, Threshold
from teal_jax.nn.q_sparse import q_sparse_gates

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

STEPS = 256


def models(dtype, kind="threshold"):
    """The embedded model with the kernels and without, under gates that keep about half."""
    lm = teal_jax.load("embedded", dtype=dtype, progress=False)
    gates = {
        "dense": Dense(),
        "threshold": Threshold(jnp.full((lm.config.num_layers, 7), 0.2, jnp.float32)),
        "top_k": q_sparse_gates(lm.config, 0.5),
        "blocks": q_sparse_gates(lm.config, 0.5, block=8),
        "int8 blocks": q_sparse_gates(lm.config, 0.5, block=8, int8=True),
    }[kind]
    lm = dataclasses.replace(lm, params=lm.params | {"gates": gates})
    return (dataclasses.replace(lm, implementation=name) for name in ("pallas", "xla"))


def start(lm, batch=1):
    prompt = jnp.asarray(np.random.default_rng(0).integers(0, lm.config.vocab_size, (batch, 16)), jnp.int32)
    logits, cache = jax.jit(lm.prefill)(lm.params, prompt, lm.init_cache(batch, 16 + STEPS))
    return logits.argmax(-1).astype(jnp.int32), cache


@pytest.mark.parametrize("kind", ["dense", "threshold", "top_k", "blocks"])
@pytest.mark.parametrize("batch", [1, 3])
def test_float32_gives_the_same_tokens(kind, batch):
    tokens = {}
    for lm in models("float32", kind):
        token, cache = start(lm, batch)
        step = jax.jit(lm.decode_step, donate_argnums=2)
        tokens[lm.implementation] = []
        for _ in range(STEPS):
            logits, cache = step(lm.params, token, cache)
            token = logits.argmax(-1).astype(jnp.int32)
            tokens[lm.implementation].append(np.asarray(token))
    np.testing.assert_array_equal(tokens["pallas"], tokens["xla"])


def test_int8_differs_from_xlas_by_far_less_than_int8_costs():
    # Sums in another order put a value now and then across the border between two codes, so that tokens part in time.
    (fused, plain), (_, exact) = models("float32", "int8 blocks"), models("float32", "blocks")
    token, cache = start(plain)
    steps = [(lm.params, jax.jit(lm.decode_step)) for lm in (fused, plain, exact)]
    apart, cost = [], []
    for _ in range(STEPS):
        found = [step(params, token, cache) for params, step in steps]
        ours, xlas, without = (np.asarray(logits) for logits, _ in found)
        apart.append(np.sqrt(((ours - xlas) ** 2).mean()))
        cost.append(np.sqrt(((without - xlas) ** 2).mean()))
        cache, token = found[1][1], xlas.argmax(-1).astype(np.int32)
    assert np.median(apart) <= 0.2 * np.median(cost), (np.median(apart), np.median(cost))
    assert np.max(apart) <= np.median(cost), (np.max(apart), np.median(cost))


def test_bfloat16_logits_are_as_near_to_float32_as_xlas():
    fused, plain = models("bfloat16")
    exact = dataclasses.replace(plain, params=float32(plain.params))
    token, cache = start(plain)
    steps = {name: jax.jit(lm.decode_step) for name, lm in {"pallas": fused, "xla": plain, "exact": exact}.items()}
    errors, agree = {"pallas": [], "xla": []}, {"pallas": 0, "xla": 0}
    for _ in range(STEPS):
        # One cache for all: what earlier steps rounded differently does not count here.
        truth = np.asarray(steps["exact"](exact.params, token, float32(cache))[0])
        for name in errors:
            logits, following = steps[name](plain.params, token, cache)
            logits = np.asarray(logits)
            errors[name].append(np.sqrt(((logits - truth) ** 2).mean()) / truth.std())
            agree[name] += int(logits.argmax() == truth.argmax())
        cache, token = following, logits.argmax(-1).astype(np.int32)
    found = {name: (np.median(e), np.quantile(e, 0.95)) for name, e in errors.items()}
    assert found["pallas"][0] <= 1.1 * found["xla"][0], found
    assert found["pallas"][1] <= 1.2 * found["xla"][1], found
    assert agree["pallas"] >= agree["xla"] - 0.04 * STEPS, (agree, found)


def float32(tree):
    """The same numbers in float32; integers stay."""
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


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
