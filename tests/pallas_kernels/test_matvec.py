import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.coded import Matrix
from pallas_kernels.matvec import matvec, matvec_reference, real_splits
from pallas_kernels.row_sum import lists_of_split
from pallas_kernels.tiles import Tile
from tests.pallas_kernels.float64 import Bounded, draws, exactly, f64, kept_rows, masked, poisoned, product, same_bits


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, and how the kernel cuts them; `width` None: dense."""

    batch: int
    d_in: int
    d_outs: tuple[int, ...]
    width: int | None
    tile: Tile
    dtype: str = "float32"
    bias: bool = False
    residual: bool = False
    out_dtype: str | None = None

    def check(self, interpret: bool) -> None:
        """Raise unless the kernel and its reference match float64 for everything that lists can be."""
        rng = np.random.default_rng(0)
        segments, result = len(self.d_outs), self.out_dtype or self.dtype
        weights = self.weights(rng)
        rest = {}
        if self.bias:
            rest["biases"] = tuple(jnp.asarray(rng.normal(size=n), self.dtype) for n in self.d_outs)
        if self.residual:
            rest["residual"] = jnp.asarray(rng.normal(size=(self.batch, sum(self.d_outs))), result)
        # More counters than tiles: one buffer serves all kernels.
        counters = jnp.zeros(sum(-(-n // self.tile.columns) for n in self.d_outs) + 3, jnp.int32)
        reference = jax.jit(matvec_reference, static_argnames="out_dtype")
        for name, x, thresholds in draws(rng, self.batch, self.d_in, segments, self.width or 64, self.dtype):
            xs = [x] * segments if self.width is None else masked(x, thresholds)
            rows = jnp.asarray(x, self.dtype) if self.width is None else kept_rows(x, thresholds, self.width)
            ws = weights if self.width is None else tuple(map(poisoned, weights, xs))
            y, counters = matvec(
                rows, ws, counters, tile=self.tile, out_dtype=self.out_dtype, interpret=interpret, **rest
            )
            assert y.dtype == result
            assert not np.asarray(counters).any(), name
            expected = self.expected(xs, ws, **rest)
            expected.check(y, name)
            again = matvec(rows, ws, counters, tile=self.tile, out_dtype=self.out_dtype, interpret=interpret, **rest)
            assert same_bits((y, counters), again), name
            if interpret:  # the reference is the same everywhere
                expected.check(reference(rows, weights, out_dtype=self.out_dtype, **rest), name)

    def weights(self, rng: np.random.Generator) -> tuple[Matrix, ...]:
        """One a segment."""
        return tuple(jnp.asarray(rng.normal(size=(self.d_in, n)), self.dtype) for n in self.d_outs)

    def expected(self, xs, ws, biases=None, residual=None) -> Bounded:
        """Of x with zeros where it is not kept, for each segment; rows of W that no x needs do not count."""
        parts = []
        for s, (x, w) in enumerate(zip(xs, ws, strict=True)):
            read = (x != 0).any(axis=0) if self.width else slice(None)
            y = product(x[:, read], exactly(w)[read])
            parts.append(y if biases is None else y.plus(f64(biases[s])))
        y = Bounded(*(np.concatenate([getattr(p, f) for p in parts], axis=1) for f in ("value", "error")))
        y = y.rounded(self.out_dtype or self.dtype)
        return y if residual is None else y.plus(f64(residual)).rounded(self.out_dtype or self.dtype)


def small(splits: int, unroll: int = 2, columns: int = 32) -> Tile:
    return Tile(columns, splits, unroll=unroll, warps=1)


CASES = [
    Case(1, 257, (33,), 64, small(2)),  # splits that do not divide the lists, nor the loop the lists of a split
    Case(1, 320, (129,), 32, small(1, unroll=4), bias=True, residual=True),  # lists that advance together
    Case(1, 129, (7,), 32, small(16), "float16"),  # several splits a list, not dividing
    Case(1, 33, (320,), 64, small(4), "bfloat16", out_dtype="float32"),  # splits without a row of their own
    Case(1, 7, (1,), 4, small(40, unroll=1)),  # more splits than channels; partials in groups and a rest
    Case(1, 1, (1,), 1, small(1)),
    Case(1, 257, (33, 64, 1), 64, small(2, unroll=1), "bfloat16", bias=True),
    Case(3, 129, (33, 7), 32, small(3, unroll=1), "float16", residual=True),
    Case(8, 33, (33,), 16, small(2, unroll=1), bias=True, residual=True),
]
DENSE = [
    Case(1, 257, (33,), None, small(2)),
    Case(1, 256, (64,), None, small(4), "bfloat16", bias=True, residual=True),  # nothing to mask
    Case(1, 7, (129, 1), None, small(5, unroll=1), "float16", out_dtype="float32"),  # splits without a row
    Case(8, 33, (7,), None, small(2, unroll=1), bias=True),
]


@pytest.mark.parametrize("case", CASES + DENSE, ids=str)
def test_matches_float64(case):
    case.check(interpret=True)


@pytest.mark.parametrize("lists", [1, 2, 3, 5, 8, 33])
@pytest.mark.parametrize("splits", [1, 2, 3, 4, 7, 16, 100])
def test_every_list_has_its_splits(lists, splits):
    """Whole lists, each of one split, or several splits to a list; none idle, and what is cut again is cut the same."""
    rows = kept_rows(np.ones((1, lists * 2)), [0.0], 2)
    real = real_splits(rows, Tile(32, splits)).splits
    own, parts = lists_of_split(lists, splits)
    assert min(own, parts) == 1
    assert 1 <= real <= max(splits, lists)
    assert lists_of_split(lists, real) == (own, parts)
    if parts > 1:
        assert real == lists * parts
    else:
        assert (real - 1) * own < lists <= real * own


def test_a_product_of_rows_and_of_x_is_one():
    """Dense x and lists that keep all of it: the same sums up to their order."""
    rng = np.random.default_rng(1)
    x, weight = rng.normal(size=(1, 64)), jnp.asarray(rng.normal(size=(64, 32)), jnp.float32)
    counters = jnp.zeros(1, jnp.int32)
    expected = product(f64(jnp.asarray(x, jnp.float32)), f64(weight))
    for rows in (jnp.asarray(x, jnp.float32), kept_rows(x, [0.0], 16)):
        expected.check(matvec(rows, (weight,), counters, tile=small(2), interpret=True)[0])


def test_a_batch_reads_the_union_and_multiplies_its_own():
    """Row 0 keeps channel 0, row 1 channel 1: one row's values must not reach the other."""
    rows = kept_rows(np.asarray([[5.0, 0.1, 0.0], [0.1, 7.0, 0.0]]), [1.0], 4)
    weight = jnp.asarray([[1.0, 2.0], [10.0, 20.0], [np.nan, np.inf]])
    y, _ = matvec(rows, (weight,), jnp.zeros(1, jnp.int32), tile=small(1), interpret=True)
    np.testing.assert_array_equal(y, [[5, 10], [70, 140]])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_residual_is_added_to_the_rounded_sum(dtype):
    """As the model does: 1 + eps / 2 is rounded to 1, and so is that plus eps / 2."""
    half = float(jnp.finfo(dtype).eps) / 2
    x, weight = jnp.ones((1, 2), dtype), jnp.asarray([[1.0], [half]], dtype)
    residual = jnp.full((1, 1), half, dtype)
    y, _ = matvec(x, (weight,), jnp.zeros(1, jnp.int32), tile=small(1), residual=residual, interpret=True)
    assert y[0, 0] == 1
