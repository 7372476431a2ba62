import json

import numpy as np
import pytest

from teal_jax.errors import DataError
from teal_jax.training.token_file import open_token_file, write_token_file
from tests.teal_jax.training.tiny import token_file


@pytest.mark.parametrize(("vocab_size", "dtype"), [(64, np.uint16), (1 << 16, np.uint16), (70000, np.uint32)])
def test_what_is_written_is_read(tmp_path, vocab_size, dtype):
    rows = [np.array([1, 5, vocab_size - 1]), np.array([7, 2])]
    found = token_file(tmp_path / "a.tokens", [(row, None) for row in rows], vocab_size=vocab_size)
    assert isinstance(found.tokens, np.memmap)
    assert found.tokens.dtype == dtype
    assert found.tokens.tolist() == [1, 5, vocab_size - 1, 7, 2]
    assert found.examples is None
    assert (found.tokenizer, found.vocab_size, found.source) == ("of a test", vocab_size, "test")


def test_examples_say_where_answers_begin(tmp_path):
    rows = [(np.array([1, 2, 3]), 2), (np.array([4, 5, 6, 7, 8]), 1)]
    found = token_file(tmp_path / "a.tokens", rows)
    assert found.examples.tolist() == [[0, 2], [3, 4]]
    assert found.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_the_digest_is_of_tokens_and_examples(tmp_path):
    one, two = np.array([1, 2]), np.array([3])
    digests = [
        token_file(tmp_path / f"{i}.tokens", rows).digest
        for i, rows in enumerate([[(one, None), (two, None)], [(two, None), (one, None)], [(one, 1), (two, 0)]])
    ]
    assert len(set(digests)) == 3


def test_nothing_is_overwritten_and_nothing_half_written_is_left(tmp_path):
    path = tmp_path / "a.tokens"
    token_file(path)
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"a\.tokens exists"):
        token_file(path)
    assert path.read_bytes() == before
    with pytest.raises(DataError, match="holds no tokens"):
        token_file(tmp_path / "b.tokens", [])

    def broken():
        yield np.array([1, 2]), None
        raise RuntimeError("the reader failed")

    with pytest.raises(RuntimeError):
        write_token_file(tmp_path / "c.tokens", broken(), tokenizer="x", vocab_size=64, source="x")
    assert [file.name for file in tmp_path.iterdir()] == ["a.tokens"]


def test_broken_files(tmp_path):
    with pytest.raises(DataError, match="no token file"):
        open_token_file(tmp_path / "absent.tokens")
    path = tmp_path / "a.tokens"
    path.write_bytes(b"once upon a time")
    with pytest.raises(DataError, match="is not a token file"):
        open_token_file(path)
    path.unlink()
    token_file(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(DataError, match="its header asks for"):
        open_token_file(path)
    header = json.loads(whole[12:1024])
    path.write_bytes((b"TEAL TOKENS " + json.dumps(header | {"version": 2}).encode()).ljust(1024) + whole[1024:])
    with pytest.raises(DataError, match="format version 2"):
        open_token_file(path)


def test_another_tokenizer_is_refused(tmp_path):
    found = token_file(tmp_path / "a.tokens")
    found.check_tokenizer("of a test", "it")
    with pytest.raises(DataError, match="another tokenizer"):
        found.check_tokenizer("of another", "it")
