import numpy as np
import pytest

from teal_jax.errors import DataError
from teal_jax.evaluation.overlap import NEEDLE, overlap, refuse_overlap, refuse_same_file

RNG = np.random.default_rng(0)


def by_hand(streams, rows, length):
    grams = lambda parts: [tuple(p[i : i + length]) for p in parts for i in range(len(p) - length + 1)]  # noqa: E731
    a, b = ([g for g in grams(parts) if len(set(g)) > 1] for parts in (streams, rows))
    return sum(g in set(b) for g in a) / len(a), sum(g in set(a) for g in b) / len(b)


@pytest.mark.parametrize("width", [40, 10])
def test_counts_what_is_shared(width):
    rows = RNG.integers(0, 3, (6, width), dtype=np.int32)
    streams = [np.concatenate([RNG.integers(0, 3, 50, dtype=np.int32), rows[2], rows[4][: width // 2]]), rows[5]]
    found = overlap(streams, rows)
    assert found == pytest.approx(by_hand([s.tolist() for s in streams], rows.tolist(), min(NEEDLE, width - 1)))
    assert min(found) > 0


def test_a_bos_of_a_row_hides_nothing():
    text = RNG.integers(1, 1000, 300)
    rows = np.concatenate([np.zeros((20, 1), int), text.reshape(20, 15)], axis=1)
    assert overlap([text], rows).of_calibration == pytest.approx(0.5)  # all but those that begin with the bos


def test_padding_is_no_overlap():
    row = np.concatenate([RNG.integers(0, 1000, 60), np.zeros(100, int)])
    other = np.concatenate([RNG.integers(0, 1000, 60), np.zeros(100, int)])
    assert overlap([other], row[None]) == (0, 0)


def test_a_text_that_was_calibrated_on_is_refused():
    text = RNG.integers(0, 1000, 5000)
    rows = RNG.integers(0, 1000, (8, 64))
    assert refuse_overlap([text], rows, "text.txt") == (0, 0)
    # One row of eight is enough, however long the text; so is a text that is a small part of the calibration.
    text[100:164] = rows[3]
    with pytest.raises(DataError, match=r"text.txt is the calibration text, too: 0.8 % .* and 12.5 %"):
        refuse_overlap([text], rows, "text.txt")
    with pytest.raises(DataError, match=r"100\.0 %"):
        refuse_overlap([rows[0, :40]], np.vstack([rows, RNG.integers(0, 1000, (500, 64))]), "text.txt")


def test_too_short_to_compare():
    assert overlap([np.arange(5)], np.arange(64)[None]) == (0, 0)


def test_the_same_file_under_another_name(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    (tmp_path / "c.txt").write_text("a")
    refuse_same_file([tmp_path / "a.txt"], [tmp_path / "c.txt", tmp_path / "missing.txt"])
    with pytest.raises(DataError, match="calibration text"):
        refuse_same_file([tmp_path / "a.txt"], [tmp_path / "b.txt"])
