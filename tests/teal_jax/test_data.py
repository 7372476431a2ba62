import json

import numpy as np
import pytest

import teal_jax
from teal_jax import data, default_text
from teal_jax.errors import DataError
from tests.reference import tiny_tokens

STORY = "Once there was a small boat. It sailed over the wide blue sea and came home in the evening. "


@pytest.fixture(scope="module")
def lm(fixtures):
    return teal_jax.load(fixtures / "tiny_mistral", progress=False)


def rows(lm, source, **options):
    return data.calibration_rows(lm, source, **({"num_tokens": 64, "seq_len": 16, "seed": 0} | options))


def test_documents_of_every_kind_of_file(tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    lines = tmp_path / "b.jsonl"
    lines.write_text(json.dumps("three") + "\n\n" + json.dumps({"text": "four", "id": 1}) + "\n")
    documents, name = data.read_documents([text, str(lines), "five"])
    assert documents == ["one", "two", "three", "four", "five"]
    assert name == "a.txt, b.jsonl, text"


def test_rows_begin_with_bos_and_hold_the_text(lm):
    found = rows(lm, STORY * 40)
    assert found.tokens.shape == (4, 16)
    assert found.tokens.dtype == np.int32
    assert (found.tokens[:, 0] == lm.config.bos_token_id).all()
    assert lm.tokenizer.decode(found.tokens[0]).strip() in STORY * 40


def test_the_seed_chooses_the_rows(lm):
    first, again, other = (rows(lm, STORY * 200, seed=seed).tokens for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_tokens_are_taken_as_they_are(lm):
    tokens = tiny_tokens(2, 8)
    np.testing.assert_array_equal(rows(lm, tokens).tokens, tokens)


def test_less_text_than_asked_for_is_said(lm):
    with pytest.warns(UserWarning, match="calibration tokens of the 4096 asked for"):
        found = rows(lm, STORY * 3, num_tokens=4096)
    assert len(found.tokens) >= 1


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("   ", {}, "holds no text"),
        ("A boat.", {"seq_len": 32}, "too short"),
        (STORY, {"num_tokens": 8}, "at least one row of 16"),
        (STORY, {"seq_len": 10_000}, "seq_len must lie in"),
        (np.zeros((2, 3, 4), np.int32), {}, r"integers \[rows, seq\]"),
        (np.zeros((2, 3)), {}, "integers"),
        (np.zeros((0, 3), np.int32), {}, "empty"),
        (np.full((1, 3), 100_000), {}, "another tokenizer"),
    ],
)
def test_unusable_calibration_data(lm, source, options, message):
    with pytest.raises(DataError, match=message):
        rows(lm, source, **options)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "caf\u00e9".encode("latin1"), "not UTF-8: byte 0xe9 at offset 3"),
        ("a.jsonl", b'"fine"\n{broken\n', "a.jsonl:2 is not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', 'expected a string or an object with "text"'),
        ("a.txt", b"", "holds no text"),
    ],
)
def test_unusable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        data.read_documents(tmp_path / name)


def test_missing_files(tmp_path):
    with pytest.raises(DataError, match="no text file"):
        data.read_documents("missing.txt")
    with pytest.raises(DataError, match=r"expected a \.txt or \.jsonl"):
        data.read_documents(tmp_path / "a.pdf")


def test_evaluation_streams(lm):
    (stream,), name = data.evaluation_streams(lm, STORY)
    assert stream[0] == lm.config.bos_token_id
    assert name == "text"
    streams, _ = data.evaluation_streams(lm, tiny_tokens(3, 5))
    assert len(streams) == 3


def test_without_data_the_bundled_text_is_used_and_said(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.warns(UserWarning, match=r"tatsu-lab/alpaca is not reachable .*bundled|bundled .*not reachable"):
        documents, name = default_text.default_documents("mistral-7b")
    assert name == "bundled stories"
    assert len(documents) > 50


def test_alpaca_is_read_where_it_is_reachable(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet as parquet

    (tmp_path / "data").mkdir()
    table = pyarrow.table({"instruction": ["a", "b"], "text": ["first", "second"]})
    parquet.write_table(table, tmp_path / "data" / "train-00000-of-00001.parquet")
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: str(tmp_path))
    assert default_text.default_documents("mistral-7b") == (["first", "second"], "tatsu-lab/alpaca")


def test_the_embedded_model_takes_its_own_text(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))
    assert default_text.default_documents("embedded")[1] == "bundled stories"
