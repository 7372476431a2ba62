import pytest

from teal_jax.decode.sampling import Greedy, Sampling
from teal_jax.harness.answers import prompt_room
from teal_jax.harness.options import Options, read_options


def test_what_a_task_says():
    given = {"until": ["\n", "Q:"], "max_gen_toks": 32, "do_sample": False, "temperature": 0.0}
    assert read_options(given) == Options(Greedy(), ("\n", "Q:"), 32)


def test_nothing_given():
    assert read_options({}) == Options(Greedy(), (), 256)
    assert read_options({"until": None, "max_gen_toks": None}, 7) == Options(Greedy(), (), 7)


@pytest.mark.parametrize(("until", "stop"), [("\n", ("\n",)), (["", "a"], ("a",)), ([], ())])
def test_stop_strings(until, stop):
    assert read_options({"until": until}).stop == stop


@pytest.mark.parametrize("name", ["max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_other_names_of_the_length(name):
    assert read_options({name: 5}).max_new_tokens == 5
    assert read_options({name: 5, "max_gen_toks": 9}).max_new_tokens == 9


@pytest.mark.parametrize(
    ("given", "sampler"),
    [
        ({"temperature": 0.7}, Sampling(temperature=0.7)),
        ({"temperature": 0.7, "do_sample": False}, Greedy()),
        ({"do_sample": True}, Sampling(temperature=1.0)),
        (
            {"do_sample": True, "temperature": 0.5, "top_k": 4, "top_p": 0.9, "min_p": 0.1},
            Sampling(temperature=0.5, top_k=4, top_p=0.9, min_p=0.1),
        ),
        ({"do_sample": True, "top_k": 0, "top_p": None}, Sampling()),
        ({"do_sample": True, "top_k": -1}, Sampling()),
        ({"repetition_penalty": 1.2}, Greedy(repetition_penalty=1.2)),
    ],
)
def test_samplers(given, sampler):
    assert read_options(given).sampler == sampler


def test_unknown_options_are_said():
    with pytest.warns(UserWarning, match="ignored: num_beams, typical_p"):
        read_options({"num_beams": 4, "typical_p": 0.9, "until": "a"})


def test_options_group_requests():
    assert len({read_options({"until": ["a"]}), read_options({"until": "a", "do_sample": False})}) == 1


@pytest.mark.parametrize(("positions", "answer", "room"), [(100, 20, 80), (100, 50, 50), (100, 1000, 50), (1, 9, 1)])
def test_a_prompt_leaves_room_for_its_answer(positions, answer, room):
    assert prompt_room(positions, answer) == room
