"""Gates that wrap the gate of one projection and give back part of what it drops."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from pallas_kernels.reference import matmul

if TYPE_CHECKING:
    from teal_jax.nn.gates import Gate


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Biased:
    """`y = project(x, W, gate) + bias`, on the tokens that are thinned: no weight is read for it.

    Attributes:
      gate: of the projection; for a model or a block what indexing steps down, as the biases do.
      bias: float32 `[d_out]`; for a model a tuple over layers of tuples over the seven projections.
      where: bool `[batch, seq]`, the tokens that are thinned; None: all.

    References:
      SPON, arXiv 2512.12744: `W a` for a learnt input a is such a bias.
    """

    gate: Any
    bias: Any
    where: jax.Array | None = None

    def __getitem__(self, index: int) -> "Biased":
        return Biased(self.gate[index], self.bias[index], self.where)

    def on(self, where: jax.Array) -> "Biased":
        """The same, acting only on the tokens where `where` is True."""
        return Biased(self.gate.on(where), self.bias, where)

    def keep(self, x: jax.Array) -> jax.Array:
        """The kept channels of x."""
        return self.gate.keep(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRank:
    """`y = project(x, W, gate) + ((x - keep(x) x) a) b`: the dropped part goes through a matrix of low rank.

    Attributes:
      gate: of the projection.
      a, b: `[d_in, rank]` and `[rank, d_out]`, the dtype of W; `a b` is near W. Read for every token.

    References:
      R-Sparse, arXiv 2504.19449, section 3.
    """

    gate: "Gate"
    a: jax.Array
    b: jax.Array

    def on(self, where: jax.Array) -> "LowRank":
        """The same, acting only on the tokens where `where` is True: elsewhere nothing is dropped."""
        return LowRank(self.gate.on(where), self.a, self.b)

    def keep(self, x: jax.Array) -> jax.Array:
        """The kept channels of x."""
        return self.gate.keep(x)

    def remainder(self, x: jax.Array) -> jax.Array:
        """What the dropped channels of x `[..., d_in]` add, `[..., d_out]`."""
        return matmul(matmul(jnp.where(self.keep(x), 0, x), self.a), self.b)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotated:
    """`y = (Q^T W)^T keep(x Q)`: thinned in another orthonormal basis, where fewer channels carry more.

    Computed as `W^T (keep(x Q) Q^T)`, the same sum, so that W stays as it is; a decoder would hold `Q^T W`.

    Attributes:
      gate: of the projection; it sees `x Q`.
      rotation: Q, float32 `[d_in, d_in]`, orthonormal. Read for every token, once for all projections of a site.
      where: as in `Biased`.

    References:
      LaRoSA, arXiv 2507.01299, section 3.
    """

    gate: "Gate"
    rotation: jax.Array
    where: jax.Array | None = None

    def on(self, where: jax.Array) -> "Rotated":
        """The same, acting only on the tokens where `where` is True."""
        return Rotated(self.gate.on(where), self.rotation, where)

    def keep(self, x: jax.Array) -> jax.Array:
        """The kept channels of `x Q`."""
        return self.gate.keep(self.turn(x))

    def turn(self, x: jax.Array) -> jax.Array:
        """`x Q` for x `[..., d_in]`, in float32."""
        return matmul(x.astype(jnp.float32), self.rotation)

    def thin(self, x: jax.Array) -> jax.Array:
        """`keep(x Q) Q^T`, in the dtype of x."""
        turned = self.turn(x)
        return matmul(jnp.where(self.gate.keep(turned), turned, 0), self.rotation.T).astype(x.dtype)


def only(where: jax.Array | None, value: jax.Array, otherwise: jax.Array | float) -> jax.Array:
    """`value [..., width]` on the tokens of `where`, `otherwise` on the others."""
    return value if where is None else jnp.where(where[..., None], value, otherwise)
