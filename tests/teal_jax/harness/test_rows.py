import numpy as np
import pytest

from teal_jax.harness.rows import Row, Semantics, continuation_row, padded_length, rolling_rows

DECODING = Semantics()


def test_the_context_is_dense_and_the_continuation_scored():
    row = continuation_row([1, 2, 3], [4, 5], max_length=10, semantics=DECODING)
    assert row == Row([1, 2, 3, 4, 5], score=3, dense=3)


def test_the_last_token_needs_no_position():
    assert continuation_row([1, 2, 3], [4, 5], max_length=4, semantics=DECODING) == Row([1, 2, 3, 4, 5], 3, 3)


def test_what_is_too_long_loses_its_beginning():
    assert continuation_row([1, 2, 3], [4, 5], max_length=3, semantics=DECODING) == Row([2, 3, 4, 5], 2, 2)


def test_a_continuation_longer_than_the_model_is_cut_and_keeps_a_token_before_it():
    assert continuation_row([1], [2, 3, 4, 5], max_length=2, semantics=DECODING) == Row([3, 4, 5], 1, 1)


@pytest.mark.parametrize(
    ("semantics", "dense"),
    [
        (Semantics(sparse_prefill=True), 0),
        (Semantics(sparse_prefill=True, dense_prefix=2), 2),
        (Semantics(sparse_prefill=True, dense_prefix=0.5), 3),  # of the six inputs
        (Semantics(sparse_prefill=True, dense_prefix=100), 6),
        (Semantics(dense_prefix=2), 4),
        (Semantics(dense_prefix=5), 5),
    ],
)
def test_where_the_gates_begin(semantics, dense):
    row = continuation_row([1, 2, 3, 4], [5, 6, 7], max_length=20, semantics=semantics)
    assert (row.score, row.dense) == (4, dense)


@pytest.mark.parametrize("dense_prefix", [-1, 1.5])
def test_a_dense_prefix_out_of_range_is_refused(dense_prefix):
    with pytest.raises(ValueError, match="dense_prefix"):
        continuation_row([1], [2], max_length=4, semantics=Semantics(dense_prefix=dense_prefix))


def harness_windows(tokens, prefix, size):
    """The pairs of input and prediction that the docstring of the harness's LM shows, written from its words."""
    stream, pairs, done = [prefix, *tokens], [], 0
    while done < len(tokens):
        count = min(size, len(tokens) - done)
        stop = done + count
        start = max(0, stop - size)
        pairs.append((stream[start:stop], stream[done + 1 : stop + 1]))
        done = stop
    return pairs


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 10, 13])
def test_rolling_windows_are_the_harness_s(length):
    tokens = list(range(10, 10 + length))
    pairs = [(row.tokens[:-1], row.tokens[row.score :]) for row in rolling_rows(tokens, 0, max_length=4)]
    assert pairs == harness_windows(tokens, 0, 4)
    assert [token for _, predicted in pairs for token in predicted] == tokens


def test_the_harness_agrees_on_its_windows():
    utils = pytest.importorskip("lm_eval.utils")
    for length in (1, 4, 5, 11, 23):
        tokens = list(range(100, 100 + length))
        theirs = [
            (list(inputs), list(predicted)) for inputs, predicted in utils.get_rolling_token_windows(tokens, 0, 5, 1)
        ]
        ours = [(row.tokens[:-1], row.tokens[row.score :]) for row in rolling_rows(tokens, 0, max_length=5)]
        assert ours == theirs


def test_all_of_a_rolling_text_is_sparse_unless_a_prefix_is_asked_for():
    assert [row.dense for row in rolling_rows(list(range(1, 10)), 0, max_length=4)] == [0, 0, 0]
    assert [row.dense for row in rolling_rows(list(range(1, 10)), 0, max_length=4, dense_prefix=0.5)] == [2, 2, 2]


def test_a_text_that_begins_with_bos_gets_no_second_one():
    assert rolling_rows([0, 5, 6], 0, max_length=4) == [Row([0, 5, 6], 1, 0)]


@pytest.mark.parametrize("tokens", [[], [0]])
def test_nothing_to_score(tokens):
    assert rolling_rows(tokens, 0, max_length=4) == []


def test_padding_is_at_most_a_third_and_the_lengths_few():
    lengths = np.arange(1, 5000)
    padded = np.array([padded_length(int(n)) for n in lengths])
    assert (padded >= lengths).all()
    assert (padded[lengths > 16] < 1.5 * lengths[lengths > 16]).all()
    assert sorted(set(padded))[:7] == [16, 24, 32, 48, 64, 96, 128]
