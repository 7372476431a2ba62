"""Three small tasks of the harness on the embedded model, every number of theirs computed again in float64 numpy."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import teal_jax
from teal_jax.errors import DataError, TealError
from teal_jax.harness.results import TaskResults, TaskScore, read_scores, task_table
from teal_jax.harness.tasks import DEFAULT_TASKS, run_tasks
from tests.reference import forward
from tests.test_architecture import ROOT

pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")

TASKS = Path(__file__).parent / "tasks"
FILES = [TASKS / f"teal_{name}.yaml" for name in ("choice", "rolling", "story")]
STOPS = (".", ",", "!")


def documents(name):
    return [json.loads(line) for line in (TASKS / f"{name}.jsonl").read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def models():
    dense = teal_jax.load("embedded", dtype="float32", progress=False)
    calibration = teal_jax.calibrate(dense, num_tokens=2048, progress=False)
    plan = teal_jax.allocate(dense, calibration, 0.5, method="uniform", progress=False)
    return {"dense": dense, "sparse": dense.sparsify(plan)}


@pytest.fixture(scope="module")
def results(models):
    return {name: run_tasks(lm, FILES, progress=False, bootstrap_iters=0) for name, lm in models.items()}


@pytest.fixture(scope="module", params=["dense", "sparse"])
def measured(request, models, results):
    """The model, and `{(task, metric): value}` of what was measured on it."""
    scores = results[request.param].scores
    return models[request.param], {(score.task, score.metric): score.value for score in scores}


def logprobs(lm, tokens, dense):
    """Float64 log-probabilities [seq, vocab] after each token, the gates acting from position `dense` on."""
    logits, _ = forward(lm, np.array(tokens), None if lm.plan is None else lm.plan.thresholds, dense)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def continuation(lm, context, text):
    ids = lm.tokenizer.encode(context)
    whole = lm.tokenizer.encode(context + text)
    table = logprobs(lm, whole[:-1], len(ids))
    return sum(table[i - 1, whole[i]] for i in range(len(ids), len(whole)))


def test_choices(measured):
    lm, values = measured
    right, right_by_length = 0, 0
    for document in documents("choice"):
        sums = [continuation(lm, document["beginning"], f" {ending}") for ending in document["endings"]]
        lengths = [len(ending) for ending in document["endings"]]
        right += int(np.argmax(sums)) == document["answer"]
        right_by_length += int(np.argmax(np.divide(sums, lengths))) == document["answer"]
    assert values["teal_choice", "acc"] == pytest.approx(right / 7)
    assert values["teal_choice", "acc_norm"] == pytest.approx(right_by_length / 7)
    # By hand: children's stories have an opinion on the first six endings, and none on the moon's gold and silver,
    # whose many words only win by the letter.
    assert (right, right_by_length) == (6, 7)


def test_running_text(measured):
    lm, values = measured
    total, words, letters = 0.0, 0, 0
    for document in documents("rolling"):
        ids = lm.tokenizer.encode(document["text"])
        table = logprobs(lm, ids[:-1], 0)
        total += sum(table[i - 1, ids[i]] for i in range(1, len(ids)))
        words += len(document["text"].split())
        letters += len(document["text"].encode())
    assert values["teal_rolling", "bits_per_byte"] == pytest.approx(-total / letters / math.log(2), rel=1e-4)
    assert values["teal_rolling", "byte_perplexity"] == pytest.approx(math.exp(-total / letters), rel=1e-4)
    assert values["teal_rolling", "word_perplexity"] == pytest.approx(math.exp(-total / words), rel=1e-3)


def greedy(lm, context):
    """The text that follows, without a cache, up to a stop: at most 12 tokens."""
    ids = lm.tokenizer.encode(context)
    prompt = len(ids)
    for _ in range(12):
        ids.append(int(logprobs(lm, ids, prompt)[-1].argmax()))
        text = lm.tokenizer.decode(ids)[len(context) :]
        if any(stop in text for stop in STOPS):
            return text[: min(text.find(stop) for stop in STOPS if stop in text)]
    return text


def test_generated_text(measured):
    lm, values = measured
    found = [greedy(lm, document["beginning"]).strip() for document in documents("story")]
    right = [text == document["next"] for text, document in zip(found, documents("story"), strict=True)]
    assert values["teal_story", "exact_match"] == pytest.approx(sum(right) / 5)
    # By hand: Lily, singing, apple and after are how such stories go on; the dog runs after a ball, not a cat.
    assert right == [True, True, True, False, True]


def test_the_results_say_what_was_run(models, results):
    dense, sparse = results["dense"], results["sparse"]
    assert (dense.target_sparsity, dense.realised_sparsity, dense.method) == (0, 0, None)
    assert (sparse.target_sparsity, sparse.method) == (0.5, "uniform")
    assert sparse.realised_sparsity == pytest.approx(0.5, abs=0.05)
    assert "contexts dense" in sparse.scoring
    assert sparse.versions.keys() == {"teal_jax", "jax", "lm_eval"}
    kinds = {score.task: score.kind for score in sparse.scores}
    assert kinds == {
        "teal_choice": "multiple_choice",
        "teal_rolling": "loglikelihood_rolling",
        "teal_story": "generate_until",
    }
    assert json.loads(json.dumps(sparse.as_dict()))["scores"][0]["task"] == "teal_choice"
    by_metric = {score.metric: score for score in sparse.scores}
    assert by_metric["acc"].higher_is_better
    assert not by_metric["bits_per_byte"].higher_is_better
    assert by_metric["exact_match"].filter == "stripped"
    assert (by_metric["acc"].samples, by_metric["exact_match"].samples) == (7, 5)


def test_limit_and_one_task_alone(models):
    found = run_tasks(models["dense"], FILES[0], limit=2, progress=False, bootstrap_iters=0)
    assert {score.samples for score in found.scores} == {2}
    assert found.limit == 2


def test_tasks_of_a_folder_by_name(models):
    from teal_jax.harness.tasks import _check_names, _task_manager

    manager = _task_manager(str(TASKS), built_in=False)
    _check_names(["teal_story"], manager)
    with pytest.raises(TealError, match=r"no task called 'teal_stori' .*did you mean teal_story"):
        _check_names(["teal_stori"], manager)
    with pytest.raises(TealError, match=r"no task called 'xyzzy' .*ls tasks"):
        _check_names(["xyzzy"], manager)


def test_errors(models, tmp_path):
    with pytest.raises(ValueError, match="at least one task"):
        run_tasks(models["dense"], [])
    with pytest.raises(TealError, match="no task file"):
        run_tasks(models["dense"], tmp_path / "none.yaml")
    gone = {
        "task": "gone",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "none.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_target": "text",
    }
    with pytest.raises(DataError, match="cannot get the documents of"):
        run_tasks(models["dense"], [gone], progress=False)


def test_the_default_tasks_are_the_harness_s_and_of_every_kind():
    from teal_jax.harness.tasks import _check_names, _task_manager

    manager = _task_manager(None, built_in=True)
    _check_names(DEFAULT_TASKS, manager)
    kinds = {manager.task_index[name].cfg["output_type"] for name in DEFAULT_TASKS}
    assert kinds == {"multiple_choice", "loglikelihood_rolling", "generate_until"}


@pytest.mark.slow
def test_the_command_line_of_the_harness(tmp_path):
    """`--model teal_jax` in lm-eval's own command line, whose results are in the file it writes."""
    arguments = [
        "--model",
        "teal_jax",
        "--model_args",
        "pretrained=embedded,sparsity=0.5,method=uniform,num_tokens=2048",
    ]
    arguments += ["--include_path", str(TASKS), "--tasks", "teal_choice", "--batch_size", "auto"]
    arguments += ["--output_path", str(tmp_path / "out.json")]
    subprocess.run([sys.executable, "-m", "teal_jax.harness", *arguments], cwd=ROOT, check=True, timeout=600)
    [written] = tmp_path.rglob("*.json")
    found = json.loads(written.read_text())
    assert found["results"]["teal_choice"]["acc_norm,none"] > 0.8
    assert found["config"]["target_sparsity"] == 0.5
    assert found["config"]["realised_sparsity"] == pytest.approx(0.5, abs=0.05)


# Rows and tables


def test_scores_are_read_with_groups_and_missing_errors():
    raw = {
        "results": {
            "g": {"alias": "g", "acc,none": 0.5},
            "t": {"alias": "t", "acc,none": 0.25, "acc_stderr,none": 0.1, "sample_len": 4, "note,none": "text"},
            "u": {"ppl,x": 3, "ppl_stderr,x": "N/A"},
        },
        "groups": {"g": {"alias": "g", "acc,none": 0.5}},
        "configs": {"t": {"output_type": "multiple_choice"}, "u": {"output_type": "loglikelihood_rolling"}},
        "n-samples": {"t": {"effective": 3, "original": 4}},
        "n-shot": {"t": 5},
        "versions": {"t": 1.0},
        "higher_is_better": {"t": {"acc": True}},
    }
    assert read_scores(raw) == (
        TaskScore("t", "multiple_choice", "acc", "none", 0.25, 0.1, True, 3, 5, "1.0"),
        TaskScore("u", "loglikelihood_rolling", "ppl", "x", 3.0, None, None, 0, None, ""),
        TaskScore("g", "group", "acc", "none", 0.5, None, None, 0, None, ""),
    )


def test_the_table_puts_sparsities_side_by_side(capsys):
    from rich.console import Console

    def run(target, method, *values):
        scores = tuple(
            TaskScore(task, "multiple_choice", "acc", "none", value, 0.01, True, 9, 0, "1") for task, value in values
        )
        return TaskResults(
            model="m",
            target_sparsity=target,
            realised_sparsity=target and target - 0.01,
            method=method,
            scoring="",
            scores=scores,
            limit=None,
            seed=0,
            versions={},
        )

    runs = [run(0.0, None, ("a", 0.5), ("b", 0.25)), run(0.4, "greedy", ("a", 0.75))]
    Console(width=100).print(task_table(runs))
    text = capsys.readouterr().out
    assert "greedy 40.0 %" in text
    assert "realised 39.0 %" in text
    assert [line.split() for line in text.splitlines() if line.strip().startswith(("a", "b"))] == [
        ["a", "acc", "↑", "9", "0.5", "±", "0.01", "0.75", "±", "0.01"],
        ["b", "acc", "↑", "9", "0.25", "±", "0.01", "-"],
    ]
