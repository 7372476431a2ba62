import pytest

from teal_jax.decode.generation import generate
from teal_jax.decode.sampling import Greedy, Sampling
from teal_jax.harness.answers import generate_batches
from teal_jax.harness.options import Options
from tests.teal_jax.harness.models import CONFIG, tiny_speaker


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return tiny_speaker(tmp_path_factory.mktemp("speaker"))


@pytest.fixture(scope="module")
def prompts(lm):
    texts = ("The dog", "Once upon a time there was", "They", "The cat sat on the mat, and")
    return [lm.tokenizer.encode(text) for text in texts]


def test_each_request_gets_what_it_would_get_alone(lm, prompts):
    short, long = Options(Greedy(), ("a",), 6), Options(Sampling(temperature=0.8), (), 9)
    options = [short, long, short, long]
    order = []
    answers = generate_batches(
        lm, prompts, options, max_length=96, batch_size=2, seed=5, done=lambda i, answer: order.append(i)
    )
    assert sorted(order) == [0, 1, 2, 3]
    for i, (prompt, option, answer) in enumerate(zip(prompts, options, answers, strict=True)):
        alone = generate(
            lm,
            prompt,
            max_new_tokens=option.max_new_tokens,
            sampler=option.sampler,
            seed=5 + i,
            stop=option.stop,
        )
        assert (answer.tokens, answer.text) == (alone.tokens, alone.text)


def test_max_length_bounds_prompt_and_answer(lm, prompts):
    whole = Options(Greedy(), (), 200)
    for limit in (40, CONFIG.max_position):
        for prompt, answer in zip(prompts, generate_batches(lm, prompts, [whole] * 4, max_length=limit), strict=True):
            assert answer.finish_reason == "eos" or len(prompt) + len(answer.tokens) == limit


def test_the_largest_seed_wraps(lm, prompts):
    option = Options(Sampling(), (), 2)
    assert len(generate_batches(lm, prompts[:2], [option] * 2, max_length=96, seed=2**32 - 1)) == 2
