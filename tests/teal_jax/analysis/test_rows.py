import numpy as np
import pytest

from teal_jax.analysis.rows import Rows, evaluation_rows
from teal_jax.errors import DataError
from tests.reference import TINY, tiny_tokens


class Letters:
    """A tokenizer: one token a letter, BOS before every text."""

    def encode_batch(self, texts):
        return [[TINY.bos_token_id, *(ord(c) % 50 + 2 for c in text)] for text in texts]


@pytest.fixture
def with_tokenizer(lm):
    import dataclasses

    return dataclasses.replace(lm, tokenizer=Letters())


def story(n, seed=0):
    return "".join(np.random.default_rng(seed).choice(list("abcdefghij klmnop"), n))


def test_rows_begin_with_bos_and_are_drawn_once(with_tokenizer):
    rows = evaluation_rows(with_tokenizer, story(500), num_tokens=200, seq_len=20)
    assert rows.tokens.shape == (10, 20)
    assert (rows.tokens[:, 0] == TINY.bos_token_id).all()
    assert len(np.unique(rows.tokens, axis=0)) == 10
    assert rows.prompt == 10
    assert rows.num_scored == 100
    np.testing.assert_array_equal(rows.after_prompt, np.arange(20) >= 10)
    again = evaluation_rows(with_tokenizer, story(500), num_tokens=200, seq_len=20, seed=1)
    assert (again.tokens != rows.tokens).any()


def test_a_multiple_of_rows(with_tokenizer):
    rows = evaluation_rows(with_tokenizer, story(500), num_tokens=200, seq_len=20, multiple=4, prompt=3)
    assert rows.tokens.shape == (8, 20)
    assert rows.prompt == 3
    with pytest.raises(DataError, match="expected at least 16 rows of 20 tokens, got 10"):
        evaluation_rows(with_tokenizer, story(500), num_tokens=200, seq_len=20, multiple=16)


def test_token_rows_are_taken_as_they_are(lm):
    tokens = tiny_tokens(3, 12)
    np.testing.assert_array_equal(evaluation_rows(lm, tokens, num_tokens=1, seq_len=2).tokens, tokens)


def test_wrong_sizes(with_tokenizer):
    with pytest.raises(DataError, match="seq_len must lie in"):
        evaluation_rows(with_tokenizer, story(500), num_tokens=200, seq_len=TINY.max_position + 1)
    with pytest.raises(DataError, match="at least one row of 60 tokens, got 31"):
        evaluation_rows(with_tokenizer, story(30), num_tokens=200, seq_len=60)
    with pytest.raises(DataError, match="10 asked for"):
        evaluation_rows(with_tokenizer, story(300), num_tokens=10, seq_len=20)
    with pytest.raises(ValueError, match="prompt must lie in"):
        evaluation_rows(with_tokenizer, story(300), num_tokens=100, seq_len=20, prompt=20)


def test_known_text_is_refused(with_tokenizer):
    known = evaluation_rows(with_tokenizer, story(2000), num_tokens=600, seq_len=60).tokens
    with pytest.raises(DataError, match="is the calibration text, too"):
        evaluation_rows(with_tokenizer, story(2000), num_tokens=600, seq_len=60, unseen_by=known)
    evaluation_rows(with_tokenizer, story(2000, seed=1), num_tokens=600, seq_len=60, unseen_by=known)


def test_prompts_count_as_read():
    assert Rows(tiny_tokens(2, 10), 7, "tokens").num_scored == 6
