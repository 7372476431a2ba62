import jax
import jax.numpy as jnp
import numpy as np
import pytest

from teal_jax.nn import embedding
from teal_jax.nn.embedding import look_up


def slope_of_table(table, tokens, slope):
    return jax.jit(lambda table, tokens, slope: jax.vjp(lambda t: look_up(t, tokens), table)[1](slope)[0])(
        table, tokens, slope
    )


@pytest.mark.parametrize("ones", [embedding.ONES, 7 * 60, 1])
def test_the_derivative_is_the_sum_over_each_token(monkeypatch, ones):
    monkeypatch.setattr(embedding, "ONES", ones)
    rng = np.random.default_rng(0)
    table, tokens = rng.normal(size=(17, 5)).astype(np.float32), rng.integers(0, 17, (3, 20)).astype(np.int32)
    slope = rng.normal(size=(3, 20, 5)).astype(np.float32)
    np.testing.assert_array_equal(look_up(table, tokens), table[tokens])
    expected = np.zeros((17, 5))
    np.add.at(expected, tokens, slope.astype(np.float64))
    np.testing.assert_allclose(slope_of_table(table, tokens, slope), expected, rtol=1e-5, atol=1e-6)


def test_a_frequent_token_in_bfloat16_is_summed_in_float32():
    # One by one in bfloat16 the sum would stop at 256, where 1 is less than half a unit in the last place.
    table, tokens = jnp.zeros((3, 2), jnp.bfloat16), jnp.full((4096,), 1, jnp.int32)
    found = slope_of_table(table, tokens, jnp.ones((4096, 2), jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found.astype(jnp.float32), [[0, 0], [4096, 4096], [0, 0]])
