import ml_dtypes
import numpy as np
import pytest

from converters.grouped import GroupedWeight, in_sequence
from converters.regroup import regroup_int4, regroup_int8, relative_error
from teal_jax.errors import CheckpointError
from tests.converters.packed import numbers

D_IN, D_OUT, GROUP = 32, 48, 16


def grouped(groups: int, **changes) -> GroupedWeight:
    codes, scales, zeros = numbers(np.random.default_rng(0), D_IN, D_OUT, groups)
    fields = {"codes": codes, "scales": scales, "zeros": zeros, "group_of": in_sequence(D_IN, D_IN // groups)}
    return GroupedWeight(**(fields | changes))


def frobenius(ours, theirs) -> float:
    difference = sum((float(a) - float(b)) ** 2 for a, b in zip(ours.ravel(), theirs.ravel(), strict=True))
    return (difference / sum(float(b) ** 2 for b in theirs.ravel())) ** 0.5


def test_int8_is_lossless_where_a_column_has_one_scale():
    weight = grouped(1)
    ours = regroup_int8(weight)
    assert (ours.error, ours.bits, ours.zero) == (0.0, 8, None)
    assert ours.codes.dtype == np.int8
    assert ours.scale.shape == (D_OUT,)
    np.testing.assert_array_equal(ours.dequantize(), weight.dequantize())


def test_int8_takes_several_zero_points_of_one_scale():
    scales = np.repeat(np.linspace(0.01, 0.02, D_OUT, dtype=np.float16)[None], 4, axis=0)
    weight = grouped(4, scales=scales)
    assert len(np.unique(weight.zeros[:, 0])) > 1
    assert regroup_int8(weight).error == 0
    np.testing.assert_array_equal(regroup_int8(weight).dequantize(), weight.dequantize())


def test_int8_otherwise_rounds_to_its_own_steps():
    weight = grouped(4)
    ours, exact = regroup_int8(weight), weight.dequantize()
    assert np.all(np.abs(ours.dequantize() - exact) <= ours.scale / 2 * 1.00001)
    assert np.abs(ours.codes).max() == 127
    assert ours.error == pytest.approx(frobenius(ours.dequantize(), exact), rel=1e-6)
    assert 0 < ours.error < 0.01


@pytest.mark.parametrize("act_order", [False, True])
def test_int4_is_lossless_where_the_outputs_of_a_group_agree(act_order):
    rng = np.random.default_rng(1)
    scales = np.repeat(rng.uniform(0.01, 0.02, (4, D_OUT // GROUP)).astype(ml_dtypes.bfloat16), GROUP, axis=1)
    zeros = np.repeat(rng.integers(0, 16, (4, D_OUT // GROUP), np.uint8), GROUP, axis=1)
    group_of = rng.permutation(in_sequence(D_IN, 8)) if act_order else in_sequence(D_IN, 8)
    weight = grouped(4, scales=scales, zeros=zeros, group_of=group_of)
    ours = regroup_int4(weight, GROUP)
    assert (ours.error, ours.bits, ours.group) == (0.0, 4, GROUP)
    np.testing.assert_array_equal(ours.codes & 15, weight.codes[:, 0::2])
    np.testing.assert_array_equal(ours.codes >> 4, weight.codes[:, 1::2])
    np.testing.assert_array_equal(ours.dequantize(), weight.dequantize())


@pytest.mark.parametrize("difference", ["scale", "zero", "not in bfloat16"])
def test_int4_is_not_called_lossless_for_less(difference):
    scales = np.full((4, D_OUT), 0.0103 if difference == "not in bfloat16" else 2**-6, np.float16)
    zeros = np.full((4, D_OUT), 8, np.uint8)
    if difference == "scale":
        scales[3, 5] *= 1.5
    if difference == "zero":
        zeros[3, 5] += 1
    assert regroup_int4(grouped(4, scales=scales, zeros=zeros), GROUP).error > 0


def test_int4_otherwise_rounds_to_nearest():
    weight = grouped(4)
    ours, exact = regroup_int4(weight, GROUP), weight.dequantize()
    assert ours.codes.shape == (D_IN, D_OUT // 2)
    assert ours.zero is not None
    assert ours.scale.shape == ours.zero.shape == (D_IN, D_OUT // GROUP)
    assert ours.scale.dtype == ml_dtypes.bfloat16
    # Half a step, and at an edge of the range what the rounded zero point and the scale's 8 bits (2^-8) cut off.
    step = np.repeat(ours.scale.astype(np.float64), GROUP, axis=1)
    assert np.all(np.abs(ours.dequantize() - exact) <= step * (1 + 15 / 256))
    assert ours.error == pytest.approx(frobenius(ours.dequantize(), exact), rel=1e-6)
    assert 0 < ours.error < 0.1


@pytest.mark.parametrize("regroup", [regroup_int8, lambda weight: regroup_int4(weight, GROUP)])
def test_rows_and_columns_of_zeros(regroup):
    weight = grouped(4)
    weight.scales[:, :GROUP] = 0
    ours = regroup(weight)
    assert np.all(ours.dequantize()[:, :GROUP] == 0)
    assert np.isfinite(ours.error)
    weight.scales[:] = 0
    assert regroup(weight).error == 0


@pytest.mark.parametrize("group", [0, 3, 32, 47])
def test_group_that_does_not_divide(group):
    with pytest.raises(CheckpointError, match=f"groups of {group} outputs do not divide 48 outputs"):
        regroup_int4(grouped(4), group)


def test_relative_error():
    assert relative_error(np.array([3.0, 5.0]), np.array([3.0, 4.0])) == pytest.approx(0.2)
    assert relative_error(np.zeros(2), np.zeros(2)) == 0
    assert relative_error(np.ones(4), np.zeros(4)) == 2
