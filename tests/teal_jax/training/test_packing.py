import dataclasses
import json

import pytest

from teal_jax.decode.tokenizer import Tokenizer
from teal_jax.errors import DataError
from teal_jax.training.packing import pack
from tests.teal_jax.training.tiny import CONFIG, model


@pytest.fixture(scope="module")
def lm(fixtures):
    config = dataclasses.replace(CONFIG, bos_token_id=1, eos_token_ids=(2,), vocab_size=512)
    tokenizer = Tokenizer.from_directory(fixtures / "tiny_mistral", config)
    return dataclasses.replace(model(), config=config, tokenizer=tokenizer)


def write_lines(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def test_documents_lie_end_to_end(lm, tmp_path):
    first = tmp_path / "a.txt"
    first.write_text("one<|endoftext|>two two")
    second = write_lines(tmp_path / "b.jsonl", {"text": "three"})
    found = pack(lm, [first, second], tmp_path / "x.tokens")
    bos, end = lm.tokenizer.bos_token_id, lm.config.eos_token_ids[0]
    expected = []
    for text in ("one", "two two", "three"):
        expected += [bos, *lm.tokenizer.encode(text, bos=False), end]
    assert found.tokens.tolist() == expected
    assert found.source == "a.txt, b.jsonl"
    assert found.tokenizer == lm.tokenizer.fingerprint
    assert found.examples is None


def test_one_token_that_begins_and_ends_is_not_doubled(lm, tmp_path):
    bos = lm.tokenizer.bos_token_id
    lm = dataclasses.replace(lm, config=dataclasses.replace(lm.config, eos_token_ids=(bos,)))
    file = write_lines(tmp_path / "b.jsonl", "one", "two")
    found = pack(lm, [file], tmp_path / "x.tokens").tokens.tolist()
    one, two = (lm.tokenizer.encode(text, bos=False) for text in ("one", "two"))
    assert found == [bos, *one, bos, *two, bos]


def test_pairs(lm, tmp_path):
    pairs = [("Who ran up the hill? ", "The dog."), ("And the cat?", " It sat.")]
    file = write_lines(tmp_path / "p.jsonl", *({"prompt": p, "answer": a} for p, a in pairs))
    found = pack(lm, [file], tmp_path / "x.tokens")
    ends = [*found.examples[1:, 0], len(found.tokens)]
    for (prompt, answer), (begin, start), end in zip(pairs, found.examples, ends, strict=True):
        tokens = found.tokens[begin:end].tolist()
        assert tokens == [*lm.tokenizer.encode(prompt + answer), lm.config.eos_token_ids[0]]
        # The part that is not scored belongs to the prompt alone, as generation will see it.
        unscored = tokens[: start - begin]
        assert unscored == lm.tokenizer.encode(prompt)[: len(unscored)]
        assert len(unscored) >= len(lm.tokenizer.encode(prompt)) - 1


def test_refused(lm, tmp_path):
    text, pairs = tmp_path / "a.txt", write_lines(tmp_path / "p.jsonl", {"prompt": "x", "answer": "y"})
    text.write_text("a text")
    out = tmp_path / "x.tokens"
    with pytest.raises(DataError, match=r"p\.jsonl holds prompts and answers"):
        pack(lm, [text, pairs], out)
    with pytest.raises(DataError, match="no training data"):
        pack(lm, [], out)
    with pytest.raises(DataError, match="no text file"):
        pack(lm, [tmp_path / "absent.txt"], out)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="holds no text"):
        pack(lm, [tmp_path / "empty.txt"], out)
    broken = write_lines(tmp_path / "q.jsonl", {"prompt": "x", "answer": "y"}, {"prompt": "x"})
    with pytest.raises(DataError, match=r"q\.jsonl:2: expected an object with"):
        pack(lm, [broken], out)
    with pytest.raises(DataError, match="has no tokenizer"):
        pack(dataclasses.replace(lm, tokenizer=None), [text], out)
    assert not out.exists()


def test_a_model_without_an_end_token(lm, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("a text")

    class Endless:
        eos_token_ids = ()

    bare = dataclasses.replace(lm, config=dataclasses.replace(lm.config, eos_token_ids=()), tokenizer=Endless())
    with pytest.raises(DataError, match="names no end token"):
        pack(bare, [text], tmp_path / "x.tokens")
