import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest

import teal_jax
from teal_jax.config import SITE_OF_PROJECTION
from teal_jax.errors import DataError, PlanError
from teal_jax.sparsity.statistics import Calibration
from tests.reference import TINY, forward, tiny_model, tiny_tokens


@pytest.fixture(scope="module")
def lm():
    return tiny_model()


@pytest.fixture(scope="module")
def tokens():
    return tiny_tokens(6, 32)


@pytest.fixture(scope="module")
def calibration(lm, tokens):
    return teal_jax.calibrate(lm, tokens, progress=False)


def sites(lm, tokens, prefix=0):
    """|x| per layer and site, over all rows, by the float64 reference."""
    rows = [forward(lm, row)[1] for row in tokens]
    return [
        [np.abs(np.concatenate([row[layer][site][prefix:] for row in rows])) for site in range(4)]
        for layer in range(lm.config.num_layers)
    ]


@pytest.mark.parametrize("target", [0.0, 0.1, 0.25, 0.4, 0.5, 0.65, 0.9])
def test_thresholds_realise_the_target_on_the_calibration_tokens(lm, tokens, calibration, target):
    thresholds = calibration.thresholds(target)
    assert thresholds.shape == (2, 7)
    assert (thresholds >= 0).all()
    exact = sites(lm, tokens)
    for layer in range(2):
        for i, site in enumerate(SITE_OF_PROJECTION):
            realised = (exact[layer][site] <= thresholds[layer, i]).mean()
            assert realised == pytest.approx(target, abs=0.005)
            assert calibration.realised(thresholds)[layer, i] == pytest.approx(realised, abs=0.002)


def test_bfloat16_models_realise_the_target_too(tokens):
    lm = tiny_model(dtype="bfloat16")
    calibration = teal_jax.calibrate(lm, tokens, progress=False)
    np.testing.assert_allclose(calibration.realised(calibration.thresholds(0.4)), 0.4, atol=0.005)


def test_each_projection_takes_its_own_share(calibration):
    shares = np.linspace(0.1, 0.9, 14).reshape(2, 7)
    np.testing.assert_allclose(calibration.realised(calibration.thresholds(shares)), shares, atol=0.005)


def test_dense_prefix_is_not_counted(lm, tokens):
    calibration = teal_jax.calibrate(lm, tokens, dense_prefix=0.5, progress=False)
    widths = np.array(lm.config.site_widths)
    np.testing.assert_array_equal(calibration.counts.sum(axis=-1), np.tile(6 * 16 * widths, (2, 1)))
    thresholds = calibration.thresholds(0.4)
    late = sites(lm, tokens, prefix=16)
    assert (late[1][3] <= thresholds[1, 6]).mean() == pytest.approx(0.4, abs=0.005)
    with pytest.raises(DataError, match="nothing to count"):
        teal_jax.calibrate(lm, tokens, dense_prefix=32, progress=False)


def test_gates_do_not_change_what_is_counted(lm, tokens, calibration):
    sparse = lm.sparsify(teal_jax.allocate(lm, calibration, 0.5, method="uniform"))
    again = teal_jax.calibrate(sparse, tokens, progress=False)
    np.testing.assert_array_equal(again.counts, calibration.counts)


def test_save_and_load(tmp_path, lm, calibration):
    loaded = Calibration.load(calibration.save(tmp_path / "calibration.npz"))
    np.testing.assert_array_equal(loaded.counts, calibration.counts)
    np.testing.assert_array_equal(loaded.tokens, calibration.tokens)
    assert loaded.config == lm.config
    assert loaded.notes == calibration.notes
    assert loaded.path is None
    assert [path.name for path in tmp_path.iterdir()] == ["calibration.npz"]


def test_signed_histograms_are_saved_too(tmp_path, lm, tokens):
    calibration = teal_jax.calibrate(lm, tokens, threshold_rule="signed", progress=False)
    loaded = Calibration.load(calibration.save(tmp_path / "calibration.npz"))
    assert loaded.threshold_rule == "signed"
    np.testing.assert_array_equal(loaded.thresholds(0.4), calibration.thresholds(0.4))


def test_broken_files(tmp_path, calibration):
    path = calibration.save(tmp_path / "calibration.npz")
    with pytest.raises(PlanError, match="no calibration at"):
        Calibration.load(tmp_path / "none.npz")
    cut = tmp_path / "cut.npz"
    cut.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(PlanError, match="is not a calibration"):
        Calibration.load(cut)
    with pytest.raises(PlanError, match="cannot write"):
        calibration.save(tmp_path / "missing" / "calibration.npz")
    arrays = dict(np.load(path))
    header = json.loads(str(arrays["header"]))
    arrays["header"] = np.array(json.dumps(header | {"format_version": 99}))
    np.savez(tmp_path / "newer.npz", **arrays)
    with pytest.raises(PlanError, match="upgrade teal_jax"):
        Calibration.load(tmp_path / "newer.npz")


def test_nan_activations_are_refused(tokens):
    lm = tiny_model()
    lm.params["weights"]["layers"][1]["mlp_norm"]["weight"] = jnp.full(32, jnp.nan)
    with pytest.raises(DataError, match="layer 1 mlp_in"):
        teal_jax.calibrate(lm, tokens, progress=False)


def test_wrong_use(lm, tokens, calibration):
    with pytest.raises(ValueError, match="threshold_rule"):
        teal_jax.calibrate(lm, tokens, threshold_rule="guess", progress=False)
    with pytest.raises(ValueError, match=">= 0"):
        calibration.thresholds(-0.1)
    with pytest.raises(DataError, match="must lie in"):
        teal_jax.calibrate(lm, np.full((1, 8), 61), progress=False)
    other = tiny_model(dataclasses.replace(TINY, d_mlp=96))
    with pytest.raises(PlanError, match="another model"):
        teal_jax.allocate(other, calibration, 0.4)
