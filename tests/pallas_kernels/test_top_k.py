import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.top_k import top_k_mask, unused_bits


def kept(x, count):
    """One row at a time, by numpy's own stable sort of (not NaN, -|x|, index)."""
    mask = np.zeros(x.shape, bool)
    for place in np.ndindex(x.shape[:-1]):
        row = np.abs(x[place].astype(np.float64))
        order = np.lexsort((np.arange(len(row)), -np.nan_to_num(row, nan=0, posinf=np.inf), ~np.isnan(row)))
        mask[place][order[:count]] = True
    return mask


def rows(dtype):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(6, 37)) * 10.0 ** np.array([[-6], [-2], [0], [1], [3], [0]])
    x[2] = np.round(x[2])  # ties
    x[5, ::5], x[5, 1], x[5, 2], x[5, 3] = np.nan, np.inf, -np.inf, -0.0
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_exactly_the_largest_ties_by_index_nan_first(dtype):
    x = rows(dtype)
    search = jax.jit(lambda x, count, unused: top_k_mask(x, count, unused), static_argnums=2)
    for count in (0, 1, 6, 18, 36, 37):
        expected = kept(np.asarray(x.astype(jnp.float32)), count)
        for unused in {0, unused_bits(x.dtype)}:
            np.testing.assert_array_equal(search(x.astype(jnp.float32), jnp.int32(count), unused), expected)
    assert search._cache_size() == len({0, unused_bits(x.dtype)})  # one program for every count


def test_a_count_of_its_own_for_every_row():
    x = rows(jnp.float32)
    counts = np.array([0, 3, 5, 37, 1, 20], np.int32)[:, None]
    got = top_k_mask(x, jnp.asarray(counts))
    for row, count in enumerate(counts[:, 0]):
        np.testing.assert_array_equal(got[row], kept(np.asarray(x[row]), count))
