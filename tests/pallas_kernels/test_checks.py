"""What does not fit is refused before a kernel is launched: while it is traced."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import gate_up, matvec, norm, select
from pallas_kernels.coded import CodedMatrix
from pallas_kernels.kept import Cut
from pallas_kernels.reference import check_thresholds
from pallas_kernels.tiles import Tile
from tests.pallas_kernels.float64 import kept_rows

TILE = Tile(32, 2, unroll=2, warps=1)
X = jnp.ones((2, 20))
ROWS = kept_rows(np.ones((2, 20)), [0.0, 0.0], 8)
W = jnp.ones((20, 40))
COUNTERS = jnp.zeros(4, jnp.int32)
LAYER = jnp.zeros(1, jnp.int32)

CALLS = {
    "matvec": (matvec.matvec, {"rows": ROWS, "weights": (W, W), "counters": COUNTERS, "tile": TILE}),
    "gate_up": (
        gate_up.gate_up,
        {"rows": ROWS, "weights": (W, W), "counters": COUNTERS, "cut": Cut.of([0.5]), "tile": TILE},
    ),
    "norm": (
        norm.rms_norm_select,
        {"h": X, "weight": jnp.ones(20), "cut": Cut.of([0.5]), "eps": 1e-5, "width": 8},
    ),
    "select": (select.select, {"x": X, "cut": Cut.of([0.5]), "width": 8}),
}


def tile(**change):
    return {"tile": dataclasses.replace(TILE, **change)}


def rows(**change):
    return {"rows": dataclasses.replace(ROWS, **change)}


INT8 = CodedMatrix(jnp.ones((20, 40), jnp.int8), jnp.ones(40), float_dtype="float32")
INT4 = CodedMatrix(jnp.ones((20, 20), jnp.uint8), jnp.ones((20, 5), "bfloat16"), None, 8, "float32")


def coded(weight=INT8, **change):
    return {"weights": (dataclasses.replace(weight, **change), W)}


NINE = jnp.ones((9, 20))
INTS = jnp.ones((2, 20), jnp.int32)

WEIGHTED = {
    "no weights": ({"weights": ()}, ValueError, "weights: expected at least one matrix, got none"),
    "weight ndim": ({"weights": (W, W[0])}, ValueError, r"weights: expected \[20, d_out\] each, got \(40,\)"),
    "weight shape": ({"weights": (W, W[:19])}, ValueError, r"weights: expected \[20, d_out\] each, got \(19, 40\)"),
    "weight empty": ({"weights": (W[:, :0], W)}, ValueError, r"weights: expected .* got \(20, 0\)"),
    "weight dtypes": ({"weights": (W, W.astype("bfloat16"))}, TypeError, "expected float32 throughout, got bfloat16"),
    "weight dtype": ({"weights": (W.astype(int),) * 2}, TypeError, "weights: expected one of .*bfloat16.* got int32"),
    "codes dtype": (coded(codes=INT8.codes.astype("int16")), TypeError, "codes: expected int8, got int16"),
    "int8 scale": (coded(scale=jnp.ones(39)), ValueError, r"scale: expected \(40,\), got \(39,\)"),
    "int8 zero": (coded(zero=jnp.ones(40, "uint8")), ValueError, "zero: expected none with 8 bits"),
    "odd group": (coded(INT4, group=3), ValueError, "group: expected a power of two, got 3"),
    "group": (coded(INT4, group=16), ValueError, "group: expected one >= 2 that divides 40 outputs, got 16"),
    "int4 codes": (coded(INT4, codes=INT4.codes.astype("int8")), TypeError, "codes: expected uint8, got int8"),
    "int4 scale": (coded(INT4, scale=jnp.ones((20, 4), "bfloat16")), ValueError, r"scale: expected \(20, 5\), got"),
    "scale dtype": (coded(INT4, scale=jnp.ones((20, 5))), TypeError, "scale: expected bfloat16, got float32"),
    "zero dtype": (coded(INT4, zero=jnp.ones((20, 5))), TypeError, "zero: expected uint8, got float32"),
    "float dtype": (coded(float_dtype="bfloat16"), TypeError, "expected bfloat16 throughout, got float32"),
    "segments": ({"rows": kept_rows(np.ones((2, 20)), [0.0], 8)}, ValueError, "one segment for each of 2 .* got 1"),
    "few lists": (
        {"rows": kept_rows(np.ones((2, 16)), [0.0] * 2, 8)},
        ValueError,
        "lists that cover 20 channels, got 2 lists of 8",
    ),
    "batch 9": ({"rows": kept_rows(np.ones((9, 20)), [0.0] * 2, 8)}, ValueError, "batch 1 to 8, got 9"),
    "dense batch 9": ({"rows": NINE}, ValueError, r"x: expected \[batch, d\] with batch 1 to 8, got \(9, 20\)"),
    "dense ndim": ({"rows": X[0]}, ValueError, r"x: expected \[batch, d\] .* got \(20,\)"),
    "dense d_in": ({"rows": X[:, :19]}, ValueError, r"x: expected \[batch, 20\] .* got \(2, 19\)"),
    "dense dtype": ({"rows": X.astype("float16")}, TypeError, "dtype of the weights, float32, got float16"),
    "dense int": ({"rows": INTS}, TypeError, "x: expected one of .* got int32"),
    "few counters": (
        {"counters": COUNTERS[:3]},
        ValueError,
        r"counters: expected int32 \[n\] with n >= 4, got .*\(3,\)",
    ),
    "counters dtype": ({"counters": jnp.zeros(4)}, ValueError, "counters: expected int32 .* got float32"),
    "counters ndim": ({"counters": COUNTERS[None]}, ValueError, r"counters: expected .* got int32 \(1, 4\)"),
    "tile columns": (tile(columns=48), ValueError, "columns: expected a power of two, got 48"),
    "tile warps": (tile(warps=3), ValueError, "warps: expected a power of two, got 3"),
    "tile each": (tile(each=12), ValueError, "each: expected a power of two, got 12"),
    "tile splits": (tile(splits=0), ValueError, "tile: expected splits and unroll >= 1, got .*splits=0"),
    "tile unroll": (tile(unroll=0), ValueError, "tile: expected splits and unroll >= 1, got .*unroll=0"),
    "no columns": (tile(columns=0), ValueError, "columns: expected a power of two, got 0"),
    "rows index dtype": (rows(index=ROWS.index.astype(jnp.float32)), TypeError, "rows: expected .*int32.* got float32"),
    "rows value shape": (rows(value=ROWS.value[..., :4]), ValueError, r"rows: expected .* got \(2, 3, 2, 4\)"),
    "rows value dtype": (rows(value=ROWS.value.astype("bfloat16")), TypeError, "rows: expected float32.* got bfloat16"),
    "rows count shape": (rows(count=ROWS.count[:, :1]), ValueError, r"rows: expected .* got \(2, 1\)"),
    "few biases": ({"biases": (W[0],)}, ValueError, "biases: expected .* got 1"),
    "bias shape": ({"biases": (W[0], W[0, :9])}, ValueError, r"biases: expected .*40.* got \(9,\)"),
    "bias dtype": ({"biases": (W[0].astype(int),) * 2}, TypeError, "biases: expected .* got int32"),
}
CUTS = {
    "threshold ndim": (Cut(jnp.ones(7), LAYER, (0,)), TypeError, r"float32 \[layers, projections\], got "),
    "threshold dtype": (Cut(jnp.ones((1, 7), "bfloat16"), LAYER, (0,)), TypeError, "expected float32 .* got "),
    "layer dtype": (Cut(jnp.ones((1, 7)), jnp.zeros(1), (0,)), TypeError, "layer: expected int32.* got float32"),
    "layer shape": (Cut(jnp.ones((1, 7)), jnp.int32(0), (0,)), ValueError, r"layer: expected .* got \(\)"),
    "projection": (Cut(jnp.ones((1, 7)), LAYER, (7,)), ValueError, "projections: expected .* got .*7"),
}
CUTS = {name: ({"cut": cut}, *rest) for name, (cut, *rest) in CUTS.items()}
WRONG = {
    "matvec": WEIGHTED
    | {
        "residual": ({"residual": jnp.ones((2, 79))}, ValueError, r"residual: expected \(2, 80\), got \(2, 79\)"),
        "residual dtype": (
            {"residual": jnp.ones((2, 80), "bfloat16")},
            TypeError,
            "residual: expected float32, got bf",
        ),
        "out_dtype": ({"out_dtype": "int32"}, TypeError, "out_dtype: expected one of .* got int32"),
    },
    "gate_up": WEIGHTED
    | CUTS
    | {
        "shapes": ({"weights": (W, W[:, :39])}, ValueError, r"of one shape, got \(20, 40\) and \(20, 39\)"),
        "one weight": ({"rows": X, "weights": (W,)}, ValueError, "weights: expected .*gate and up.* got 1"),
        "cuts": ({"cut": Cut.of([0.5, 0.5])}, ValueError, "one for each of 1 segments, got 2"),
    },
    "norm": CUTS
    | {
        "batch 9": ({"h": NINE}, ValueError, r"h: expected .* batch 1 to 8, got \(9, 20\)"),
        "ndim": ({"h": X[0]}, ValueError, r"h: expected \[batch, d\] .* got \(20,\)"),
        "empty": ({"h": X[:, :0]}, ValueError, r"h: expected .* got \(2, 0\)"),
        "dtype": ({"h": INTS}, TypeError, "h: expected one of .* got int32"),
        "weight": ({"weight": jnp.ones(19)}, ValueError, r"weight: expected float32 \(20,\), got float32 \(19,\)"),
        "weight dtype": ({"weight": jnp.ones(20, "float16")}, ValueError, "weight: expected float32 .* got float16"),
        "width": ({"width": 24}, ValueError, "width: expected a power of two, got 24"),
        "no width": ({"width": 0}, ValueError, "width: expected a power of two, got 0"),
        "no thresholds": ({"cut": Cut.of([])}, ValueError, "expected at least one"),
    },
    "select": CUTS
    | {
        "batch 9": ({"x": NINE}, ValueError, r"x: expected .* batch 1 to 8, got \(9, 20\)"),
        "no batch": ({"x": X[:0]}, ValueError, r"x: expected .* got \(0, 20\)"),
        "dtype": ({"x": INTS}, TypeError, "x: expected one of .* got int32"),
        "width": ({"width": 24}, ValueError, "width: expected a power of two, got 24"),
    },
}


@pytest.mark.parametrize("call", CALLS)
def test_what_fits_is_not_refused(call):
    f, arguments = CALLS[call]
    f.eval_shape(**arguments)


@pytest.mark.parametrize(
    ("call", "wrong"),
    [(call, wrong) for call in WRONG for wrong in WRONG[call]],
)
def test_wrong_use_raises(call, wrong):
    f, arguments = CALLS[call]
    change, error, message = WRONG[call][wrong]
    with pytest.raises(error, match=message):
        f.eval_shape(**(arguments | change))


@pytest.mark.parametrize("bad", [-0.5, np.nan, -np.inf])
def test_thresholds_below_zero_or_nan(bad):
    with pytest.raises(ValueError, match=f"expected every one >= 0.*got {bad}"):
        check_thresholds(jnp.asarray([[0.5, 1.0], [bad, 0.0]]))


@pytest.mark.parametrize("bad", [-0.5, np.nan])
def test_a_cut_of_thresholds_below_zero_or_nan(bad):
    with pytest.raises(ValueError, match=f"expected every one >= 0.*got {bad}"):
        Cut.of([0.5, bad])


def test_thresholds_that_are_right():
    check_thresholds([[0.0, 1.0], [np.inf, 3]])
    check_thresholds(0.5)
