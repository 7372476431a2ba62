import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from teal_jax.decode.sampling import Sampling
from teal_jax.evaluation.generated import (
    Prompted,
    agreement,
    choose_prompts,
    continue_prompts,
    dense_sides,
    repeated_ngrams,
)
from teal_jax.evaluation.text import read_text
from tests.reference import tiny_model, tiny_sparse, tiny_tokens


@pytest.fixture(scope="module")
def lm():
    return tiny_model(scale=5.0)


@pytest.fixture(scope="module")
def sparse(lm):
    return tiny_sparse(lm, 0.5)


def test_agreement_is_what_decoding_token_by_token_finds(lm, sparse):
    prompts = tiny_tokens(3, 8, seed=4).tolist()
    told = continue_prompts(lm, prompts, new_tokens=12, progress=False)
    assert [len(row) for row in told] == [12] * 3
    same, asked = agreement(dense_sides(lm, Prompted(prompts, told)), sparse, 3, progress=False)
    assert asked.tolist() == [11, 11, 11]
    step = jax.jit(sparse.decode_step)
    expected = []
    for prompt, row in zip(prompts, told, strict=True):
        _, cache = sparse.prefill(sparse.params, jnp.array([prompt]), sparse.init_cache(1, 32))
        hits = 0
        for token, after in itertools.pairwise(row):
            logits, cache = step(sparse.params, jnp.array([token]), cache)
            hits += int(logits[0].argmax()) == after
        expected.append(hits)
    assert same.tolist() == expected
    assert 0 < same.sum() < asked.sum()  # else the test would be empty


def test_dense_agrees_with_itself_and_short_texts_ask_nothing(lm):
    prompts = [[1, 5, 9, 4], [1, 7, 3, 2], [1, 2]]
    told = [[8, 3, 5], [9], []]
    same, asked = agreement(dense_sides(lm, Prompted(prompts, told)), lm, 3, progress=False)
    assert asked.tolist() == [2, 0, 0]
    greedy = continue_prompts(lm, prompts[:2], new_tokens=9, progress=False)
    same, asked = agreement(dense_sides(lm, Prompted(prompts[:2], greedy)), lm, 2, progress=False)
    assert same.tolist() == asked.tolist() == [8, 8]
    assert agreement(dense_sides(lm, Prompted([], [])), lm, 0, progress=False)[0].shape == (0,)


def test_more_prompts_than_rows_and_seeds(sparse):
    prompts = tiny_tokens(11, 6, seed=5).tolist()
    options = {"new_tokens": 5, "sampler": Sampling(temperature=1.0), "progress": False}
    told = continue_prompts(sparse, prompts, seed=3, **options)
    assert len(told) == 11
    assert continue_prompts(sparse, prompts, seed=3, **options) == told
    assert continue_prompts(sparse, prompts, seed=4, **options) != told


def test_prompts_begin_documents(lm):
    rows = tiny_tokens(40, 20)
    text = read_text(lm, rows, context=12, window=4)
    chosen = choose_prompts(text, 1, count=5, length=6)
    assert chosen == [rows[i, :6].tolist() for i in (0, 9, 19, 29, 39)]


def test_prompts_of_one_long_document(lm):
    stream = tiny_tokens(1, 100)
    text = read_text(lm, stream, context=12, window=4)
    chosen = choose_prompts(text, 1, count=4, length=6)
    assert [prompt[0] for prompt in chosen] == [1] * 4
    assert [prompt[1:] for prompt in chosen] == [stream[0, s : s + 5].tolist() for s in (0, 31, 63, 95)]
    assert len(choose_prompts(text, None, count=400, length=6)) == 16  # no more than there is text for
    assert choose_prompts(text, None, count=0, length=6) == []


@pytest.mark.parametrize(
    ("tokens", "n", "expected"),
    [
        ([1, 2, 3, 4], 4, (0, 1)),
        ([7] * 6, 4, (2, 3)),
        ([1, 2, 1, 2, 1], 2, (2, 4)),
        ([1, 2], 4, (0, 0)),
        ([], 1, (0, 0)),
    ],
)
def test_repeated_ngrams(tokens, n, expected):
    assert repeated_ngrams(tokens, n) == expected


def test_sampling_repeats_less_than_a_loop():
    rng = np.random.default_rng(0)
    loop = [1, 2, 3, 4, 5] * 20
    repeated, total = repeated_ngrams(loop, 4)
    assert repeated / total > 0.9
    assert repeated_ngrams(rng.integers(0, 1000, 100).tolist(), 4)[0] == 0
