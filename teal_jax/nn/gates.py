"""How a projection's input is thinned. A gate is a pytree: an argument of the model, never a part of it.

Indexing steps down from a model (`[layers, 7]`) to a block (`[7]`) to one projection; `on(where)` makes a gate act on
some tokens only; `keep(x)` says which channels one projection's gate keeps.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import keep_mask
from pallas_kernels.top_k import top_k_mask
from teal_jax.nn.block_top_k import BlockTopK
from teal_jax.nn.compensation import Biased, LowRank, Rotated, only
from teal_jax.nn.int8 import Int8
from teal_jax.nn.relu import Relu
from teal_jax.nn.straight_through import StraightThrough
from teal_jax.nn.top_k_keys import keep_largest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Dense:
    """Every input channel is kept."""

    def __getitem__(self, index: int) -> "Dense":
        return self

    def on(self, where: jax.Array) -> "Dense":
        """Dense on any choice of tokens is dense."""
        return self

    def keep(self, x: jax.Array) -> jax.Array:
        """Everywhere True, the shape of x."""
        return jnp.ones(x.shape, bool)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Threshold:
    """Input channel i is kept iff `scale_i * |x_i| > value`, compared in float32.

    Attributes:
      value: float32, >= 0. `[layers, 7]` for a model, `[7]` for a block, a scalar for one projection:
        indexing takes the step down.
      where: bool `[batch, seq]`, the tokens that are thinned; None thins all.
      scale: None: 1. Else float32 `[d_in]`, > 0, for one projection; for a model a tuple over layers of tuples over
        the seven projections.
    """

    value: jax.Array
    where: jax.Array | None = None
    scale: Any = None

    def __getitem__(self, index: int) -> "Threshold":
        return Threshold(self.value[index], self.where, None if self.scale is None else self.scale[index])

    def on(self, where: jax.Array) -> "Threshold":
        """The same thresholds, acting only on the tokens where `where` (bool `[batch, seq]`) is True."""
        return dataclasses.replace(self, where=where)

    def per_token(self) -> jax.Array:
        """The threshold of every token, float32, broadcastable against x `[batch, seq, d_in]`.

        A token that stays dense gets -1, which every `|x|` exceeds.
        """
        if self.where is None:
            return self.value
        return jnp.where(self.where, self.value, -1.0)[..., None]

    def keep(self, x: jax.Array) -> jax.Array:
        """The kept channels of x `[batch, seq, d_in]`, bool."""
        return keep_mask(scores(x, self.scale), self.per_token())


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TopK:
    """Per token, the `count` input channels of largest `scale_i * |x_i|` are kept; of equal ones the lower index.

    Attributes:
      count: int32, the shapes of `Threshold.value`; traced, so that one compiled program serves every count.
      where, scale: as in `Threshold`.
    """

    count: jax.Array
    where: jax.Array | None = None
    scale: Any = None

    def __getitem__(self, index: int) -> "TopK":
        return TopK(self.count[index], self.where, None if self.scale is None else self.scale[index])

    def on(self, where: jax.Array) -> "TopK":
        """The same counts, acting only on the tokens where `where` (bool `[batch, seq]`) is True."""
        return dataclasses.replace(self, where=where)

    def keep(self, x: jax.Array) -> jax.Array:
        """The kept channels of x `[batch, seq, d_in]`, bool: exactly `count` a token, a NaN before all others."""
        scaled = self.scale is not None
        kept = top_k_mask(scores(x, self.scale), self.count) if scaled else keep_largest(x, self.count)
        return kept if self.where is None else kept | ~self.where[..., None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GateOutput:
    """CATS, in the place of up's gate: hidden channel j lives iff `|silu(gate_proj x)_j| > value`, in float32.

    The others are neither computed by up nor read by down; the block sees to it with `keep` on `silu(gate_proj x)`.

    Attributes:
      value: float32 scalar, >= 0.
      where: as in `Threshold`.

    References:
      CATS, arXiv 2404.08763, section 4.
    """

    value: jax.Array
    where: jax.Array | None = None

    def on(self, where: jax.Array) -> "GateOutput":
        """The same threshold, acting only on the tokens where `where` (bool `[batch, seq]`) is True."""
        return GateOutput(self.value, where)

    def keep(self, x: jax.Array) -> jax.Array:
        """The living channels, bool, for `x = silu(gate_proj(mlp_in))`."""
        return Threshold(self.value, self.where).keep(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Soft:
    """A `Threshold` with a derivative, for learning it: the hard mask m forwards, `sigmoid(u / width)` backwards.

    `u = scale_i |x_i| / value - 1`; the mask is `m + s - stop_gradient(s)` with `s = sigmoid(u / width)`: what is
    computed is what will run, and near the threshold it has a slope in `value`, `scale` and x.

    Attributes:
      value: float32 scalar, > 0.
      scale: float32 `[d_in]`, > 0, or None.
      width: float32 scalar, > 0: how far from the threshold a channel still has a say.
      where: as in `Threshold`.
    """

    value: jax.Array
    scale: jax.Array | None
    width: jax.Array
    where: jax.Array | None = None

    def on(self, where: jax.Array) -> "Soft":
        """The same, acting only on the tokens where `where` is True."""
        return dataclasses.replace(self, where=where)

    def mask(self, x: jax.Array) -> jax.Array:
        """The mask of x `[..., d_in]`, float32: 0 or 1, with the soft mask's derivative."""
        soft = jax.nn.sigmoid((scores(x, self.scale) / self.value - 1) / self.width)
        slope = only(self.where, soft - jax.lax.stop_gradient(soft), 0.0)
        return self.keep(x) + slope

    def keep(self, x: jax.Array) -> jax.Array:
        """The kept channels, bool."""
        return Threshold(self.value, self.where, self.scale).keep(x)


def scores(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """`scale_i * |x_i|`, float32, for x `[..., d_in]` and scale `[d_in]`, or None for 1."""
    magnitude = jnp.abs(x.astype(jnp.float32))
    return magnitude if scale is None else magnitude * scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Gates:
    """Unlike gates of one model: a tuple over layers of tuples over the seven projections."""

    layers: tuple[tuple[Any, ...], ...]

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        return self.layers[index]

    def on(self, where: jax.Array) -> "Gates":
        """The same gates, acting only on the tokens where `where` (bool `[batch, seq]`) is True."""
        return Gates(tuple(tuple(gate.on(where) for gate in layer) for layer in self.layers))


def prompt_gates(gates: Any) -> Any:
    """A model's gates for its prompts: dense, unless the model was trained through its gates and knows no other."""
    return gates if isinstance(gates, StraightThrough) else Dense()


type Gate = (
    Dense
    | Threshold
    | TopK
    | BlockTopK
    | Relu
    | GateOutput
    | Soft
    | Biased
    | LowRank
    | Rotated
    | Int8
    | StraightThrough
)
"""Of one projection; those that have `__getitem__` also hold those of a block or of a model."""

type BlockGates = Dense | Threshold | TopK | BlockTopK | Relu | Biased | Int8 | StraightThrough | tuple[Gate, ...]
"""Of the seven projections of a block."""

type ModelGates = Dense | Threshold | TopK | BlockTopK | Relu | Biased | Int8 | StraightThrough | Gates
"""Of a model."""
