import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.top_k import top_k_mask
from teal_jax.nn.top_k_keys import keep_largest
from tests.pallas_kernels.test_top_k import kept, rows


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_exactly_the_largest_ties_by_index_nan_first(dtype):
    x = rows(dtype)
    search = jax.jit(keep_largest)
    for count in (0, 1, 6, 18, 36, 37):
        expected = kept(np.asarray(x.astype(jnp.float32)), count)
        np.testing.assert_array_equal(search(x, jnp.int32(count)), expected)


@pytest.mark.parametrize("width", [1, 65, 32768])
def test_any_width_and_nothing_but_ties(width):
    x = jnp.full((1, width), -0.5, jnp.bfloat16).at[0, -1].set(1)
    found = jax.jit(keep_largest)(x, jnp.int32(max(1, width // 2)))
    np.testing.assert_array_equal(found, top_k_mask(x.astype(jnp.float32), jnp.int32(max(1, width // 2)), 16))
    assert int(found.sum()) == max(1, width // 2)
