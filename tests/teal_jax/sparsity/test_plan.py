import json

import numpy as np
import pytest

from teal_jax.errors import PlanError, SparsityError
from teal_jax.sparsity.plan import SparsityPlan, check_sparsity, model_sparsity
from tests.reference import TINY


def make_plan(**changes):
    rng = np.random.default_rng(0)
    fields = {
        "sparsity": rng.uniform(0, 1, (2, 7)),
        "thresholds": rng.uniform(0, 3, (2, 7)),
        "target": 0.4,
        "method": "greedy",
        "fingerprint": TINY.fingerprint,
        "projection_sizes": TINY.projection_sizes,
        "model": "tiny",
        "notes": {"seed": 0},
    }
    return SparsityPlan(**(fields | changes))


def test_model_sparsity_is_weighted_by_size():
    plan = make_plan(sparsity=np.tile([1, 0, 0, 0, 0, 0, 0.5], (2, 1)))
    q = 32 * 32
    total = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 80
    expected = (q + 0.5 * 32 * 80) / total
    assert plan.model_sparsity == pytest.approx(expected)
    assert model_sparsity(TINY, plan.sparsity) == pytest.approx(expected)


def test_json_round_trip_is_exact(tmp_path):
    plan = make_plan()
    loaded = SparsityPlan.load(plan.save(tmp_path / "plan.json"))
    np.testing.assert_array_equal(loaded.thresholds, plan.thresholds)
    np.testing.assert_array_equal(loaded.sparsity, plan.sparsity)
    assert (loaded.target, loaded.method, loaded.notes, loaded.fingerprint) == (
        0.4,
        "greedy",
        {"seed": 0},
        TINY.fingerprint,
    )
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]


def test_plans_are_frozen():
    with pytest.raises(ValueError, match="read-only"):
        make_plan().sparsity[0, 0] = 1


@pytest.mark.parametrize("value", [-0.1, 1, 1.0, 40, float("nan")])
def test_sparsity_range(value):
    with pytest.raises(SparsityError, match=r"\[0, 1\)"):
        check_sparsity(value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": np.zeros((2, 6))}, r"shape \[layers, 7\]"),
        ({"thresholds": np.zeros((3, 7))}, "2 layers, thresholds 3"),
        ({"thresholds": np.full((2, 7), np.nan)}, "finite"),
        ({"sparsity": np.full((2, 7), -0.1)}, ">= 0"),
        ({"sparsity": [["a"] * 7]}, "numbers"),
        ({"projection_sizes": (1, 2)}, "7 sizes"),
    ],
)
def test_malformed_plans(changes, message):
    with pytest.raises(PlanError, match=message):
        make_plan(**changes)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: f.update(format_version=99), "upgrade teal_jax"),
        (lambda f: f.pop("format_version"), "no format_version"),
        (lambda f: f.pop("thresholds"), "lacks thresholds"),
        (lambda f: f.update(projections=["q"]), "projections must be"),
    ],
)
def test_files_that_are_not_plans(tmp_path, edit, message):
    path = make_plan().save(tmp_path / "plan.json")
    fields = json.loads(path.read_text())
    edit(fields)
    path.write_text(json.dumps(fields))
    with pytest.raises(PlanError, match=message):
        SparsityPlan.load(path)


def test_unreadable_files(tmp_path):
    with pytest.raises(PlanError, match="no plan at"):
        SparsityPlan.load(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(PlanError, match="not a plan"):
        SparsityPlan.load(tmp_path / "broken.json")
    with pytest.raises(PlanError, match="cannot write"):
        make_plan().save(tmp_path / "missing" / "plan.json")
