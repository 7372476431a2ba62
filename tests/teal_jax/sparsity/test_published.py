import dataclasses

import numpy as np
import pytest

import converters
from teal_jax.errors import CheckpointError
from teal_jax.sparsity.published import import_plan


@pytest.fixture
def config(fixtures):
    return dataclasses.replace(converters.read_config(fixtures / "tiny_llama3"), num_layers=2)


def icdf(counts, centers, q):
    """The reference's inverse CDF, written once more."""
    total = np.cumsum(counts.astype(np.float64))
    return float(np.interp(q * total[-1], total, centers))


def test_uniform_thresholds_are_the_reference_quantiles(fixtures, config):
    folder = fixtures / "teal_published"
    plan = import_plan(config, 0.4, histograms=folder)
    assert plan.method == "uniform"
    histograms = converters.teal_published.read_histograms(folder)
    for layer, sites in enumerate(histograms):
        for i, site in enumerate((0, 0, 0, 1, 2, 2, 3)):
            expected = icdf(sites[site].counts, sites[site].centers, 0.7)
            assert plan.thresholds[layer, i] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_greedy_path_is_looked_up_at_its_nearest_row(fixtures, config):
    folder = fixtures / "teal_published"
    plan = import_plan(config, 0.4, histograms=folder, lookup=folder, model="tiny")
    assert plan.method == "greedy"
    for layer, table in enumerate(converters.teal_published.read_lookup(folder)):
        nearest = min(table, key=lambda row: abs(row[0] - 0.4))
        np.testing.assert_array_equal(plan.sparsity[layer], nearest[3:])
    plan.check_fits(config)


def test_histograms_of_another_model_are_refused(fixtures, config):
    folder = fixtures / "teal_published"
    with pytest.raises(CheckpointError, match="another model"):
        import_plan(dataclasses.replace(config, d_mlp=config.d_mlp * 2), 0.4, histograms=folder)
    with pytest.raises(CheckpointError, match="layers"):
        import_plan(dataclasses.replace(config, num_layers=3), 0.4, histograms=folder)


def test_missing_files(tmp_path, config):
    with pytest.raises(CheckpointError, match="layer-0"):
        import_plan(config, 0.4, histograms=tmp_path)
