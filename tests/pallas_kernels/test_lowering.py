"""Every kernel with its default tiles becomes one Triton kernel for four GPUs, in place where it should be."""

import functools

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import sparse
from pallas_kernels.gate_up import gate_up
from pallas_kernels.kept import Cut, kept_shapes
from pallas_kernels.largest import select_largest
from pallas_kernels.matvec import matvec
from pallas_kernels.norm import rms_norm_select
from pallas_kernels.select import select
from pallas_kernels.tiles import matvec_tile
from pallas_kernels.workloads import LLAMA_3_2_1B, LLAMA_3_8B
from tests.pallas_kernels.lowering import DEVICES, KERNEL, lower

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

WIDTH = 128
shape = jax.ShapeDtypeStruct
COUNTERS = shape((8192,), jnp.int32)


def cut(*projections):
    return Cut(shape((32, 7), jnp.float32), shape((1,), jnp.int32), projections)


def kept(d_in, segments, batch):
    return kept_shapes(segments, -(-d_in // WIDTH), batch, WIDTH)


def norm(workload, batch, dtype):
    f = functools.partial(rms_norm_select, eps=1e-5, width=WIDTH)
    return f, (shape((batch, workload.d_model), dtype), shape((workload.d_model,), dtype), cut(0, 1, 2)), ()


def choose(workload, batch, dtype):
    return select, (shape((batch, workload.d_mlp), dtype), cut(6)), ()


def largest(workload, batch, dtype):
    counts = Cut(shape((32, 7), jnp.int32), shape((1,), jnp.int32), (0, 1, 2))
    return select_largest, (shape((batch, workload.d_model), dtype), counts), ()


def product(names, workload, batch, dtype, dense=False, residual=False):
    shapes = [workload.projection_shapes[name] for name in names]
    d_in, d_outs = shapes[0][0], tuple(d_out for _, d_out in shapes)
    tile = matvec_tile(d_in, d_outs, batch=batch, dense=dense)
    rows = shape((batch, d_in), dtype) if dense else kept(d_in, len(names), batch)
    weights = tuple(shape(s, dtype) for s in shapes)

    def f(rows, weights, counters, h):
        return matvec(rows, weights, counters, tile=tile, residual=h)

    return f, (rows, weights, COUNTERS, shape((batch, sum(d_outs)), dtype) if residual else None), (2,)


def mlp(workload, batch, dtype, dense=False):
    d, m = workload.d_model, workload.d_mlp
    f = functools.partial(gate_up, tile=matvec_tile(d, (m, m), batch=batch, dense=dense))
    rows = shape((batch, d), dtype) if dense else kept(d, 2, batch)
    return f, (rows, (shape((d, m), dtype),) * 2, COUNTERS, None if dense else cut(6)), (2,)


KERNELS = {
    "norm": norm,
    "select": choose,
    "top_k": largest,
    "qkv": functools.partial(product, ("q", "k", "v")),
    "down": functools.partial(product, ("down",), residual=True),
    "dense o": functools.partial(product, ("o",), dense=True),
    "gate_up": mlp,
    "dense gate_up": functools.partial(mlp, dense=True),
}


def check(device, kernel, workload=LLAMA_3_8B, batch=1, dtype="bfloat16"):
    f, args, donate = KERNELS[kernel](workload, batch, jnp.dtype(dtype))
    text = lower(device, f, *args, donate=donate)
    assert text.count(KERNEL) == 1
    assert text.count("#stablehlo.output_operand_alias") == len(donate)
    assert text.count("tf.aliasing_output") == len(donate)
    # Nothing around it: no copy, no cast, no transpose of a weight.
    assert "stablehlo." not in text.replace("stablehlo.custom_call", "").replace("#stablehlo.output_operand_alias", "")


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("device", DEVICES)
def test_one_token_on_every_gpu(device, kernel):
    check(device, kernel)


@pytest.mark.parametrize("kernel", KERNELS)
def test_eight_tokens(kernel):
    check("h200", kernel, batch=8)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_other_dtypes(kernel, dtype):
    check("h200", kernel, LLAMA_3_2_1B, dtype=dtype)


def test_odd_sizes(monkeypatch):
    """Nothing is a power of two, a whole list or a whole tile."""
    monkeypatch.setattr("pallas_kernels.support.why_not", lambda: None)
    f = functools.partial(sparse.sparse_matvec, implementation="pallas")
    args = (shape((3, 257), jnp.bfloat16), shape((257, 33), jnp.bfloat16), shape((), jnp.float32))
    assert lower("h200", f, *args).count(KERNEL) == 2
