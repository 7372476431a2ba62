"""`StraightThrough`: a gate as it is forwards, and no gate at all backwards."""

import dataclasses
from typing import Any

import jax

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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StraightThrough:
    """What `gate` makes of x, `dy/dx = dy/d(gate(x))`: a dropped channel learns as well as a kept one.

    Forwards it is `gate`, for a model, a block or one projection. Thresholds, scales and counts have no gradient
    through it; a bias has. It also marks the gates of a model that was trained through them: see `gates.prompt_gates`.

    Attributes:
      gate: `Dense`, `Threshold`, `TopK`, `BlockTopK`, `Relu`, `Int8` or `Rotated`; `Biased` or `Gates` of those.

    References:
      Q-Sparse, arXiv 2407.10969, section 2: without it the gradient vanishes towards the first layers.
    """

    gate: Any

    def __getitem__(self, index: int) -> Any:
        inner = self.gate[index]
        return tuple(map(StraightThrough, inner)) if isinstance(inner, tuple) else StraightThrough(inner)

    def on(self, where: jax.Array) -> "StraightThrough":
        """The same, acting only on the tokens where `where` (bool `[batch, seq]`) is True."""
        return StraightThrough(self.gate.on(where))

    def keep(self, x: jax.Array) -> jax.Array:
        """The kept channels of x."""
        return self.gate.keep(x)

    def inside(self) -> Any:
        """The same gate with the compensation outside, whose own gradient is right."""
        if isinstance(self.gate, Biased):
            return dataclasses.replace(self.gate, gate=StraightThrough(self.gate.gate))
        return self


def without_gradient(gates: Any) -> Any:
    """The gates that run: those of training without the derivative that they had there."""
    return gates.gate if isinstance(gates, StraightThrough) else gates
