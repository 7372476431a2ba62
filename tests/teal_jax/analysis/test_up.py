import numpy as np
import pytest

from teal_jax.analysis.up import MEASURES, RULES, compare_up_masks, gate_histograms
from teal_jax.sparsity.histogram import magnitude_quantiles
from teal_jax.sparsity.plan import model_sparsity
from tests.reference import forward as reference
from tests.reference import silu, weights64
from tests.teal_jax.analysis.float64 import dropped, forward

UP, DOWN = 5, 6
SHARE = 0.5


@pytest.fixture(scope="module")
def found(lm, calibration, rows, dense):
    return {row.rule: row for row in compare_up_masks(lm, calibration, rows, dense, sparsities=[SHARE], progress=False)}


@pytest.fixture(scope="module")
def gate_limits(lm, calibration):
    """Medians of |silu(gate)| over the calibration tokens, from the float64 reference."""
    weights = weights64(lm)
    values = [[], []]
    for row in calibration.tokens:
        for layer, taps in enumerate(reference(lm, row)[1]):
            values[layer].append(np.abs(silu(taps[2] @ weights["layers"][layer]["mlp"]["gate_proj"]["weight"])))
    return [np.quantile(layer, SHARE) for layer in values]


def test_gate_thresholds_are_quantiles(lm, calibration, gate_limits):
    counts = gate_histograms(lm, calibration.tokens)
    assert counts.sum() == calibration.tokens.size * 2 * lm.config.d_mlp
    got = [magnitude_quantiles(layer, np.array(SHARE)) for layer in counts]
    np.testing.assert_allclose(got, gate_limits, rtol=0.01)


def keep_by(rule, thresholds, gates, where):
    def keep(layer, i, x, gate):
        kept = np.ones(x.shape, bool)
        if i == UP and rule in ("input", "input and down"):
            kept = np.abs(x) > thresholds[layer, UP]
        if i == DOWN and rule in ("output, by hidden", "input and down"):
            kept = np.abs(x) > thresholds[layer, DOWN]
        if i == DOWN and rule == "output, by gate":
            kept = np.abs(gate) > gates[layer]
        return kept | ~where[:, None]

    return keep


@pytest.mark.parametrize("rule", RULES)
def test_cost_matches_float64(lm, calibration, rows, dense, found, rule):
    gates = [magnitude_quantiles(layer, np.array(SHARE)) for layer in gate_histograms(lm, calibration.tokens)]
    where = rows.after_prompt
    nll, masks = forward(lm, rows.tokens, keep_by(rule, calibration.thresholds(SHARE), gates, where))
    shares = dropped(masks, where)
    assert found[rule].cost.excess == pytest.approx(nll[:, rows.prompt - 1 :].mean() - dense.nll.mean(), abs=1e-4)
    if rule == "output, by gate":
        shares[:, UP] = shares[:, DOWN]
    assert found[rule].up == pytest.approx(shares[:, UP].mean(), abs=1e-3)
    assert found[rule].down == pytest.approx(shares[:, DOWN].mean(), abs=1e-3)
    assert found[rule].cost.realised_sparsity == pytest.approx(model_sparsity(lm.config, shares), abs=1e-3)


def test_errors_within_the_layer_match_float64(lm, calibration, rows, found):
    weights, thresholds = weights64(lm), calibration.thresholds(SHARE)
    gates = [magnitude_quantiles(layer, np.array(SHARE)) for layer in gate_histograms(lm, calibration.tokens)]
    taps = [reference(lm, row)[1] for row in rows.tokens]
    for layer in range(2):
        mlp = weights["layers"][layer]["mlp"]
        x = np.concatenate([row[layer][2][rows.prompt :] for row in taps])
        gate, up = silu(x @ mlp["gate_proj"]["weight"]), x @ mlp["up_proj"]["weight"]
        thinned = {
            "input": np.where(np.abs(x) > thresholds[layer, UP], x, 0) @ mlp["up_proj"]["weight"],
            "output, by gate": np.where(np.abs(gate) > gates[layer], up, 0),
            "output, by hidden": np.where(np.abs(gate * up) > thresholds[layer, DOWN], up, 0),
        }
        for rule, other in thinned.items():
            parts = (up, gate * up, gate * up @ mlp["down_proj"]["weight"])
            others = (other, gate * other, gate * other @ mlp["down_proj"]["weight"])
            for name, part, changed in zip(MEASURES, parts, others, strict=True):
                expected = np.linalg.norm(changed - part) / np.linalg.norm(part)
                assert found[rule].error[name][layer] == pytest.approx(expected, rel=1e-3), (rule, name)
    assert not found["input and down"].error
