import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kept import Cut, select_reference
from pallas_kernels.select import select
from tests.pallas_kernels.float64 import Bounded, check_rows, draws, same_bits

CASES = [  # batch, d_in, segments, width, dtype
    (1, 1, 1, 1, "float32"),
    (1, 257, 3, 64, "float32"),
    (3, 320, 2, 64, "bfloat16"),
    (8, 33, 1, 16, "float16"),
    (2, 7, 1, 32, "bfloat16"),
]


def check(batch, d_in, segments, width, dtype, interpret):
    reference = jax.jit(select_reference, static_argnames="width")
    for name, x, thresholds in draws(np.random.default_rng(0), batch, d_in, segments, width, dtype):
        x_array, cut = jnp.asarray(x, dtype), Cut.of(thresholds)
        rows = select(x_array, cut, width=width, interpret=interpret)
        check_rows(rows, Bounded(x, np.zeros_like(x)), thresholds, width, name)
        assert same_bits(rows, reference(x_array, cut.values, width)), name
        assert same_bits(rows, select(x_array, cut, width=width, interpret=interpret)), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case):
    check(*case, interpret=True)


def test_thresholds_of_a_layer():
    thresholds = jnp.full((4, 7), jnp.inf).at[2, 5].set(0.5).at[2, 1].set(0.0)
    cut = Cut(thresholds, jnp.asarray([2], jnp.int32), (5, 1, 0))
    x = np.linspace(-1, 1, 20)[None].astype(np.float32)
    rows = select(jnp.asarray(x), cut, width=16, interpret=True)
    np.testing.assert_array_equal(rows.count.sum(axis=1), [(np.abs(x) > 0.5).sum(), 20, 0])


def test_a_channel_at_its_threshold_is_dropped():
    rows = select(jnp.asarray([[0.5, -0.5, 0.5000001, -0.6]]), Cut.of([0.5]), width=4, interpret=True)
    np.testing.assert_array_equal(rows.index[0, 0, : rows.count[0, 0]], [2, 3])


def test_thresholds_are_not_rounded_to_bfloat16():
    x = jnp.asarray([[0.80078125]], jnp.bfloat16)  # what 0.8 would round to
    assert select(x, Cut.of([0.8]), width=1, interpret=True).count[0, 0] == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_scales_weigh_what_is_compared_and_not_what_is_listed(batch):
    rng = np.random.default_rng(0)
    x, scales = rng.normal(size=(batch, 40)).astype(np.float32), rng.uniform(0.1, 4, (2, 40)).astype(np.float32)
    cut = Cut.of([0.8, 1.6], tuple(jnp.asarray(scale) for scale in scales))
    rows = select(jnp.asarray(x), cut, width=16, interpret=True)
    assert same_bits(rows, select_reference(jnp.asarray(x), cut.values, 16, cut.scales))
    for segment, threshold in enumerate([0.8, 1.6]):
        keep = np.abs(x * scales[segment]) > np.float32(threshold)
        found = np.zeros_like(x)
        for which in range(3):
            count = int(rows.count[segment, which])
            found[:, np.asarray(rows.index[segment, which, :count])] = rows.value[segment, which, :, :count]
        np.testing.assert_array_equal(found, np.where(keep, x, 0))
        assert int(rows.count[segment].sum()) == keep.any(axis=0).sum()


def test_scales_that_do_not_fit_are_refused():
    x = jnp.ones((1, 8))
    with pytest.raises(ValueError, match="scales: expected one for each of 1 segments, got 2"):
        select(x, Cut.of([0.5], (jnp.ones(8), jnp.ones(8))), interpret=True)
    with pytest.raises(ValueError, match=r"scales: expected \(8,\), got \(7,\)"):
        select(x, Cut.of([0.5], (jnp.ones(7),)), interpret=True)
    with pytest.raises(TypeError, match="scales: expected float32, got bfloat16"):
        select(x, Cut.of([0.5], (jnp.ones(8, jnp.bfloat16),)), interpret=True)
