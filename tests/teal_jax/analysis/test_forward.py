import numpy as np
import pytest

import teal_jax
from teal_jax.analysis.cost import Cost
from teal_jax.analysis.forward import Limits, Scored, score, threshold_step
from teal_jax.sparsity.plan import model_sparsity
from tests.reference import forward as reference


def limits(lm, plan):
    return Limits(plan.thresholds, np.full(lm.config.num_layers, -1, np.float32))


def test_dense_matches_the_model(lm, rows, dense):
    found = teal_jax.perplexity(lm, rows.tokens, context=8, window=12, protocol="teal", progress=False)
    assert found.num_tokens == rows.num_scored
    assert dense.nll.mean() == pytest.approx(found.nll, rel=1e-6)
    assert not dense.realised.any()


def test_thresholds_match_the_gates_and_float64(lm, rows, plans):
    """The analyses' own pass agrees with the model's gates, the prompt dense, and with the reference."""
    got = score(lm, rows, threshold_step, limits(lm, plans[1]))
    windows = {"context": 8, "window": 12, "protocol": "teal", "dense_prefix": 0}
    sparse = teal_jax.perplexity(lm.sparsify(plans[1]), rows.tokens, **windows, sparse_prefill=False, progress=False)
    assert got.nll.mean() == pytest.approx(sparse.nll, rel=1e-6)
    np.testing.assert_allclose(got.realised, sparse.realised, atol=1e-7)
    for row, tokens in enumerate(rows.tokens):
        logits, _ = reference(lm, tokens, plans[1].thresholds, 8)
        logprob = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        assert got.nll[row] == pytest.approx(-np.mean([logprob[p - 1, tokens[p]] for p in range(8, 20)]), abs=1e-4)


def test_slices_do_not_matter(lm, rows, plans):
    whole = score(lm, rows, threshold_step, limits(lm, plans[0]))
    parts = score(lm, rows, threshold_step, limits(lm, plans[0]), rows_at_once=2)
    np.testing.assert_allclose(parts.nll, whole.nll, rtol=1e-6)
    np.testing.assert_allclose(parts.realised, whole.realised, rtol=1e-12)


def test_cost_is_paired(lm):
    dense, sparse = np.array([1.0, 2.0, 4.0]), np.array([1.5, 2.25, 4.0])
    realised = np.random.default_rng(0).uniform(size=(2, 7))
    cost = Cost.of(lm.config, Scored(sparse, realised), Scored(dense, 0 * realised))
    assert cost.ppl == pytest.approx(np.exp(7.75 / 3))
    assert cost.excess == pytest.approx(0.25)
    assert cost.standard_error == pytest.approx(np.std([0.5, 0.25, 0], ddof=1) / np.sqrt(3))
    assert cost.realised_sparsity == pytest.approx(model_sparsity(lm.config, realised))
    one = Cost.of(lm.config, Scored(sparse[:1], realised), Scored(dense[:1], realised))
    assert one.standard_error is None
