"""How every kernel here is launched: Pallas-Triton, nothing left to defaults that differ between jax versions."""

from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu


def launch(
    kernel: Callable[..., None],
    inputs: Any,
    *,
    out: Any,
    grid: tuple[int, ...],
    warps: int,
    name: str,
    aliases: dict[int, int] | None = None,
    stages: int = 1,
    interpret: bool = False,
) -> Any:
    """Run `kernel(*input_refs, *output_refs)`; whole arrays, no blocks: the kernels index them themselves.

    Args:
      kernel: takes one ref for each leaf of `inputs`, then one for each leaf of `out`, as the same pytrees.
      inputs: tuple of pytrees of arrays.
      out: tuple of pytrees of `jax.ShapeDtypeStruct`.
      grid: programs along each axis.
      warps: of 32 threads, a program.
      name: what a profiler shows.
      aliases: flat input index to flat output index, of arrays updated in place.
      stages: iterations of a loop whose loads into matrix products are under way at once; they wait in shared memory.
      interpret: run on any device, as plain jax, to test.
    """
    flat, tree = jax.tree.flatten((inputs, out))
    num_in = len(jax.tree.leaves(inputs))

    def body(*refs: Any) -> None:
        ins, outs = jax.tree.unflatten(tree, refs)
        kernel(*ins, *outs)

    body.__name__ = name
    results = pl.pallas_call(
        body,
        out_shape=flat[num_in:],
        grid=grid,
        input_output_aliases=aliases or {},
        compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=stages),
        interpret=interpret,
        name=name,
    )(*flat[:num_in])
    return jax.tree.unflatten(jax.tree.structure(out), results)


def synchronise(interpret: bool) -> None:
    """Inside a kernel: every thread of a program waits for the others; its stores come before what follows."""
    if not interpret:
        plgpu.debug_barrier()


def power_of_two(n: int) -> int:
    """The smallest power of two >= n: Triton takes no other sizes, the rest is masked."""
    return 1 << (n - 1).bit_length()


def whole_lists(d_in: int, width: int) -> int:
    """Lists of `width` channels that hold `d_in`."""
    return -(-d_in // width)
