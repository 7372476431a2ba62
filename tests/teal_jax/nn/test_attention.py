import jax
import jax.numpy as jnp
import numpy as np
import pytest

from teal_jax.nn.attention import attend, attend_causal

BATCH, SEQ, HEADS, KV_HEADS, DIM = 2, 24, 6, 2, 16


def both(window, library, dtype):
    """Sum of squares and its derivatives by `attend_causal`, and by `attend` in float32."""
    rng = np.random.default_rng(0)
    shapes = [(BATCH, SEQ, heads, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    qkv = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    distance = np.arange(SEQ)[:, None] - np.arange(SEQ)
    visible = (distance >= 0) & (distance < (window or SEQ))
    visible = jnp.asarray(np.broadcast_to(visible, (BATCH, 1, SEQ, SEQ)))

    def of(function, *rest):
        square = lambda *qkv: jnp.sum(function(*qkv, *rest).astype(jnp.float32) ** 2)  # noqa: E731
        return jax.jit(jax.value_and_grad(square, argnums=(0, 1, 2)))

    exact = [x.astype(jnp.float32) for x in qkv]
    return of(attend_causal, window, library)(*qkv), of(attend, visible)(*exact)


@pytest.mark.parametrize("window", [None, 1, 5])
def test_causal_attention_of_jaxs_own(window):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), *both(window, "xla", "float32"))


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5])
def test_causal_attention_of_cudnns(window):
    def near(found, exact):
        found, exact = np.asarray(found, np.float64), np.asarray(exact, np.float64)
        assert np.abs(found - exact).max() <= 0.02 * np.abs(exact).max()

    jax.tree.map(near, *both(window, "cudnn", "bfloat16"))
