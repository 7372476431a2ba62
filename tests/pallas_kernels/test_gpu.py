"""The kernels on a real GPU: the properties of the other tests, real sizes, the same bits every time.

`-k sanitize` is the part for `compute-sanitizer --tool memcheck` and `--tool racecheck`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_kernels import support
from pallas_kernels.attention import decode_attention, decode_attention_reference
from pallas_kernels.gate_up import gate_up
from pallas_kernels.kept import Cut
from pallas_kernels.matvec import matvec
from pallas_kernels.norm import rms_norm_select
from pallas_kernels.select import select
from pallas_kernels.sparse import sparse_matvec
from pallas_kernels.tiles import Tile, matvec_tile
from pallas_kernels.workloads import LLAMA_3_8B
from tests.pallas_kernels import (
    test_attention,
    test_gate_up,
    test_largest,
    test_matvec,
    test_norm,
    test_select,
    test_sparse,
)
from tests.pallas_kernels.float64 import (
    Bounded,
    check_rows,
    f64,
    kept_rows,
    masked,
    product,
    rms_norm,
    same_bits,
    silu_product,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning"),
]

D, D_MLP = LLAMA_3_8B.d_model, LLAMA_3_8B.d_mlp
WIDTH, EPS, RUNS = 128, 1e-5, 1000
BATCHES = [(1, "bfloat16"), (2, "bfloat16"), (4, "bfloat16"), (8, "bfloat16"), (1, "float16"), (1, "float32")]


def counters() -> jax.Array:
    return jnp.zeros(8192, jnp.int32)


# The small cases of the other tests.

SMALL = {
    "matvec": test_matvec.CASES + test_matvec.DENSE,
    "gate_up": test_gate_up.CASES,
    "norm": test_norm.CASES,
    "select": test_select.CASES,
    "top_k": test_largest.CASES,
    "attention": test_attention.CASES,
}
SANITIZE = {"matvec": [0, 2, 7, 9], "gate_up": [1, 5], "norm": [2], "select": [1], "top_k": [1], "attention": [1, 8]}


def check_small(kernel: str, number: int) -> None:
    case = SMALL[kernel][number]
    if kernel == "attention":
        check_attention(case)
    elif kernel in ("norm", "select", "top_k"):
        {"norm": test_norm, "select": test_select, "top_k": test_largest}[kernel].check(*case, interpret=False)
    else:
        case.check(interpret=False)


def check_attention(case: test_attention.Case) -> None:
    inputs = case.inputs()
    out, new_keys = test_attention.expected(case, inputs)
    how = {"num_heads": case.heads, "window": case.window, "splits": case.splits, "block": case.block}
    rows, keys, values, zeros = decode_attention(**inputs, counters=counters(), cut=None, **how)
    assert not np.asarray(zeros).any()
    np.testing.assert_allclose(f64(rows), out.reshape(rows.shape), atol=test_attention.tolerance(case))
    test_attention.check_cache(case, inputs, keys, values, new_keys)


@pytest.mark.parametrize(("kernel", "number"), [(k, n) for k, numbers in SANITIZE.items() for n in numbers])
def test_sanitize(kernel, number):
    check_small(kernel, number)


@pytest.mark.parametrize(
    ("kernel", "number"), [(k, n) for k, cases in SMALL.items() for n in range(len(cases)) if n not in SANITIZE[k]]
)
def test_small_cases(kernel, number):
    check_small(kernel, number)


# Real sizes, with the tiles that are used for them.


@functools.cache
def weight(d_in: int, d_out: int, dtype: str, seed: int = 0) -> jax.Array:
    return (jax.random.normal(jax.random.key(seed), (d_in, d_out)) / d_in**0.5).astype(dtype)


def poison(w: jax.Array, x: np.ndarray) -> jax.Array:
    """NaN in the rows that no row of x needs."""
    return jnp.where(jnp.asarray((x == 0).all(axis=0))[:, None], jnp.nan, w)


def exact(x: np.ndarray, w: jax.Array, tile: Tile) -> Bounded:
    """`x @ w`, where a row of the tile adds its share, then the rows are added, then the splits."""
    read = np.flatnonzero((x != 0).any(axis=0))
    depth = 2 * -(-x.shape[1] // (tile.splits * tile.rows)) + tile.rows + tile.splits
    return product(x[:, read], f64(w.astype(jnp.float32)[read]), depth)


def draw(batch: int, d: int, dtype: str, seed: int = 1) -> np.ndarray:
    return f64(jnp.asarray(np.random.default_rng(seed).normal(size=(batch, d)), dtype))


@pytest.mark.parametrize(("batch", "dtype"), BATCHES)
def test_qkv(batch, dtype):
    shapes = [LLAMA_3_8B.projection_shapes[p] for p in "qkv"]
    x, thresholds = draw(batch, D, dtype), [0.4, 0.0, 1.7]
    xs = masked(x, thresholds)
    weights = tuple(poison(weight(*s, dtype, i), xs[i]) for i, s in enumerate(shapes))
    tile = matvec_tile(D, tuple(s[1] for s in shapes), batch=batch)
    y, zeros = matvec(kept_rows(x, thresholds, WIDTH), weights, counters(), tile=tile, out_dtype="float32")
    assert not np.asarray(zeros).any()
    starts = np.cumsum([s[1] for s in shapes])[:-1]
    for part, masked_x, w in zip(np.split(f64(y), starts, axis=1), xs, weights, strict=True):
        exact(masked_x, w, tile).check(part)


@pytest.mark.parametrize(
    ("batch", "dtype", "dense"), [(1, "bfloat16", False), (8, "float16", False), (1, "bfloat16", True)]
)
def test_down(batch, dtype, dense):
    x, h = draw(batch, D_MLP, dtype), draw(batch, D, dtype, 2)
    (kept,) = [x] if dense else masked(x, [0.7])
    w = weight(D_MLP, D, dtype) if dense else poison(weight(D_MLP, D, dtype), kept)
    tile = matvec_tile(D_MLP, (D,), batch=batch, dense=dense)
    rows = jnp.asarray(x, dtype) if dense else kept_rows(x, [0.7], WIDTH)
    y, zeros = matvec(rows, (w,), counters(), tile=tile, residual=jnp.asarray(h, dtype))
    assert not np.asarray(zeros).any()
    exact(kept, w, tile).rounded(dtype).plus(h).rounded(dtype).check(y)


@pytest.mark.parametrize(("batch", "dtype"), [(1, "bfloat16"), (8, "bfloat16"), (1, "float32")])
def test_gate_and_up(batch, dtype):
    x, thresholds = draw(batch, D, dtype), [0.7, 0.5]
    xs = masked(x, thresholds)
    weights = tuple(poison(weight(D, D_MLP, dtype, i), xs[i]) for i in range(2))
    tile = matvec_tile(D, (D_MLP, D_MLP), batch=batch)
    rows, zeros = gate_up(kept_rows(x, thresholds, WIDTH), weights, counters(), Cut.of([0.1]), tile=tile)
    assert not np.asarray(zeros).any()
    expected = silu_product(*(exact(x, w, tile) for x, w in zip(xs, weights, strict=True)), dtype)
    check_rows(rows, expected, [0.1], tile.columns)
    assert same_bits(rows.value, rows.value.astype(dtype).astype(jnp.float32))


@pytest.mark.parametrize(("batch", "dtype"), [(1, "bfloat16"), (8, "float16"), (1, "float32")])
def test_norm_and_select(batch, dtype):
    h, gain = draw(batch, D, dtype), draw(1, D, dtype, 2)[0]
    thresholds = [0.0, 0.5, 2.0]
    rows = rms_norm_select(jnp.asarray(h, dtype), jnp.asarray(gain, dtype), Cut.of(thresholds), eps=EPS, width=WIDTH)
    check_rows(rows, rms_norm(h, gain, EPS, dtype), thresholds, WIDTH)
    assert same_bits(rows.value, rows.value.astype(dtype).astype(jnp.float32))
    x = draw(batch, D_MLP, dtype)
    rows = select(jnp.asarray(x, dtype), Cut.of([0.6]))
    check_rows(rows, Bounded(x, np.zeros_like(x)), [0.6], 256)


def attention_inputs(batch: int, dtype: str, slots: int = 4096) -> tuple[dict[str, jax.Array], int]:
    w = LLAMA_3_8B
    angles = jnp.linspace(-3, 3, batch * w.head_dim // 2, dtype=jnp.float32).reshape(batch, -1)
    cache = (batch, slots, w.num_kv_heads, w.head_dim)
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = {
        "qkv": jax.random.normal(keys[0], (batch, (w.num_heads + 2 * w.num_kv_heads) * w.head_dim), dtype),
        "rotary": (jnp.cos(angles), jnp.sin(angles)),
        "length": jnp.asarray([3000, 17, 4095, 5000][:batch], jnp.int32),
        "keys": jax.random.normal(keys[1], cache, dtype),
        "values": jax.random.normal(keys[2], cache, dtype),
    }
    return inputs, w.num_heads


@pytest.mark.parametrize(("batch", "dtype"), [(1, "bfloat16"), (4, "bfloat16"), (1, "float32")])
def test_attention_of_a_workload(batch, dtype):
    inputs, heads = attention_inputs(batch, dtype)
    out, keys, values, zeros = decode_attention(**inputs, counters=counters(), cut=None, num_heads=heads)
    assert not np.asarray(zeros).any()
    wide = jax.tree.map(lambda a: a.astype(jnp.float32) if a.dtype == dtype else a, inputs)
    with jax.default_matmul_precision("highest"):
        reference = decode_attention_reference(**wide, cut=None, num_heads=heads)
    tolerance = 1e-5 if dtype == "float32" else 3 * float(jnp.finfo(dtype).eps)
    for got, expected in zip((out, keys, values), reference, strict=True):
        np.testing.assert_allclose(f64(got), f64(expected), atol=tolerance, rtol=tolerance)


# The same bits.


def bits(tree) -> list[jax.Array]:
    """Arrays as integers: NaN is equal to itself, 0 is not -0."""
    kinds = {2: jnp.int16, 4: jnp.int32}
    return [lax.bitcast_convert_type(a, kinds[a.dtype.itemsize]) for a in jax.tree.leaves(tree)]


def runs_that_differ(f, first, state) -> int:
    """Of `RUNS` calls of `f(state) -> (result, state)` in one program, those whose bits are not those of `first`."""

    @jax.jit
    def loop(first, state):
        def body(_, carry):
            differ, state = carry
            result, state = f(state)
            same = [jnp.array_equal(a, b) for a, b in zip(bits(result), bits(first), strict=True)]
            return differ + ~jnp.stack(same).all(), state

        return lax.fori_loop(0, RUNS, body, (jnp.int32(0), state))

    differ, last = loop(first, state)
    assert not any(np.asarray(a).any() for a in jax.tree.leaves(last) if a.ndim == 1)  # the counters
    return int(differ)


def test_a_matvec_gives_the_same_bits():
    x = draw(1, D_MLP, "bfloat16")
    rows, w = kept_rows(x, [0.7], WIDTH), (weight(D_MLP, D, "bfloat16"),)
    run = functools.partial(matvec, tile=matvec_tile(D_MLP, (D,)))
    assert runs_that_differ(lambda c: run(rows, w, c), run(rows, w, counters())[0], counters()) == 0


def test_gate_up_gives_the_same_bits():
    x = draw(1, D, "bfloat16")
    rows, ws = kept_rows(x, [0.7, 0.6], WIDTH), tuple(weight(D, D_MLP, "bfloat16", i) for i in range(2))
    run = functools.partial(gate_up, cut=Cut.of([0.1]), tile=matvec_tile(D, (D_MLP, D_MLP)))
    assert runs_that_differ(lambda c: run(rows, ws, c), run(rows, ws, counters())[0], counters()) == 0


def test_attention_gives_the_same_bits():
    inputs, heads = attention_inputs(1, "bfloat16")
    keys, values = inputs.pop("keys"), inputs.pop("values")
    run = functools.partial(decode_attention, **inputs, cut=Cut.of([0.05]), num_heads=heads)

    def f(state):
        rows, *state = run(keys=state[0], values=state[1], counters=state[2])
        return rows, tuple(state)

    assert runs_that_differ(f, f((keys, values, counters()))[0], (keys, values, counters())) == 0


def chain(h: jax.Array, zeros: jax.Array, weights, call) -> tuple[jax.Array, jax.Array]:
    """Four blocks without attention: every kernel starts as soon as it may after the one before it."""
    cuts, gain = [Cut.of([0.5]), Cut.of([0.6, 0.7]), Cut.of([0.05])], jnp.ones(D, h.dtype)
    for o, gate, up, down in weights:
        rows = call(select, h, cuts[0], width=WIDTH)
        h, zeros = call(matvec, rows, (o,), zeros, tile=matvec_tile(D, (D,)), residual=h)
        rows = call(rms_norm_select, h, gain, cuts[1], eps=EPS, width=WIDTH)
        rows, zeros = call(gate_up, rows, (gate, up), zeros, cuts[2], tile=matvec_tile(D, (D_MLP, D_MLP)))
        h, zeros = call(matvec, rows, (down,), zeros, tile=matvec_tile(D_MLP, (D,)), residual=h)
    return h, zeros


def test_kernels_in_one_program_give_the_bits_of_kernels_one_by_one():
    shapes = [(D, D), (D, D_MLP), (D, D_MLP), (D_MLP, D)]
    weights = [[weight(*s, "bfloat16", 7 * layer + i) for i, s in enumerate(shapes)] for layer in range(4)]
    h = jnp.asarray(draw(1, D, "bfloat16"), "bfloat16")

    def alone(f, *args, **how):
        return jax.block_until_ready(f(*jax.block_until_ready(args), **how))

    def together(f, *args, **how):
        return f(*args, **how)

    first, _ = chain(h, counters(), weights, alone)
    assert np.isfinite(f64(first)).all()
    program = jax.jit(lambda h, zeros, weights: chain(h, zeros, weights, together))
    zeros, differ = counters(), jnp.int32(0)
    for _ in range(RUNS // 10):
        again, zeros = program(h, zeros, weights)
        differ += ~jnp.array_equal(bits(again)[0], bits(first)[0])
    assert int(differ) == 0
    assert not np.asarray(zeros).any()


# The one call.


def test_the_kernels_run_here():
    assert support.why_not() is None
    text = jax.jit(lambda x, w: sparse_matvec(x, w, 0.5)).lower(jnp.ones((1, 64)), jnp.ones((64, 32))).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2


@pytest.mark.parametrize("how", [{"implementation": "pallas"}, {"implementation": "xla"}, {}], ids=str)
@pytest.mark.parametrize(("batch", "d_in", "d_out", "dtype"), [(1, 257, 33, "float32"), (3, 1025, 130, "bfloat16")])
def test_every_implementation_matches_float64(batch, d_in, d_out, dtype, how):
    test_sparse.check(batch, d_in, d_out, dtype, **how)
