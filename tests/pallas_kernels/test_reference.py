import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import keep_mask, masked_matmul


def test_a_channel_at_its_threshold_is_dropped():
    x = jnp.array([0.5, -0.5, 0.5000001, -0.6, 0.0])
    np.testing.assert_array_equal(keep_mask(x, jnp.float32(0.5)), [False, False, True, True, False])


def test_thresholds_are_not_rounded_to_bfloat16():
    x = jnp.array([0.80078125], jnp.bfloat16)  # what 0.8 would round to: as bfloat16 numbers they are equal
    assert keep_mask(x, jnp.float32(0.8)).all()


def test_nan_is_kept_and_a_negative_threshold_keeps_all():
    assert keep_mask(jnp.array([jnp.nan]), jnp.float32(1e30)).all()
    assert keep_mask(jnp.zeros(3), jnp.float32(-1.0)).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2), ("float16", 3e-3)])
def test_masked_matmul_matches_float64(dtype, tolerance):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 37)), dtype)
    weight = jnp.asarray(rng.normal(size=(37, 11)), dtype)
    thresholds = jnp.asarray([0.0, 0.7, 9.0], jnp.float32)[None, :, None]
    x64 = np.asarray(x, np.float64)
    expected = np.where(np.abs(x64) > np.asarray(thresholds), x64, 0) @ np.asarray(weight, np.float64)
    got = masked_matmul(x, weight, thresholds)
    assert got.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=tolerance * np.abs(expected).max())
    assert not np.asarray(got)[:, 2].any()
