"""`x * y + z` in one instruction: XLA's Triton leaves a multiplication and an addition, and threads have no time."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import mlir

_fma = core.Primitive("pallas_fma")


def fma(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    """`x * y + z`, float32, broadcast against each other; rounded once inside a kernel."""
    shape = jnp.broadcast_shapes(x.shape, y.shape, z.shape)
    return _fma.bind(*(jnp.broadcast_to(a, shape) for a in (x, y, z)))


def _plain(x: jax.Array, y: jax.Array, z: jax.Array) -> jax.Array:
    return x * y + z


_fma.def_impl(_plain)
_fma.def_abstract_eval(lambda x, y, z: z)
mlir.register_lowering(_fma, mlir.lower_fun(_plain, multiple_results=False))


def _install() -> bool:
    try:
        from jax._src.lib.mlir.dialects import math
        from jax._src.pallas.triton import lowering

        @lowering.register_lowering(_fma)
        def _rule(ctx: Any, x: Any, y: Any, z: Any) -> Any:
            return math.fma(x, y, z)
    except (ImportError, AttributeError):
        return False
    return True


INSTALLED = _install()
"""Whether kernels can be lowered with it."""
