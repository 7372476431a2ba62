import dataclasses

import numpy as np
import pytest

from teal_jax.errors import DataError, TrainingError
from teal_jax.training.order import batch_of, check_answers, check_vocabulary, num_rows, row_numbers
from tests.teal_jax.training.tiny import SETTINGS, documents, token_file


def test_every_epoch_reads_every_row_once_in_another_order():
    drawn = np.concatenate([row_numbers(step, 4, 10, seed=3) for step in range(10)])
    epochs = drawn.reshape(4, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_step_is_a_pure_function_of_seed_and_step():
    later = row_numbers(7, 4, 10, seed=3)
    assert row_numbers(0, 4, 10, seed=3).tolist() != row_numbers(0, 4, 10, seed=4).tolist()
    assert row_numbers(7, 4, 10, seed=3).tolist() == later.tolist()


def test_windows_of_text(tmp_path):
    file = token_file(tmp_path / "a.tokens")
    stream = np.concatenate(documents())
    assert num_rows(file, 8) == (len(stream) - 1) // 8
    rows, scored = batch_of(file, SETTINGS, 2)
    numbers = row_numbers(2, 8, num_rows(file, 8), SETTINGS.seed)
    assert rows.tolist() == [stream[8 * i : 8 * i + 9].tolist() for i in numbers]
    assert rows.dtype == np.int32
    assert scored.shape == (8, 8)
    assert scored.all()


def test_a_pair_has_a_row_and_only_its_answer_counts(tmp_path):
    pairs = [(np.array([1, 2, 3, 4]), 2), (np.arange(10, 30), 3), (np.array([5, 6]), 0)]
    file = token_file(tmp_path / "a.tokens", pairs)
    settings = dataclasses.replace(SETTINGS, batch=3)
    rows, scored = batch_of(file, settings, 0)
    numbers = row_numbers(0, 3, 3, settings.seed)
    for row, mask, number in zip(rows, scored, numbers, strict=True):
        tokens, answer = pairs[number]
        assert row.tolist() == (tokens.tolist() + [0] * 9)[:9]
        # Token j + 1 is scored where it belongs to the answer; nothing predicts a row's first.
        assert mask.tolist() == [max(answer, 1) <= j < len(tokens) for j in range(1, 9)]


def test_refused(tmp_path):
    short = token_file(tmp_path / "a.tokens", [(np.arange(8), None)])
    with pytest.raises(DataError, match="has 8 tokens, one row needs 9"):
        num_rows(short, 8)
    with pytest.raises(DataError, match="holds token 7, the model knows 5"):
        check_vocabulary(short, 5)
    check_vocabulary(short, 8)
    late = token_file(tmp_path / "b.tokens", [(np.arange(20), 9)])
    with pytest.raises(TrainingError, match="no answer"):
        check_answers(late, 8)
    check_answers(late, 9)
