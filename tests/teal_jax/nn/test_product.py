import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from teal_jax.nn.product import matmul, product

RNG = np.random.default_rng(0)
SPECS = {"bskgd,btkd->bksgt": ((2, 5, 2, 3, 4), (2, 6, 2, 4)), "abi,io->abo": ((2, 3, 8), (8, 5))}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 2e-2)])
def test_product_and_its_derivative_against_float64(spec, dtype, tolerance):
    a, b = (jnp.asarray(RNG.normal(size=shape), dtype) for shape in SPECS[spec])
    got, pull = jax.vjp(lambda a, b: product(spec, a, b), a, b)
    assert got.dtype == jnp.float32
    left, right, out = re.split(",|->", spec)
    wide = [np.asarray(part).astype(np.float64) for part in (a, b)]
    np.testing.assert_allclose(got, np.einsum(spec, *wide), atol=tolerance)
    slope = RNG.normal(size=got.shape)
    of_a, of_b = pull(jnp.asarray(slope, jnp.float32))
    assert of_a.dtype == of_b.dtype == a.dtype
    for found, expected in (
        (of_a, np.einsum(f"{out},{right}->{left}", slope, wide[1])),
        (of_b, np.einsum(f"{left},{out}->{right}", wide[0], slope)),
    ):
        np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=tolerance * np.abs(expected).max())


def test_nothing_is_widened_to_be_multiplied():
    x, w = jnp.ones((2, 3, 8), jnp.bfloat16), jnp.ones((8, 5), jnp.bfloat16)
    text = str(jax.make_jaxpr(jax.grad(lambda x, w: matmul(x, w).astype(jnp.float32).sum(), (0, 1)))(x, w))
    operands = re.findall(r":f32\[[\d,]*\] = dot_general\[.*?\] (\w+) (\w+)", text, re.DOTALL)
    assert len(operands) == 3
    assert all(f"{name}:bf16[" in text for pair in operands for name in pair)
