import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from teal_jax.config import PROJECTIONS, RopeConfig
from teal_jax.errors import ContextError, PlanError
from teal_jax.model import dense_prefix_length, model_functions
from teal_jax.nn.gates import Threshold
from teal_jax.sparsity.plan import SparsityPlan
from tests.reference import TINY, forward, tiny_model, tiny_tokens

CONFIGS = {
    "gqa": TINY,
    "mha_tied": dataclasses.replace(TINY, num_kv_heads=4, tie_embeddings=True),
    "window": dataclasses.replace(TINY, sliding_window=5, head_dim=16),
    "biases": dataclasses.replace(TINY, attention_bias=True, mlp_bias=True),
    "llama3_rope": dataclasses.replace(
        TINY, rope=RopeConfig(type="llama3", theta=5e5, factor=8.0, original_max_position=16)
    ),
    "linear_rope, relu2": dataclasses.replace(TINY, rope=RopeConfig(type="linear", factor=4.0), hidden_act="relu2"),
}


def thresholds(config, value=0.4):
    ramp = np.linspace(0.5, 1.5, len(PROJECTIONS))
    return (value * ramp * np.ones((config.num_layers, 1))).astype(np.float32)


def sparse_params(lm, value=0.4):
    return {"weights": lm.params["weights"], "gates": Threshold(jnp.asarray(thresholds(lm.config, value)))}


def plan_for(lm, value=0.4):
    return SparsityPlan(
        sparsity=np.full((lm.config.num_layers, 7), 0.4),
        thresholds=thresholds(lm.config, value),
        target=0.4,
        method="test",
        fingerprint=lm.config.fingerprint,
        projection_sizes=lm.config.projection_sizes,
    )


@pytest.fixture(params=CONFIGS)
def lm(request):
    lm = tiny_model(CONFIGS[request.param])
    if lm.config.attention_bias:
        rng = np.random.default_rng(1)
        for layer in lm.params["weights"]["layers"].values():
            for part in ("attn", "mlp"):
                for projection in layer[part].values():
                    projection["bias"] = jnp.asarray(rng.normal(size=projection["bias"].shape), jnp.float32)
    return lm


def test_logits_match_float64(lm):
    tokens = tiny_tokens(2, 20)
    got = lm.logits(tokens)
    for row, ids in zip(got, tokens, strict=True):
        np.testing.assert_allclose(row, forward(lm, ids)[0], atol=2e-4)


@pytest.mark.parametrize("prefix", [0, 7, 0.5])
def test_sparse_logits_match_float64(lm, prefix):
    tokens = tiny_tokens(1, 20)
    plan = plan_for(lm)
    got = lm.sparsify(plan).logits(tokens, dense_prefix=prefix)[0]
    expected, _ = forward(lm, tokens[0], plan.thresholds, dense_prefix_length(prefix, 20))
    assert np.abs(expected - forward(lm, tokens[0])[0]).max() > 0.1  # the thresholds do something
    np.testing.assert_allclose(got, expected, atol=2e-4)


def test_prefill_and_decode_match_whole_sequences(lm):
    tokens = tiny_tokens(2, 24)
    plan = plan_for(lm)
    whole = lm.sparsify(plan).logits(tokens, dense_prefix=11)
    params, cache = lm.sparsify(plan).params, lm.init_cache(2, 24)
    logits, cache = jax.jit(lm.prefill, donate_argnums=2)(params, tokens[:, :11], cache)
    np.testing.assert_allclose(logits, whole[:, 10], atol=1e-4)
    step = jax.jit(lm.decode_step, donate_argnums=2)
    for i in range(11, 24):
        logits, cache = step(params, tokens[:, i], cache)
        np.testing.assert_allclose(logits, whole[:, i], atol=1e-4)
    np.testing.assert_array_equal(cache.length, [24, 24])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("sparse", [False, True])
def test_padded_batch_equals_each_sequence_alone(lm, side, sparse):
    tokens = tiny_tokens(3, 20)
    lengths = [12, 3, 7]
    params = sparse_params(lm) if sparse else lm.params
    mask = np.zeros((3, 12), bool)
    padded = np.full((3, 12), 9, np.int32)
    for row, length in enumerate(lengths):
        place = slice(12 - length, 12) if side == "left" else slice(length)
        mask[row, place] = True
        padded[row, place] = tokens[row, :length]
    first, cache = jax.jit(lm.prefill)(params, padded, lm.init_cache(3, 20), mask)
    second, cache = jax.jit(lm.decode_step)(params, tokens[:, 12], cache)
    whole = lm.logits(padded, mask=mask)
    for row, length in enumerate(lengths):
        ids = np.append(tokens[row, :length], tokens[row, 12])
        expected, _ = forward(lm, ids, thresholds(lm.config) if sparse else None, sparse_from=length)
        np.testing.assert_allclose(np.asarray(whole[row])[mask[row]], expected[:-1], atol=2e-4)
        np.testing.assert_allclose(first[row], expected[-2], atol=2e-4)
        np.testing.assert_allclose(second[row], expected[-1], atol=2e-4)


@pytest.mark.parametrize("name", ["gqa", "window"])
def test_prefill_in_pieces(name):
    lm = tiny_model(CONFIGS[name])
    tokens = tiny_tokens(1, 23)
    cache = lm.init_cache(1, 32)
    for start, stop in ((0, 9), (9, 10), (10, 23)):
        logits, cache = jax.jit(lm.prefill)(lm.params, tokens[:, start:stop], cache)
        np.testing.assert_allclose(logits[0], forward(lm, tokens[0, :stop])[0][-1], atol=2e-4)


def test_user_loops_jit_scan_while_and_vmap():
    lm = tiny_model()
    params = sparse_params(lm)
    logits, cache = jax.jit(lm.prefill)(params, tiny_tokens(2, 5), lm.init_cache(2, 16))
    first = jnp.argmax(logits, -1).astype(jnp.int32)

    def advance(carry, _):
        token, cache = carry
        logits, cache = lm.decode_step(params, token, cache)
        token = jnp.argmax(logits, -1).astype(jnp.int32)
        return (token, cache), token

    _, scanned = jax.jit(lambda t, c: lax.scan(advance, (t, c), length=6))(first, cache)

    def body(state):
        i, token, cache, out = state
        (token, cache), _ = advance((token, cache), None)
        return i + 1, token, cache, out.at[i].set(token)

    loop = jax.jit(lambda t, c: lax.while_loop(lambda s: s[0] < 6, body, (0, t, c, jnp.zeros((6, 2), jnp.int32)))[3])
    np.testing.assert_array_equal(loop(first, cache), scanned)
    thick = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), cache)
    mapped, _ = jax.jit(jax.vmap(lm.decode_step, in_axes=(None, 0, 0)))(params, jnp.stack([first, first]), thick)
    np.testing.assert_allclose(mapped[1], jax.jit(lm.decode_step)(params, first, cache)[0], atol=1e-5)


def test_one_compilation_serves_every_sparsity():
    lm = tiny_model()
    step = jax.jit(lm.decode_step)
    _, cache = jax.jit(lm.prefill)(lm.params, tiny_tokens(1, 4), lm.init_cache(1, 8))
    results, sizes = [], []
    for value in (0.0, 0.3, 0.9):
        results.append(step(sparse_params(lm, value), jnp.zeros(1, jnp.int32), cache)[0])
        sizes.append(step._cache_size())  # shared by all that jit this function, so only its growth counts
    assert sizes[0] == sizes[1] == sizes[2]
    assert not np.allclose(results[0], results[2])


def test_the_donated_cache_is_updated_in_place():
    lm = tiny_model()
    cache = lm.init_cache(1, 48)
    lowered = jax.jit(lm.decode_step, donate_argnums=2).lower(lm.params, jnp.zeros(1, jnp.int32), cache)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(cache))
    assert lowered.compile().memory_analysis().alias_size_in_bytes >= size


def test_functions_are_shared_and_weights_not_copied():
    lm = tiny_model()
    fast = lm.sparsify(plan_for(lm))
    assert fast.decode_step is lm.decode_step is model_functions(dataclasses.replace(TINY)).decode_step
    assert fast.params["weights"] is lm.params["weights"]
    assert fast.dense().plan is None
    assert lm.plan is None


def test_threshold_zero_is_dense():
    lm = tiny_model()
    tokens = tiny_tokens(1, 12)
    zero = dataclasses.replace(lm, params=sparse_params(lm, 0.0))
    np.testing.assert_array_equal(zero.logits(tokens), lm.logits(tokens))


def test_nan_activations_are_kept_not_hidden():
    from teal_jax.nn.project import project

    x = jnp.array([[jnp.nan, 1.0]])
    assert jnp.isnan(project(x, jnp.ones((2, 3)), Threshold(jnp.float32(5.0)))).all()


def test_wrong_use():
    lm = tiny_model()
    with pytest.raises(ContextError, match="holds 8 tokens, got a prompt of 9"):
        lm.prefill(lm.params, tiny_tokens(1, 9), lm.init_cache(1, 8))
    with pytest.raises(ValueError, match="batch and max_len"):
        lm.init_cache(0, 8)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        lm.logits(tiny_tokens(1, 4), dense_prefix=1.5)
    with pytest.raises(ValueError, match="count must be >= 0"):
        lm.logits(tiny_tokens(1, 4), dense_prefix=-1)
    with pytest.raises(PlanError, match="dense"):
        lm.require_plan()
    other = tiny_model(dataclasses.replace(TINY, d_mlp=96))
    with pytest.raises(PlanError, match="another model"):
        other.sparsify(plan_for(lm))
    deeper = tiny_model(dataclasses.replace(TINY, num_layers=3))
    with pytest.raises(PlanError, match="2 layers; the model has 3"):
        deeper.sparsify(plan_for(lm))


def test_repr_is_a_line():
    lm = tiny_model(TINY)
    assert repr(lm) == f"LanguageModel({lm.name!r}, {TINY.num_layers} layers, float32, dense)"
    assert repr(lm.sparsify(plan_for(lm))).endswith("40 % sparse by test)")
