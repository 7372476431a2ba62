"""Codes to floats without a conversion, which runs at a quarter of the rate of an addition or less.

A code becomes the low bits of a float's mantissa and the float's constant is subtracted: exact, and few instructions.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import mlir

BYTES = "{ .reg .b32 u, t; xor.b32 u, $4, 0x80808080; " + " ".join(
    f"prmt.b32 t, u, 0x4B000000, 0x744{i}; add.rn.f32 ${i}, t, 0fCB000080;" for i in range(4)
)
"""PTX: four bytes of a word, u = code + 128 each, below the upper bytes of 2^23: 2^23 + u. Less 2^23 + 128."""

CONSTANTS = [-(2.0 ** (23 - 4 * place)) for place in range(4)]
"""What is added to a half byte that came from bit `4 * place`, before its zero point is subtracted."""


def _half(element: int, half: int) -> str:
    """PTX: a half byte at bit 4p of the mantissa of 2^23, 2^23 + 16^p code; times 16^-p, less 2^(23 - 4p) + zero."""
    place = 2 * (element % 2) + half
    mask, factor = f"{15 << 4 * place:#x}", f"0f{0x3F800000 - (4 * place << 23):08X}"
    return (
        f"lop3.b32 t, u, {mask}, 0x4B000000, 0xEA; "
        f"fma.rn.f32 ${4 * half + element}, t, {factor}, ${9 + 4 * place + element};"
    )


NIBBLES = "{ .reg .b32 u, t; mov.b32 u, $8; " + " ".join(
    ("shr.u32 u, u, 16; " if element == 2 else "") + _half(element, 0) + " " + _half(element, 1) for element in range(4)
)
"""PTX: the low halves of four bytes, then the high halves; the constants, less the zero point of every byte, follow."""

_bytes, _nibbles = core.Primitive("pallas_bytes_to_floats"), core.Primitive("pallas_nibbles_to_floats")
_nibbles.multiple_results = True


def bytes_to_floats(codes: jax.Array) -> jax.Array:
    """Int8 as float32."""
    return _bytes.bind(codes)


def nibbles_to_floats(codes: jax.Array, zero: jax.Array | float) -> tuple[jax.Array, jax.Array]:
    """The low and the high half of each uint8, less `zero` (float32, whole numbers, broadcast): float32, exact."""
    low, high = _nibbles.bind(codes, jnp.broadcast_to(jnp.asarray(zero, jnp.float32), codes.shape))
    return low, high


def _plain_bytes(codes: jax.Array) -> jax.Array:
    return codes.astype(jnp.float32)


def _plain_nibbles(codes: jax.Array, zero: jax.Array) -> list[jax.Array]:
    return [half.astype(jnp.float32) - zero for half in (codes & 15, codes >> 4)]


_bytes.def_impl(_plain_bytes)
_bytes.def_abstract_eval(lambda codes: codes.update(dtype=jnp.dtype(jnp.float32)))
mlir.register_lowering(_bytes, mlir.lower_fun(_plain_bytes, multiple_results=False))
_nibbles.def_impl(_plain_nibbles)
_nibbles.def_abstract_eval(lambda codes, zero: [zero, zero])
mlir.register_lowering(_nibbles, mlir.lower_fun(_plain_nibbles, multiple_results=True))


def _install() -> bool:
    try:
        from jax._src.lib.mlir import ir
        from jax._src.lib.mlir.dialects import arith
        from jax._src.lib.triton import dialect
        from jax._src.pallas.triton import lowering

        def assembly(text: str, args: list[Any], constraints: str, results: int) -> Any:
            kind = ir.RankedTensorType.get(args[0].type.shape, ir.F32Type.get())
            # Four codes are a word.
            return dialect.elementwise_inline_asm(
                [kind] * results, text + " }", constraints=constraints, pure=True, packed_element=4, args=args
            )

        @lowering.register_lowering(_bytes)
        def _bytes_rule(ctx: Any, codes: Any) -> Any:
            return assembly(BYTES, [codes], "=f,=f,=f,=f,r", 1)

        @lowering.register_lowering(_nibbles)
        def _nibbles_rule(ctx: Any, codes: Any, zero: Any) -> Any:
            constants = [ir.FloatAttr.get_f32(value) for value in CONSTANTS]
            splats = [arith.constant(zero.type, ir.DenseElementsAttr.get_splat(zero.type, c)) for c in constants]
            sums = [arith.subf(c, zero) for c in splats]
            return list(assembly(NIBBLES, [codes, *sums], ",".join(["=f"] * 8 + ["r"] + ["f"] * 16), 2))
    except (ImportError, AttributeError):
        return False
    return True


INSTALLED = _install()
"""Whether kernels can be lowered with them."""
