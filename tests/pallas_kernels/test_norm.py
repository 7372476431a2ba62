import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kept import Cut, KeptRows
from pallas_kernels.norm import rms_norm_select, rms_norm_select_reference
from tests.pallas_kernels.float64 import SPARSITIES, check_rows, f64, rms_norm, same_bits

EPS = 1e-5
CASES = [  # batch, d, segments (0: dense), width, dtype
    (1, 1, 1, 1, "float32"),
    (1, 257, 3, 64, "float32"),
    (3, 320, 2, 64, "bfloat16"),
    (8, 33, 1, 16, "float16"),
    (1, 257, 0, 64, "float32"),
    (3, 129, 0, 32, "float16"),
]


def draw(batch, d, dtype, seed=0):
    """h with rows of unlike sizes, and the norm's weight."""
    rng = np.random.default_rng(seed)
    h = rng.normal(size=(batch, d)) * np.logspace(-1, 1, batch)[:, None]
    return jnp.asarray(h, dtype), jnp.asarray(rng.uniform(0.5, 2, size=d), dtype)


def check(batch, d, segments, width, dtype, interpret):
    run = functools.partial(rms_norm_select, eps=EPS, width=width, interpret=interpret)
    reference = jax.jit(functools.partial(rms_norm_select_reference, eps=EPS, width=width))
    h, weight = draw(batch, d, dtype)
    cuts = {"dense": None}
    if segments:
        x = np.abs(f64(reference(h, weight, None)))
        cuts = {f"sparsity {s}": [0.0 if s == 0 else np.quantile(x, s) * 1.001] * segments for s in SPARSITIES}
        cuts["a segment keeps all, one half, one none"] = [0.0, 0.7, np.inf][:segments]
    broken = h.at[0, d // 2].set(jnp.inf).at[-1, 0].set(jnp.nan)
    huge = jnp.full_like(h, 200)  # 200 squared is a float16, the sum of many is not
    for name, thresholds in cuts.items():
        cut = None if thresholds is None else Cut.of(thresholds)
        for kind, row in {"": h, "infinity and NaN": broken, "huge": huge, "zero": jnp.zeros_like(h)}.items():
            x = rms_norm(f64(row), f64(weight), EPS, dtype)
            out = run(row, weight, cut)
            for result in (out, reference(row, weight, cut)):
                if thresholds is None:
                    assert result.dtype == h.dtype
                    x.check(result, (name, kind))
                else:
                    check_rows(result, x, thresholds, width, (name, kind))
            assert same_bits(out, run(row, weight, cut)), (name, kind)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case):
    check(*case, interpret=True)


def test_thresholds_of_a_layer():
    h, weight = draw(1, 40, "float32")
    thresholds = jnp.full((3, 7), jnp.inf).at[1, 4].set(0.0)
    for layer, kept in ((0, 0), (1, 40), (2, 0)):
        cut = Cut(thresholds, jnp.asarray([layer], jnp.int32), (4, 5))
        rows = rms_norm_select(h, weight, cut, eps=EPS, width=32, interpret=True)
        assert isinstance(rows, KeptRows)
        np.testing.assert_array_equal(rows.count.sum(axis=1), [kept, 0])
