import jax
import jax.numpy as jnp
import numpy as np
import pytest

from teal_jax.errors import QuantizationError
from teal_jax.nn.quantized import QuantSpec, pack_nibbles, unpack_nibbles
from teal_jax.quantization.rtn import round_to_nearest
from tests.reference import TINY
from tests.teal_jax.quantization import float64

FORMATS = ["int8", "int4", "int4-g128", "int4-asym", "int4-g128-asym", "int3", "int3-g128-asym", "int2", "int2-asym"]


def weight(rows=96, columns=256, seed=0):
    w = np.random.default_rng(seed).standard_t(4, (rows, columns)).astype(np.float32)
    w[3] = 0
    w[:, 5] = 0
    return w


@pytest.mark.parametrize("name", FORMATS)
def test_against_float64(name):
    w, spec = weight(), QuantSpec.parse(name)
    found = round_to_nearest(jnp.asarray(w), spec)
    expected = float64.round_to_nearest(w, spec.bits, spec.group, spec.symmetric)
    # The stored numbers mean what the docstring says, and dequantize reads them so.
    np.testing.assert_allclose(np.asarray(found.dequantize()), float64.dequantize(found), rtol=1e-6, atol=0)
    # A value in the middle of two codes may go either way in float32.
    step = np.abs(expected - float64.dequantize(found)) > 1e-5 * np.abs(w).max()
    assert step.mean() < 1e-3
    assert found.shape == w.shape
    assert found.dtype == "float32"
    assert found.nbytes == spec.bytes_of(*w.shape)
    assert str(found.spec) == str(spec)


@pytest.mark.parametrize(("name", "most"), [("int8", 0.010), ("int4", 0.10), ("int4-asym", 0.095), ("int3", 0.20)])
def test_relative_error_on_normal_weights(name, most):
    w = np.random.default_rng(1).normal(size=(128, 512)).astype(np.float32)
    error = float64.dequantize(round_to_nearest(jnp.asarray(w), QuantSpec.parse(name))) - w
    assert np.linalg.norm(error) / np.linalg.norm(w) < most


def on_grid(spec, rows=16, columns=256, seed=2):
    """Weights that use both ends of the grid of every group."""
    generator = np.random.default_rng(seed)
    half, group = 2 ** (spec.bits - 1), spec.group or rows
    codes = generator.integers(0, 2 * half, (rows * columns // group, group))
    codes[:, 0], codes[:, 1] = 0, 2 * half - 1
    zero = half if spec.symmetric else generator.integers(0, 2 * half, (len(codes), 1))
    scale = float64.bfloat16(generator.uniform(0.01, 1, (len(codes), 1)))
    w = ((codes - zero) * scale).astype(np.float32)
    return w.reshape(columns, rows).T if spec.group is None else w.reshape(rows, columns)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_on_the_grid_stays(name):
    w = on_grid(QuantSpec.parse(name))
    np.testing.assert_array_equal(round_to_nearest(jnp.asarray(w), QuantSpec.parse(name)).dequantize(), w)


def test_zero_groups_come_back_as_zeros_and_dtype_is_kept():
    w = jnp.asarray(weight(), jnp.bfloat16)
    for name in FORMATS:
        back = round_to_nearest(w, QuantSpec.parse(name)).dequantize()
        assert back.dtype == jnp.bfloat16
        assert not back[3].any()
        assert not back[:, 5].any()


def test_nibbles_low_is_the_even_output():
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 16, (3, 8)))
    packed = pack_nibbles(codes)
    assert packed.dtype == jnp.uint8
    assert packed[0, 0] == codes[0, 0] + 16 * codes[0, 1]
    np.testing.assert_array_equal(unpack_nibbles(packed), codes)


def test_a_quantised_weight_is_a_pytree():
    found = round_to_nearest(jnp.asarray(weight()), QuantSpec.parse("int4-asym"))
    assert len(jax.tree.leaves(found)) == 3
    again = jax.jit(lambda q: q)(found)
    assert again.spec == found.spec
    assert found.astype("bfloat16").dequantize().dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("int5", "bits must be 8, 4, 3 or 2, got 5"),
        ("fp8", "no format 'fp8'"),
        ("", "no format"),
        ("int8-g64", "takes no group"),
        ("int8-asym", "no zero points"),
        ("int4-g1", "even group"),
        ("int4-g63", "even group"),
    ],
)
def test_formats_that_do_not_exist(name, says):
    with pytest.raises(QuantizationError, match=says):
        QuantSpec.parse(name)


def test_a_group_that_does_not_divide():
    with pytest.raises(QuantizationError, match=r"groups of 64 do not divide the outputs of q \[32, 32\].*16, 8, 4"):
        QuantSpec.parse("int4").check_fits(TINY)
    QuantSpec.parse("int4-g16").check_fits(TINY)
    QuantSpec.parse("int8").check_fits(TINY)
