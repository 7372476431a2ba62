"""The harness's requests on a tiny model; what they should give is computed in float64."""

import dataclasses
import importlib.metadata
import math
import tomllib
import warnings

import numpy as np
import pytest

from teal_jax.decode.generation import generate
from teal_jax.decode.tokenizer import Tokenizer
from teal_jax.errors import TealError
from tests.reference import forward, tiny_model
from tests.teal_jax.decode import tiny_tokenizers
from tests.teal_jax.harness.models import CONFIG, tiny_speaker
from tests.test_architecture import ROOT

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model, model_registry

from teal_jax.harness.adapter import TealLM

THRESHOLDS = np.full((CONFIG.num_layers, 7), 0.3)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return tiny_speaker(tmp_path_factory.mktemp("speaker"))


@pytest.fixture
def model(lm):
    return TealLM(lm, progress=False)


def ask(kind, *arguments):
    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0, metadata=("test", 0, 1))


def pairs(*texts):
    return [ask("loglikelihood", *text) for text in texts]


def reference(lm, context, continuation, dense):
    """Log-probability of continuation tokens after context tokens, and whether each is the likeliest."""
    tokens = [*context, *continuation]
    logits, _ = forward(lm, np.array(tokens[:-1]), THRESHOLDS, dense)
    logits = logits[len(context) - 1 :]
    logprob = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logprob = logprob - logits.max(-1, keepdims=True)
    return logprob[np.arange(len(continuation)), continuation].sum(), (logits.argmax(-1) == continuation).all()


# Registration


def test_the_harness_knows_the_name():
    assert get_model("teal_jax") is TealLM
    assert "hf" in model_registry  # the built-in models are still found


def test_the_entry_point_leads_here():
    [[name, value]] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"][
        "lm_eval.models"
    ].items()
    assert name == "teal_jax"
    assert importlib.metadata.EntryPoint(name, value, "lm_eval.models").load() is TealLM


# Log-likelihood


def test_loglikelihood_matches_float64(lm, model):
    texts = [("The dog ran", " up the hill"), ("The cat", " sat on the mat."), ("They were good friends", ".")]
    for (context, continuation), (logprob, greedy) in zip(texts, model.loglikelihood(pairs(*texts)), strict=True):
        ids = lm.tokenizer.encode(context)
        whole = lm.tokenizer.encode(context + continuation)
        assert whole[: len(ids)] == ids
        expected, likeliest = reference(lm, ids, whole[len(ids) :], len(ids))
        assert logprob == pytest.approx(expected, abs=2e-3)
        assert greedy == likeliest


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(model):
    first, second = model.loglikelihood(pairs(("The dog ", "ran up"), ("The dog", " ran up")))
    assert first == second


def test_greedy_is_true_for_what_the_decoder_writes(lm, model):
    context = lm.tokenizer.encode("Once upon a time")
    answer = list(generate(lm, context, max_new_tokens=6).tokens)
    wrong = [*answer[:-1], (answer[-1] + 1) % CONFIG.vocab_size]
    requests = [(None, context, tokens) for tokens in (answer, answer[:3], wrong)]
    assert [greedy for _, greedy in model._loglikelihood_tokens(requests)] == [True, True, False]


@pytest.mark.parametrize("context", ["", " "])
def test_an_empty_context_is_bos(lm, model, context):
    [(logprob, _)] = model.loglikelihood(pairs((context, "The dog")))
    ids = lm.tokenizer.encode(context + "The dog", bos=False)
    assert logprob == pytest.approx(reference(lm, [1], ids, 1)[0], abs=2e-3)


def test_an_empty_continuation_is_certain(model):
    assert model.loglikelihood(pairs(("The dog", ""), ("The dog", " ran up")))[0] == (0.0, True)


def test_a_context_without_tokens_is_bos(model):
    assert model._loglikelihood_tokens([(None, [], [9, 10])]) == model._loglikelihood_tokens([(None, [1], [9, 10])])


def test_what_is_too_long_loses_its_beginning_and_is_said_once(lm, model):
    context = list(np.random.default_rng(0).integers(3, 300, 150))
    requests = [(None, [int(t) for t in context], [7, 8, 9]), (None, [int(t) for t in context[:120]], [4, 5])]
    with pytest.warns(UserWarning, match="2 of 2 requests are longer than fits the 96 tokens") as caught:
        answers = model._loglikelihood_tokens(requests)
    assert len(caught) == 1
    for (_, ids, continuation), (logprob, _) in zip(requests, answers, strict=True):
        kept = ids[-(97 - len(continuation)) :]
        assert logprob == pytest.approx(reference(lm, kept, continuation, len(kept))[0], abs=5e-3)


def test_what_just_fits_is_not_warned_of(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model._loglikelihood_tokens([(None, [5] * 94, [7, 8, 9])])


def test_sparse_prefill_lets_the_gates_act_on_the_context(lm):
    context, continuation = lm.tokenizer.encode("Once upon a time there"), [100, 101, 102]
    for options, dense in (({}, 0), ({"dense_prefix": 2}, 2)):
        model = TealLM(lm, sparse_prefill=True, **options, progress=False)
        [(logprob, _)] = model._loglikelihood_tokens([(None, context, continuation)])
        assert logprob == pytest.approx(reference(lm, context, continuation, dense)[0], abs=2e-3)


def test_continuations_that_sparsity_cannot_touch_are_said(lm, model):
    one = [(None, [5, 6, 7], [8]), (None, [5, 6], [9])]
    with pytest.warns(UserWarning, match="sparsity has no part"):
        model._loglikelihood_tokens(one)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model._loglikelihood_tokens([*one, (None, [5], [6, 7])])
        TealLM(lm, sparse_prefill=True, progress=False)._loglikelihood_tokens(one)
        TealLM(lm.dense(), progress=False)._loglikelihood_tokens(one)


# Rolling log-likelihood


def test_rolling_matches_float64_over_several_windows(lm):
    model = TealLM(lm, max_length=16, progress=False)
    texts = ["The dog ran up the hill and saw the sun. The cat sat on the mat.", "They were", ""]
    got = model.loglikelihood_rolling([ask("loglikelihood_rolling", text) for text in texts])
    for text, value in zip(texts, got, strict=True):
        stream, total, done = [1, *lm.tokenizer.encode(text, bos=False)], 0.0, 1
        while done < len(stream):
            stop = min(done + 16, len(stream))
            start = max(0, stop - 17)
            total += reference(lm, stream[start:done], stream[done:stop], 0)[0]
            done = stop
        assert value == pytest.approx(total, abs=5e-3)
    assert len(lm.tokenizer.encode(texts[0])) > 17


# Generation


def test_generation_is_the_decoder_s(lm, model):
    options = {"until": ["e"], "max_gen_toks": 12, "do_sample": False}
    prompts = ["The dog", "Once upon a time there was a", "They"]
    got = model.generate_until([ask("generate_until", prompt, dict(options)) for prompt in prompts])
    assert got == [generate(lm, prompt, max_new_tokens=12, stop="e").text for prompt in prompts]
    assert not any("e" in text for text in got)


def test_sampling_differs_between_repeats_and_not_between_runs(lm):
    request = ask("generate_until", "The dog", {"until": [], "max_gen_toks": 10, "temperature": 1.0})
    first = TealLM(lm, progress=False, seed=3).generate_until([request] * 3)
    assert len(set(first)) > 1
    assert TealLM(lm, progress=False, seed=3).generate_until([request] * 3) == first


def test_a_prompt_that_leaves_no_room_loses_its_beginning(lm, model):
    prompt = "The cat sat on the mat, and the dog looked at the cat. " * 6
    with pytest.warns(UserWarning, match="1 of 1 requests"):
        [text] = model.generate_until([ask("generate_until", prompt, {"until": [], "max_gen_toks": 20})])
    kept = lm.tokenizer.encode(prompt)[-(96 - 20) :]
    assert text == generate(lm, kept, max_new_tokens=20).text


def test_an_empty_prompt_is_bos(lm, model):
    [text] = model.generate_until([ask("generate_until", "", {"until": [], "max_gen_toks": 5})])
    assert text == generate(lm, [1], max_new_tokens=5).text


# What goes with it


def test_realised_sparsity_is_counted_over_scoring_and_generation(lm):
    model = TealLM(lm, progress=False)
    assert model.get_model_info()["realised_sparsity"] is None
    model.generate_until([ask("generate_until", "The dog", {"until": [], "max_gen_toks": 8})])
    answer = generate(lm, "The dog", max_new_tokens=8)
    # The prompt predicts the first token; the decoder reads all but the last, which may be the eos.
    assert model.tally.tokens == len(answer.tokens) - (answer.finish_reason == "length")
    assert model.tally.tokens > 2
    model.loglikelihood(pairs(("The dog", " ran up the hill")))
    realised = model.get_model_info()["realised_sparsity"]
    assert 0 < realised < 1
    assert TealLM(lm.dense(), progress=False).get_model_info()["realised_sparsity"] == 0


def test_answers_are_handed_to_the_harness_s_cache(model, monkeypatch):
    kept = {}
    monkeypatch.setattr(
        model.cache_hook, "add_partial", lambda kind, asked, answer: kept.update({(kind, asked[0]): answer})
    )
    model.loglikelihood(pairs(("The dog", " ran up")))
    model.loglikelihood_rolling([ask("loglikelihood_rolling", "The cat")])
    model.generate_until([ask("generate_until", "They", {"max_gen_toks": 2})])
    assert {kind for kind, _ in kept} == {"loglikelihood", "loglikelihood_rolling", "generate_until"}
    assert math.isfinite(kept["loglikelihood_rolling", "The cat"])


def test_chat_templates(model):
    history = [{"role": "user", "content": "Hi"}]
    assert model.apply_chat_template(history) == "<s><|user|>Hi</s><|assistant|>"
    assert model.apply_chat_template(history, add_generation_prompt=False) == "<s><|user|>Hi"  # to be continued
    assert model.tok_encode("<s>Hi")[:2] != [1, 1]
    assert "assistant" in model.chat_template(True)
    assert model.chat_template(False) is None
    assert model.tokenizer_name == "tiny"


def test_model_args_as_the_command_line_has_them(tmp_path):
    from teal_jax.model import LanguageModel

    made = TealLM.create_from_arg_string(
        "pretrained=embedded,sparsity=0,dtype=float32,max_length=64,dense_prefix=0.5,progress=False",
        {"batch_size": "auto", "max_batch_size": 4, "device": "cuda:0"},
    )
    assert isinstance(made.lm, LanguageModel)
    assert (made.max_length, made.prefix_token_id, made.eot_token_id) == (64, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.4}, "comes with its sparsity"),
        ({"plan": "plan.json"}, "comes with its sparsity"),
        ({"max_length": 97}, r"max_length must lie in \[1, 96\]"),
        ({"max_length": 0}, "max_length"),
        ({"max_gen_toks": 0}, "max_gen_toks"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": "many"}, "batch_size"),
    ],
)
def test_wrong_arguments(lm, options, message):
    with pytest.raises(ValueError, match=message):
        TealLM(lm, **options, progress=False)


def test_a_model_without_a_tokenizer_is_refused():
    with pytest.raises(TealError, match="no tokenizer"):
        TealLM(tiny_model(), progress=False)


def test_neither_bos_nor_eos(lm, tmp_path):
    config = dataclasses.replace(CONFIG, bos_token_id=None, eos_token_ids=())
    tokenizer = Tokenizer.from_directory(tiny_tokenizers.byte_level(tmp_path), config)
    tokenizer.bos_token_id, tokenizer.eos_token_ids = None, ()
    model = TealLM(dataclasses.replace(lm, config=config, tokenizer=tokenizer), progress=False)
    with pytest.raises(TealError, match="neither bos nor eos"):
        model.loglikelihood(pairs(("", "The dog")))
