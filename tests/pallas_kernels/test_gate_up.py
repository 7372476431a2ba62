import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gate_up import gate_up, gate_up_reference
from pallas_kernels.kept import Cut
from pallas_kernels.tiles import Tile
from tests.pallas_kernels.float64 import (
    Bounded,
    check_rows,
    draws,
    f64,
    kept_rows,
    masked,
    poisoned,
    product,
    same_bits,
    silu_product,
)


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, and how the kernel cuts them; `width` None: dense input; `cut` False: dense output."""

    batch: int
    d_model: int
    d_mlp: int
    width: int | None
    tile: Tile
    dtype: str = "float32"
    cut: bool = True
    bias: bool = False

    def check(self, interpret: bool) -> None:
        """Raise unless the kernel and its reference match float64 for everything that lists can be."""
        rng = np.random.default_rng(0)
        weights = [rng.normal(size=(self.d_model, self.d_mlp)) / self.d_model**0.5 for _ in range(2)]
        clean = tuple(jnp.asarray(w, self.dtype) for w in weights)
        biases = tuple(jnp.asarray(rng.normal(size=self.d_mlp), self.dtype) for _ in range(2)) if self.bias else None
        counters = jnp.zeros(2 * -(-self.d_mlp // self.tile.columns) + 3, jnp.int32)
        reference = jax.jit(gate_up_reference, static_argnames="width")
        downs = (0.0, 0.2, 0.05, 1.0, np.inf)
        for i, (name, x, thresholds) in enumerate(
            draws(rng, self.batch, self.d_model, 2, self.width or 64, self.dtype)
        ):
            xs = [x] * 2 if self.width is None else masked(x, thresholds)
            rows = jnp.asarray(x, self.dtype) if self.width is None else kept_rows(x, thresholds, self.width)
            ws = clean if self.width is None else tuple(poisoned(w, xs[s], self.dtype) for s, w in enumerate(weights))
            expected = self.expected(xs, ws, biases)
            down = downs[i % len(downs)]
            cut = Cut.of([down]) if self.cut else None
            out, counters = gate_up(rows, ws, counters, cut, tile=self.tile, biases=biases, interpret=interpret)
            assert not np.asarray(counters).any(), name
            again = gate_up(rows, ws, counters, cut, tile=self.tile, biases=biases, interpret=interpret)
            assert same_bits((out, counters), again), name
            results = [out]
            if interpret:  # the reference is the same everywhere
                results.append(reference(rows, clean, cut, width=self.tile.columns, biases=biases))
            for got in results:
                if self.cut:
                    check_rows(got, expected, [down], self.tile.columns, name)
                else:
                    assert got.dtype == self.dtype
                    expected.check(got, name)

    def expected(self, xs, ws, biases) -> Bounded:
        """`silu(gate) * up`; rows of W that no x needs do not count."""
        both = []
        for s, (x, w) in enumerate(zip(xs, ws, strict=True)):
            read = (x != 0).any(axis=0) if self.width else slice(None)
            y = product(x[:, read], f64(w)[read])
            both.append(y if biases is None else y.plus(f64(biases[s])))
        return silu_product(*both, self.dtype)


def small(splits: int, unroll: int = 2) -> Tile:
    return Tile(32, splits, unroll=unroll, warps=1)


CASES = [
    Case(1, 257, 129, 64, small(2)),
    Case(1, 129, 33, 32, small(16), "float16", bias=True),  # several splits a list
    Case(1, 320, 64, 64, small(3), "bfloat16"),  # whole tiles
    Case(1, 7, 1, 8, small(1)),
    Case(1, 33, 320, 16, small(2), cut=False),
    Case(3, 33, 33, 16, small(2, unroll=1), "bfloat16", bias=True),
    Case(8, 33, 7, 16, small(3, unroll=1)),
    Case(1, 129, 40, None, small(2), cut=False),
    Case(2, 33, 40, None, small(1, unroll=1), "float16"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case):
    case.check(interpret=True)


def test_threshold_of_a_layer():
    rng = np.random.default_rng(0)
    x, weights = jnp.asarray(rng.normal(size=(1, 8)), jnp.float32), rng.normal(size=(2, 8, 32))
    thresholds = jnp.full((3, 7), jnp.inf).at[1, 6].set(0.0)
    for layer, kept in ((0, 0), (1, 32), (2, 0)):
        cut = Cut(thresholds, jnp.asarray([layer], jnp.int32), (6,))
        gate, up = (jnp.asarray(w, jnp.float32) for w in weights)
        rows, _ = gate_up(x, (gate, up), jnp.zeros(2, jnp.int32), cut, tile=small(1), interpret=True)
        assert rows.count[0, 0] == kept


def test_squared_relu():
    rng = np.random.default_rng(0)
    x, weights = rng.normal(size=(2, 8)), rng.normal(size=(2, 8, 40))
    gate, up = (np.asarray(x, np.float32).astype(np.float64) @ np.float32(w) for w in weights)
    expected = np.maximum(gate, 0) ** 2 * up
    args = jnp.asarray(x, jnp.float32), tuple(jnp.asarray(w, jnp.float32) for w in weights)
    out, _ = gate_up(*args, jnp.zeros(4, jnp.int32), None, tile=small(1), activation="relu2", interpret=True)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(out)[gate < -1e-5], 0)
    reference = gate_up_reference(*args, None, width=32, activation="relu2")
    np.testing.assert_allclose(reference, expected, atol=1e-5)


@pytest.mark.parametrize("gate", [-1e4, -89.0, -1.0, 0.0, 89.0, 1e4])
def test_silu_does_not_overflow(gate):
    x, ones = jnp.ones((1, 1)), jnp.ones((1, 32))
    out, _ = gate_up(x, (gate * ones, ones), jnp.zeros(2, jnp.int32), None, tile=small(1), interpret=True)
    with np.errstate(over="ignore"):
        np.testing.assert_allclose(out, gate / (1 + np.exp(-gate)), rtol=1e-6, atol=1e-36)
