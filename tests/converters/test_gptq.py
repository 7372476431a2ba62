import numpy as np
import pytest

from converters import gptq
from converters.quantization_config import Quantization
from teal_jax.errors import CheckpointError
from tests.converters.packed import dequantized, gptq_tensors, numbers, pack_columns

D_IN, D_OUT = 32, 24
IN_ORDER = [i // 8 for i in range(D_IN)]


def quantization(**changes) -> Quantization:
    return Quantization(**({"method": "gptq", "format": "gptq", "group_size": 8} | changes))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def refused(message: str, tensors, quantized: Quantization) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        gptq.unpack("m", tensors, quantized)
    assert caught.value.hint


def test_words_by_hand():
    # Input channels 0..7 of the one output hold 0..7; places from the lowest on are in order.
    tensors = {
        "qweight": np.full((1, 8), 0x76543210, np.int32),
        "qzeros": np.array([[0x76543210]], np.int32),
        "scales": np.ones((1, 8), np.float16),
    }
    v1 = gptq.unpack("m", tensors, quantization())
    assert v1.codes[:, 5].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert v1.zeros.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    assert v1.dequantize()[:, 0].tolist() == [-1, 0, 1, 2, 3, 4, 5, 6]
    v2 = gptq.unpack("m", tensors, quantization(format="gptq_v2"))
    assert v2.zeros.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7]]


@pytest.mark.parametrize("v2", [False, True])
@pytest.mark.parametrize("order", ["in order", "act order", "missing", "one group"])
def test_round_trip(rng, v2, order):
    group_size = None if order == "one group" else 8
    group_of = [0] * D_IN if order == "one group" else IN_ORDER
    if order == "act order":
        group_of = rng.permutation(group_of)
    codes, scales, zeros = numbers(rng, D_IN, D_OUT, max(group_of) + 1)
    tensors = gptq_tensors(codes, scales, zeros, group_of, v2=v2)
    quantized = quantization(
        format="gptq_v2" if v2 else "gptq",
        group_size=group_size,
        act_order=order in ("act order", "one group"),
        symmetric=False,
    )
    assert gptq.shapes("m", D_IN, D_OUT, quantized) == {name: tensor.shape for name, tensor in tensors.items()}
    if order == "missing":
        del tensors["g_idx"]
    weight = gptq.unpack("m", tensors, quantized)
    np.testing.assert_array_equal(weight.codes, codes)
    np.testing.assert_array_equal(weight.zeros, zeros)
    np.testing.assert_array_equal(weight.group_of, group_of)
    np.testing.assert_array_equal(weight.dequantize(), dequantized(codes, scales, zeros, group_of))


def test_last_group_may_be_smaller(rng):
    group_of = [i // 24 for i in range(D_IN)]
    codes, scales, zeros = numbers(rng, D_IN, D_OUT, 2)
    weight = gptq.unpack("m", gptq_tensors(codes, scales, zeros, group_of), quantization(group_size=24))
    np.testing.assert_array_equal(weight.dequantize(), dequantized(codes, scales, zeros, group_of))


def test_gptqmodel_s_borrow_is_undone(rng):
    """GPTQModel turns v2 into v1 by taking 0x11111111 off a word; under a zero point of 0 it borrows."""
    codes, scales, zeros = numbers(rng, D_IN, D_OUT, 4)
    zeros[:, ::3] = 0
    tensors = gptq_tensors(codes, scales, zeros, IN_ORDER, v2=True)
    words = [[(int(word) - 0x11111111) % 2**32 for word in row] for row in tensors["qzeros"]]
    tensors["qzeros"] = np.array(words, np.uint32).view(np.int32)
    weight = gptq.unpack("m", tensors, quantization(by_gptqmodel=True))
    np.testing.assert_array_equal(weight.zeros, zeros)


def test_autogptq_s_spilt_zero_is_refused(rng):
    """AutoGPTQ's v1 of a zero point of 0: -1 as uint32, ored into its place and all above."""
    codes, scales, zeros = numbers(rng, D_IN, D_OUT, 4)
    tensors = gptq_tensors(codes, scales, zeros, IN_ORDER)
    tensors["qzeros"] |= np.int32(-1) << 12
    refused(r"m.qzeros holds 15, a zero point of 0 less one", tensors, quantization())


@pytest.mark.parametrize("v2", [False, True])
def test_format_that_contradicts_sym(rng, v2):
    codes, scales, zeros = numbers(rng, D_IN, D_OUT, 4, symmetric=True)
    tensors = gptq_tensors(codes, scales, zeros, IN_ORDER, v2=v2)
    formats = ("gptq", "gptq_v2")
    gptq.unpack("m", tensors, quantization(format=formats[v2], symmetric=True))
    wrong = quantization(format=formats[not v2], symmetric=True)
    found = 9 if v2 else 7
    refused(f"m.qzeros means zero points {found} to {found} in format {wrong.format}.*sym: true", tensors, wrong)


def test_act_order_without_g_idx(rng):
    tensors = gptq_tensors(*numbers(rng, D_IN, D_OUT, 4), IN_ORDER)
    del tensors["g_idx"]
    refused("m.g_idx is missing, and quantization_config says desc_act: true", tensors, quantization(act_order=True))


def test_act_order_that_the_config_denies(rng):
    group_of = [*IN_ORDER[8:], *IN_ORDER[:8]]
    tensors = gptq_tensors(*numbers(rng, D_IN, D_OUT, 4), group_of)
    gptq.unpack("m", tensors, quantization(act_order=True))
    refused("m.g_idx is out of order at input channel 0.*desc_act: false", tensors, quantization())


def test_groups_that_are_not_there(rng):
    tensors = gptq_tensors(*numbers(rng, D_IN, D_OUT, 4), [*IN_ORDER[:-1], 4])
    refused("m.g_idx names groups 0 to 4, there are 4", tensors, quantization(act_order=True))


def test_groups_of_another_size(rng):
    # All zeros, as some old writers left it: it would give every channel the scales of the first group.
    tensors = gptq_tensors(*numbers(rng, D_IN, D_OUT, 4), [0] * D_IN)
    refused("m.g_idx gives group 0 32 input channels: expected 8", tensors, quantization(act_order=True))


def test_broken_scale(rng):
    codes, scales, zeros = numbers(rng, D_IN, D_OUT, 4)
    scales[2, 1] = np.nan
    refused("m.scales holds NaN", gptq_tensors(codes, scales, zeros, IN_ORDER), quantization())


@pytest.mark.parametrize(("d_in", "d_out", "what"), [(20, 16, "20 inputs"), (16, 20, "20 outputs")])
def test_sizes_that_do_not_fill_words(d_in, d_out, what):
    with pytest.raises(CheckpointError, match=f"m has {what}: 4-bit packing needs a multiple of 8"):
        gptq.shapes("m", d_in, d_out, quantization())


def test_packing_helper_agrees_with_a_word_by_hand():
    assert pack_columns(np.arange(8)[None]).tolist() == [[0x76543210]]
