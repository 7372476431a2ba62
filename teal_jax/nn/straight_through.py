"""`StraightThrough`: a gate as it is forwards, and no gate at all backwards."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from teal_jax.nn.compensation import Biased


@jax.custom_jvp
def passed(x: jax.Array, y: jax.Array) -> jax.Array:
    """y, with the derivative of x: both of one shape and dtype.

    A rule of its own and not `x + stop_gradient(y - x)`, which rounds: here the masked channels are exactly 0, the
    others the very bits of y, and an infinite x does not become NaN.
    """
    return y


@passed.defjvp
def _passed(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    return primals[1], tangents[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def passed_partly(x: jax.Array, y: jax.Array, slope: float) -> jax.Array:
    """y, with the derivative of x where y is not 0 and `slope` of it where y is 0."""
    return y


@passed_partly.defjvp
def _passed_partly(
    slope: float, primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    y, change = primals[1], tangents[0]
    return y, change * jnp.where(y != 0, 1, slope).astype(change.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StraightThrough:
    """What `gate` makes of x, `dy/dx = dy/d(gate(x))`: a dropped channel learns as well as a kept one, or less.

    Forwards it is `gate`, for a model, a block or one projection. Thresholds, scales and counts have no gradient
    through it; a bias has. It also marks the gates of a model that was trained through them: see `gates.prompt_gates`.

    Attributes:
      gate: `Dense`, `Threshold`, `TopK`, `BlockTopK`, `Relu`, `Int8` or `Rotated`; `Biased` or `Gates` of those.
      slope: share of the derivative that a dropped channel gets, in [0, 1]: 1 is Q-Sparse's, 0 leaves it to the kept.

    References:
      Q-Sparse, arXiv 2407.10969, section 2: without it the gradient vanishes towards the first layers.
    """

    gate: Any
    slope: float = dataclasses.field(default=1.0, metadata={"static": True})

    def __getitem__(self, index: int) -> Any:
        inner = self.gate[index]
        if isinstance(inner, tuple):
            return tuple(StraightThrough(gate, self.slope) for gate in inner)
        return StraightThrough(inner, self.slope)

    def on(self, where: jax.Array) -> "StraightThrough":
        """The same, acting only on the tokens where `where` (bool `[batch, seq]`) is True."""
        return StraightThrough(self.gate.on(where), self.slope)

    def keep(self, x: jax.Array) -> jax.Array:
        """The kept channels of x."""
        return self.gate.keep(x)

    def inside(self) -> Any:
        """The same gate with the compensation outside, whose own gradient is right."""
        if isinstance(self.gate, Biased):
            return dataclasses.replace(self.gate, gate=StraightThrough(self.gate.gate, self.slope))
        return self


def without_gradient(gates: Any) -> Any:
    """The gates that run: those of training without the derivative that they had there."""
    return gates.gate if isinstance(gates, StraightThrough) else gates
