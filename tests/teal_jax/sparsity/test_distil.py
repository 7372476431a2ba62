import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import teal_jax
from teal_jax.config import SITE_OF_PROJECTION
from teal_jax.nn.gates import Dense
from teal_jax.sparsity.distil import (
    KEPT_BYTES,
    DistilSettings,
    activation_bytes,
    distil,
    log_norms,
    output_scales,
    soft_gates,
)
from teal_jax.sparsity.divergence import divergence, log_probabilities, mean_divergence
from teal_jax.sparsity.gating import layer_weights
from teal_jax.sparsity.plan import model_sparsity
from tests.reference import TINY, forward, tiny_model, tiny_tokens

TARGET = 0.5
SETTINGS = DistilSettings(steps=30, tokens_per_step=128)


@pytest.fixture(scope="module")
def lm():
    return tiny_model(scale=4.0)


@pytest.fixture(scope="module")
def calibration(lm):
    return teal_jax.calibrate(lm, tiny_tokens(8, 32), progress=False)


@pytest.fixture(scope="module")
def learnt(lm, calibration):
    start = calibration.thresholds(TARGET)
    return distil(lm, calibration.tokens, start, TARGET, settings=SETTINGS, progress=False)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_divergence_matches_float64(lm, calibration):
    thresholds = calibration.thresholds(0.4)
    tokens = calibration.tokens[:2]
    expected = []
    for row in tokens:
        dense, sparse = (log_softmax(forward(lm, row, given)[0]) for given in (None, thresholds))
        expected.append((np.exp(dense) * (dense - sparse)).sum(-1))
    assert divergence(lm, thresholds, tokens) == pytest.approx(np.mean(expected), rel=1e-3)
    assert divergence(lm, np.full((2, 7), -1.0), tokens) == pytest.approx(0, abs=1e-6)


def test_the_budget_is_met(lm, learnt):
    assert model_sparsity(TINY, learnt.sparsity) == pytest.approx(TARGET, abs=0.002)
    assert (learnt.thresholds > 0).all()
    assert learnt.exponents.shape == learnt.thresholds.shape == (2, 7)
    assert set(learnt.biases) == {(layer, i) for layer in range(2) for i in range(7)}


def test_training_lowers_the_divergence(learnt):
    first, last = learnt.divergence
    assert last < first


def test_only_what_is_named_is_learnt(lm, calibration):
    start = calibration.thresholds(TARGET)
    found = distil(lm, calibration.tokens, start, TARGET, learn=("bias",), settings=SETTINGS, progress=False)
    np.testing.assert_allclose(found.thresholds, start, rtol=1e-6)
    assert not found.exponents.any()
    assert max(np.abs(bias).max() for bias in found.biases.values()) > 0
    before, after = found.divergence
    assert after < before


def test_the_same_seed_gives_the_same_plan(lm, calibration, learnt):
    again = distil(lm, calibration.tokens, calibration.thresholds(TARGET), TARGET, settings=SETTINGS, progress=False)
    np.testing.assert_array_equal(again.thresholds, learnt.thresholds)


def test_bias_gradients_match_finite_differences(lm):
    """Gates keep all, so that the loss is smooth: only the plumbing of the gradient is tried."""
    tokens = jnp.asarray(tiny_tokens(2, 8))
    weights = lm.params["weights"]
    dense, _ = log_probabilities(TINY, weights, Dense(), tokens)

    def loss(bias):
        values = {
            "threshold": jnp.full((2, 7), -20.0),
            "exponent": jnp.zeros((2, 7)),
            "output": jnp.ones((2, 7)),
            "bias": [[jnp.zeros(n) for _, n in TINY.projection_shapes] for _ in range(2)],
        }
        values["bias"][1][6] = bias
        sparse, _ = log_probabilities(TINY, weights, soft_gates(values, None, jnp.float32(0.1)), tokens)
        return mean_divergence(dense, sparse)

    rng = np.random.default_rng(0)
    at, along = (jnp.asarray(rng.normal(size=32), jnp.float32) for _ in range(2))
    slope = float(jnp.vdot(jax.grad(loss)(at), along))
    assert slope == pytest.approx(float(loss(at + 0.01 * along) - loss(at - 0.01 * along)) / 0.02, rel=0.02)


def test_norms_are_those_of_the_rows(lm):
    found = log_norms(lm.params["weights"], TINY)
    weight = np.asarray(layer_weights(lm.params["weights"], 1)[6], np.float64)
    norms = np.linalg.norm(weight, axis=1)
    np.testing.assert_allclose(found[1][6], np.log(norms / norms.max()), atol=1e-5)


def test_output_scales_match_float64(lm, calibration):
    found = output_scales(TINY, lm.params["weights"], calibration.tokens)
    for i, site in enumerate(SITE_OF_PROJECTION):
        x = np.concatenate([forward(lm, row)[1][1][site] for row in calibration.tokens])
        weight = np.asarray(layer_weights(lm.params["weights"], 1)[i], np.float64)
        expected = np.sqrt(((x**2).mean(0)[:, None] * weight**2).sum() / weight.shape[1])
        assert found[1, i] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"tokens_per_step": 0}, {"softness": (0.0, 0.1)}])
def test_settings_are_checked(bad):
    with pytest.raises(ValueError, match=r"must be >"):
        DistilSettings(**bad)


def test_computing_blocks_again_changes_no_gradient(lm):
    tokens = jnp.asarray(tiny_tokens(2, 10))
    biases = [[jnp.full(n, 0.01) for _, n in TINY.projection_shapes] for _ in range(TINY.num_layers)]
    values = {"threshold": jnp.full((2, 7), -2.0), "bias": biases, "output": jnp.ones((2, 7))}

    def loss(values, remat):
        weights = lm.params["weights"]
        dense, _ = log_probabilities(TINY, weights, Dense(), tokens)
        gates = soft_gates(values, None, jnp.float32(0.3))
        return mean_divergence(dense, log_probabilities(TINY, weights, gates, tokens, remat=remat)[0])

    kept, again = (jax.jit(jax.grad(lambda v, remat=remat: loss(v, remat)))(values) for remat in (False, True))
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert max(float(jnp.abs(a).max()) for a in jax.tree.leaves(kept)) > 1e-3


def test_a_large_model_keeps_one_activation_a_block():
    large = dataclasses.replace(TINY, d_model=4096, d_mlp=14336, num_layers=32)
    assert activation_bytes(TINY, 1024, 4) < KEPT_BYTES < activation_bytes(large, 1024, 2)
