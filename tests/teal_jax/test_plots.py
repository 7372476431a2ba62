import subprocess
import sys

import numpy as np
import pytest

from teal_jax.plots import plot_perplexity, plot_plan
from teal_jax.sparsity.plan import SparsityPlan


def is_png(path):
    return path.read_bytes().startswith(b"\x89PNG\r\n") and path.stat().st_size > 5000


def make_plan(layers):
    rng = np.random.default_rng(0)
    return SparsityPlan(
        sparsity=rng.uniform(0, 1, (layers, 7)),
        thresholds=rng.uniform(0, 1, (layers, 7)),
        target=0.4,
        method="greedy",
        fingerprint="0" * 16,
        projection_sizes=(4, 2, 2, 4, 8, 8, 8),
    )


@pytest.mark.parametrize("layers", [1, 6, 32, 80])
def test_plan_at_any_depth(tmp_path, layers):
    path = plot_plan(make_plan(layers), tmp_path / "new" / "plan.png")
    assert path == tmp_path / "new" / "plan.png"
    assert is_png(path)


def test_perplexity_with_and_without_dense(tmp_path):
    curves = {"uniform": [(0.26, 4.0), (0.5, 9.0)], "greedy": [(0.25, 3.8), (0.5, 7.0)]}
    assert is_png(plot_perplexity(curves, tmp_path / "a.png", dense=3.5))
    assert is_png(plot_perplexity(curves, tmp_path / "b.png"))


def test_perplexity_over_orders_of_magnitude(tmp_path):
    assert is_png(plot_perplexity({"uniform": [(0.3, 4.0), (0.9, 40000.0)]}, tmp_path / "a.png", dense=3.5))


def test_perplexity_of_the_dense_model_alone(tmp_path):
    assert is_png(plot_perplexity({}, tmp_path / "a.png", dense=3.5))


def test_matplotlib_is_imported_when_something_is_drawn():
    program = "import sys, teal_jax.plots; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0
