import numpy as np
import pytest

from converters import awq
from converters.quantization_config import Quantization
from teal_jax.errors import CheckpointError
from tests.converters.packed import awq_tensors, dequantized, numbers

AWQ = Quantization(method="awq", format="gemm", group_size=8)


def test_a_word_by_hand():
    # Outputs 0..7 hold 0..7: AutoAWQ's order puts 0 2 4 6 1 3 5 7 into the places from the lowest on.
    word = np.array([[0x75316420]], np.int32)
    assert awq.unpack_columns(word, awq.ORDER).tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


def test_the_highest_number_is_no_sign():
    word = np.array([[0xF0000000]], np.uint32).view(np.int32)
    assert awq.unpack_columns(word, awq.ORDER).tolist() == [[0, 0, 0, 0, 0, 0, 0, 15]]


@pytest.mark.parametrize("group_size", [8, 16, None])
def test_round_trip(group_size):
    d_in, d_out = 32, 24
    quantization = Quantization(method="awq", format="gemm", group_size=group_size)
    codes, scales, zeros = numbers(np.random.default_rng(0), d_in, d_out, d_in // (group_size or d_in))
    zeros[0, 0] = 0  # stored as it is
    tensors = awq_tensors(codes, scales, zeros)
    assert awq.shapes("m", d_in, d_out, quantization) == {name: tensor.shape for name, tensor in tensors.items()}
    weight = awq.unpack("m", tensors, quantization)
    assert weight.shape == (d_in, d_out)
    assert weight.codes.dtype == weight.zeros.dtype == np.uint8
    np.testing.assert_array_equal(weight.codes, codes)
    np.testing.assert_array_equal(weight.zeros, zeros)
    np.testing.assert_array_equal(weight.scales, scales)
    group_of = [i // (group_size or d_in) for i in range(d_in)]
    np.testing.assert_array_equal(weight.group_of, group_of)
    # Equal, not close: a 16-bit scale times a whole number below 16 is exact in float32.
    np.testing.assert_array_equal(weight.dequantize(), dequantized(codes, scales, zeros, group_of))


def test_group_that_does_not_divide():
    with pytest.raises(CheckpointError, match="m has 20 inputs, which group_size 8 does not divide"):
        awq.shapes("m", 20, 16, AWQ)


def test_output_that_does_not_fill_words():
    with pytest.raises(CheckpointError, match="m has 12 outputs: 4-bit packing needs a multiple of 8"):
        awq.shapes("m", 16, 12, AWQ)
    assert awq.shapes("m", 8, 16, AWQ)["qweight"] == (8, 2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_broken_scale(value):
    codes, scales, zeros = numbers(np.random.default_rng(0), 16, 8, 2)
    scales[1, 3] = value
    with pytest.raises(
        CheckpointError, match=r"m.scales holds NaN or infinite numbers: 1, the first for group 1, out.* 3"
    ):
        awq.unpack("m", awq_tensors(codes, scales, zeros), AWQ)
