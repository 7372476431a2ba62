import numpy as np
import pytest

from teal_jax.analysis.batch import compare_batches, fit_thresholds
from teal_jax.analysis.rows import Rows
from teal_jax.config import SITE_OF_PROJECTION
from teal_jax.errors import DataError
from teal_jax.sparsity.plan import model_sparsity
from tests.reference import forward as reference
from tests.reference import tiny_tokens
from tests.teal_jax.analysis.float64 import dropped, forward


@pytest.fixture(scope="module")
def found(lm, plans, calibration, rows, dense):
    table = compare_batches(lm, plans[1:], calibration, rows, dense, batches=(1, 2, 4), progress=False)
    return {(row.rule, row.batch, row.fitted): row for row in table}


def shared(x, rule, batch):
    groups = np.abs(x).reshape(-1, batch, *x.shape[1:])
    return np.repeat(groups.mean(1) if rule == "mean" else groups.max(1), batch, axis=0)


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("rule", ["own", "union", "mean"])
@pytest.mark.parametrize("fitted", [False, True])
def test_rules_match_float64(lm, plans, calibration, rows, dense, found, rule, batch, fitted):
    if (rule, batch, fitted) not in found:
        assert batch == 1 or rule == "own"
        return
    thresholds, read = plans[1].thresholds, [[], []]
    if fitted:
        thresholds = fit_thresholds(lm, calibration.tokens, [plans[1].sparsity], [(rule, batch)])[rule, batch][0]

    def keep(layer, i, x, gate):
        by_batch = (shared(x, rule, batch) > thresholds[layer, i]) | ~rows.after_prompt[:, None]
        read[layer].append(by_batch)
        return (np.abs(x) > thresholds[layer, i]) | ~rows.after_prompt[:, None] if rule == "own" else by_batch

    nll, _ = forward(lm, rows.tokens, keep)
    row = found[rule, batch, fitted]
    assert row.cost.excess == pytest.approx(nll[:, rows.prompt - 1 :].mean() - dense.nll.mean(), abs=2e-3)
    survives = model_sparsity(lm.config, dropped(read, rows.after_prompt))
    assert row.cost.realised_sparsity == pytest.approx(survives, abs=2e-3)


def test_what_must_hold_of_any_model(found):
    alone = found["own", 1, False].cost
    assert alone.realised_sparsity == pytest.approx(0.6, abs=0.05)
    for batch in (2, 4):
        own, union = found["own", batch, False].cost, found["union", batch, False].cost
        assert own.ppl == pytest.approx(alone.ppl, rel=1e-5)
        assert own.realised_sparsity < alone.realised_sparsity
        # Fitted thresholds hold the sparsity that the batch would eat.
        assert found["union", batch, True].cost.realised_sparsity > union.realised_sparsity + 0.1
        # Not equal: projections differ in what they realise.
        assert alone.realised_sparsity**batch < found["own", batch, False].independent < alone.realised_sparsity
    assert found["own", 4, False].cost.realised_sparsity < found["own", 2, False].cost.realised_sparsity


def test_fitted_thresholds_are_quantiles_of_what_is_compared(lm, calibration):
    shares = np.random.default_rng(0).uniform(0.2, 0.8, (2, 7))
    kinds = [("union", 2), ("mean", 4), ("mean", 1)]
    fitted = fit_thresholds(lm, calibration.tokens, [shares, shares / 2], kinds, seed=3)
    order = np.random.default_rng(3).permutation(8)
    taps = [reference(lm, row)[1] for row in calibration.tokens[order]]
    for rule, batch in kinds:
        assert fitted[rule, batch].shape == (2, 2, 7)
        for layer in range(2):
            for i, site in enumerate(SITE_OF_PROJECTION):
                x = np.stack([row[layer][site] for row in taps])
                below = (shared(x, rule, batch) <= fitted[rule, batch][0, layer, i]).mean()
                assert below == pytest.approx(shares[layer, i], abs=0.01)
    np.testing.assert_array_equal(fitted["mean", 1][0], calibration.thresholds(shares))


def test_wrong_use(lm, plans, calibration, rows, dense):
    with pytest.raises(DataError, match="a batch of 16 need as many calibration rows, got 8"):
        fit_thresholds(lm, calibration.tokens, [plans[0].sparsity], [("mean", 16)])
    for batches, tokens in (((1, 3, 4), rows), ((0, 2), rows), ((1, 2), Rows(tiny_tokens(3, 20), 8, "tokens"))):
        with pytest.raises(ValueError, match="divide the largest"):
            compare_batches(lm, plans, calibration, tokens, dense, batches=batches, progress=False)
