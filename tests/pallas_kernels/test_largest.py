import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kept import Cut
from pallas_kernels.largest import select_largest, select_largest_reference
from tests.pallas_kernels.float64 import same_bits

CASES = [  # batch, d_in, segments, width, dtype, block
    (1, 1, 1, 1, "float32", None),
    (3, 257, 3, 64, "bfloat16", None),
    (8, 33, 1, 16, "float16", None),
    (3, 136, 2, 32, "bfloat16", 8),
]


def draw(batch, d_in, dtype):
    """Many ties, one row of zeros, and a NaN where there are several rows."""
    x = np.round(np.random.default_rng(0).normal(size=(batch, d_in)) * 3) / 3
    if batch > 1:
        x[1] = 0
        x[2, d_in // 2] = np.nan
    return jnp.asarray(x, dtype)


def counts(values, layer=0, scales=None):
    projections = tuple(range(len(values)))
    every = jnp.full((3, len(values)), 1, jnp.int32).at[layer].set(jnp.asarray(values, jnp.int32))
    return Cut(every, jnp.asarray([layer], jnp.int32), projections, scales)


def largest(x, count, scale=1.0, block=None):
    """Which are kept, by numpy's own stable sort of (not NaN, -score, index)."""
    score = np.abs(np.asarray(x, np.float32)) * np.float32(scale)
    if block is not None:
        return largest(score.reshape(-1, block), count).reshape(score.shape)
    kept = np.zeros(score.shape, bool)
    for row, values in enumerate(score):
        order = np.lexsort((np.arange(len(values)), -np.nan_to_num(values), ~np.isnan(values)))
        kept[row, order[:count]] = True
    return kept


def check(batch, d_in, segments, width, dtype, block, interpret):
    x, of = draw(batch, d_in, dtype), block or d_in
    for some in ((0, 1, of // 2), (of, -(-of // 3), of - 1)):
        cut = counts(some[:segments], layer=1)
        rows = select_largest(x, cut, width=width, block=block, interpret=interpret)
        assert same_bits(rows, select_largest_reference(x, cut, width=width, block=block))
        for segment, count in enumerate(some[:segments]):
            check_listed(rows, segment, np.asarray(x, np.float32), largest(x, count, block=block))


def check_listed(rows, segment, x, keep):
    """Raise unless the lists hold `x` where kept, 0 for the other rows, and no other channel."""
    found, seen = np.zeros_like(x), []
    for which, count in enumerate(np.asarray(rows.count[segment])):
        index = np.asarray(rows.index[segment, which, :count])
        assert (np.diff(index) > 0).all()
        found[:, index] = rows.value[segment, which, :, :count]
        seen.extend(index)
    np.testing.assert_array_equal(found, np.where(keep, x, 0))
    np.testing.assert_array_equal(seen, np.flatnonzero(keep.any(axis=0)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_numpy(case):
    check(*case, interpret=True)


def test_scales_weigh_what_is_compared():
    rng = np.random.default_rng(1)
    x, scales = jnp.asarray(rng.normal(size=(2, 40)), jnp.float32), rng.uniform(0.1, 4, (2, 40)).astype(np.float32)
    cut = counts((7, 20), scales=tuple(map(jnp.asarray, scales)))
    rows = select_largest(x, cut, width=16, interpret=True)
    assert same_bits(rows, select_largest_reference(x, cut, width=16))
    for segment, count in enumerate((7, 20)):
        check_listed(rows, segment, np.asarray(x, np.float32), largest(x, count, scales[segment]))


def test_int8_is_compared_and_listed():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 40)), jnp.bfloat16).at[1].set(0)
    rows = select_largest(x, counts((7,)), width=16, int8=True, interpret=True)
    assert same_bits(rows, select_largest_reference(x, counts((7,)), width=16, int8=True))
    wide = np.asarray(x, np.float64)
    top = np.abs(wide).max(axis=1, keepdims=True) + 1e-5
    coded = np.asarray(jnp.asarray(np.round(127 * wide / top) * top / 127, jnp.bfloat16), np.float32)
    check_listed(rows, 0, coded, largest(coded, 7))


def test_arguments_that_do_not_fit():
    x = jnp.ones((1, 8))
    with pytest.raises(TypeError, match=r"expected int32 \[layers, projections\], got float32"):
        select_largest(x, Cut.of([0.5]), interpret=True)
    with pytest.raises(ValueError, match="width: expected a power of two, got 24"):
        select_largest(x, counts((3,)), width=24, interpret=True)
    for block in (3, 32, 16):
        with pytest.raises(ValueError, match=f"block: expected a power of two that divides 8 and 16, got {block}"):
            select_largest(x, counts((3,)), width=16, block=block, interpret=True)
    assert jax.eval_shape(lambda x: select_largest(x, counts((3,)), interpret=True), x).count.shape == (1, 1)
