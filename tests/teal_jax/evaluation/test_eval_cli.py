"""`teal eval` as users run it, and the page it leaves, opened in a browser."""

import json
import re
import shutil

import pytest

from teal_jax.cli.evaluation import parse_methods
from teal_jax.evaluation.page import render
from teal_jax.evaluation.report import EvaluationReport
from teal_jax.sparsity.allocation import METHODS
from tests.teal_jax.command import ok, teal
from tests.teal_jax.evaluation.browser import Browser, find_browser


@pytest.fixture(scope="module")
def arguments(fixtures, halves, tmp_path_factory):
    """Of one small evaluation, without its directory."""
    first, second = halves[0], tmp_path_factory.mktemp("documents") / "second.txt"
    # Documents enough for an interval.
    second.write_text("<|endoftext|>".join(re.findall(r"\S.{50}", halves[1].read_text(), re.DOTALL)))
    sizes = ("-s", "0,0.3,0.6", "--context", 32, "--window", 32, "--prompts", 3)
    return "eval", fixtures / "tiny_mistral", "--data", second, "--calibration-data", first, *sizes


@pytest.fixture(scope="module")
def evaluated(arguments, tmp_path_factory):
    """A finished evaluation's directory, and what it printed."""
    path = tmp_path_factory.mktemp("evaluated") / "run"
    return path, ok(teal(*arguments, "-o", path))


def test_it_leaves_a_report_and_says_where(evaluated):
    path, run = evaluated
    assert {"report.json", "report.html", "calibration.npz", "cells"} <= {file.name for file in path.iterdir()}
    assert str(path / "report.html") in run.stdout
    shown = " ".join(run.stdout.split())  # however wide the terminal
    words = ("greedy", "uniform", "60 %", "realised", "Loss as a share of greedy's")
    assert not [word for word in words if word not in shown]
    assert "prompts are too few" in run.stdout
    assert "coarser than the library's default" in run.stdout
    assert "greedy 60 %: scoring" in run.stderr  # a bar


def test_its_json_holds_everything(evaluated):
    values = json.loads((evaluated[0] / "report.json").read_text())
    assert [(row["method"], row["target"]) for row in values["rows"]] == [
        ("dense", 0),
        ("greedy", 0.3),
        ("uniform", 0.3),
        ("greedy", 0.6),
        ("uniform", 0.6),
    ]
    dense, greedy = values["rows"][0], values["rows"][3]
    assert dense["kl"] == 0
    assert dense["agreement"] == 1
    assert greedy["realised"] == pytest.approx(0.6, abs=0.05)
    assert greedy["bits_per_byte"] > 0
    assert greedy["ppl_interval"][0] < greedy["ppl"] < greedy["ppl_interval"][1]
    assert len(greedy["depth_error"]) == 2
    assert len(values["activations"]) == 8
    assert values["made"]["seeds"] == {"calibration": 0, "sampling and bootstrap": 0}
    assert {"python", "teal_jax", "jax"} <= set(values["made"]["versions"])
    assert values["calibration"]["overlap"] == {"of_evaluation": 0, "of_calibration": 0}
    assert len(values["samples"]["texts"]) == 5


def test_no_folder_of_this_machine_is_told(arguments, evaluated):
    text = (evaluated[0] / "report.json").read_text() + (evaluated[0] / "report.html").read_text()
    assert str(arguments[3].parent) not in text
    assert str(arguments[1].parent) not in text


def test_the_same_command_goes_on_and_another_is_refused(arguments, evaluated, tmp_path):
    path = evaluated[0]
    before = json.loads((path / "report.json").read_text())
    run = ok(teal(*arguments, "-o", path))
    after = json.loads((path / "report.json").read_text())
    assert "scoring" not in run.stderr
    assert "Calibrating" not in run.stderr
    assert after["rows"] == before["rows"]
    copy = shutil.copytree(path, tmp_path / "copy")  # what it writes is another report
    cut = [*arguments, "-o", copy, "--measured", "--method", "greedy,wina"]
    assert "Not measured: wina 30 %, wina 60 %." in " ".join(ok(teal(*cut)).stdout.split())
    run = teal(*arguments, "-o", path, "--window", 16)
    assert run.exit_code == 3
    assert "another configuration" in run.stderr


def test_a_directory_of_its_own_by_default(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dense = [*arguments[:6], "-s", "0", "--prompts", 0, "--json"]
    first = json.loads(ok(teal(*dense)).stdout)
    [folder] = (tmp_path / "teal-eval").iterdir()
    assert folder.name.startswith("tiny_mistral-")
    assert [row["method"] for row in first["rows"]] == ["dense"]
    assert first["activations"] == []
    ok(teal(*dense, "--context", 30))
    assert len(list((tmp_path / "teal-eval").iterdir())) == 2


def test_a_calibration_of_another_model_is_refused(arguments, evaluated, fixtures, tmp_path):
    kept = evaluated[0] / "calibration.npz"
    other = ("eval", fixtures / "tiny_llama3", *arguments[2:4], "--context", 32, "--window", 32)
    run = teal(*other, "--calibration", kept, "-s", "0.4", "-o", tmp_path / "b")
    assert run.exit_code == 3
    assert "another model" in run.stderr


def test_a_sweep_not_begun_has_nothing_to_report(arguments, tmp_path):
    run = teal(*arguments, "-o", tmp_path / "run", "--measured")
    assert run.exit_code == 3
    assert "no cell has been measured in" in run.stderr
    assert not (tmp_path / "run").exists()


def test_overlap_is_refused_and_leaves_no_directory(arguments, tmp_path):
    first = arguments[arguments.index("--calibration-data") + 1]
    (tmp_path / "copy.txt").write_text(first.read_text())
    given = list(arguments)
    given[given.index("--data") + 1] = tmp_path / "copy.txt"
    run = teal(*given, "-o", tmp_path / "run")
    assert run.exit_code == 3
    assert "score text that the calibration has not seen" in run.stderr
    assert not (tmp_path / "run").exists()


def test_rendered_again(evaluated, tmp_path):
    path = tmp_path / "kept.json"
    path.write_text((evaluated[0] / "report.json").read_text())
    run = ok(teal("eval", "--render", path, "--plot", tmp_path / "ppl.png"))
    assert (tmp_path / "kept.html").read_text() == (evaluated[0] / "report.html").read_text()
    assert (tmp_path / "ppl.png").exists()
    assert "greedy" in run.stdout
    run = ok(teal("eval", "--render", path, "-o", tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "kept.html").exists()
    assert teal("eval", "--render", tmp_path / "missing.json").exit_code == 3


def test_methods():
    assert parse_methods("uniform, greedy,uniform") == ["uniform", "greedy"]
    assert parse_methods("all") == list(METHODS)
    with pytest.raises(ValueError, match=r"got .nonsense"):
        parse_methods("greedy,nonsense")


# The page


@pytest.fixture(scope="module")
def page(evaluated, tmp_path_factory):
    """A page with a name and notes that must be escaped, too."""
    report = EvaluationReport.load(evaluated[0] / "report.json")
    evil = "<script>throw 1</script>"
    fields = report.to_dict() | {"model": f"tiny {evil}", "notes": [*report.notes, evil]}
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(render(EvaluationReport(**fields)), "utf-8")
    return path


def test_the_page_needs_nothing_from_elsewhere(page):
    text = page.read_text("utf-8")
    assert "<script" not in text
    assert "src=" not in text.replace("default-src", "")
    links = re.findall(r'(?:href|url)\s*[=(]\s*["\']?([^"\')\s]+)', text)
    assert all(link.startswith(("#", "data:")) for link in links)


def test_ids_are_unique(page):
    ids = re.findall(r'\bid="([^"]*)"', page.read_text("utf-8"))
    assert len(ids) == len(set(ids)) > 100


BOXES = """
[...document.querySelectorAll("figure svg")].map(svg => {
  const shapes = [...svg.querySelectorAll("path, use, image, text")].map(s => s.getBoundingClientRect());
  const box = svg.getBoundingClientRect();
  return {label: svg.getAttribute("aria-label"), width: box.width, height: box.height,
          shapes: shapes.filter(s => s.width > 0 || s.height > 0).length,
          drawn: [...svg.querySelectorAll("g[id*='line2d'] path, g[id*='QuadMesh'] path, g[id*='patch'] path")]
            .filter(p => p.getBBox().width > 0 && p.getBBox().height > 0).length};
})
"""


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, False), (1280, True)], ids=["wide", "narrow", "dark"])
def test_every_plot_is_drawn_in_a_browser(page, width, dark):
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium here")
    with Browser(program, width=width, dark=dark) as browser:
        browser.open(page)
        boxes = browser.evaluate(BOXES)
        # Five quality figures, two depths, greedy's plans, four sites.
        assert len(boxes) == 12
        for box in boxes:
            assert box["width"] > 200, box
            assert box["height"] > 100, box
            assert box["shapes"] > 20, box
            assert box["drawn"] > 1, box
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        assert browser.evaluate("document.querySelectorAll('#quality tbody tr').length") == 5
        ink = browser.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
        assert (ink == "rgb(154, 161, 168)") is dark, ink
        assert not browser.problems
        assert all(url.startswith(("file:", "data:")) for url in browser.requests)


def test_the_browser_test_sees_what_is_wrong(page, tmp_path):
    program = find_browser()
    if program is None:
        pytest.skip("no Chromium here")
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text("utf-8").replace("</main>", '<img src="missing.png"><script>x.y</script></main>'))
    with Browser(program) as browser:
        browser.open(broken)
        assert browser.problems
