"""`QuantizedWeight`: a projection's matrix in few bits, in the place of an array in a model's parameters."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp

from teal_jax.config import PROJECTIONS, ModelConfig
from teal_jax.errors import QuantizationError

DEFAULT_GROUP = 64
"""Of int4 where nobody says: 4.25 bits a weight; divides every width of the models known here."""

_NAME = re.compile(r"int([0-9]+)(?:-g([0-9]+))?(-asym)?")


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """A format of quantised weights; `QuantSpec.parse("int4-g128-asym")` and `str(spec)` are its name.

    Attributes:
      bits: 8, one scale an output channel; 4, one scale for each `group` outputs of a row, so that a kept row's
        scales lie with it; 3 and 2, as 4 but each code in a byte of its own: simulated, to see what they cost.
      group: outputs that share a scale; None with 8 bits.
      symmetric: no zero points.
    """

    bits: int
    group: int | None = None
    symmetric: bool = True

    def __post_init__(self):
        if self.bits not in (8, 4, 3, 2):
            raise QuantizationError(f"bits must be 8, 4, 3 or 2, got {self.bits}", hint="for example int8 or int4-g128")
        if self.bits == 8 and not (self.group is None and self.symmetric):
            raise QuantizationError("int8 has one scale an output channel: it takes no group and no zero points")
        if self.bits < 8 and (self.group is None or self.group < 2 or self.group % 2):
            raise QuantizationError(f"int{self.bits} needs an even group >= 2, got {self.group}", hint="try 64 or 128")

    @classmethod
    def parse(cls, name: "str | QuantSpec") -> "QuantSpec":
        """The format called `int8`, `int4`, `int4-g128`, `int3-g64-asym`; without -gN the group is 64.

        Raises:
          QuantizationError: no such format.
        """
        if isinstance(name, QuantSpec):
            return name
        match = _NAME.fullmatch(str(name).strip().lower())
        if match is None:
            raise QuantizationError(
                f"no format {name!r} of quantised weights", hint="int8, int4, int3 or int2; int4-g128, int4-g64-asym"
            )
        bits, group = int(match[1]), int(match[2]) if match[2] else None
        return cls(bits, DEFAULT_GROUP if group is None and bits < 8 else group, match[3] is None)

    def __str__(self) -> str:
        group = "" if self.group is None else f"-g{self.group}"
        return f"int{self.bits}{group}{'' if self.symmetric else '-asym'}"

    @property
    def simulated(self) -> bool:
        """Stored wider than its name says."""
        return self.bits < 4

    def bytes_of(self, d_in: int, d_out: int) -> int:
        """Bytes that a matrix `[d_in, d_out]` takes, scales and zero points included."""
        if self.group is None:
            return d_in * d_out + 4 * d_out
        codes = d_in * d_out // 2 if self.bits == 4 else d_in * d_out
        return codes + d_in * (d_out // self.group) * (2 if self.symmetric else 3)

    def check_fits(self, config: ModelConfig) -> None:
        """Raise `QuantizationError` unless the group divides the outputs of every projection."""
        if self.group is None:
            return
        shapes = zip(PROJECTIONS, config.projection_shapes, strict=True)
        if wrong := [f"{name} [{d_in}, {d_out}]" for name, (d_in, d_out) in shapes if d_out % self.group]:
            raise QuantizationError(
                f"groups of {self.group} do not divide the outputs of {', '.join(wrong)}", hint=_dividing(config)
            )


def _dividing(config: ModelConfig) -> str:
    widths = [d_out for _, d_out in config.projection_shapes]
    fits = [group for group in (128, 64, 32, 16, 8, 4) if not any(width % group for width in widths)]
    return f"groups that do: {', '.join(map(str, fits))}; or int8" if fits else "int8 takes any shape"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """`W[i, j] = (code - zero) * scale`, with the scale of output j (8 bits) or of the group of j in row i.

    A pytree whose arrays are `codes`, `scale` and, without symmetry, `zero`; `project` takes it like an array.

    Attributes:
      codes: 8 bits: int8 `[d_in, d_out]`. 4 bits: uint8 `[d_in, d_out / 2]`, two codes of 0..15 to a byte, the even
        output in the low nibble. Simulated: int8 `[d_in, d_out]`, of 0..2^bits - 1.
      scale: 8 bits: float32 `[d_out]`. Else bfloat16 `[d_in, d_out / group]`. Of either sign.
      zero: uint8, as `scale`; None: 0 with 8 bits, else `2^(bits - 1)`.
      bits, group: as in `QuantSpec`.
      dtype: name of what it dequantises to: that of the activations.
    """

    codes: jax.Array
    scale: jax.Array
    zero: jax.Array | None = None
    bits: int = dataclasses.field(metadata={"static": True})
    group: int | None = dataclasses.field(default=None, metadata={"static": True})
    dtype: str = dataclasses.field(default="bfloat16", metadata={"static": True})

    @property
    def spec(self) -> QuantSpec:
        """Its format."""
        return QuantSpec(self.bits, self.group, self.zero is None)

    @property
    def shape(self) -> tuple[int, int]:
        """`(d_in, d_out)`."""
        d_in, width = self.codes.shape
        return d_in, 2 * width if self.bits == 4 else width

    @property
    def nbytes(self) -> int:
        """Bytes of all its arrays."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def astype(self, dtype: jax.typing.DTypeLike) -> "QuantizedWeight":
        """The same codes, dequantised to another dtype."""
        return dataclasses.replace(self, dtype=jnp.dtype(dtype).name)

    def dequantize(self) -> jax.Array:
        """W `[d_in, d_out]`: multiplied in float32, rounded once to `dtype`."""
        codes = unpack_nibbles(self.codes) if self.bits == 4 else self.codes
        return decode(codes, self.scale, self.zero, self.spec).astype(self.dtype)


def decode(codes: jax.Array, scale: jax.Array, zero: jax.Array | None, spec: QuantSpec) -> jax.Array:
    """`(code - zero) * scale`, float32 `[d_in, d_out]`, for codes `[d_in, d_out]` of any type."""
    values, scale = codes.astype(jnp.float32), scale.astype(jnp.float32)
    if spec.group is None:
        return values * scale
    grouped = values.reshape(codes.shape[0], -1, spec.group)
    middle = 2 ** (spec.bits - 1) if zero is None else zero.astype(jnp.float32)[:, :, None]
    return ((grouped - middle) * scale[:, :, None]).reshape(codes.shape)


def assemble(
    codes: jax.Array, scale: jax.Array, zero: jax.Array | None, spec: QuantSpec, dtype: jax.typing.DTypeLike
) -> QuantizedWeight:
    """The weight with these codes `[d_in, d_out]`, of -128..127 with 8 bits and else of 0..2^bits - 1, packed."""
    packed = pack_nibbles(codes) if spec.bits == 4 else codes.astype(jnp.int8)
    scale = scale.astype(jnp.float32 if spec.group is None else jnp.bfloat16)
    zero = None if zero is None else zero.astype(jnp.uint8)
    return QuantizedWeight(
        codes=packed, scale=scale, zero=zero, bits=spec.bits, group=spec.group, dtype=jnp.dtype(dtype).name
    )


def pack_nibbles(codes: jax.Array) -> jax.Array:
    """uint8 `[d_in, d_out / 2]` from codes of 0..15 `[d_in, d_out]`: the even output is the low nibble."""
    codes = codes.astype(jnp.uint8)
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: jax.Array) -> jax.Array:
    """What `pack_nibbles` packed, uint8 `[d_in, d_out]`."""
    return jnp.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)


def to_dense(weight: jax.Array | QuantizedWeight) -> jax.Array:
    """The matrix as an array."""
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight


def quantization_of(weights: Any) -> str | None:
    """The formats in a tree of weights, such as `int4-g64` or `int4-g64+int8`; None where nothing is quantised."""
    is_one = lambda leaf: isinstance(leaf, QuantizedWeight)  # noqa: E731
    found = {str(leaf.spec) for leaf in jax.tree.leaves(weights, is_leaf=is_one) if is_one(leaf)}
    return "+".join(sorted(found)) or None
