import numpy as np
import pytest

from teal_jax.benchmark.sharing import greedy_like, uniform
from teal_jax.benchmark.thresholds import SHARES, Fit, fit_thresholds
from teal_jax.config import SITE_OF_PROJECTION
from teal_jax.model import model_functions
from teal_jax.nn.gates import Threshold
from teal_jax.sparsity.plan import model_sparsity
from tests.teal_jax.benchmark.tiny import CONFIG, model

PREFIX = 16


def realised(thresholds, tokens):
    """Counted on the whole model's forward pass: not block by block, as they are fitted."""
    import jax.numpy as jnp

    def observe(taps, gates):
        sizes = [jnp.abs(taps[site][:, PREFIX:]) for site in SITE_OF_PROJECTION]
        return [jnp.mean(size <= t) for size, t in zip(sizes, gates.value, strict=True)]

    params = {"weights": model().params["weights"], "gates": Threshold(jnp.asarray(thresholds))}
    where = jnp.broadcast_to(jnp.arange(tokens.shape[1]) >= PREFIX, tokens.shape)
    _, observed = model_functions(CONFIG).forward(params, jnp.asarray(tokens), where, None, observe)
    return np.array(observed, np.float64)


@pytest.mark.parametrize("sparsity", [uniform(CONFIG, 0.25), uniform(CONFIG, 0.65), greedy_like(CONFIG, 0.5)])
def test_fitted_thresholds_realise_every_projections_sparsity(sparsity):
    tokens = np.random.default_rng(1).integers(0, CONFIG.vocab_size, (1, 96), dtype=np.int32)
    fit = fit_thresholds(model(), tokens, sparsity, PREFIX)
    found = realised(fit.thresholds, tokens)
    assert np.abs(found - sparsity).max() < 0.005
    assert model_sparsity(CONFIG, found) == pytest.approx(model_sparsity(CONFIG, sparsity), abs=0.002)
    assert (fit.corrected(found).thresholds == fit.thresholds).all()


def test_zero_keeps_everything():
    tokens = np.zeros((1, 32), np.int32)
    assert (fit_thresholds(model(), tokens, uniform(CONFIG, 0.0), PREFIX).thresholds == 0).all()


def test_counts_correct_the_thresholds():
    # |x| uniform on [0, 1] when fitted, on [0, 2] when run: half of what was asked for is realised.
    quantiles = np.broadcast_to(SHARES, (1, 4, len(SHARES))).astype(np.float32)
    fit = Fit(np.full((1, 7), 0.5), np.full((1, 7), 0.5, np.float32), quantiles)
    counted = np.full((1, 7), 0.25)
    counted[0, 3] = 0.505
    better = fit.corrected(counted)
    assert better.thresholds[0, 3] == 0.5  # near enough
    assert np.delete(better.thresholds[0], 3) == pytest.approx(1.0)


@pytest.mark.parametrize("target", [0.1, 0.5, 0.9])
def test_a_greedy_like_plan_needs_the_same_bytes(target):
    plan = greedy_like(CONFIG, target)
    assert model_sparsity(CONFIG, plan) == pytest.approx(target, abs=1e-12)
    assert np.abs(plan - target).max() == pytest.approx(min(0.15, target, 0.99 - target))
    assert plan.std() > 0.03
    assert (plan == greedy_like(CONFIG, target)).all()
