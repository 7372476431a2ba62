import numpy as np
import pytest

import teal_jax
from teal_jax.config import SITE_OF_PROJECTION
from teal_jax.evaluation.comparison import DenseSide, compare
from teal_jax.evaluation.weight_bytes import unread_share, weight_bytes
from teal_jax.nn.gates import Dense
from teal_jax.scoring import lay_windows
from tests.reference import TINY, block, norm, tiny_model, tiny_sparse, tiny_tokens, weights64


@pytest.fixture(scope="module")
def lm():
    return tiny_model(scale=3.0)


@pytest.fixture(scope="module")
def sparse(lm):
    return tiny_sparse(lm, 0.4)


def residuals(lm, tokens, thresholds, sparse_from):
    """Log-probabilities [seq, vocab], and per layer the residual stream and the sites, in float64."""
    weights = weights64(lm)
    x, streams, taps = weights["embed"]["weight"][tokens], [], []
    for i in range(lm.config.num_layers):
        of_layer = None if thresholds is None else thresholds[i]
        x, sites = block(weights["layers"][i], x, lm.config, of_layer, sparse_from)
        streams.append(x)
        taps.append(sites)
    logits = norm(x, weights["final_norm"]["weight"], lm.config.norm_eps) @ weights["lm_head"]["weight"]
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True)), streams, taps


@pytest.mark.parametrize("prefix", [0, 5, 0.5])
def test_everything_matches_float64(lm, sparse, prefix):
    streams = list(tiny_tokens(2, 29, seed=2))
    layout = lay_windows(TINY, streams, "tokens", context=12, window=4, dense_prefix=prefix)
    got = compare(DenseSide(lm, layout), sparse, progress=False)
    nll, kl, same, errors, acted = [], [], [], np.zeros(2), 0
    dropped = np.zeros((2, 7))
    thresholds = sparse.plan.thresholds
    for index, (start, score, stop) in layout.pieces:
        ids = streams[index][start:stop]
        first = int(np.ceil(prefix * len(ids))) if isinstance(prefix, float) else prefix
        p, thick, _ = residuals(lm, ids, None, 0)
        q, thin, taps = residuals(lm, ids, thresholds, first)
        for at in range(score - start - 1, len(ids) - 1):
            nll.append(-q[at, ids[at + 1]])
            kl.append((np.exp(p[at]) * (p[at] - q[at])).sum())
            same.append(p[at].argmax() == q[at].argmax())
            for layer in range(2):
                a, b = thick[layer][at], thin[layer][at]
                errors[layer] += np.linalg.norm(a - b) / np.linalg.norm(a)
        acted += len(ids) - first
        for layer in range(2):
            for i, site in enumerate(SITE_OF_PROJECTION):
                dropped[layer, i] += (np.abs(taps[layer][site][first:]) <= thresholds[layer, i]).mean(1).sum()
    np.testing.assert_allclose(got.nll, nll, atol=2e-4)
    np.testing.assert_allclose(got.kl, kl, atol=2e-4)
    np.testing.assert_array_equal(got.same, same)
    np.testing.assert_allclose(got.depth_error, errors / len(nll), rtol=1e-4)
    np.testing.assert_allclose(got.realised, dropped / acted, atol=1e-3)
    assert got.kl.max() > 1e-3  # the test would be empty otherwise


def test_it_scores_what_perplexity_scores(lm, sparse):
    stream = tiny_tokens(1, 45, seed=3)
    options = {"context": 12, "window": 4, "max_tokens": 30}
    layout = lay_windows(TINY, list(stream), "tokens", **options)
    got = compare(DenseSide(lm, layout), sparse, progress=False)
    found = teal_jax.perplexity(sparse, stream, progress=False, **options)
    assert len(got.nll) == found.num_tokens == layout.num_tokens
    assert got.nll.mean() == pytest.approx(found.nll, rel=1e-5)
    np.testing.assert_allclose(got.realised, found.realised)


def test_dense_against_itself_is_nothing(lm):
    layout = lay_windows(TINY, list(tiny_tokens(1, 20)), "tokens", context=12, window=4)
    got = compare(DenseSide(lm, layout), lm, progress=False)
    assert not got.kl.any()
    assert got.same.all()
    assert not got.depth_error.any()
    assert not got.realised.any()


def test_weight_bytes_count_what_is_kept_and_the_head(lm):
    realised = np.linspace(0, 0.9, 14).reshape(2, 7)
    d, m, kv = TINY.d_model, TINY.d_mlp, TINY.num_kv_heads * TINY.head_dim
    sizes = [d * d, d * kv, d * kv, d * d, d * m, d * m, m * d]
    expected = sum((1 - realised[i, j]) * size for i in range(2) for j, size in enumerate(sizes)) + d * TINY.vocab_size
    assert weight_bytes(lm, realised) == round(4 * expected)
    assert weight_bytes(lm, np.zeros((2, 7))) == 4 * (2 * sum(sizes) + d * TINY.vocab_size)


def test_weight_bytes_count_a_shared_matrix_once(lm, sparse):
    import dataclasses

    import jax.numpy as jnp

    nothing = np.zeros((2, 7))
    assert weight_bytes(sparse, nothing) == weight_bytes(lm, nothing)  # thresholds are no weights
    rotation = jnp.ones((8, 8), jnp.float32)
    gates = [Dense(), {"rotation": rotation, "scale": jnp.ones(8)}, {"rotation": rotation, "a": jnp.ones((8, 2))}]
    held = dataclasses.replace(lm, params={"weights": lm.params["weights"], "gates": gates})
    assert weight_bytes(held, nothing) == weight_bytes(lm, nothing) + 4 * (64 + 16)
    blocks = 2 * sum(TINY.projection_sizes)
    half = np.full((2, 7), 0.5)
    assert unread_share(lm, half) == pytest.approx(0.5)
    assert unread_share(held, half) == pytest.approx(0.5 - 80 / blocks)


def test_kept_or_computed_again_is_the_same(lm, sparse, monkeypatch):
    import teal_jax.evaluation.comparison as module

    layout = lay_windows(TINY, list(tiny_tokens(2, 40)), "tokens", context=12, window=4)
    side = DenseSide(lm, layout)
    first, second = (compare(side, sparse, progress=False) for _ in range(2))
    monkeypatch.setattr(module, "_KEPT_BYTES", 0)
    third = compare(DenseSide(lm, layout), sparse, progress=False)
    for other in (second, third):
        np.testing.assert_array_equal(first.kl, other.kl)
        np.testing.assert_array_equal(first.depth_error, other.depth_error)
