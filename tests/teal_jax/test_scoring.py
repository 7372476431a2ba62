import numpy as np
import pytest

import teal_jax
from teal_jax.config import SITE_OF_PROJECTION
from teal_jax.errors import DataError
from teal_jax.scoring import default_windows, dense_tokens, windows
from teal_jax.sparsity.plan import model_sparsity
from tests.reference import TINY, forward, tiny_model, tiny_sparse, tiny_tokens


@pytest.fixture(scope="module")
def lm():
    return tiny_model(scale=3.0)


@pytest.fixture(scope="module")
def sparse(lm):
    return tiny_sparse(lm, 0.4)


@pytest.mark.parametrize("length", [2, 9, 12, 13, 40, 41])
def test_strided_windows_score_every_token_once(length):
    scored = []
    for start, score, stop in windows(length, 8, 4, "strided"):
        assert stop - start <= 12
        scored += range(score, stop)
    assert scored == list(range(1, length))


def test_teal_windows():
    assert windows(20, 8, 4, "teal") == [(0, 8, 12), (4, 12, 16), (8, 16, 20)]
    assert windows(11, 8, 4, "teal") == []


def reference(lm, stream, pieces, dense, sparse_prefill=True):
    """Mean nll and realised sparsity [layers, 7], by the float64 reference."""
    total, count = 0.0, 0
    dropped, seen = np.zeros((2, 7)), 0
    for start, score, stop in pieces:
        ids = stream[start:stop]
        prefix = dense(len(ids)) if sparse_prefill else max(dense(len(ids)), score - start)
        thresholds = lm.plan.thresholds
        logits, taps = forward(lm, ids, thresholds, prefix)
        logprob = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for position in range(score - start, stop - start):
            total -= logprob[position - 1, ids[position]]
            count += 1
        for layer in range(2):
            for i, site in enumerate(SITE_OF_PROJECTION):
                dropped[layer, i] += (np.abs(taps[layer][site][prefix:]) <= thresholds[layer, i]).mean(1).sum()
        seen += len(ids) - prefix
    return total / count, count, dropped / seen


@pytest.mark.parametrize(("protocol", "prefix"), [("strided", 0), ("strided", 5), ("strided", 0.25), ("teal", None)])
def test_perplexity_and_realised_sparsity_match_float64(sparse, protocol, prefix):
    stream = tiny_tokens(1, 45, seed=2)
    got = teal_jax.perplexity(
        sparse, stream, context=12, window=4, protocol=protocol, dense_prefix=prefix, progress=False
    )
    share = 0.5 if prefix is None else prefix
    dense = lambda n: int(np.ceil(share * n)) if isinstance(share, float) else share  # noqa: E731
    nll, count, realised = reference(sparse, stream[0], windows(45, 12, 4, protocol), dense)
    assert got.nll == pytest.approx(nll, abs=1e-4)
    assert got.ppl == pytest.approx(np.exp(nll), rel=1e-4)
    assert got.num_tokens == count
    np.testing.assert_allclose(got.realised, realised, atol=1e-3)
    assert got.realised_sparsity == pytest.approx(model_sparsity(TINY, realised), abs=1e-3)
    assert got.target_sparsity == 0.4


@pytest.mark.parametrize(("protocol", "prefix"), [("strided", 0), ("strided", 14), ("teal", None)])
def test_a_dense_prefill_matches_float64(sparse, protocol, prefix):
    """What stands before the scored tokens is left dense, in every window, however long that is."""
    stream = tiny_tokens(1, 45, seed=2)
    settings = {"context": 12, "window": 4, "protocol": protocol, "dense_prefix": prefix, "progress": False}
    got = teal_jax.perplexity(sparse, stream, sparse_prefill=False, **settings)
    dense = lambda n: 8 if prefix is None else prefix  # noqa: E731
    nll, count, realised = reference(sparse, stream[0], windows(45, 12, 4, protocol), dense, sparse_prefill=False)
    assert got.nll == pytest.approx(nll, abs=1e-4)
    assert got.num_tokens == count
    np.testing.assert_allclose(got.realised, realised, atol=1e-3)
    assert "dense before the scored tokens" in got.protocol
    assert got.nll != teal_jax.perplexity(sparse, stream, **settings).nll


def test_dense_tokens():
    assert dense_tokens(20, 8, 0, sparse_prefill=True) == 0
    assert dense_tokens(20, 8, 4, sparse_prefill=True) == 4
    assert dense_tokens(20, 8, 4, sparse_prefill=False) == 8
    assert dense_tokens(20, 8, 0.5, sparse_prefill=False) == 10
    assert dense_tokens(6, 8, 7, sparse_prefill=True) == 6


def test_a_dense_model_drops_nothing(lm):
    got = teal_jax.perplexity(lm, tiny_tokens(2, 20), context=12, window=4, progress=False)
    assert got.realised_sparsity == got.target_sparsity == 0
    assert got.num_tokens == 2 * 19


def test_rows_are_streams_of_their_own(lm):
    rows = tiny_tokens(3, 16)
    both = teal_jax.perplexity(lm, rows, context=12, window=4, progress=False)
    each = [teal_jax.perplexity(lm, row[None], context=12, window=4, progress=False).nll for row in rows]
    assert both.nll == pytest.approx(np.mean(each), rel=1e-5)


def test_one_stream_needs_no_row_axis(lm):
    stream = tiny_tokens(1, 30)
    one, two = (teal_jax.perplexity(lm, s, context=12, window=4, progress=False) for s in (stream[0], stream))
    assert one.nll == two.nll


def test_max_tokens(lm):
    got = teal_jax.perplexity(lm, tiny_tokens(1, 60), context=12, window=4, max_tokens=21, progress=False)
    assert got.num_tokens == 21


def test_default_windows_fit_the_model():
    assert sum(default_windows(TINY, None, None)) == TINY.max_position
    with pytest.raises(DataError, match="at most the model's 64"):
        default_windows(TINY, 64, 1)
    with pytest.raises(ValueError, match=">= 1"):
        default_windows(TINY, 0, 4)


def test_wrong_use(lm):
    with pytest.raises(DataError, match="too short to score: 7 tokens; expected at least 16"):
        teal_jax.perplexity(lm, tiny_tokens(1, 7), context=12, window=4, protocol="teal", progress=False)
    with pytest.raises(ValueError, match="protocol"):
        teal_jax.perplexity(lm, tiny_tokens(1, 7), protocol="best")
    with pytest.raises(DataError, match="no tokenizer"):
        teal_jax.perplexity(lm, "some text", progress=False)
