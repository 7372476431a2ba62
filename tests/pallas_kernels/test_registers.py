import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from pallas_kernels.kept import kept_shapes
from pallas_kernels.launch import launch
from pallas_kernels.matvec import matvec
from pallas_kernels.registers import INSTALLED, RELEASE, begin
from pallas_kernels.tiles import Tile
from tests.pallas_kernels.lowering import DEVICES, lower

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

BUDGET = "ttg.maxnreg"
shape = jax.ShapeDtypeStruct


@functools.cache
def lowered(device: str, **how) -> str:
    """A kernel that does nothing else."""

    def kernel(x, y):
        i = begin(pl.program_id(0), **how)
        y[i] = x[i]

    def f(x):
        return launch(kernel, (x,), out=(shape((4,), jnp.float32),), grid=(4,), warps=1, name="copy")

    return lower(device, f, shape((4,), jnp.float32))


def test_this_jax_takes_the_hook():
    assert INSTALLED is True


@pytest.mark.parametrize("device", DEVICES)
def test_the_register_budget_reaches_the_compiler(device):
    assert BUDGET in lowered(device, registers=64)
    assert BUDGET not in lowered(device)
    assert lowered(device, registers=64) != lowered(device, registers=96)


@pytest.mark.parametrize(("device", "early"), [("h200", True), ("b200", True), ("a100", False), ("rtx4090", False)])
def test_the_next_kernel_comes_early_where_the_gpu_can(device, early):
    assert (RELEASE in lowered(device, registers=64)) is early
    assert (RELEASE in lowered(device)) is early
    assert RELEASE not in lowered(device, release=False)


def test_a_tile_says_the_budget_of_its_matvec():
    def text(registers):
        f = functools.partial(matvec, tile=Tile(32, 1, unroll=1, warps=1, registers=registers))
        return lower("h200", f, kept_shapes(1, 1, 1, 16), (shape((16, 32), jnp.bfloat16),), shape((1,), jnp.int32))

    assert BUDGET in text(64)
    assert text(64) != text(96)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_outside_a_kernel_nothing_changes(wrap):
    f = wrap(lambda x: begin(x, registers=64) + 1)
    np.testing.assert_array_equal(f(jnp.int32(3)), 4)
