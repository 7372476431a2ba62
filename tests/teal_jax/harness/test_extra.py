"""Without the extra `eval`."""

import importlib.util
import subprocess
import sys

import pytest

from teal_jax.errors import TealError
from teal_jax.harness import __main__, extra, tasks
from tests.reference import tiny_model
from tests.test_architecture import ROOT


@pytest.fixture
def without(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "lm_eval" else find(name))


@pytest.mark.usefixtures("without")
def test_the_error_names_the_extra():
    with pytest.raises(TealError, match=r"pip install 'teal-jax\[eval\]'"):
        extra.require_lm_eval()
    with pytest.raises(TealError, match=r"teal-jax\[eval\]"):
        tasks.run_tasks(tiny_model(), ["piqa"])


@pytest.mark.usefixtures("without")
def test_the_command_line_says_so_in_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        __main__.main()
    assert stop.value.code == 3
    assert capsys.readouterr().err == "error: lm-eval is not installed (pip install 'teal-jax[eval]')\n"


def test_nothing_of_it_is_needed_to_import_the_package():
    program = (
        "import sys, teal_jax.harness.tasks, teal_jax.harness.results; print({'lm_eval', 'datasets'} & {*sys.modules})"
    )
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
