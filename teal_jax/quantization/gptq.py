"""GPTQ: rows rounded one after another, each one's error made up for by those still to come.

With groups along the outputs, a row's scales are its own: they are fitted to the row as it stands when its turn comes,
and rows may be taken in any order (the most active inputs first) without an index to carry.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from teal_jax.errors import QuantizationError
from teal_jax.nn.quantized import QuantizedWeight, QuantSpec, assemble, decode
from teal_jax.quantization.grid import SHRINKS, Grid, best_shrink, encode, fit

DAMPING = 0.01
"""Of the mean of the Hessian's diagonal, added to it, as in the paper."""

_ROWS = 128
"""Rows whose errors go to the others in one product."""

_DAMPING_TRIES = 4
"""Each ten times the one before."""


@jax.jit
def second_moment(x: jax.Array) -> jax.Array:
    """`sum over tokens x x^T`, float32 `[width, width]`, for x `[..., width]`: half the Hessian of a layer's error."""
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return jnp.matmul(x.T, x, precision=lax.Precision.HIGHEST)


def gptq(
    weight: jax.Array,
    moment: jax.Array,
    spec: QuantSpec,
    *,
    damping: float = DAMPING,
    shrinks: tuple[float, ...] = SHRINKS,
) -> QuantizedWeight:
    """W `[d_in, d_out]` quantised so that `|x W - x Q|^2` over the calibration tokens is small.

    Args:
      weight: finite.
      moment: of its inputs, float32 `[d_in, d_in]`; see `second_moment`. An input that was never active is rounded to
        nearest.
      spec: the format; its group divides `d_out`.
      damping: see `DAMPING`; raised tenfold where the Hessian is too near singular for float32.
      shrinks: factors on the span of each grid, the best taken by squared error; (1.0,): none, as in
        the paper. On stories3M (perplexity 3.54) int3-g64 goes from 8.67 to 6.92 with it.

    Raises:
      QuantizationError: the moment is not finite, or no damping helps.

    References:
      GPTQ, arXiv 2210.17323, algorithm 1; act-order from its code.
    """
    if not jnp.isfinite(moment).all():
        raise QuantizationError("the calibration activations are not finite", hint="load the model as float32")
    for tried in range(_DAMPING_TRIES):
        found, finite = _gptq(weight, moment, jnp.float32(damping * 10**tried), jnp.asarray(shrinks, jnp.float32), spec)
        if finite:
            return found
    raise QuantizationError(
        f"the Hessian is singular, even damped by {damping * 10**tried:g}", hint="use more calibration tokens"
    )


@functools.partial(jax.jit, static_argnums=4)
def _gptq(
    weight: jax.Array, moment: jax.Array, damping: jax.Array, shrinks: jax.Array, spec: QuantSpec
) -> tuple[QuantizedWeight, jax.Array]:
    d_in, d_out = weight.shape
    values = weight.astype(jnp.float32)

    def fitted(values: jax.Array, importance: jax.Array) -> Grid:
        return fit(values, spec, best_shrink(values, spec, importance, shrinks))

    whole = fitted(values, jnp.diagonal(moment)) if spec.group is None else None
    order = jnp.argsort(-jnp.diagonal(moment))
    padded = -(-d_in // _ROWS) * _ROWS
    values = jnp.pad(values[order], ((0, padded - d_in), (0, 0)))
    upper = jnp.pad(_inverse_factor(moment[order][:, order], damping), (0, padded - d_in))
    upper = upper + jnp.diag(jnp.arange(padded) >= d_in).astype(jnp.float32)

    def row(block: jax.Array, step: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, Grid, jax.Array]]:
        i, factors = step
        now = block[i][None]
        grid = fitted(now, jnp.ones(1)) if whole is None else whole
        codes = encode(now, grid, spec)
        error = (now - decode(codes, grid.scale, grid.zero, spec)) / factors[i]
        # Exact float32 products of a column and a row; no dot, which a GPU may round.
        block = block - factors[:, None] * error
        return block, (codes[0], jax.tree.map(lambda part: part[0], grid), error[0])

    def rows(values: jax.Array, start: jax.Array) -> tuple[jax.Array, tuple[jax.Array, Grid]]:
        block = lax.dynamic_slice(values, (start, 0), (_ROWS, d_out))
        factors = lax.dynamic_slice(upper, (start, 0), (_ROWS, padded))
        own = lax.dynamic_slice(factors, (0, start), (_ROWS, _ROWS))
        _, (codes, grid, errors) = lax.scan(row, block, (jnp.arange(_ROWS), own))
        later = jnp.where(jnp.arange(padded) >= start + _ROWS, factors, 0)
        return values - jnp.matmul(later.T, errors, precision=lax.Precision.HIGHEST), (codes, grid)

    _, (codes, grids) = lax.scan(rows, values, jnp.arange(0, padded, _ROWS))
    back = jnp.argsort(order)
    placed = lambda stacked: stacked.reshape(padded, -1)[back]  # noqa: E731
    grid = jax.tree.map(placed, grids) if whole is None else whole
    found = assemble(placed(codes), grid.scale, grid.zero, spec, weight.dtype)
    return found, jnp.isfinite(upper).all()


def _inverse_factor(moment: jax.Array, damping: jax.Array) -> jax.Array:
    """The upper triangular U with `H^-1 = U^T U`, NaN where H is not positive in float32."""
    diagonal = jnp.diagonal(moment)
    # A dead input has no error to spread and none to receive: its row of the identity says so.
    dead = diagonal <= 0
    mean = jnp.maximum(jnp.mean(diagonal), jnp.finfo(jnp.float32).tiny)
    hessian = jnp.where(dead[:, None] | dead[None, :], 0, moment) / mean
    hessian = hessian + jnp.diag(jnp.where(dead, 1.0, damping))
    factor = jnp.linalg.cholesky(hessian)
    identity = jnp.eye(len(moment), dtype=jnp.float32)
    inverse = jax.scipy.linalg.cho_solve((factor, True), identity)
    return jnp.linalg.cholesky((inverse + inverse.T) / 2).T
