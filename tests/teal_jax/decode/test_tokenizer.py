"""Round trips, chat templates and streaming, with both kinds of tokenizer that Llama and Mistral use."""

import dataclasses
import random

import pytest

from teal_jax.config import ModelConfig
from teal_jax.decode.tokenizer import TextStream, Tokenizer
from teal_jax.errors import DataError, ModelNotFoundError, TealError
from tests.teal_jax.decode import tiny_tokenizers

CONFIG = ModelConfig(
    vocab_size=400,
    d_model=8,
    d_mlp=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    max_position=64,
    norm_eps=1e-5,
    bos_token_id=1,
    eos_token_ids=(2, 7),
)

TEXTS = [
    "Once upon a time",
    " the  dog ran , and\nsat .",
    "caf\u00e9 \u4f60\u597d \U0001f600!\U0001f468\u200d\U0001f469\u200d\U0001f467 the",
    "\u4f60\u597d\u4e16\u754c" * 6,
    "\t ",
]


@pytest.fixture(params=[tiny_tokenizers.byte_level, tiny_tokenizers.byte_fallback], ids=["byte-level", "byte-fallback"])
def tokenizer(request, tmp_path):
    return Tokenizer.from_directory(request.param(tmp_path / "tok"), CONFIG)


@pytest.fixture
def chat_tokenizer(tmp_path):
    return Tokenizer.from_directory(tiny_tokenizers.byte_level(tmp_path / "chat"), CONFIG)


@pytest.mark.parametrize("text", TEXTS)
def test_text_survives_the_round_trip_with_one_bos(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id == 1
    assert ids.count(1) == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode(text, bos=False) == ids[1:]
    assert tokenizer.encode_batch([text, "a"]) == [ids, tokenizer.encode("a")]
    assert max(ids) < tokenizer.vocab_size


def test_a_bos_in_the_text_is_not_doubled(tokenizer):
    assert tokenizer.encode("<s>the").count(1) == 1


def test_eos_ids_are_those_of_tokenizer_and_config(tmp_path):
    directory = tiny_tokenizers.byte_level(tmp_path)
    assert Tokenizer.from_directory(directory, CONFIG).eos_token_ids == (2, 7)
    assert Tokenizer.from_directory(directory, dataclasses.replace(CONFIG, eos_token_ids=(7,))).eos_token_ids == (2, 7)
    assert Tokenizer.from_directory(directory).eos_token_ids == (2,)


def test_empty_inputs(tokenizer):
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("", bos=False) == []
    assert tokenizer.encode_batch([]) == []
    assert tokenizer.decode([]) == ""


def test_special_tokens_are_not_text(tokenizer):
    assert tokenizer.decode([1, *tokenizer.encode("the dog", bos=False), 2]) == "the dog"


def test_text_that_was_not_utf8_is_refused(tokenizer):
    with pytest.raises(DataError, match="UTF-8"):
        tokenizer.encode(b"caf\xe9".decode("utf-8", "surrogateescape"))


def test_a_reload_of_saved_files_encodes_alike(chat_tokenizer, tmp_path):
    chat_tokenizer.save(tmp_path / "out" / "again")
    again = Tokenizer.from_directory(tmp_path / "out" / "again", CONFIG)
    messages = [{"role": "user", "content": "the dog"}]
    assert again.encode(TEXTS[2]) == chat_tokenizer.encode(TEXTS[2])
    assert again.chat_tokens(messages) == chat_tokenizer.chat_tokens(messages)
    again.save(tmp_path / "out" / "again")  # onto itself


def test_a_tokenizer_without_its_directory_can_be_saved(chat_tokenizer, tmp_path):
    Tokenizer(chat_tokenizer._backend, CONFIG).save(tmp_path / "plain")
    assert Tokenizer.from_directory(tmp_path / "plain", CONFIG).encode(TEXTS[2]) == chat_tokenizer.encode(TEXTS[2])


def test_missing_and_broken_files_say_what_to_do(tmp_path):
    with pytest.raises(ModelNotFoundError, match=r"tokenizer\.json"):
        Tokenizer.from_directory(tmp_path, CONFIG)
    with pytest.raises(ModelNotFoundError):
        Tokenizer.from_directory(tmp_path / "nowhere", CONFIG)
    (tmp_path / "tokenizer.json").write_text("{ not json")
    with pytest.raises(TealError, match="cannot read the tokenizer"):
        Tokenizer.from_directory(tmp_path, CONFIG)


def test_chat_tokens_follow_the_template(chat_tokenizer):
    assert chat_tokenizer.has_chat_template
    ids = chat_tokenizer.chat_tokens([{"role": "user", "content": " the dog "}])
    assert ids == [1, 3, *chat_tokenizer.encode("the dog", bos=False), 2, 4]
    assert chat_tokenizer.chat_tokens([{"role": "user", "content": "the dog"}], add_generation_prompt=False) == ids[:-1]


def test_chat_errors(chat_tokenizer, tmp_path):
    with pytest.raises(TealError, match="no such role"):
        chat_tokenizer.chat_tokens([{"role": "bad", "content": "x"}])
    plain = Tokenizer.from_directory(tiny_tokenizers.byte_level(tmp_path / "plain", template=False), CONFIG)
    assert not plain.has_chat_template
    with pytest.raises(TealError, match="no chat template"):
        plain.chat_tokens([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_is_the_text_in_whole_characters(tokenizer, text):
    ids = tokenizer.encode(text)
    for size in (1, 3, 100):
        stream = TextStream(tokenizer)
        pieces = [stream.push(ids[i : i + size]) for i in range(0, len(ids), size)]
        assert not any("\ufffd" in piece for piece in pieces)
        assert "".join(pieces) + stream.flush() == text


@pytest.mark.parametrize("text", TEXTS)
def test_a_stream_continues_a_context_cut_anywhere(tokenizer, text):
    ids = tokenizer.encode(text)
    for cut in range(1, len(ids) + 1):
        stream = TextStream(tokenizer, ids[:cut])
        rest = stream.push(ids[cut:]) + stream.flush()
        # A character that the cut goes through belongs to the rest; all before it does not.
        whole = next(part for k in range(cut, -1, -1) if "\ufffd" not in (part := tokenizer.decode(ids[:k])))
        assert rest == text[len(whole) :]


def test_a_continuation_keeps_its_leading_space(tokenizer):
    ids = tokenizer.encode("Once the dog")
    cut = len(tokenizer.encode("Once"))
    assert TextStream(tokenizer, ids[:cut]).push(ids[cut:]) == " the dog"


def test_broken_bytes_do_not_hold_the_stream_up(tokenizer):
    half = tokenizer.encode("\u4f60", bos=False)[-1]  # a continuation byte on its own
    stream = TextStream(tokenizer)
    assert stream.push([half] * 40).count("\ufffd") >= 20
    stream.flush()
    stream = TextStream(tokenizer)
    assert stream.push([half]) == ""
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


def test_random_tokens_never_lose_the_stream(tokenizer):
    rng = random.Random(0)
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(300)]
    stream = TextStream(tokenizer)
    text = "".join(stream.push([i]) for i in ids) + stream.flush()
    assert [c for c in text if c.isalpha()][:20]
    assert abs(len(text) - len(tokenizer.decode(ids))) < 150  # invalid bytes may count differently


def test_byte_lengths_of_tokens_add_up_to_the_text(tokenizer):
    texts = [*TEXTS, "a", "<s>the"]
    lengths = tokenizer.byte_lengths(texts)
    for text, found in zip(texts, lengths, strict=True):
        ids = tokenizer.encode(text)
        assert len(found) == len(ids)
        assert (found >= 0).all()
        assert found.sum() == len(text.encode())
    ascii_text = TEXTS[1]
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(ascii_text)]
    if tokenizer.decode(tokenizer.encode(" a", bos=False)[:1]) != "":  # byte-level: a token's text is its own
        assert tokenizer.byte_lengths([ascii_text])[0].tolist() == [len(piece) for piece in pieces]


def test_byte_lengths_need_offsets(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer._backend), "is_fast", False)
    with pytest.raises(TealError, match="where its tokens lie"):
        tokenizer.byte_lengths(["a"])
