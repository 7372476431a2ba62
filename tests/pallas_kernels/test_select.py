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
