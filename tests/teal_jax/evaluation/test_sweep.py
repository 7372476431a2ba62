import dataclasses
import json

import numpy as np
import pytest

import teal_jax
from teal_jax.errors import ArtifactError, SparsityError
from teal_jax.evaluation.cell import Cell
from teal_jax.evaluation.report import EvaluationReport, make_report
from teal_jax.evaluation.run_directory import RunDirectory, digest, weights_digest, write_json
from teal_jax.evaluation.settings import EvaluationSettings
from teal_jax.evaluation.statistics import Statistics
from teal_jax.evaluation.sweep import sweep
from teal_jax.evaluation.table import columns_of, evaluation_table
from teal_jax.evaluation.text import read_text
from tests.reference import tiny_model, tiny_tokens

SETTINGS = EvaluationSettings(prompts=3, prompt_tokens=6, new_tokens=8, resamples=200)
CONFIGURATION = {"model": "tiny", "text": {"tokens": 3}, "seeds": (0, 1)}


@pytest.fixture(scope="module")
def lm():
    return tiny_model(scale=5.0)


@pytest.fixture(scope="module")
def calibration(lm):
    return teal_jax.calibrate(lm, tiny_tokens(4, 32, seed=1), progress=False)


@pytest.fixture(scope="module")
def text(lm):
    return read_text(lm, tiny_tokens(30, 20, seed=2), context=12, window=4)


class Asked:
    """Plans a uniform model for any method name, and remembers what it was asked for."""

    def __init__(self, lm, calibration, fails=()):
        self.lm, self.calibration, self.fails = lm, calibration, fails
        self.calls = []

    def __call__(self, method, target):
        self.calls.append((method, target))
        if method in self.fails:
            raise SparsityError(f"{method} cannot", hint="nor later")
        shift = 0.1 if method == "off" else 0
        plan = teal_jax.allocate(self.lm, self.calibration, target + shift, method="uniform")
        return self.lm.sparsify(dataclasses.replace(plan, method=method, target=target))


def run(lm, text, path, sparsify, **changes):
    options = {"methods": ["greedy", "other"], "targets": [0.5, 0, 0.3], "settings": SETTINGS} | changes
    directory = RunDirectory(path, CONFIGURATION)
    return sweep(lm, text, sparsify=sparsify, directory=directory, progress=False, **options)


@pytest.fixture(scope="module")
def swept(lm, text, calibration, tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "new" / "run"
    return path, *run(lm, text, path, Asked(lm, calibration))


def report_of(lm, text, cells, failures, prompted, settings=SETTINGS, calibration=None):
    return make_report(
        lm, text, cells, failures, prompted, settings, calibration=calibration, shared=None, command="teal eval",
        hardware="none", seeds={"all": 0},
    )  # fmt: skip


# Cells and their directory


def test_dense_first_then_by_target(swept):
    _, cells, failures, prompted = swept
    assert [(c.method, c.target) for c in cells] == [
        ("dense", 0),
        ("greedy", 0.3),
        ("other", 0.3),
        ("greedy", 0.5),
        ("other", 0.5),
    ]
    assert not failures
    assert len(prompted.prompts) == len(prompted.dense) == 3


def test_a_cell_agrees_with_perplexity(lm, text, calibration, swept):
    cell = swept[1][3]
    sparse = lm.sparsify(teal_jax.allocate(lm, calibration, 0.5, method="uniform"))
    found = teal_jax.perplexity(sparse, tiny_tokens(30, 20, seed=2), context=12, window=4, progress=False)
    for units in (cell.documents, cell.windows):
        assert sum(units["nll"]) / text.num_tokens == pytest.approx(found.nll, rel=1e-5)
    assert len(cell.documents["nll"]) == 30
    assert cell.realised_sparsity == pytest.approx(found.realised_sparsity, abs=1e-6)
    assert np.shape(cell.realised) == np.shape(cell.sparsity) == (2, 7)
    assert set(cell.repetition) == {"greedy", "sampled"}
    assert [total for _, total in cell.repetition["greedy"]] == [5, 5, 5]


def test_the_same_command_measures_nothing_twice(lm, text, calibration, swept):
    path, cells, _, prompted = swept
    asked = Asked(lm, calibration)
    again, _, same = run(lm, text, path, asked)
    assert not asked.calls
    assert again == cells
    assert same == prompted
    found, failures, _ = run(lm, text, path, asked, methods=["greedy", "third"], targets=[0.3, 0.4], measured=True)
    assert not asked.calls
    assert (found, failures) == (cells[:2], [])


def test_it_goes_on_where_it_ended(lm, text, calibration, tmp_path):
    class Interrupted(Asked):
        def __call__(self, method, target):
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().__call__(method, target)

    with pytest.raises(KeyboardInterrupt):
        run(lm, text, tmp_path / "run", Interrupted(lm, calibration))
    (tmp_path / "run" / "cells" / "other-0.3.json").write_text('{"method": "oth')  # as a crash might leave it
    asked = Asked(lm, calibration)
    cells, _, _ = run(lm, text, tmp_path / "run", asked)
    assert asked.calls == [("other", 0.3), ("greedy", 0.5), ("other", 0.5)]
    assert len(cells) == 5
    assert not list((tmp_path / "run").rglob("*.part"))


def test_more_methods_and_targets_join_in(lm, text, calibration, swept):
    asked = Asked(lm, calibration)
    cells, _, _ = run(lm, text, swept[0], asked, methods=["greedy", "third"], targets=[0.3, 0.4])
    assert asked.calls == [("third", 0.3), ("greedy", 0.4), ("third", 0.4)]
    assert ("other", 0.3) not in [(c.method, c.target) for c in cells]


def test_another_configuration_is_refused(tmp_path):
    RunDirectory(tmp_path / "run", CONFIGURATION)
    assert not (tmp_path / "run").exists()  # nothing was measured: another configuration may still have it
    RunDirectory(tmp_path / "run", CONFIGURATION).begin()
    RunDirectory(tmp_path / "run", CONFIGURATION)
    other = CONFIGURATION | {"text": {"tokens": 4}, "seeds": (0, 2)}
    with pytest.raises(
        ArtifactError, match=r"another configuration: seeds was \[0, 1\], is \[0, 2\]; text.tokens was 3"
    ):
        RunDirectory(tmp_path / "run", other)
    with pytest.raises(ArtifactError, match=r"plan was None, is \{'a': 0,.{40,60}\.\.\. "):
        RunDirectory(tmp_path / "run", CONFIGURATION | {"plan": {"a": 0, "b": [0.5] * 1000}})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(ArtifactError, match="not the directory of a sweep"):
        RunDirectory(tmp_path / "other", CONFIGURATION)
    with pytest.raises(ArtifactError, match="not the directory of a sweep"):
        RunDirectory(tmp_path / "other" / "thesis.tex", CONFIGURATION)
    with pytest.raises(ArtifactError, match="cannot write"):
        write_json(tmp_path / "other" / "thesis.tex" / "x.json", {})


def test_digests(lm):
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 1, "b": 3})
    assert weights_digest(lm) == weights_digest(lm.dense())
    assert weights_digest(lm) != weights_digest(tiny_model(scale=5.0, seed=1))


def test_a_method_without_a_plan_is_told(lm, text, calibration, tmp_path):
    asked = Asked(lm, calibration, fails=("other",))
    cells, failures, prompted = run(lm, text, tmp_path / "run", asked, targets=[0.3])
    assert [(c.method, c.target) for c in cells] == [("dense", 0), ("greedy", 0.3)]
    assert failures == [("other", 0.3, "other cannot")]
    report = report_of(lm, text, cells, failures, prompted)
    assert "other has no plan for 30 %: other cannot." in report.notes


def test_without_prompts(lm, text, calibration, tmp_path):
    settings = dataclasses.replace(SETTINGS, prompts=0)
    cells, failures, prompted = run(
        lm, text, tmp_path / "run", Asked(lm, calibration), targets=[0.3], settings=settings
    )
    assert prompted.prompts == []
    report = report_of(lm, text, cells, failures, prompted, settings)
    assert report.rows[1]["agreement"] is None
    assert report.rows[1]["repetition"] == {}
    assert {"top-1", "repeats", "bits/byte"}.isdisjoint(column.heading for column in columns_of(report))


@pytest.mark.parametrize(
    "wrong",
    [{"prompts": -1}, {"new_tokens": 1}, {"confidence": 1.0}, {"tolerance": -0.1}, {"resamples": 0}],
    ids=str,
)
def test_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        EvaluationSettings(**wrong)


# Statistics and report


def test_rows_against_numpy(text, swept):
    cells = swept[1]
    dense, cell, tokens = cells[0], cells[3], text.num_tokens
    row = Statistics(text, SETTINGS, dense).row(cell)
    assert row.ppl == pytest.approx(np.exp(sum(cell.documents["nll"]) / tokens))
    assert row.ratio == pytest.approx(row.ppl / np.exp(sum(dense.documents["nll"]) / tokens))
    assert row.kl == pytest.approx(sum(cell.documents["kl"]) / tokens)
    assert row.agreement == sum(cell.same) / sum(cell.asked)
    assert row.ppl_interval.low < row.ppl < row.ppl_interval.high
    assert row.weight_bytes_share == cell.weight_bytes / dense.weight_bytes < 1
    assert row.unread == pytest.approx(row.realised, abs=1e-5)
    assert row.bits_per_byte is None
    # Three prompts cannot carry a 95 % interval.
    assert row.agreement_interval is None
    # Paired draws: the ratio is known better than either perplexity.
    width = lambda interval: np.log(interval[1] / interval[0])  # noqa: E731
    assert width(row.ratio_interval) < 0.8 * width(row.ppl_interval)


def test_pairs(text, swept):
    dense, greedy, other = swept[1][:3]
    statistics = Statistics(text, SETTINGS, dense)
    [low, high] = statistics.compared([dense, greedy, other, *swept[1][3:]])
    assert (low.method, low.against, low.target, high.target) == ("other", "greedy", 0.3, 0.5)
    assert low.difference == 0  # they are the same plan
    assert low.difference_interval == (0, 0)
    # A random model may even gain from sparsity: one that has lost something by construction.
    lost = dataclasses.replace(dense, documents={**dense.documents, "nll": [x + 1 for x in dense.documents["nll"]]})
    assert statistics.versus(lost, lost).excess_ratio == pytest.approx(1)
    worse = dataclasses.replace(other, documents={**other.documents, "nll": [x + 1 for x in other.documents["nll"]]})
    found = statistics.versus(worse, greedy)
    assert found.difference == pytest.approx(30 / text.num_tokens)
    assert found.difference_interval.low > 0
    # Nothing was lost: no share of it can be told.
    assert statistics.versus(greedy, dense).excess_ratio is None
    assert statistics.compared([dense, greedy]) == []


def test_a_missed_target_and_too_little_text_are_said(lm, calibration, tmp_path):
    short = read_text(lm, tiny_tokens(1, 40, seed=2), context=12, window=4, max_tokens=60)
    settings = dataclasses.replace(SETTINGS, prompts=30, tolerance=0.03)
    asked = Asked(lm, calibration)
    cells, failures, prompted = run(
        lm, short, tmp_path / "run", asked, methods=["off"], targets=[0.4], settings=settings
    )
    report = report_of(lm, short, cells, failures, prompted, settings)
    said = " ".join(report.notes)
    assert "off did not reach its target of 40 %" in said
    assert "60 tokens were to be scored, there are 39" in said
    assert "it takes 20 documents or windows" in said
    assert "Too little text for 30 prompts" in said
    row = report.rows[1]
    assert not row["reached"]
    assert row["ppl_interval"] is row["kl_interval"] is None
    realised = columns_of(report)[0]
    assert realised.cells[1][0].endswith(" !")
    # Windows of one long document carry an interval, but not a trustworthy one.
    long = read_text(lm, tiny_tokens(1, 120, seed=2), context=12, window=4)
    settings = dataclasses.replace(SETTINGS, prompts=0)
    cells, failures, prompted = run(
        lm, long, tmp_path / "long", asked, methods=["off"], targets=[0.4], settings=settings
    )
    report = report_of(lm, long, cells, failures, prompted, settings)
    assert "fewer than 20 documents" in " ".join(report.notes)
    assert report.rows[1]["ppl_interval"] is not None


def test_own_matrices_count_against_the_target(lm, text, swept):
    _, cells, failures, prompted = swept
    rotated = dataclasses.replace(cells[3], method="turned", unread=0.2)
    report = report_of(lm, text, [cells[0], cells[3], rotated], failures, prompted)
    assert [row["reached"] for row in report.rows] == [True, True, False]
    assert "with its own matrices 20.0 % of the block weights were left unread" in " ".join(report.notes)
    unread = next(column for column in columns_of(report) if column.heading == "unread")
    assert unread.cells[2][0] == "20.0 %"


def test_the_report_survives_its_file(lm, text, calibration, swept, tmp_path):
    report = report_of(lm, text, *swept[1:], calibration=calibration)
    path = write_json(tmp_path / "report.json", report.to_dict())
    again = EvaluationReport.load(path)
    assert again.to_dict() == report.to_dict() == json.loads(path.read_text())
    assert [row["method"] for row in again.rows] == ["dense", "greedy", "other", "greedy", "other"]
    assert len(again.activations) == 8
    assert again.made["versions"]["jax"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "is not JSON"),
        ("[]", "not a report"),
        ('{"format_version": 1}', "not a report"),
        ('{"format_version": 99, "rows": []}', "format version 99"),
        ('{"format_version": 1, "rows": []}', "lacks activations"),
        (None, "no file"),
    ],
)
def test_what_is_no_report(tmp_path, content, message):
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ArtifactError, match=message):
        EvaluationReport.load(path)


def test_the_table_leaves_out_what_does_not_fit(lm, text, swept):
    report = report_of(lm, text, *swept[1:])
    wide = [str(column.header) for column in evaluation_table(report, width=200).columns]
    narrow = [str(column.header) for column in evaluation_table(report, width=60).columns]
    assert {"method", "target", "realised", "ppl", "KL"} <= set(narrow) < set(wide)


def test_cells_are_plain_json(swept):
    cell = swept[1][1]
    assert Cell(**json.loads(json.dumps(cell.to_dict()))) == cell
