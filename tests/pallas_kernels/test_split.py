"""What interpret mode forgives, and a GPU does not: reads and writes past the end, programs that nobody waits for."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import gate_up, launch, matvec, norm, select
from pallas_kernels.kept import Cut
from pallas_kernels.split import GROUP, add_partials, tile_columns
from pallas_kernels.tiles import Tile
from tests.pallas_kernels.float64 import kept_rows


@pytest.mark.parametrize(("d_out", "columns"), [(1, 32), (33, 32), (64, 32), (320, 128)])
def test_tiles_cover_every_column_once(d_out, columns):
    seen = []
    for tile in range(-(-d_out // columns)):
        cols, exists = tile_columns(jnp.int32(tile), columns, d_out)
        seen += np.asarray(cols if exists is None else cols[exists]).tolist()
    assert seen == list(range(d_out))


@pytest.mark.parametrize("splits", [1, 3, GROUP, 2 * GROUP + 5])
def test_partials_are_added_in_order(splits):
    partials = np.random.default_rng(0).normal(size=(splits, 2, 64)).astype(np.float32) * 1e3

    def kernel(partials, out):
        columns = pl.program_id(0) * 32 + jnp.arange(32)
        plgpu.store(out.at[columns], add_partials(partials, 1, columns, None))

    out = jax.ShapeDtypeStruct((64,), jnp.float32)
    (total,) = launch.launch(kernel, (partials,), out=(out,), grid=(2,), warps=1, name="sum", interpret=True)
    expected = np.zeros(64, np.float32)
    for part in partials[:, 1]:
        expected = expected + part
    np.testing.assert_array_equal(total, expected)


TILE = Tile(32, 3, unroll=3, warps=1)  # a split loads more entries at once than a list has
X = np.random.default_rng(0).normal(size=(2, 41)).astype(np.float32)
ROWS = kept_rows(X, [0.0, 0.7], 16)
WEIGHTS = (jnp.ones((41, 33)), jnp.ones((41, 33)))
COUNTERS = jnp.zeros(4, jnp.int32)
BIASES = (jnp.ones(33), jnp.ones(33))

CALLS = {
    "matvec": lambda f: f(matvec.matvec, ROWS, WEIGHTS, COUNTERS, tile=TILE, biases=BIASES, residual=jnp.ones((2, 66))),
    "dense matvec": lambda f: f(matvec.matvec, jnp.asarray(X), WEIGHTS, COUNTERS, tile=TILE),
    "gate_up": lambda f: f(gate_up.gate_up, ROWS, WEIGHTS, COUNTERS, Cut.of([0.5]), tile=TILE, biases=BIASES),
    "dense gate_up": lambda f: f(gate_up.gate_up, jnp.asarray(X), WEIGHTS, COUNTERS, None, tile=TILE),
    "norm": lambda f: f(norm.rms_norm_select, jnp.asarray(X), jnp.ones(41), Cut.of([0.5, 0.0]), eps=1e-5, width=16),
    "dense norm": lambda f: f(norm.rms_norm_select, jnp.asarray(X), jnp.ones(41), None, eps=1e-5, width=16),
    "select": lambda f: f(select.select, jnp.asarray(X), Cut.of([0.5, 0.0]), width=16),
}


def afresh(f, *args, **how):
    """`f` of a kernel, traced again: what jit remembers was traced without the test's eyes."""
    return jax.jit(functools.partial(f.__wrapped__, **how, interpret=True))(*args)


@pytest.mark.parametrize("call", CALLS)
def test_nothing_past_the_end_is_read_or_written(call, monkeypatch):
    accesses, outside = [], []

    def watch(real):
        def access(ref, *args, mask=None, **how):
            indices = ref.transforms[-1].indices
            for index, size in zip(indices, ref.ref.shape, strict=True):
                bad = (jnp.asarray(index) < 0) | (jnp.asarray(index) >= size)
                bad = bad if mask is None else bad & mask
                jax.debug.callback(lambda any_bad, site=(ref.ref.shape, indices): _note(any_bad, site), bad.any())
            accesses.append(ref)
            return real(ref, *args, mask=mask, **how)

        def _note(any_bad, site):
            if any_bad:
                outside.append(site)

        return access

    monkeypatch.setattr(plgpu, "load", watch(plgpu.load))
    monkeypatch.setattr(plgpu, "store", watch(plgpu.store))
    jax.block_until_ready(CALLS[call](afresh))
    jax.effects_barrier()
    assert accesses
    assert not outside


@pytest.mark.parametrize("call", ["matvec", "dense matvec", "gate_up", "dense gate_up"])
def test_every_program_is_waited_for(call, monkeypatch):
    grids, totals = [], set()

    def see_grid(*args, grid, **how):
        grids.append(grid)
        return launch.launch(*args, grid=grid, **how)

    for module in (matvec, gate_up):

        def see_total(counters, which, total, interpret, real=module.last_to_finish):
            totals.add(total)
            return real(counters, which, total, interpret)

        monkeypatch.setattr(module, "launch", see_grid)
        monkeypatch.setattr(module, "last_to_finish", see_total)
    CALLS[call](lambda f, *args, **how: jax.eval_shape(functools.partial(f.__wrapped__, **how), *args))
    (grid,), (total,) = grids, totals
    outputs = 2 if "gate_up" in call else 4  # tiles: of both segments together, or each of its own
    assert total * outputs == math.prod(grid)
