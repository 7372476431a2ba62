import numpy as np
import pytest

from teal_jax.evaluation.bootstrap import percentile_interval, resampled_sums, unit_sums, units_needed


@pytest.mark.parametrize(("confidence", "units"), [(0.5, 2), (0.9, 10), (0.95, 20), (0.99, 100)])
def test_units_needed(confidence, units):
    assert units_needed(confidence) == units


@pytest.mark.parametrize("confidence", [0, 1, 1.5])
def test_confidence_is_a_share(confidence):
    with pytest.raises(ValueError, match="confidence"):
        units_needed(confidence)


def test_unit_sums():
    values, units = np.array([1.0, 2, 3, 4]), np.array([0, 2, 2, 0])
    assert unit_sums(values, units).tolist() == [5, 0, 5]


def test_draws_are_sums_of_as_many_units(monkeypatch):
    import teal_jax.evaluation.bootstrap as module

    monkeypatch.setattr(module, "_CHUNK", 64)  # several chunks
    sums = np.stack([np.ones(25), 2.0 ** np.arange(25)])
    draws = resampled_sums(sums, resamples=40, seed=0)
    assert draws.shape == (40, 2)
    assert (draws[:, 0] == 25).all()
    assert len(np.unique(draws[:, 1])) == 40
    with pytest.raises(ValueError, match="resamples"):
        resampled_sums(sums, resamples=0, seed=0)


def test_same_seed_same_draws_whatever_is_resampled():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=(2, 30))
    first, second = (resampled_sums(x[None], resamples=50, seed=3) for x in (a, b))
    both = resampled_sums(np.stack([a, b]), resamples=50, seed=3)
    np.testing.assert_allclose(np.hstack([first, second]), both)
    assert not np.allclose(resampled_sums(a[None], resamples=50, seed=4), first)


def test_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(0).normal(3, 2, 400)
    draws = resampled_sums(np.stack([values, np.ones(400)]), resamples=4000, seed=0)
    low, high = percentile_interval(draws[:, 0] / draws[:, 1], 0.95)
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.02)
    assert high == pytest.approx(values.mean() + half, abs=0.02)


def test_coverage():
    """The interval of a ratio holds the truth about as often as it says."""
    rng, held = np.random.default_rng(2), 0
    for trial in range(200):
        tokens = rng.integers(50, 200, 60).astype(float)
        nll = tokens * rng.gamma(4, 0.5, 60)  # 2 a token
        draws = resampled_sums(np.stack([nll, tokens]), resamples=300, seed=trial)
        low, high = percentile_interval(draws[:, 0] / draws[:, 1], 0.9)
        held += low <= 2 <= high
    assert 0.82 <= held / 200 <= 0.96


def test_empty_draws_are_left_out():
    assert percentile_interval(np.array([1.0, np.nan, 3.0]), 0.5) == (1.5, 2.5)
    assert np.isnan(percentile_interval(np.array([np.nan]), 0.5)).all()
