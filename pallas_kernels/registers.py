"""What a kernel tells the compiler that Pallas has no option for: its register budget, and when the next may start."""

from typing import Any

import jax
from jax.extend import core
from jax.interpreters import mlir

_begin = core.Primitive("pallas_begin")
_begin.def_impl(lambda x, *, registers, release: x)
_begin.def_abstract_eval(lambda x, *, registers, release: x)
mlir.register_lowering(_begin, lambda ctx, x, *, registers, release: [x])

RELEASE = "griddepcontrol.launch_dependents; mov.b32 $0, $1;"
"""PTX: the next kernel's programs may take their places now. They wait there until this kernel has ended."""


def begin(x: jax.Array, registers: int | None = None, release: bool = True) -> jax.Array:
    """`x`, an int32 scalar, unchanged; call it at the start of a kernel, on every path, and use what it returns.

    The kernel is compiled for at most `registers` registers a thread. ptxas left alone raises occupancy by placing
    every load just before its use, which leaves one or two loads in flight instead of eight. With a budget set it
    keeps them together.

    From compute capability 9.0 on, the next kernel's launch overlaps this kernel (programmatic dependent launch):
    XLA lets every kernel wait for the end of the one before it, but nothing lets it come early.

    Outside a kernel, and on a jax whose private lowering moved, this does nothing: speed is lost, not correctness.
    """
    return _begin.bind(x, registers=registers, release=release)


def _install() -> bool:
    try:
        from jax._src.lib.mlir import ir
        from jax._src.lib.triton import dialect
        from jax._src.pallas.triton import gpu_info, lowering

        @lowering.register_lowering(_begin)
        def _rule(ctx: Any, x: Any, *, registers: int | None, release: bool) -> Any:
            module: Any = ir.InsertionPoint.current.block.owner
            while module.operation.name != "builtin.module":
                module = module.operation.parent
            if registers is not None:
                attribute = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), registers)
                module.operation.attributes["ttg.maxnreg"] = attribute
            if not release or (gpu_info.get_gpu_info().compute_capability or 0) < 90:
                return x
            return dialect.elementwise_inline_asm(
                [x.type], RELEASE, constraints="=r,r", pure=False, packed_element=1, args=[x]
            )
    except (ImportError, AttributeError):
        return False
    return True


INSTALLED = _install()
"""Whether this has an effect on this jax."""
