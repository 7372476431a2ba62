import numpy as np
import pytest

from teal_jax.errors import DataError
from teal_jax.training.scaling_law import ScalingLaw, bootstrap_laws, fit_scaling_law

LAW = ScalingLaw(e=1.2, b=0.1, c=0.002, alpha=0.3, beta=1.0, unit=5e6)
SIZES, SHARES = (grid.ravel() for grid in np.meshgrid([1e6, 3e6, 1e7, 3e7], [0.0, 0.3, 0.5, 0.65, 0.8]))


def test_the_law_that_made_the_losses_is_found():
    losses = [
        1.2 + (0.1 + 0.002 * np.exp(1.0 / (1 - s))) / (n / 5e6) ** 0.3 for n, s in zip(SIZES, SHARES, strict=True)
    ]
    found = fit_scaling_law(SIZES, SHARES, losses)
    np.testing.assert_allclose(found.loss(SIZES, SHARES), losses, rtol=1e-4)
    assert (found.e, found.alpha, found.beta) == pytest.approx((1.2, 0.3, 1.0), rel=0.03)
    shares = np.arange(0, 0.95, 0.001)
    active = (0.1 + 0.002 * np.exp(1.0 / (1 - shares))) * (1 - shares) ** 0.3
    assert 0.4 < found.optimal_sparsity() < 0.6
    assert found.optimal_sparsity() == pytest.approx(shares[active.argmin()], abs=0.01)


def test_the_interval_holds_the_truth_and_widens_with_the_noise():
    widths = []
    for noise in (1e-4, 3e-3):
        losses = LAW.loss(SIZES, SHARES) + noise * np.random.default_rng(1).normal(size=len(SIZES))
        laws = bootstrap_laws(fit_scaling_law(SIZES, SHARES, losses), SIZES, SHARES, losses, samples=20)
        found = np.array([law.optimal_sparsity() for law in laws])
        assert found.min() - 0.02 <= LAW.optimal_sparsity() <= found.max() + 0.02
        widths.append(np.ptp(found))
    assert widths[0] < widths[1]


def test_too_few_models():
    with pytest.raises(DataError, match="two sizes and three sparsities, got 4 of 2 and 2"):
        fit_scaling_law([1, 1, 2, 2], [0, 0.5, 0, 0.5], [3, 3, 2, 2])
