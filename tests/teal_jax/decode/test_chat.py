"""Conversations: what stays in the cache, and that keeping it changes no answer."""

import dataclasses

import pytest

from teal_jax.decode.chat import Chat
from teal_jax.decode.generation import generate
from teal_jax.decode.sampling import Greedy, Sampling
from teal_jax.decode.tokenizer import Tokenizer
from teal_jax.errors import ContextError, TealError
from tests.teal_jax.decode import lively, tiny_tokenizers

CONFIG = dataclasses.replace(lively.CONFIG, max_position=200)


class CannedTokens(Tokenizer):
    """Renders each answer from the tokens it was generated with, so that no turn is rendered differently."""

    answers: dict[str, list[int]]

    def chat_tokens(self, messages, add_generation_prompt=True):
        ids = [1]
        for message in messages:
            text = message["content"]
            said = message["role"] == "assistant"
            ids += [4, *self.answers[text]] if said else [3, *self.encode(text, bos=False)]
        return [*ids, 4]


def make_model(tmp_path, *, template=True, canned=False, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    directory = tiny_tokenizers.byte_level(tmp_path / "tok", template=template)
    tokenizer = Tokenizer.from_directory(directory, config)
    if canned:
        tokenizer = CannedTokens(tokenizer._backend, config)
        tokenizer.answers = {}
    return lively.lively_model(config, tokenizer)


def say(chat, text):
    """The answer, and the tokens of the conversation up to it."""
    tokens = chat._tokens([*chat.messages, {"role": "user", "content": text}])
    answer = "".join(chat.send(text))
    assert chat.messages[-1] == {"role": "assistant", "content": answer}
    return answer, tokens


@pytest.mark.parametrize("window", [None, 24])
def test_answers_are_those_of_a_fresh_start(tmp_path, window):
    # The template renders the tokens of the first answers anew: the cache is rewound, or dropped under a window.
    lm = make_model(tmp_path, sliding_window=window)
    chat = Chat(lm, "the sun", max_new_tokens=9)
    for text in ("the dog", "a cat", "Once upon a time there was a hill", "friends"):
        answer, tokens = say(chat, text)
        fresh = Chat(lm, max_new_tokens=9)
        fresh._tokens = lambda messages, tokens=tokens: tokens
        assert "".join(fresh.send("anything")) == answer
    assert chat.stats.turns == 4
    assert [m["role"] for m in chat.messages] == ["system"] + ["user", "assistant"] * 4


@pytest.mark.parametrize("window", [None, 24])
def test_only_new_tokens_are_read(tmp_path, window):
    lm = make_model(tmp_path, canned=True, sliding_window=window)
    chat = Chat(lm, max_new_tokens=10)
    before: list[int] = []
    for turn, text in enumerate(("the dog", "a cat sat", "Once upon a time")):
        _, tokens = say(chat, text)
        cached = chat._cached
        assert cached[: len(tokens)] == tokens
        assert tokens[: len(before)] == before
        assert chat.stats.prefilled_tokens == len(tokens) - len(before)
        if turn == 2:
            assert chat.stats.prefilled_tokens < 20 < len(tokens)
        assert chat.stats.context_used == len(cached) == int(chat._cache.length[0])
        lm.tokenizer.answers[chat.messages[-1]["content"]] = cached[len(tokens) :]
        before = cached


def test_history_rendered_differently_is_read_again_from_there(tmp_path):
    lm = make_model(tmp_path, canned=True)
    chat = Chat(lm, max_new_tokens=10)
    _, tokens = say(chat, "the dog")
    first = chat._cached
    lm.tokenizer.answers[chat.messages[-1]["content"]] = [*first[len(tokens) : len(tokens) + 4], 9, 9]
    _, tokens = say(chat, "a cat")
    assert chat.stats.prefilled_tokens == len(tokens) - (len(first) - 5)
    assert chat._cached[: len(tokens)] == tokens


def test_the_same_seed_gives_the_same_conversation(tmp_path):
    lm = make_model(tmp_path)
    options = {"sampler": Sampling(temperature=1.5), "max_new_tokens": 8}
    chat = Chat(lm, seed=3, **options)
    answers = [say(chat, "the dog")[0] for _ in range(2)]
    assert answers[0] != answers[1]
    chat.reset()
    assert chat.messages == []
    assert chat.stats.turns == chat.stats.context_used == 0
    assert [say(chat, "the dog")[0] for _ in range(2)] == answers
    other = Chat(lm, seed=4, **options)
    assert say(other, "the dog")[0] != answers[0]


def test_an_answer_broken_off_stays_as_far_as_it_came(tmp_path):
    lm = make_model(tmp_path)
    chat = Chat(lm, max_new_tokens=40)
    answer = chat.send("the dog")
    heard = next(answer)
    never_read = chat.send("a cat")  # ends the first answer; is itself dropped unread
    assert chat.messages == [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": heard}]
    assert chat.stats.finish_reason is None
    assert int(chat._cache.length[0]) == len(chat._cached)
    list(chat.send("friends"))
    assert [m["content"] for m in chat.messages[::2]] == ["the dog", "friends"]
    assert list(never_read) == []


def test_a_failure_in_the_middle_starts_the_cache_afresh(tmp_path, monkeypatch):
    lm = make_model(tmp_path)
    chat = Chat(lm, max_new_tokens=12)
    with monkeypatch.context() as patch:
        patch.setattr("teal_jax.decode.run.decode_chunk", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(chat.send("the dog"))
    assert chat._cache is None
    _, tokens = say(chat, "a cat")
    assert chat.stats.prefilled_tokens == len(tokens)


def test_a_conversation_that_does_not_fit_says_so_and_goes_on(tmp_path):
    chat = Chat(make_model(tmp_path), max_len=40, max_new_tokens=5)
    say(chat, "the")
    messages = list(chat.messages)
    with pytest.raises(ContextError, match="conversation is too long") as error:
        chat.send("Once upon a time " * 20)
    assert "reset" in error.value.hint
    assert chat.messages == messages
    say(chat, "a")


def test_an_answer_ends_where_the_context_does(tmp_path):
    chat = Chat(make_model(tmp_path, eos_token_ids=()), max_len=30, max_new_tokens=500, sampler=Greedy())
    say(chat, "the dog")
    assert chat.stats.finish_reason in ("length", "eos")
    assert chat.stats.context_used <= 30 == chat.stats.context_size


def test_a_base_model_continues_the_story(tmp_path):
    lm = make_model(tmp_path, template=False)
    chat = Chat(lm, "Once upon a time", max_new_tokens=6)
    answer, tokens = say(chat, "the dog")
    assert tokens == lm.tokenizer.encode("Once upon a time the dog")
    assert answer == generate(lm, "Once upon a time the dog", max_new_tokens=6).text
    _, tokens = say(chat, "\nThe cat")
    assert tokens == lm.tokenizer.encode(f"Once upon a time the dog{answer}\nThe cat")


def test_stop_strings_end_an_answer(tmp_path):
    lm = make_model(tmp_path)
    whole, _ = say(Chat(lm, max_new_tokens=30), "the dog")
    stop = whole[5:8]
    chat = Chat(lm, max_new_tokens=30, stop=stop)
    assert say(chat, "the dog")[0] == whole[: whole.index(stop)]
    assert int(chat._cache.length[0]) == len(chat._cached)


def test_chat_needs_a_tokenizer():
    with pytest.raises(TealError, match="tokenizer"):
        Chat(lively.lively_model(CONFIG))
