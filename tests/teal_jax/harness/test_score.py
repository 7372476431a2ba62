"""Row scores against the float64 reference, and against the decoder's own steps."""

import jax.numpy as jnp
import numpy as np
import pytest

import teal_jax
from teal_jax.config import SITE_OF_PROJECTION
from teal_jax.harness.rows import Row
from teal_jax.harness.score import Tally, score_rows
from teal_jax.sparsity.plan import model_sparsity
from tests.reference import TINY, forward, tiny_model, tiny_sparse, tiny_tokens


@pytest.fixture(scope="module")
def dense():
    return tiny_model(scale=3.0)


@pytest.fixture(scope="module")
def sparse(dense):
    return tiny_sparse(dense, 0.5)


def row(length, score, dense=None, seed=0):
    return Row(tiny_tokens(1, length, seed=seed)[0].tolist(), score, score if dense is None else dense)


ROWS = [row(9, 4), row(30, 29, seed=1), row(2, 1, 0, seed=2), row(18, 5, 0, seed=3), row(9, 4, 8, seed=4)]


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def reference(lm, row):
    """Log-probability and greedy flag of a row, and channels dropped [layers, 7], in float64."""
    thresholds = None if lm.plan is None else lm.plan.thresholds
    inputs, targets = np.array(row.tokens[:-1]), np.array(row.tokens[1:])
    logits, taps = forward(lm, inputs, thresholds, row.dense)
    logprob = log_softmax(logits)[np.arange(len(targets)), targets][row.score - 1 :]
    hits = (logits.argmax(-1) == targets)[row.score - 1 :]
    dropped = np.zeros((TINY.num_layers, 7))
    if thresholds is not None:
        for layer in range(TINY.num_layers):
            for i, site in enumerate(SITE_OF_PROJECTION):
                dropped[layer, i] = (np.abs(taps[layer][site][row.dense :]) <= thresholds[layer, i]).mean(1).sum()
    return logprob.sum(), hits.all(), dropped


@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_scores_match_float64(name, request):
    lm = request.getfixturevalue(name)
    for got, asked in zip(score_rows(lm, ROWS), ROWS, strict=True):
        logprob, greedy, _ = reference(lm, asked)
        assert got.logprob == pytest.approx(logprob, abs=2e-4)
        assert got.greedy == greedy


def test_greedy_is_what_greedy_decoding_gives(sparse):
    prompt = tiny_tokens(1, 6, seed=5)[0].tolist()
    answer = list(teal_jax.generate(sparse, [prompt], max_new_tokens=8, ignore_eos=True)[0].tokens)
    other = [*answer[:-1], (answer[-1] + 1) % TINY.vocab_size]
    rows = [Row([*prompt, *tokens], len(prompt), len(prompt)) for tokens in (answer, other, other[:-1])]
    assert [score.greedy for score in score_rows(sparse, rows)] == [True, False, True]


def test_a_continuation_scores_as_the_decoder_steps_through_it(sparse):
    """Prefill and decode_step, whose first prediction is dense and whose later ones come through the gates."""
    asked = row(14, 6, seed=6)
    context, continuation = asked.tokens[:6], asked.tokens[6:]
    logits, cache = sparse.prefill(sparse.params, jnp.asarray([context]), sparse.init_cache(1, 20))
    total = 0.0
    for token in continuation:
        total += float(log_softmax(np.asarray(logits, np.float64))[0, token])
        logits, cache = sparse.decode_step(sparse.params, jnp.asarray([token]), cache)
    [got] = score_rows(sparse, [asked])
    assert got.logprob == pytest.approx(total, abs=1e-4)
    [all_sparse] = score_rows(sparse, [asked._replace(dense=0)])
    [all_dense] = score_rows(sparse.dense(), [asked])
    assert abs(all_sparse.logprob - total) > 1e-2
    assert abs(all_dense.logprob - total) > 1e-2


def test_one_token_is_predicted_dense(sparse):
    asked = row(12, 11, seed=7)
    assert score_rows(sparse, [asked])[0].logprob == pytest.approx(
        score_rows(sparse.dense(), [asked])[0].logprob, abs=1e-5
    )


@pytest.mark.parametrize("options", [{"batch_size": 1}, {"batch_size": 3}, {"most": 2}])
def test_neither_batch_nor_order_matters(sparse, options):
    together = score_rows(sparse, ROWS)
    assert [s.logprob for s in score_rows(sparse, ROWS, **options)] == pytest.approx(
        [s.logprob for s in together], abs=1e-4
    )
    backwards = score_rows(sparse, ROWS[::-1])[::-1]
    assert [s.logprob for s in backwards] == pytest.approx([s.logprob for s in together], abs=1e-4)


def test_realised_sparsity_is_counted_where_the_gates_act(sparse):
    tally = Tally(TINY)
    assert tally.realised_sparsity is None
    score_rows(sparse, ROWS[:2], tally=tally)
    score_rows(sparse, ROWS[2:], tally=tally)
    acted = [len(asked.tokens) - 1 - asked.dense for asked in ROWS]
    assert tally.tokens == sum(acted)
    dropped = sum(reference(sparse, asked)[2] for asked in ROWS)
    assert tally.realised_sparsity == pytest.approx(model_sparsity(TINY, dropped / sum(acted)), abs=1e-3)


def test_no_rows():
    assert score_rows(tiny_model(), []) == []
