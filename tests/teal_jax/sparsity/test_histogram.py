import jax.numpy as jnp
import numpy as np
import pytest

from teal_jax.sparsity.histogram import NUM_BINS, bin_edges, count_magnitudes, magnitude_quantiles, share_below

SHARES = np.array([0.0, 0.05, 0.25, 0.4, 0.5, 0.65, 0.9, 1.0])


def samples(kind: str) -> np.ndarray:
    rng = np.random.default_rng(0)
    draw = {
        "gauss": lambda: rng.normal(size=40_000),
        "laplace_shifted": lambda: rng.laplace(0.7, 1.0, size=40_000),
        "tiny": lambda: rng.normal(size=40_000) * 1e-12,
        "outliers": lambda: rng.standard_t(1.2, size=40_000) * 1e3,
    }[kind]()
    return draw.astype(np.float32).reshape(4, 100, 100)


@pytest.mark.parametrize("kind", ["gauss", "laplace_shifted", "tiny", "outliers"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_quantiles_realise_their_share(kind, dtype):
    if (kind, dtype) in {("tiny", "float16"), ("outliers", "float16")}:
        pytest.skip("outside float16's range")
    x = jnp.asarray(samples(kind), dtype)
    thresholds = magnitude_quantiles(np.asarray(count_magnitudes(x)), SHARES)
    assert thresholds.dtype == np.float32
    assert (thresholds >= 0).all()
    magnitude = np.abs(np.asarray(x, np.float64))
    realised = [(magnitude <= t).mean() for t in thresholds]
    np.testing.assert_allclose(realised, SHARES, atol=0.004)


def test_share_below_knows_what_a_threshold_drops():
    x = jnp.asarray(samples("gauss"), jnp.bfloat16)
    counts = np.asarray(count_magnitudes(x))
    thresholds = magnitude_quantiles(counts, SHARES)
    exact = [(np.abs(np.asarray(x, np.float64)) <= t).mean() for t in thresholds]
    np.testing.assert_allclose(share_below(counts, thresholds), exact, atol=1e-12)


def test_histograms_add_and_masks_leave_tokens_out():
    x = jnp.asarray(samples("gauss"))
    mask = np.arange(100) >= 30
    late = count_magnitudes(x, jnp.broadcast_to(mask, (4, 100)))
    early = count_magnitudes(x, jnp.broadcast_to(~mask, (4, 100)))
    np.testing.assert_array_equal(late + early, count_magnitudes(x))
    np.testing.assert_array_equal(late, count_magnitudes(x[:, 30:]))


def test_every_float_has_its_bin():
    edges = bin_edges()
    finite = edges[: 0x7F800000 >> 15]
    assert (np.diff(finite) > 0).all()
    values = np.array([0, 1e-45, 1.0, 1.5, -1.5, 3e38, -0.0, np.inf, -np.inf], np.float32)
    counts = np.asarray(count_magnitudes(jnp.asarray(values).reshape(1, -1, 1)))
    assert counts.sum() == len(values)
    for value in values[np.isfinite(values)]:
        bin_index = np.searchsorted(finite, abs(value), side="right") - 1
        assert counts[bin_index] > 0
    assert counts[0x7F800000 >> 15] == 2


def test_a_constant_is_kept_or_dropped_whole():
    counts = np.zeros(NUM_BINS, np.int64)
    counts[np.searchsorted(bin_edges()[:65280], np.float32(2.0))] = 10
    low, high = magnitude_quantiles(counts, np.array([0.4, 0.6]))
    assert low < 2.0 <= high


def test_zero_sparsity_drops_at_most_exact_zeros():
    x = jnp.asarray([[[0.0, 0.0, 1e-30, -2.0]]])
    assert magnitude_quantiles(np.asarray(count_magnitudes(x)), np.array(0.0)) == 0
