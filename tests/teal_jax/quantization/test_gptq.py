import jax.numpy as jnp
import numpy as np
import pytest

from teal_jax.errors import QuantizationError
from teal_jax.nn.quantized import QuantSpec
from teal_jax.quantization.gptq import gptq, second_moment
from teal_jax.quantization.rtn import round_to_nearest
from tests.teal_jax.quantization import float64
from tests.teal_jax.quantization.test_rtn import on_grid

FORMATS = ["int8", "int4-g32", "int4-g32-asym", "int3-g32", "int2-g32-asym"]


def problem(d_in, d_out=64, tokens=512, seed=0):
    """Weights, and correlated inputs of unlike sizes."""
    generator = np.random.default_rng(seed)
    mix = generator.normal(size=(d_in, d_in)) / np.sqrt(d_in) + np.eye(d_in)
    x = generator.normal(size=(tokens, d_in)) @ mix * generator.uniform(0.1, 3, d_in)
    return generator.normal(size=(d_in, d_out)).astype(np.float32), x.astype(np.float32)


def error(x, w, quantised):
    return np.linalg.norm(x.astype(np.float64) @ (float64.dequantize(quantised) - w))


@pytest.mark.parametrize("name", FORMATS)
def test_against_float64(name):
    w, x = problem(40)
    spec, moment = QuantSpec.parse(name), x.T.astype(np.float64) @ x
    found = gptq(jnp.asarray(w), jnp.asarray(moment, jnp.float32), spec, shrinks=(1.0,))
    expected = float64.gptq(w, moment, spec.bits, spec.group, spec.symmetric)
    same = np.abs(float64.dequantize(found) - expected) < 1e-3
    # A weight that float32 rounds the other way moves its whole column's later ones.
    assert same.mean() > 0.95
    ours, theirs = error(x, w, found), np.linalg.norm(x @ (expected - w))
    assert abs(ours / theirs - 1) < 0.02


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("d_in", [96, 128, 200])
def test_error_on_the_calibration_batch_is_below_rounding(name, d_in):
    w, x = problem(d_in)
    spec = QuantSpec.parse(name)
    found = gptq(jnp.asarray(w), second_moment(jnp.asarray(x)), spec)
    rounded = round_to_nearest(jnp.asarray(w), spec)
    assert error(x, w, found) < 0.9 * error(x, w, rounded)


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_on_the_grid_stays(name):
    spec = QuantSpec.parse(name)
    w = on_grid(spec, rows=48, columns=64)
    x = problem(48)[1]
    np.testing.assert_array_equal(gptq(jnp.asarray(w), second_moment(jnp.asarray(x)), spec).dequantize(), w)


def test_dead_inputs_and_no_inputs_are_rounded_to_nearest():
    w, x = problem(48)
    x[:, [3, 17]] = 0
    spec = QuantSpec.parse("int4-g32")
    rounded, whole = round_to_nearest(jnp.asarray(w), spec).dequantize(), (1.0,)
    found = gptq(jnp.asarray(w), second_moment(jnp.asarray(x)), spec, shrinks=whole).dequantize()
    np.testing.assert_array_equal(found[np.array([3, 17])], rounded[np.array([3, 17])])
    np.testing.assert_array_equal(gptq(jnp.asarray(w), jnp.zeros((48, 48)), spec, shrinks=whole).dequantize(), rounded)


def test_fewer_tokens_than_inputs():
    w, x = problem(200, tokens=20)
    spec = QuantSpec.parse("int4-g32")
    found = gptq(jnp.asarray(w), second_moment(jnp.asarray(x)), spec)
    assert error(x, w, found) < 0.5 * error(x, w, round_to_nearest(jnp.asarray(w), spec))


def test_a_broken_moment():
    w, _ = problem(40)
    with pytest.raises(QuantizationError, match="not finite"):
        gptq(jnp.asarray(w), jnp.full((40, 40), jnp.inf), QuantSpec.parse("int8"))
