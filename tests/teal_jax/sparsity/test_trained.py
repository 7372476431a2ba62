"""What was trained here decodes here: plans of Q-Sparse models, saved and read in both layouts."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import teal_jax
from converters import export_checkpoint, read_gates
from teal_jax.errors import PlanError, SparsityError
from teal_jax.nn.gates import Dense, Threshold, TopK
from teal_jax.nn.q_sparse import q_sparse_gates
from teal_jax.nn.straight_through import StraightThrough
from teal_jax.sparsity.gating import gates_of
from teal_jax.sparsity.plan import SparsityPlan, Trained
from teal_jax.sparsity.trained import trained_plan
from tests.reference import TINY, tiny_model, tiny_tokens

KINDS = {
    "top_k": {"kept": [0.5, 0.3, 0.61, 0.2]},
    "int8": {"kept": 0.37, "int8": True},
    "block": {"kept": 0.5, "block": 8},
    "int8, block": {"kept": 0.25, "block": 16, "int8": True},
}


@pytest.fixture(scope="module")
def lm():
    return tiny_model(dataclasses.replace(TINY, num_layers=1, hidden_act="relu2"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_gives_back_its_gates(lm, kind, tmp_path):
    gates = q_sparse_gates(lm.config, **KINDS[kind])
    plan = SparsityPlan.load(trained_plan(lm, gates, notes={"steps": 3}).save(tmp_path / "plan.json"))
    again = gates_of(plan, lm.config, lm.params["weights"])
    assert jax.tree.structure(again) == jax.tree.structure(gates)
    assert all((a == b).all() for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(gates), strict=True))
    assert json.loads((tmp_path / "plan.json").read_text())["format_version"] == 3
    assert plan.notes == {"steps": 3}


def test_both_layouts_give_the_same_logits(lm, tmp_path):
    plan = trained_plan(lm, q_sparse_gates(lm.config, 0.5))
    sparse = lm.sparsify(plan)
    tokens = tiny_tokens(2, 8)
    expected = sparse.logits(tokens)
    assert np.abs(expected - lm.logits(tokens)).max() > 0.1
    sparse.save(tmp_path / "artifact")
    export_checkpoint(lm.params["weights"], lm.config, tmp_path / "hf", gates=plan.to_dict())
    assert read_gates(tmp_path / "hf") == plan.to_dict()
    for layout in ("artifact", "hf"):
        again = teal_jax.load(tmp_path / layout, progress=False)
        assert again.plan.to_dict() == plan.to_dict()
        np.testing.assert_array_equal(again.logits(tokens), expected)
    # Prompts pass the gates as in training: decoding and scoring agree at every position.
    logits, cache = again.prefill(again.params, jnp.asarray(tokens[:, :5]), again.init_cache(2, 8))
    np.testing.assert_allclose(logits, expected[:, 4], atol=2e-4)
    logits, _ = again.decode_step(again.params, jnp.asarray(tokens[:, 5]), cache)
    np.testing.assert_allclose(logits, expected[:, 5], atol=2e-4)


def test_a_plan_that_training_went_through(lm):
    plan = trained_plan(lm, q_sparse_gates(lm.config, 0.5))
    after = dataclasses.replace(plan, trained=None)
    assert isinstance(gates_of(after, lm.config, lm.params["weights"]), TopK)
    assert after.to_dict()["format_version"] == 2
    recovered = dataclasses.replace(plan, gate="threshold", thresholds=np.full((1, 7), 0.2), trained=Trained())
    gates = gates_of(recovered, lm.config, lm.params["weights"])
    assert isinstance(gates, StraightThrough)
    assert isinstance(gates.gate, Threshold)
    assert SparsityPlan.from_dict(recovered.to_dict()).trained == Trained()


def test_what_does_not_fit_is_refused(lm):
    plan = trained_plan(lm, q_sparse_gates(lm.config, 0.5, block=8))
    with pytest.raises(PlanError, match="expected top-K gates without scales, got Dense"):
        trained_plan(lm, StraightThrough(Dense()))
    with pytest.raises(PlanError, match="threshold or top_k gates, got gate_output"):
        dataclasses.replace(plan, gate="gate_output")
    with pytest.raises(PlanError, match="block goes with top_k gates"):
        dataclasses.replace(plan, gate="threshold")
    with pytest.raises(PlanError, match="block must be a whole number >= 1 or null, got 0"):
        Trained(block=0)
    with pytest.raises(PlanError, match="int8 must be true or false, got 1"):
        Trained(int8=1)
    with pytest.raises(PlanError, match=r"plan.trained: .*int4.*upgrade"):
        SparsityPlan.from_dict(plan.to_dict() | {"trained": {"int4": True}})
    with pytest.raises(SparsityError, match="blocks of 3 channels do not fill 32"):
        gates_of(dataclasses.replace(plan, trained=Trained(block=3)), lm.config, lm.params["weights"])
