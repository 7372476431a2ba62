import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from teal_jax.training.devices import make_mesh
from teal_jax.training.sparsity import q_sparse_plan, training_gates
from teal_jax.training.step import Inputs, Losses, computed_weights, make_program, place_rows
from tests.teal_jax.training.tiny import CONFIG, SETTINGS, model

PLAN = q_sparse_plan(model(), 0.5)


@pytest.fixture(scope="module")
def rows():
    generator = np.random.default_rng(1)
    scored = generator.random((8, 8)) < 0.7
    return generator.integers(0, 64, (8, 9)).astype(np.int32), scored


def gates():
    return training_gates(PLAN, CONFIG, model().params["weights"])


def log_softmax(x):
    x = np.asarray(x, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def test_loss_against_float64(rows):
    tokens, scored = rows
    weights = model().params["weights"]
    settings = dataclasses.replace(SETTINGS, distil=0.25)
    loss = jax.jit(Losses(CONFIG, settings))
    total, parts = loss(weights, Inputs(gates(), None, weights), tokens, scored)
    dense, sparse = (log_softmax(lm.logits(tokens[:, :-1])) for lm in (model(), model().sparsify(PLAN)))
    entropy = -np.take_along_axis(sparse, tokens[:, 1:, None], 2)[..., 0][scored].sum()
    divergence = (np.exp(dense) * (dense - sparse)).sum(axis=-1)[scored].sum()
    assert divergence > 0
    np.testing.assert_allclose(parts["entropy"], entropy, rtol=1e-5)
    np.testing.assert_allclose(parts["divergence"], divergence, rtol=1e-5)
    np.testing.assert_allclose(total, 0.75 * entropy + 0.25 * divergence, rtol=1e-5)
    np.testing.assert_allclose(parts["dropped"], PLAN.sparsity, atol=1e-6)


def run(settings, rows):
    mesh = make_mesh(1)
    program = make_program(CONFIG, settings, mesh, False)
    state = program.start(model().params["weights"], None)
    return program.step(state, Inputs(gates()), *place_rows(mesh, settings.accumulate, *rows))


@pytest.fixture(scope="module")
def whole(rows):
    return run(SETTINGS, rows)


def test_first_update_against_adamw_by_hand(whole):
    # Adam's first step is its rate along the sign of the gradient, so that what is left is the decay, of matrices only.
    state, metrics = whole
    rate = SETTINGS.learning_rate / 3
    for before, after in zip(
        jax.tree.leaves(model().params["weights"]), jax.tree.leaves(state["weights"]), strict=True
    ):
        decay = SETTINGS.weight_decay if before.ndim >= 2 else 0.0
        step = (np.asarray(after, np.float64) - np.asarray(before, np.float64)) / rate + decay * np.asarray(before)
        # Of an embedding row that was not read there is no gradient.
        moved = np.abs(step) > 0.5
        assert moved.mean() > 0.6
        # Adam's epsilon is felt where the gradient is smallest.
        np.testing.assert_allclose(np.abs(step[moved]), 1, atol=0.05)
        assert np.median(np.abs(np.abs(step[moved]) - 1)) < 1e-4
    assert int(state["step"]) == 1
    assert float(metrics["sparsity"]) == pytest.approx(PLAN.target, abs=1e-6)


def test_bitnet_multiplies_with_three_values():
    weights = model().params["weights"]
    settings = dataclasses.replace(SETTINGS, bitnet=True, dtype="bfloat16")
    found = computed_weights(weights, settings)["layers"][0]["mlp"]["up_proj"]["weight"]
    assert found.dtype == jnp.bfloat16
    assert len(np.unique(np.asarray(found, np.float32))) == 3
    plain = computed_weights(weights, dataclasses.replace(settings, bitnet=False))
    assert (plain["embed"]["weight"] == weights["embed"]["weight"].astype(jnp.bfloat16)).all()


def test_the_start_model_is_not_donated(whole):
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(model().params["weights"]))
