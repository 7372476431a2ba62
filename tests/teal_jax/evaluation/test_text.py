import numpy as np
import pytest

import teal_jax
from teal_jax.errors import DataError
from teal_jax.evaluation.text import read_text
from tests.reference import tiny_model, tiny_tokens

SIZES = {"context": 24, "window": 8}


@pytest.fixture(scope="module")
def lm(fixtures):
    return teal_jax.load(fixtures / "tiny_mistral", progress=False)


def test_bytes_units_and_prompts_of_documents(lm, tmp_path):
    texts = ["Once upon a time, a caf\u00e9.", "The end of it all.", "A third, longer story about a fox and a key."]
    path = tmp_path / "text.txt"
    path.write_text("<|endoftext|>".join(texts))
    text = read_text(lm, path, **SIZES)
    lengths = [len(ids) for ids in lm.tokenizer.encode_batch(texts)]
    # Every token but the first is scored, a document's bos included.
    assert text.num_tokens == sum(lengths) - 1
    assert np.bincount(text.documents).tolist() == [lengths[0] - 1, *lengths[1:]]
    bytes_of = np.bincount(text.documents, weights=text.num_bytes)
    assert bytes_of.tolist() == [len(t.encode()) for t in texts]
    assert np.bincount(text.windows).tolist() == [p.stop - p.score for _, p in text.layout.pieces]
    assert text.units(3) == (pytest.approx(text.documents), "document")
    assert text.units(4)[1] == "window"


def test_a_limit_cuts_tokens_and_bytes_alike(lm):
    story = "word " * 60
    whole, part = read_text(lm, story, **SIZES), read_text(lm, story, max_tokens=20, **SIZES)
    assert part.num_tokens == 20
    assert part.wanted == 20
    assert part.num_bytes.tolist() == whole.num_bytes[:20].tolist()
    assert part.digest != whole.digest
    assert part.digest == read_text(lm, story, max_tokens=20, **SIZES).digest


@pytest.mark.parametrize("other", [{"dense_prefix": 3}, {"sparse_prefill": False}], ids=str)
def test_the_digest_knows_what_stays_dense(lm, other):
    assert read_text(lm, "word " * 60, **other, **SIZES).digest != read_text(lm, "word " * 60, **SIZES).digest


def test_tokens_have_no_bytes_and_rows_are_documents():
    lm = tiny_model()
    text = read_text(lm, tiny_tokens(3, 20), context=12, window=4)
    assert text.num_bytes is None
    assert np.bincount(text.documents).tolist() == [19, 19, 19]
    assert text.source == "tokens"


def test_too_short(lm):
    with pytest.raises(DataError, match="too short to score"):
        read_text(lm, "a", protocol="teal", **SIZES)
