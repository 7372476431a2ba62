import math

import numpy as np
import pytest

from teal_jax.evaluation.activation_fit import DENSITY_BINS, fit_site, fit_sites
from teal_jax.sparsity.histogram import NUM_BINS, count_magnitudes
from teal_jax.sparsity.statistics import Calibration
from tests.reference import TINY

SIZE = 200_000


def counts_of(values):
    return np.asarray(count_magnitudes(values.astype(np.float32).reshape(1, 1, -1)), np.int64)


@pytest.mark.parametrize("name", ["gaussian", "laplace"])
def test_finds_the_density_that_made_the_values(name):
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.7, SIZE) if name == "gaussian" else rng.laplace(0, 0.3, SIZE)
    fit = fit_site(2, "mlp_in", counts_of(values))
    assert (fit.layer, fit.site, fit.better) == (2, "mlp_in", name)
    assert fit.gaussian_scale == pytest.approx(math.sqrt((values**2).mean()), rel=1e-3)
    assert fit.laplace_scale == pytest.approx(np.abs(values).mean(), rel=1e-3)
    s, b = fit.gaussian_scale, fit.laplace_scale
    gaussian = -np.log(s) - 0.5 * np.log(2 * np.pi) - values**2 / (2 * s * s)
    assert fit.gaussian_loglik == pytest.approx(gaussian.mean(), abs=1e-3)
    assert fit.laplace_loglik == pytest.approx((-np.log(2 * b) - np.abs(values) / b).mean(), abs=1e-3)
    right, wrong = (fit.gaussian_ks, fit.laplace_ks) if name == "gaussian" else (fit.laplace_ks, fit.gaussian_ks)
    assert right < 0.005 < 0.03 < wrong


def test_ks_distance_is_the_largest_gap():
    values = np.abs(np.random.default_rng(1).normal(size=2000))
    fit = fit_site(0, "attn_in", counts_of(values))
    x = np.sort(values)
    share = np.array([math.erf(v / fit.gaussian_scale / math.sqrt(2)) for v in x])
    steps = np.arange(1, len(x) + 1) / len(x)
    gap = max(np.abs(share - steps).max(), np.abs(share - steps + 1 / len(x)).max())
    assert fit.gaussian_ks == pytest.approx(gap, abs=3e-3)


def test_density_is_smooth_and_sums_to_what_is_shown():
    values = np.random.default_rng(2).uniform(-2, 2, SIZE)
    fit = fit_site(0, "attn_in", counts_of(values))
    assert fit.limit == pytest.approx(2, rel=0.01)
    assert len(fit.density) == DENSITY_BINS
    assert sum(fit.density) * fit.limit / DENSITY_BINS == pytest.approx(1, abs=2e-3)
    np.testing.assert_allclose(fit.density[:-1], 0.5, rtol=0.08)  # the histogram's own bins do not show


def test_nothing_to_fit():
    with pytest.raises(ValueError, match="layer 1 attn_out is 0"):
        fit_site(1, "attn_out", counts_of(np.zeros(10)))


def test_every_site_in_order():
    counts = np.zeros((2, 4, NUM_BINS), np.int64)
    counts[:] = counts_of(np.random.default_rng(3).normal(size=1000))
    counts[1, 2] = 0
    fits = fit_sites(Calibration(config=TINY, counts=counts, tokens=np.zeros((1, 4), np.int32)))
    assert [(fit.layer, fit.site) for fit in fits][3:] == [
        (0, "mlp_hidden"),
        (1, "attn_in"),
        (1, "attn_out"),
        (1, "mlp_hidden"),
    ]
