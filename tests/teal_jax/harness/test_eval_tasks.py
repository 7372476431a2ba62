"""`teal eval --tasks`: the harness's tasks beside a sweep."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from teal_jax.cli import app
from teal_jax.cli.eval_tasks import parse_tasks
from teal_jax.errors import TealError
from teal_jax.harness import extra
from teal_jax.harness.tasks import DEFAULT_TASKS

CHOICE = Path(__file__).parent / "tasks" / "teal_choice.yaml"


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(extra.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TealError, match="lm-eval") as error:
        parse_tasks("piqa")
    assert "teal-jax[eval]" in str(error.value)


def test_names():
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")
    assert parse_tasks("piqa, gsm8k,piqa") == ["piqa", "gsm8k"]
    assert parse_tasks("default") == list(DEFAULT_TASKS)
    with pytest.raises(ValueError, match="at least one task"):
        parse_tasks(" ,")


def test_every_cell_is_scored_once_and_kept(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed (extra eval)")
    arguments = ["eval", "embedded", "-s", "0,0.5", "--method", "uniform", "--max-tokens", "512", "--prompts", "0"]
    arguments += ["--tasks", str(CHOICE), "--task-limit", "3", "-o", str(tmp_path / "run"), "--json"]
    first = CliRunner().invoke(app, arguments)
    assert first.exit_code == 0, first.output
    runs = json.loads(first.stdout)["tasks"]
    assert [(run["method"], run["target_sparsity"]) for run in runs] == [(None, 0), ("uniform", 0.5)]
    assert runs[1]["realised_sparsity"] == pytest.approx(0.5, abs=0.03)
    assert {score["metric"] for score in runs[0]["scores"]} == {"acc", "acc_norm"}
    kept = sorted((tmp_path / "run" / "tasks").iterdir())
    assert [file.name.split("-")[0] for file in kept] == ["dense", "uniform"]
    times = [file.stat().st_mtime_ns for file in kept]
    again = CliRunner().invoke(app, arguments)
    assert json.loads(again.stdout)["tasks"] == runs
    assert [file.stat().st_mtime_ns for file in kept] == times
