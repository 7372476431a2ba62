import dataclasses
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from teal_jax import artifact
from teal_jax.cli import app
from teal_jax.demo import GREEDY, Demo, DemoSettings
from teal_jax.errors import ArtifactError
from teal_jax.hub import EMBEDDED_DIRECTORY, is_model_directory
from teal_jax.sparsity.greedy import GreedySettings
from teal_jax.tables import Columns

SETTINGS = DemoSettings(
    targets=(0.4, 0.6),
    calibration_tokens=256,
    seq_len=64,
    greedy=GreedySettings(step=0.5, max_sparsity=0.65, max_rows=2),
    scored_tokens=200,
    window=32,
    prompt="Once upon a time",
    new_tokens=12,
)


def test_every_stage_on_a_tiny_model(fixtures, halves, tmp_path):
    demo = Demo(fixtures / "tiny_mistral", *halves, tmp_path / "out", settings=SETTINGS, progress=False)
    lm = demo.load()
    calibration = demo.calibrate(lm)
    plans = demo.allocate(lm, calibration)
    assert set(plans) == {(method, target) for method in ("uniform", "greedy") for target in (0.4, 0.6)}
    rows, protocol = demo.compare(lm, plans)
    assert [row.method for row in rows] == ["dense", "uniform", "greedy", "uniform", "greedy"]
    assert all(abs(row.realised - row.target) < 0.1 for row in rows)
    assert "200 held-out tokens" in protocol
    fast = lm.sparsify(plans["greedy", 0.4])
    seen = []
    told = demo.talk([lm, fast], lambda i, piece: seen.append((i, piece.text)))
    assert [i for i, _ in seen[:2]] == [0, 1]  # in turn
    assert told[1].text == "".join(text for i, text in seen if i == 1)
    demo.save(fast, calibration)
    assert demo.reload(told[1].tokens) == len(told[1].tokens) <= 12
    saved = artifact.saved_calibration(demo.artifact)
    assert saved is not None
    assert saved.path is not None
    plots = demo.draw(rows, plans["greedy", 0.4])
    assert all(path.exists() for path in plots)
    # Again, over its own artifact.
    demo.save(fast, calibration)
    stages = ["import", "calibrate", "allocate", "perplexity", "generate", "save", "reload", "plots"]
    assert list(demo.seconds) == stages


def test_another_directory_is_not_overwritten(fixtures, halves, tmp_path):
    (tmp_path / "out" / "model").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="not a saved model"):
        Demo(fixtures / "tiny_mistral", *halves, tmp_path / "out", settings=SETTINGS)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="is a file"):
        Demo(fixtures / "tiny_mistral", *halves, tmp_path / "file", settings=SETTINGS)


def test_the_shown_target_is_one_that_is_compared(fixtures, halves, tmp_path):
    with pytest.raises(ValueError, match="shown"):
        Demo(fixtures / "tiny_mistral", *halves, tmp_path, settings=dataclasses.replace(SETTINGS, shown=0.3))


def arguments(fixtures, halves, tmp_path, *more):
    named = ["--model", fixtures / "tiny_mistral", "--calibration-data", halves[0], "--data", halves[1]]
    return ["demo", *map(str, named), "--out", str(tmp_path / "out"), "--prompt", "Once", "-n", "8", *more]


@pytest.fixture
def quick(monkeypatch):
    """The command with settings for a tiny model."""
    monkeypatch.setattr("teal_jax.demo.DemoSettings", lambda: SETTINGS)


def test_the_command_shows_everything(quick, fixtures, halves, tmp_path):
    run = CliRunner().invoke(app, arguments(fixtures, halves, tmp_path))
    assert run.exit_code == 0, run.output
    for text in ("tiny_mistral", "40.0 %", "uniform", "tok/s", "the same", "perplexity.png", "plan.png"):
        assert text in run.stdout, text
    assert "Calibrating" in run.stderr


def test_json_is_one_object(quick, fixtures, halves, tmp_path):
    run = CliRunner().invoke(app, arguments(fixtures, halves, tmp_path, "--json", "--quiet"))
    assert run.exit_code == 0, run.output
    values = json.loads(run.stdout)
    assert len(values["quality"]) == 5
    assert values["sparse"]["text"]
    assert values["dense"]["tokens_per_second"] > 0
    assert values["seconds"]["total"] >= sum(s for stage, s in values["seconds"].items() if stage != "total") - 0.1
    assert values["versions"]["jax"]
    assert np.shape(values["plan"]["sparsity"]) == (2, 7)


def test_quiet_leaves_table_and_paths(quick, fixtures, halves, tmp_path):
    run = CliRunner().invoke(app, arguments(fixtures, halves, tmp_path, "--quiet"))
    assert run.exit_code == 0, run.output
    assert not run.stderr
    assert "realised" in run.stdout
    assert "tok/s" not in run.stdout
    assert f"plot: {tmp_path / 'out' / 'plan.png'}" in run.stdout


def test_columns_grow():
    from rich.console import Console

    columns = Columns("Once", ["dense", "40 %"])
    columns.add(0, " upon", 0.0, None)
    columns.add(0, " a time", 12.3, "length")
    console = Console(width=60)
    with console.capture() as captured:
        console.print(columns)
    shown = captured.get()
    assert "Once upon a time" in shown
    assert "12 tok/s" in shown
    assert "compiling" in shown


@pytest.mark.slow
@pytest.mark.skipif(not is_model_directory(EMBEDDED_DIRECTORY), reason="no embedded model in this checkout")
def test_the_real_thing(monkeypatch, tmp_path):
    # The embedded model, its halves and every target; an eighth of the scored tokens tells the methods apart as well.
    greedy = dataclasses.replace(GREEDY, max_rows=1)
    fewer = DemoSettings(calibration_tokens=4096, greedy=greedy, scored_tokens=1024, new_tokens=32)
    monkeypatch.setattr("teal_jax.demo.DemoSettings", lambda: fewer)
    run = CliRunner().invoke(app, ["demo", "--json", "--quiet", "--out", str(tmp_path)])
    assert run.exit_code == 0, run.output
    values = json.loads(run.stdout)
    ppl = {(row["method"], row["target"]): row["ppl"] for row in values["quality"]}
    assert len(ppl) == 9
    assert ppl["greedy", 0.4] < 2 * ppl["dense", 0.0]
    assert all(ppl["greedy", target] <= ppl["uniform", target] * 1.02 for target in (0.25, 0.4, 0.5, 0.65))
