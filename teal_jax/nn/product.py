"""Products summed in float32 whose derivative is also multiplied in the dtype of the operands."""

import functools

import jax
import jax.numpy as jnp
from jax import lax


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """`einsum(spec, a, b)`, summed and returned in float32.

    jax's own derivative multiplies the float32 derivative of the result with bfloat16 operands, which XLA widens to
    float32: four times the arithmetic on a GPU's tensor cores. Here it is rounded to their dtype first.

    Args:
      spec: two operands without an ellipsis; every index of one is in the other or in the result.
      a, b: of one dtype; float32 ones are multiplied in float32, for which a GPU's default is tf32.
    """
    return _einsum(spec, a, b)


def _einsum(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(spec, a, b, precision=precision, preferred_element_type=jnp.float32)


def _forward(spec: str, a: jax.Array, b: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _einsum(spec, a, b), (a, b)


def _backward(spec: str, operands: tuple[jax.Array, jax.Array], slope: jax.Array) -> tuple[jax.Array, jax.Array]:
    a, b = operands
    given, out = spec.split("->")
    left, right = given.split(",")
    slope = slope.astype(a.dtype)
    of_a = _einsum(f"{out},{right}->{left}", slope, b)
    of_b = _einsum(f"{left},{out}->{right}", a, slope)
    return of_a.astype(a.dtype), of_b.astype(b.dtype)


product.defvjp(_forward, _backward)


def matmul(x: jax.Array, weight: jax.Array, *, out_dtype: jax.typing.DTypeLike | None = None) -> jax.Array:
    """`x @ weight` with float32 sums, rounded to `out_dtype` (None: of x); x `[..., d_in]`, weight `[d_in, d_out]`."""
    tokens = "abcdefgh"[: x.ndim - 1]
    return product(f"{tokens}i,io->{tokens}o", x, weight).astype(out_dtype or x.dtype)
