import json
import math

import numpy as np
import pytest
from rich.console import Console

from teal_jax.analysis.plots import draw
from teal_jax.analysis.rows import Rows
from teal_jax.analysis.run import WHAT, analyse
from teal_jax.analysis.tables import tables
from teal_jax.errors import DataError
from tests.reference import tiny_tokens
from tests.teal_jax.command import teal

SIZES = ("--seq-len", 24, "--tokens", 192, "--calibration-tokens", 192, "--batches", "1,2", "--quiet")


@pytest.fixture(scope="module")
def model(fixtures):
    return fixtures / "tiny_mistral"


@pytest.fixture
def published(tmp_path):
    path = tmp_path / "greedy_sparsities.json"
    shares = np.random.default_rng(0).uniform(0.3, 0.6, (5, 7)).tolist()
    path.write_text(json.dumps({"Some-Model": {"0.4": shares}}))
    return path


@pytest.fixture(scope="module")
def everything(model, halves, tmp_path_factory):
    folder = tmp_path_factory.mktemp("analysis")
    texts = ("--calibration-data", halves[0], "--data", halves[1])
    run = teal("analyse", model, *texts, *SIZES, "-s", "0.4,0.6", "--method", "uniform", "-o", folder / "new", "--json")
    assert run.exit_code == 0, run.output + repr(run.exception)
    return json.loads(run.stdout), folder / "new"


def test_everything_at_once(everything):
    values = everything[0]
    assert values["model"] == "tiny_mistral"
    assert [row["rule"] for row in values["up"]][:4] == [
        "input",
        "output, by gate",
        "output, by hidden",
        "input and down",
    ]
    assert {row["target"] for row in values["distribution"]} == {0.4, 0.6}
    assert {row["batch"] for row in values["batch"]} == {1, 2}
    assert {"all", "second half", "all but the first 1"} <= {row["policy"] for row in values["prefill"]}
    for rows in (values["up"], values["prefill"], values["batch"]):
        for row in rows:
            excess = row["cost"]["excess"]
            assert row["cost"]["ppl"] == pytest.approx(values["dense_ppl"] * math.exp(excess), rel=1e-4)
    assert {"jax", "python"} <= set(values["versions"])
    assert values["hardware"].startswith("CPU")
    assert values["setting"]["scored_tokens"] == 8 * 12


def test_files(everything):
    values, folder = everything
    written = json.loads((folder / "analysis-tiny_mistral.json").read_text())
    assert written == values
    for name in WHAT:
        picture = folder / f"analysis-tiny_mistral-{name}.png"
        assert picture.read_bytes().startswith(b"\x89PNG\r\n")
        assert picture.stat().st_size > 5000


def test_no_machine_path_in_the_file(everything, model, halves):
    text = (everything[1] / "analysis-tiny_mistral.json").read_text()
    assert str(model.parent) not in text
    assert str(halves[0].parent) not in text


def test_one_analysis_beside_published_tables(model, halves, published):
    texts = ("--calibration-data", halves[0], "--data", halves[1])
    wish = ("--what", "distribution", "--published", published, "--search-rows", 2)
    run = teal("analyse", model, *texts, *SIZES, *wish, "-s", "0.4")
    assert run.exit_code == 0, run.output + repr(run.exception)
    assert "Some-Model" in run.stdout
    assert "Batched" not in run.stdout


def test_usage_errors(model, published):
    wrong = [
        ("--sparsity", "0,0.4"),
        ("--sparsity", "1"),
        ("--batches", "1,3,4"),
        ("--batches", "two"),
        ("--batches", "0,4"),
        ("--what", "everything"),
        ("--what", "up", "--published", published),
    ]
    for arguments in wrong:
        run = teal("analyse", model, *arguments)
        assert run.exit_code == 2, run.output
        assert not run.stdout


def test_known_text_is_refused(model, halves, tmp_path):
    run = teal("analyse", model, "--calibration-data", halves[0], "--data", halves[0])
    assert run.exit_code == 3
    assert "is the calibration text, too" in run.stderr
    copy = tmp_path / "copy.txt"
    copy.write_text(halves[0].read_text())
    run = teal("analyse", model, "--calibration-data", halves[0], "--data", copy, *SIZES)
    assert run.exit_code == 3
    assert "is the calibration text, too" in run.stderr


def test_too_little_text_is_one_line_and_a_hint(model, halves):
    texts = ("--calibration-data", halves[0], "--data", halves[1])
    run = teal("analyse", model, *texts, *SIZES, "--batches", "1,64", "--what", "batch")
    assert run.exit_code == 3
    assert "expected at least 64 rows" in run.stderr
    assert "hint: raise --tokens" in run.stderr


def test_tables_fit_a_log(lm, calibration, rows, tmp_path):
    found = analyse(
        lm, calibration, rows, sparsities=[0.25, 0.5], method="uniform", batches=(1, 2), published=None, progress=False
    )
    console = Console(width=100, record=True, file=(tmp_path / "log").open("w"))
    for item in tables(found):
        console.print(item, markup=False)
    text = console.export_text()
    assert "…" not in text
    for words in ("output, by gate", "all but the first 4", "union, fitted", "Greedy sparsities by depth at 50 %"):
        assert words in text
    assert len(draw(found, tmp_path)) == 4


def test_wrong_arguments(lm, calibration, rows):
    wrong = [
        ({"what": ["up", "down"]}, "what must be of up, distribution, prefill, batch, got down"),
        ({"sparsities": []}, "sparsities must lie in"),
        ({"sparsities": [0.0, 0.5]}, "sparsities must lie in"),
        ({"method": "wina"}, "method must be greedy or uniform"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            analyse(lm, calibration, rows, progress=False, **arguments)


def test_a_broken_model(lm, calibration):
    import dataclasses

    import jax

    weights = jax.tree.map(lambda leaf: leaf * np.nan, lm.params["weights"])
    broken = dataclasses.replace(lm, params=lm.params | {"weights": weights})
    with pytest.raises(DataError, match="is not finite"):
        analyse(broken, calibration, Rows(tiny_tokens(1, 12), 6, "tokens"), progress=False)
