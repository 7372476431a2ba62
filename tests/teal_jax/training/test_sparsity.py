import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from teal_jax.errors import PlanError, SparsityError
from teal_jax.nn.block_top_k import BlockTopK
from teal_jax.nn.gates import Dense, Threshold, TopK
from teal_jax.nn.per_site import PerSite
from teal_jax.nn.relu import Relu
from teal_jax.nn.straight_through import StraightThrough
from teal_jax.sparsity.plan import Score, SparsityPlan, Trained
from teal_jax.training.sparsity import moved, plan_after, q_sparse_plan, relu_plan, training_gates, with_thresholds
from tests.teal_jax.training.tiny import CONFIG, model


def threshold_plan(value=0.5, sparsity=0.4, **changes):
    plan = dataclasses.replace(
        q_sparse_plan(model(), 1 - sparsity),
        trained=None,
        gate="threshold",
        method="uniform",
        thresholds=np.full((1, 7), value),
    )
    return dataclasses.replace(plan, **changes)


def test_the_plan_of_q_sparse():
    plan = q_sparse_plan(model(), 0.75)
    assert (plan.gate, plan.trained) == ("top_k", Trained())
    assert plan.sparsity.tolist() == [[0.25] * 7]
    assert plan.target == plan.model_sparsity == pytest.approx(0.25)
    blocks = q_sparse_plan(model(), 0.5, block=8, int8=True)
    assert blocks.trained == Trained(int8=True, block=8)
    gates = training_gates(blocks, CONFIG, model().params["weights"])
    assert isinstance(gates[0][6].gate.gate, BlockTopK)


@pytest.mark.parametrize("kept", [0.0, -0.1, 1.1, np.nan, [0.5] * 3])
def test_k_outside_its_range(kept):
    with pytest.raises(SparsityError):
        q_sparse_plan(model(), kept)


def test_gates_of_a_training():
    weights = model().params["weights"]
    assert isinstance(training_gates(None, CONFIG, weights), Dense)
    top = training_gates(q_sparse_plan(model(), 0.5), CONFIG, weights)
    assert isinstance(top, StraightThrough)
    assert isinstance(top[0][0].gate, TopK)
    assert [gate.gate.count.tolist() for gate in top[0]] == [8, 8, 8, 8, 8, 8, 12]
    plan = threshold_plan(arrays={"bias.0.down": np.ones(16, np.float32)})
    biased = training_gates(plan, CONFIG, weights)
    new = with_thresholds(biased, jnp.full((1, 7), 0.75))
    assert isinstance(new.gate.gate, Threshold)
    assert new.gate.gate.value.tolist() == [[0.75] * 7]
    assert new.gate.bias[0][6].tolist() == [1.0] * 16


def test_equal_gates_of_a_site_are_one():
    weights = model().params["weights"]
    shared, apart = (q_sparse_plan(model(), kept) for kept in (0.5, [0.5, 0.5, 0.25, 0.5, 0.5, 0.5, 0.5]))
    gates = training_gates(shared, CONFIG, weights)
    assert isinstance(gates.gate, PerSite)
    q, k, v, o, gate, up, down = (each.gate for each in gates[0])
    assert q is k is v
    assert gate is up
    assert len({id(each) for each in (q, o, gate, down)}) == 4
    assert isinstance(training_gates(apart, CONFIG, weights).gate, TopK)
    # Thresholds that are equal now but have other shares to hold part as they move.
    moving = dataclasses.replace(threshold_plan(), sparsity=apart.sparsity)
    assert isinstance(training_gates(moving, CONFIG, weights).gate, Threshold)
    held = with_thresholds(training_gates(threshold_plan(), CONFIG, weights), jnp.full((1, 7), 0.75))
    assert [float(gate.gate.value) for gate in held[0]] == [0.75] * 7


def test_relu_gates_that_are_not_passed_straight_through():
    gates = training_gates(relu_plan(model()), CONFIG, model().params["weights"], straight_through=0.0)
    assert isinstance(gates.gate, Relu)
    assert gates[0][6].slope == gates.on(jnp.ones((1, 1), bool)).slope == 0
    plan = SparsityPlan.from_dict(relu_plan(model()).to_dict())
    assert plan.gate == "relu"
    assert isinstance(model().sparsify(plan).params["gates"], StraightThrough)


def test_plans_that_follow_the_weights_are_refused():
    weights = model().params["weights"]
    for plan in (threshold_plan(score=Score(2)), threshold_plan(gate="gate_output")):
        with pytest.raises(PlanError, match=r"cannot be trained under|threshold or top_k"):
            training_gates(plan, CONFIG, weights)
    with pytest.raises(PlanError, match="another model"):
        training_gates(q_sparse_plan(model(), 0.5), dataclasses.replace(CONFIG, d_mlp=32), weights)


def test_thresholds_find_the_quantile_that_drops_their_share():
    x = np.abs(np.random.default_rng(0).normal(size=4096))
    target = jnp.array([0.0, 0.25, 0.5, 0.9])
    thresholds = jnp.full(4, 0.3)
    for _ in range(60):
        dropped = jnp.array([(x <= float(t)).mean() for t in thresholds])
        thresholds = moved(thresholds, dropped, target)
    assert float(thresholds[0]) == pytest.approx(0.3)
    np.testing.assert_allclose(thresholds[1:], np.quantile(x, [0.25, 0.5, 0.9]), rtol=0.02)


def test_the_plan_of_a_trained_model():
    plan = threshold_plan(notes={"seed": 3})
    found = plan_after(plan, np.full((1, 7), 0.2, np.float32), {"steps": 5})
    assert found.thresholds.tolist() == np.full((1, 7), 0.2, np.float32).tolist()
    assert found.trained == Trained()
    assert found.notes == {"seed": 3, "training": {"steps": 5}}
    assert (plan_after(plan, None, {}).thresholds == plan.thresholds).all()
