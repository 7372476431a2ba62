"""Generation against the forward pass without a cache, batches against single prompts, streams against whole texts."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from teal_jax.decode import decode_loop
from teal_jax.decode.decode_loop import Clock, begin, bucket_length, cache_capacity, decode_chunk
from teal_jax.decode.generation import generate, stream, stream_pieces
from teal_jax.decode.sampling import Greedy, Sampling
from teal_jax.decode.stops import StopMatcher, stop_strings
from teal_jax.decode.tokenizer import Tokenizer
from teal_jax.errors import ContextError, DataError, TealError
from tests.teal_jax.decode import tiny_tokenizers
from tests.teal_jax.decode.lively import CONFIG, lively_model, sparse

WINDOWED = dataclasses.replace(CONFIG, sliding_window=24)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    directory = tiny_tokenizers.byte_level(tmp_path_factory.mktemp("tok"))
    return lively_model(CONFIG, Tokenizer.from_directory(directory, CONFIG))


@pytest.fixture(scope="module")
def windowed():
    return lively_model(WINDOWED)


def some_tokens(length, seed=0):
    return np.random.default_rng(seed).integers(6, 300, length).tolist()


def assert_chain(lm, prompt, tokens):
    """Each token is the argmax of the forward pass over everything before it, prompt dense."""
    ids = np.array([[*prompt, *tokens]])
    logits = np.asarray(lm.logits(ids, dense_prefix=len(prompt)))[0]
    assert logits[len(prompt) - 1 : -1].argmax(axis=-1).tolist() == list(tokens)


@pytest.mark.parametrize("gated", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("name", ["lm", "windowed"])
def test_greedy_tokens_are_those_of_the_forward_pass(name, gated, request, monkeypatch):
    monkeypatch.setattr(decode_loop, "PREFILL_CHUNK", 32)
    lm = request.getfixturevalue(name)
    lm = sparse(lm) if gated else lm
    for length in (70, 5):  # several prefill chunks, and several windows; a prompt shorter than its bucket
        prompt = some_tokens(length)
        out = generate(lm, prompt, max_new_tokens=115 - length, ignore_eos=True)
        assert len(out.tokens) == 115 - length
        assert len(set(out.tokens)) > 10
        assert out.finish_reason == "length"
        assert out.prompt_tokens == length
        assert_chain(lm, prompt, out.tokens)


@pytest.mark.parametrize("name", ["lm", "windowed"])
@pytest.mark.parametrize("sampler", [None, Sampling(top_p=0.9, repetition_penalty=1.1)], ids=["greedy", "sampling"])
def test_a_batch_gives_each_prompt_the_tokens_it_gets_alone(name, sampler, request, monkeypatch):
    monkeypatch.setattr(decode_loop, "PREFILL_CHUNK", 32)
    lm = sparse(request.getfixturevalue(name))
    prompts = [some_tokens(70, 1), some_tokens(3, 2), some_tokens(32, 3)]
    options = {"max_new_tokens": 30, "sampler": sampler, "ignore_eos": True}
    together = generate(lm, prompts, seed=5, **options)
    alone = [generate(lm, prompt, seed=5 + i, **options) for i, prompt in enumerate(prompts)]
    assert [out.tokens for out in together] == [out.tokens for out in alone]
    assert [out.text for out in together] == [out.text for out in alone]
    chosen = generate(lm, prompts, seed=[7, 6, 5], **options)
    assert chosen[1].tokens == together[1].tokens
    assert (chosen[0].tokens == together[0].tokens) == (sampler is None)


def test_seeds_decide(lm):
    options = {"max_new_tokens": 12, "sampler": Sampling(temperature=2.0), "ignore_eos": True}
    texts = [generate(lm, "the dog", seed=seed, **options).tokens for seed in (0, 0, 1, 2**32 - 1)]
    assert texts[0] == texts[1]
    assert len(set(texts)) == 3


def test_new_lengths_seeds_and_sparsities_compile_nothing(windowed):
    config = dataclasses.replace(WINDOWED, max_position=600)  # functions of its own
    lm = sparse(lively_model(config))
    options = {"max_new_tokens": 11, "sampler": Sampling(top_k=5)}
    functions = (decode_loop.prefill_function(config), decode_loop.decode_function(config, options["sampler"], None))
    generate(lm, some_tokens(17), **options)
    sizes = [f._cache_size() for f in functions]
    assert sizes == [1, 1]
    for length in (18, 25, 32):
        generate(
            sparse(lm, 0.01 * length), some_tokens(length), **(options | {"seed": length, "max_new_tokens": length})
        )
        list(stream_pieces(lm, some_tokens(length), **options))
    assert [f._cache_size() for f in functions] == sizes


def test_weights_committed_to_a_device_compile_once(monkeypatch):
    monkeypatch.setattr(decode_loop, "PREFILL_CHUNK", 16)
    config = dataclasses.replace(CONFIG, max_position=90)
    lm = lively_model(config)
    lm = dataclasses.replace(lm, params=jax.device_put(lm.params, jax.devices()[0]))
    generate(lm, some_tokens(40), max_new_tokens=40, ignore_eos=True)
    assert decode_loop.prefill_function(config)._cache_size() == 1
    assert decode_loop.decode_function(config, Greedy(), None)._cache_size() == 1


def test_bucket_and_cache_sizes():
    assert [bucket_length(n, 4096) for n in (1, 16, 17, 32, 33, 500, 512)] == [16, 16, 32, 32, 64, 512, 512]
    assert bucket_length(17, 20) == 20
    large = dataclasses.replace(CONFIG, max_position=1000)
    assert [cache_capacity(large, n) for n in (1, 256, 257, 900, 5000)] == [256, 256, 512, 1000, 1000]


def test_compile_time_is_kept_apart(lm):
    options = {"max_new_tokens": 20, "sampler": Sampling(top_k=17), "ignore_eos": True}
    first, second = (generate(lm, "the dog", **options) for _ in range(2))
    assert first.compile_seconds > 10 * second.compile_seconds
    for out in (first, second):
        assert 0 < out.decode_seconds < first.compile_seconds
        assert out.tokens_per_second == pytest.approx(19 / out.decode_seconds)


@pytest.fixture(scope="module")
def long_answer(lm):
    return generate(lm, "the dog", max_new_tokens=60, ignore_eos=True)


def test_any_eos_ends_the_text(lm, long_answer):
    for position in (0, 3, 12):
        ends = (328, long_answer.tokens[position], 329)
        tokenizer = Tokenizer(lm.tokenizer._backend, dataclasses.replace(CONFIG, eos_token_ids=ends))
        ending = dataclasses.replace(lm, tokenizer=tokenizer)
        first = long_answer.tokens.index(long_answer.tokens[position])
        out = generate(ending, "the dog", max_new_tokens=60)
        assert out.finish_reason == "eos"
        assert out.tokens == long_answer.tokens[:first]
        assert "".join(stream(ending, "the dog", max_new_tokens=60)) == out.text
        assert generate(ending, "the dog", max_new_tokens=60, ignore_eos=True).tokens == long_answer.tokens


def test_a_row_that_ends_does_not_disturb_the_others(lm, long_answer):
    other = generate(lm, "Once", max_new_tokens=60, ignore_eos=True)
    stop = long_answer.text[10:13]
    assert stop not in other.text
    both = generate(lm, ["the dog", "Once"], max_new_tokens=60, stop=stop, ignore_eos=True)
    assert [out.finish_reason for out in both] == ["stop", "length"]
    assert both[0].text == long_answer.text[: long_answer.text.index(stop)]
    assert both[1].tokens == other.tokens


def test_stop_strings_cut_exactly_wherever_tokens_break(lm, long_answer):
    text = long_answer.text
    for start in range(2, len(text) - 6, 9):
        stop = text[start : start + 5]
        want = text[: text.index(stop)]
        out = generate(lm, "the dog", max_new_tokens=60, stop=["@@@@", stop], ignore_eos=True)
        assert (out.text, out.finish_reason) == (want, "stop")
        assert out.tokens == long_answer.tokens[: len(out.tokens)]
        assert "".join(stream(lm, "the dog", max_new_tokens=60, stop=stop, ignore_eos=True)) == want


def test_what_only_looked_like_a_stop_string_is_given_out(lm, long_answer):
    out = generate(lm, "the dog", max_new_tokens=60, stop=long_answer.text[-3:] + "...", ignore_eos=True)
    assert out.text == long_answer.text
    assert out.finish_reason == "length"


def test_a_stream_tells_tokens_and_ends(lm, long_answer):
    pieces = list(stream_pieces(lm, "the dog", max_new_tokens=60, ignore_eos=True))
    assert "".join(piece.text for piece in pieces) == long_answer.text == str(long_answer)
    assert sum((piece.tokens for piece in pieces), ()) == long_answer.tokens
    assert [piece.num_tokens for piece in pieces] == [1, 9, 17, 25, 33, 41, 49, 57, 60]
    assert [piece.finish_reason for piece in pieces] == [None] * 8 + ["length"]
    assert pieces[0].tokens_per_second == 0 < pieces[1].tokens_per_second


def test_two_models_stream_side_by_side(lm):
    thin = sparse(lm)
    options = {"max_new_tokens": 20, "ignore_eos": True}
    pairs = list(zip(stream_pieces(lm, "the", **options), stream_pieces(thin, "the", **options), strict=True))
    for i, model in enumerate((lm, thin)):
        assert "".join(pair[i].text for pair in pairs) == generate(model, "the", **options).text


def test_the_penalty_counts_prompt_and_answer(lm):
    prompt = some_tokens(12)
    out = generate(lm, prompt, max_new_tokens=40, sampler=Greedy(repetition_penalty=1e6), ignore_eos=True)
    assert len({*prompt, *out.tokens}) == 12 + 40


def test_the_model_ends_where_its_positions_end(lm):
    prompt = some_tokens(150)
    out = generate(lm, prompt, max_new_tokens=64, ignore_eos=True)
    assert len(out.tokens) == 10
    assert out.finish_reason == "length"
    assert_chain(lm, prompt, out.tokens)
    short = generate(lm, prompt[:15], max_new_tokens=64, max_len=20, ignore_eos=True)
    assert short.tokens == generate(lm, prompt[:15], max_new_tokens=5, ignore_eos=True).tokens


def test_every_form_of_prompt(lm):
    ids = lm.tokenizer.encode("the dog")
    options = {"max_new_tokens": 3, "ignore_eos": True}
    want = generate(lm, "the dog", **options).tokens
    for one in (ids, np.array(ids), jnp.array(ids), tuple(ids)):
        assert generate(lm, one, **options).tokens == want
    for several in (["the dog"], [ids], np.array([ids]), (np.array(ids),)):
        assert [out.tokens for out in generate(lm, several, **options)] == [want]


def test_chat_answers_start_on_their_own(lm):
    tokens = lm.tokenizer.chat_tokens([{"role": "user", "content": "the dog"}])
    out = generate(lm, "the dog", chat=True, max_new_tokens=6, ignore_eos=True)
    assert out.prompt_tokens == len(tokens)
    assert out.tokens == generate(lm, tokens, max_new_tokens=6, ignore_eos=True).tokens
    assert out.text == lm.tokenizer.decode(out.tokens)


def test_sentencepiece_answers_continue_the_prompt(tmp_path):
    tokenizer = Tokenizer.from_directory(tiny_tokenizers.byte_fallback(tmp_path), CONFIG)
    lm = lively_model(CONFIG, tokenizer)
    for seed in range(4):
        options = {"max_new_tokens": 20, "seed": seed, "sampler": Sampling(top_k=300), "ignore_eos": True}
        out = generate(lm, "the dog", **options)
        assert "".join(stream(lm, "the dog", **options)) == out.text
        whole = tokenizer.decode([*tokenizer.encode("the dog"), *out.tokens])
        if "\ufffd" not in whole:
            assert whole == "the dog" + out.text


def test_progress_is_drawn_on_request(lm, capsys):
    generate(lm, ["the", "dog"], max_new_tokens=3, progress=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("prompt", "options", "error", "match"),
    [
        (some_tokens(160), {}, ContextError, "160 tokens, but at most 159"),
        (some_tokens(20), {"max_len": 20}, ContextError, "at most 19"),
        ([], {}, DataError, "no prompt"),
        ([[5], []], {}, DataError, "empty"),
        ([5, 330], {}, DataError, "330"),
        ([-1], {}, DataError, r"\[0, 330\)"),
        ([1.5], {}, DataError, "whole-number"),
        ("a", {"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ("a", {"max_len": 0}, ValueError, "max_len"),
        ("a", {"stop": ["x", ""]}, ValueError, "stop"),
        (["a", "b"], {"seed": [1]}, ValueError, "seed"),
        ("a", {"seed": -1}, ValueError, "seed"),
        ([5], {"chat": True}, ValueError, "chat"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(lm, prompt, options, error, match):
    with pytest.raises(error, match=match):
        generate(lm, prompt, **options)


def test_models_without_a_tokenizer_take_tokens_only(windowed):
    with pytest.raises(TealError, match="no tokenizer"):
        generate(windowed, "text")
    with pytest.raises(TealError, match="no tokenizer"):
        stream(windowed, [5])
    with pytest.raises(TealError, match="tokenizer"):
        generate(windowed, [5], stop="x")
    with pytest.raises(ValueError, match="one prompt"):
        stream_pieces(windowed, [[5], [6]])
    assert generate(windowed, [5], max_new_tokens=2).text == ""


def test_decode_chunk_stops_when_all_rows_are_done(windowed):
    clock = Clock()
    state = begin(
        windowed,
        [some_tokens(4), some_tokens(9)],
        windowed.init_cache(2, 64),
        sampler=Greedy(),
        seeds=[0, 1],
        budgets=[3, 12],
        eos=(),
        clock=clock,
    )
    assert clock.compile_seconds > 0
    state, tokens = decode_chunk(windowed, state, 5, Greedy())
    assert tokens.shape == (2, 5)
    assert state.done.tolist() == [True, False]
    state, tokens = decode_chunk(windowed, state, 1000, Greedy())
    assert tokens.shape == (2, 6)
    assert decode_chunk(windowed, state, 5, Greedy())[1].shape == (2, 0)


def test_stop_matcher_is_the_letter_by_letter_definition():
    rng = np.random.default_rng(0)
    for _ in range(300):
        text = "".join(rng.choice(list("abc"), 25))
        stops = ["".join(rng.choice(list("abc"), rng.integers(2, 6))) for _ in range(rng.integers(1, 4))]
        want = text
        for end in range(len(text) + 1):
            if hit := [stop for stop in stops if text[:end].endswith(stop)]:
                want = text[: end - max(map(len, hit))]
                break
        matcher, got = StopMatcher(stops), ""
        cuts = [0, *sorted(rng.choice(25, 6)), 25]
        for a, b in itertools.pairwise(cuts):
            got += matcher.push(text[a:b])
            assert want.startswith(got)
        assert got + matcher.flush() == want
        assert matcher.found == (want != text)
    assert stop_strings("ab") == ("ab",)
