"""Products with int8 and int4 weights: what `test_matvec` and `test_gate_up` ask, of codes."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import dequantise
from pallas_kernels.coded import Matrix, bits_of
from pallas_kernels.tiles import Tile
from tests.pallas_kernels import test_gate_up, test_matvec
from tests.pallas_kernels.float64 import coded, exactly, f64


def one(rng: np.random.Generator, d_in: int, d_out: int, kind: str, dtype: str) -> Matrix:
    """Of floats, or of codes."""
    if kind == "float":
        return jnp.asarray(rng.normal(size=(d_in, d_out)), dtype)
    return coded(rng, d_in, d_out, kind, dtype)


@dataclasses.dataclass(frozen=True)
class Matvec(test_matvec.Case):
    """A product of rows and weights of these kinds, one a segment."""

    kinds: tuple[str, ...] = ()

    def weights(self, rng: np.random.Generator) -> tuple[Matrix, ...]:
        """One a segment."""
        return tuple(one(rng, self.d_in, n, kind, self.dtype) for n, kind in zip(self.d_outs, self.kinds, strict=True))


@dataclasses.dataclass(frozen=True)
class GateUp(test_gate_up.Case):
    """gate and up of these kinds."""

    kinds: tuple[str, str] = ("int8", "int8")

    def weights(self, rng: np.random.Generator) -> tuple[Matrix, ...]:
        """Gate and up."""
        return tuple(one(rng, self.d_model, self.d_mlp, kind, self.dtype) for kind in self.kinds)


def small(splits: int, unroll: int = 2, each: int = 16) -> Tile:
    return Tile(32, splits, unroll=unroll, warps=1, each=each)


CASES = [
    Matvec(1, 129, (33,), 32, small(2), "bfloat16", residual=True, kinds=("int8",)),
    Matvec(1, 65, (40,), 32, small(8, 1, each=32), bias=True, kinds=("int4-g8",)),  # a masked tail
    Matvec(1, 66, (192,), 16, small(2), "float16", kinds=("int4-g64-asym",)),  # a group wider than the tile
    Matvec(2, 33, (33, 16, 34), 16, small(2, 1, 8), "bfloat16", bias=True, kinds=("float", "int4-g16-asym", "int4-g2")),
    Matvec(1, 256, (64,), None, small(2), "bfloat16", out_dtype="float32", kinds=("int4-g32",)),  # nothing to mask
    Matvec(8, 33, (7, 40), None, small(2, 1, 8), bias=True, residual=True, kinds=("int8", "int4-g8-asym")),
    GateUp(1, 65, 40, 32, small(4), "bfloat16", kinds=("int4-g8", "int4-g8-asym")),
    GateUp(2, 17, 33, 16, small(2, 1), bias=True),
    GateUp(1, 64, 64, None, small(2, 1), cut=False, kinds=("int8", "int4-g64")),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case):
    case.check(interpret=True)


@pytest.mark.parametrize("kind", ["int8", "int4-g2", "int4-g16", "int4-g16-asym"])
def test_decodes(kind):
    weight = coded(np.random.default_rng(0), 5, 48, kind, "float16")
    assert weight.shape == (5, 48)
    assert weight.dtype == jnp.float16
    assert bits_of(weight) == (8 if kind == "int8" else 4)
    np.testing.assert_array_equal(f64(weight.decode()), exactly(weight).astype(np.float32))


# The assembly, run one instruction at a time.


def run(text: str, arguments: list[int | float]) -> dict[str, np.float32]:
    """What PTX of five instructions leaves in its registers; `arguments` follow the results, from `$0` on."""
    instructions = [i.strip() for i in text.strip("{ }").split(";") if i.strip()]
    results = 1 + max(int(n) for n in re.findall(r"(?:add|fma)\.rn\.f32 \$(\d+)", text))
    registers: dict = {f"${results + n}": value for n, value in enumerate(arguments)}

    def word(name: str) -> int:
        value = registers.get(name)
        if value is None:
            return int(name, 0)
        return value if isinstance(value, int) else int(np.float32(value).view(np.uint32))

    def number(name: str) -> np.float32:
        bits = int(name[2:], 16) if name.startswith("0f") else word(name)
        return np.uint32(bits).view(np.float32)

    for instruction in instructions:
        name, rest = instruction.split(" ", 1)
        to, *given = [part.strip() for part in rest.split(",")]
        match name:
            case ".reg":
                continue
            case "mov.b32":
                registers[to] = word(given[0])
            case "xor.b32":
                registers[to] = word(given[0]) ^ word(given[1])
            case "shr.u32":
                registers[to] = word(given[0]) >> word(given[1])
            case "prmt.b32":
                both = word(given[0]).to_bytes(4, "little") + word(given[1]).to_bytes(4, "little")
                chosen = bytes(both[word(given[2]) >> 4 * i & 7] for i in range(4))
                registers[to] = int.from_bytes(chosen, "little")
            case "lop3.b32":
                assert given[3] == "0xEA"  # a & b | c
                registers[to] = word(given[0]) & word(given[1]) | word(given[2])
            case "add.rn.f32":
                registers[to] = np.float32(number(given[0]) + number(given[1]))
            case "fma.rn.f32":
                exact = np.prod([f64(number(g)) for g in given[:2]]) + f64(number(given[2]))
                registers[to] = np.float32(exact)
            case _:
                raise AssertionError(instruction)
    return {name: value for name, value in registers.items() if isinstance(value, np.float32)}


WORDS = np.random.default_rng(0).permutation(np.arange(256).repeat(4)).astype(np.uint8).reshape(-1, 4)
"""Every byte, about once at every place."""


def test_assembly_of_bytes():
    for codes in WORDS:
        registers = run(dequantise.BYTES, [int(codes.view(np.uint32)[0])])
        np.testing.assert_array_equal([registers[f"${i}"] for i in range(4)], codes.view(np.int8).astype(np.float32))


@pytest.mark.parametrize("zeros", [(8, 8, 8, 8), (0, 3, 7, 15)])
def test_assembly_of_halves(zeros):
    sums = [np.float32(constant - zero) for constant in dequantise.CONSTANTS for zero in zeros]
    for codes in WORDS:
        registers = run(dequantise.NIBBLES, [int(codes.view(np.uint32)[0]), *sums])
        np.testing.assert_array_equal([registers[f"${i}"] for i in range(4)], (codes & 15) - np.float32(zeros))
        np.testing.assert_array_equal([registers[f"${i}"] for i in range(4, 8)], (codes >> 4) - np.float32(zeros))


def test_this_jax_takes_the_assembly():
    assert dequantise.INSTALLED is True
