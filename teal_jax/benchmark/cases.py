"""The kernels of a layer as separate pieces of work, each over weights that no cache can hold."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.attention import decode_attention, select_heads
from pallas_kernels.coded import Matrix
from pallas_kernels.gate_up import gate_up, gate_up_reference
from pallas_kernels.kept import Cut, KeptRows, select_reference
from pallas_kernels.matvec import matvec
from pallas_kernels.norm import rms_norm_select
from pallas_kernels.reference import matmul
from pallas_kernels.tiles import COUNTERS, DecodeTiles, Tile
from teal_jax.config import ModelConfig
from teal_jax.nn.fused_step import as_matrix
from teal_jax.nn.quantized import QuantSpec
from teal_jax.nn.rope import rotary_table
from teal_jax.quantization.rtn import round_to_nearest

ROTATION = 200e6
"""Bytes of distinct weights that one measurement goes through: some times a GPU's L2 cache."""

GEMVS = ("qkv", "o", "gate_up", "down")

HEAD = QuantSpec(8)
"""Of the lm_head, where the blocks are quantised."""

type Kept = Callable[[jax.Array, int], KeptRows]
"""`(x, segments) -> ` the rows of x that are left, in the lists that the kernel before writes."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel, one way to run it.

    Attributes:
      kernel: its name in the table.
      path: `"dense"`, `"sparse"` or `"xla"`.
      launch: part of the kernel's name in a profile; None: everything that ran counts.
      bytes: that a call needs to read and write.
      make: `i -> ` the weights of call i.
      state: small arrays that every call takes and gives back: counters, or its input.
      work: a call, `(state, weights) -> (state, weights, output)`: a kv_cache is updated in place, too.
    """

    kernel: str
    path: str
    launch: str | None
    bytes: int
    make: Callable[[int], Any]
    state: Any
    work: Callable[[Any, Any], tuple[Any, Any, Any]]

    @property
    def calls(self) -> int:
        """Distinct weights to go through."""
        return max(2, min(64, int(-(-ROTATION // self.bytes))))

    def start(self) -> Callable[[], Any]:
        """A function without arguments that runs every call once, one after the other, in one program."""
        weights = [self.make(i) for i in range(self.calls)]

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def program(state: Any, weights: list[Any], one: jax.Array) -> tuple[Any, list[Any], list[Any]]:
            outputs = []
            for i, weight in enumerate(weights):
                # A kernel of XLA's between the calls: one that may start before the last call has ended would be
                # charged for its waiting.
                state = jax.tree.map(lambda s: s * one.astype(s.dtype), state)
                state, weights[i], output = self.work(state, weight)
                outputs.append(output)
            return state, weights, outputs

        held = [(jax.tree.map(jnp.copy, self.state), weights)]

        def call() -> Any:
            state, weights, outputs = program(*held.pop(), jnp.ones((), jnp.float32))
            held.append((state, weights))
            return outputs

        return call


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(seed: int, shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, dtype)


class Cases:
    """The cases of one config, built one at a time."""

    def __init__(
        self,
        config: ModelConfig,
        tiles: DecodeTiles,
        sparsity: float,
        dtype: jax.typing.DTypeLike,
        *,
        contexts: tuple[int, ...] = (512, 8192, 32768, 131072),
        quantize: QuantSpec | None = None,
        interpret: bool = False,
    ):
        self.config, self.tiles, self.sparsity, self.dtype = config, tiles, sparsity, jnp.dtype(dtype)
        self.contexts, self.quantize, self.interpret = contexts, quantize, interpret

    def __iter__(self) -> Iterator[tuple[str, Callable[[], Case]]]:
        """What to measure, in the order of a layer, and a function that builds it and so takes its memory."""
        c, t, part = self.config, self.tiles, functools.partial
        q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        yield from _both("norm (q, k, v)", part(self.norm, "norm (q, k, v)", 3))
        yield from self.projections("qkv", c.d_model, (q, kv, kv), t.qkv, part(self.kept, width=t.width))
        for context in self.contexts:
            yield from _both(f"attention {context}", part(self.attention, context))
        yield from self.projections("o", q, (c.d_model,), t.o, self.kept_heads)
        yield from _both("norm (gate, up)", part(self.norm, "norm (gate, up)", 2))
        yield from _both("gate_up", self.gate_up)
        yield "gate_up xla", part(self.xla, "gate_up", c.d_model, (c.d_mlp, c.d_mlp))
        of_hidden = part(self.kept, width=t.gate_up.columns)
        yield from self.projections("down", c.d_mlp, (c.d_model,), t.down, of_hidden)
        yield "lm_head dense", part(self.matvec, "lm_head", c.d_model, (c.vocab_size,), t.lm_head, None)
        yield "lm_head xla", part(self.xla, "lm_head", c.d_model, (c.vocab_size,))

    def projections(
        self, name: str, d_in: int, widths: tuple[int, ...], tile: Tile, kept: Kept
    ) -> Iterator[tuple[str, Callable[[], Case]]]:
        """A matvec dense and sparse, and XLA's beside."""
        for path, rows in (("dense", None), ("sparse", kept)):
            yield f"{name} {path}", functools.partial(self.matvec, name, d_in, widths, tile, rows)
        yield f"{name} xla", functools.partial(self.xla, name, d_in, widths)

    def norm(self, name: str, segments: int, sparse: bool) -> Case:
        """RMSNorm, and the kept rows."""
        d, item = self.config.d_model, self.dtype.itemsize
        h, gain = self.x(d), jnp.ones((d,), self.dtype)
        cut = self.cut(h, segments) if sparse else None

        def work(h: jax.Array, gain: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
            rows = rms_norm_select(
                h, gain, cut, eps=self.config.norm_eps, width=self.tiles.width, interpret=self.interpret
            )
            return h, gain, rows

        written = segments * 8 * d if sparse else item * d
        return Case(name, _path(sparse), "norm_select", 2 * item * d + written, lambda i: gain + 0, h, work)

    def matvec(self, name: str, d_in: int, widths: tuple[int, ...], tile: Tile, kept: Kept | None) -> Case:
        """Projections of one input; `kept` gives a segment of its rows for each of them, None: dense."""
        x = self.x(d_in)
        rows = x if kept is None else kept(x, len(widths))
        out_dtype = jnp.float32 if name == "lm_head" else None

        def work(counters: jax.Array, weights: Any) -> tuple[Any, Any, Any]:
            y, counters = matvec(rows, weights, counters, tile=tile, out_dtype=out_dtype, interpret=self.interpret)
            return counters, weights, y

        launch = "dense_matvec" if kept is None else "kept_matvec"
        spec = HEAD if self.quantize and name == "lm_head" else self.quantize
        needed, make = self.weight_bytes(d_in, widths, rows, spec), self.weights(d_in, widths, spec)
        return Case(name, _path(kept is not None), launch, needed, make, self.counters(), work)

    def gate_up(self, sparse: bool) -> Case:
        """gate, up and the product."""
        c, width = self.config, self.tiles.gate_up.columns
        x, widths = self.x(c.d_model), (c.d_mlp, c.d_mlp)
        rows: Any = self.kept(x, 2, self.tiles.width) if sparse else x
        make: Callable[[int], Any] = self.weights(c.d_model, widths, self.quantize)
        cut = None
        if sparse:
            hidden: Any = gate_up_reference(rows, make(0), None, width=width)
            cut = self.cut(hidden, 1)

        def work(counters: jax.Array, weights: Any) -> tuple[Any, Any, Any]:
            out, counters = gate_up(rows, weights, counters, cut, tile=self.tiles.gate_up, interpret=self.interpret)
            return counters, weights, out

        needed = self.weight_bytes(c.d_model, widths, rows, self.quantize)
        return Case("gate_up", _path(sparse), "gate_up", needed, make, self.counters(), work)

    def attention(self, context: int, sparse: bool) -> Case:
        """Attention over a full cache, the last slot but one free."""
        c = self.config
        qkv = self.x((c.num_heads + 2 * c.num_kv_heads) * c.head_dim)
        length = jnp.full((1,), context - 1, jnp.int32)
        rotary = tuple(table[:, 0, 0] for table in rotary_table(length[:, None], c.rope, c.head_dim))
        # What comes out is a mean of many values, normal as they are, and smaller.
        cut = self.cut(self.x(c.num_heads * c.head_dim) / np.sqrt(context), 1) if sparse else None
        shape = (1, context, c.num_kv_heads, c.head_dim)

        def work(counters: jax.Array, cache: Any) -> tuple[Any, Any, Any]:
            rows, keys, values, counters = decode_attention(
                qkv, rotary, length, *cache, counters, cut,
                num_heads=c.num_heads, window=c.sliding_window, interpret=self.interpret,
            )  # fmt: skip
            return counters, (keys, values), rows

        seen = min(context, c.sliding_window or context)
        needed = 2 * self.dtype.itemsize * seen * c.num_kv_heads * c.head_dim

        def make(i: int) -> tuple[jax.Array, ...]:
            return tuple(_normal(2 * i + s, shape, self.dtype) for s in range(2))

        return Case(f"attention {context}", _path(sparse), "decode_attention", needed, make, self.counters(), work)

    def xla(self, name: str, d_in: int, widths: tuple[int, ...]) -> Case:
        """The same products as XLA computes them: dense, one `jnp.dot` a matrix, gate and up with what follows."""
        x = self.x(d_in)

        def work(state: Any, weights: Any) -> tuple[Any, Any, Any]:
            ys = [matmul(x, w) for w in weights]
            return state, weights, jax.nn.silu(ys[0]) * ys[1] if name == "gate_up" else ys

        return Case(name, "xla", None, self.weight_bytes(d_in, widths, x), self.weights(d_in, widths), (), work)

    def x(self, width: int) -> jax.Array:
        """A token's activations, `[1, width]`."""
        return _normal(width, (1, width), self.dtype)

    def threshold(self, x: jax.Array) -> float:
        """Drops the share `sparsity` of x."""
        return float(np.quantile(np.abs(np.asarray(x, np.float32)), self.sparsity)) if self.sparsity else 0.0

    def cut(self, x: jax.Array, segments: int) -> Cut:
        """That threshold for every segment."""
        return Cut.of(jnp.full((segments,), self.threshold(x), jnp.float32))

    def kept(self, x: jax.Array, segments: int, width: int) -> KeptRows:
        """The rows of x that are left, one segment a projection."""
        return select_reference(x, self.cut(x, segments).values, width)

    def kept_heads(self, x: jax.Array, segments: int) -> KeptRows:
        """The same, as attention leaves them: a list for each kv head."""
        return select_heads(x.reshape(1, self.config.num_kv_heads, -1), self.cut(x, segments).values)

    def counters(self) -> jax.Array:
        """As every kernel takes them."""
        return jnp.zeros((COUNTERS,), jnp.int32)

    def weights(
        self, d_in: int, widths: tuple[int, ...], spec: QuantSpec | None = None
    ) -> Callable[[int], tuple[Matrix, ...]]:
        """`i -> ` distinct matrices `[d_in, width]`, of a format or floats."""
        scale = jnp.asarray(0.02, self.dtype)

        def one(seed: int, width: int) -> Matrix:
            weight = scale * _normal(seed, (d_in, width), self.dtype)
            return weight if spec is None else as_matrix(round_to_nearest(weight, spec))

        return lambda i: tuple(one(97 * i + s, width) for s, width in enumerate(widths))

    def weight_bytes(self, d_in: int, widths: tuple[int, ...], rows: Any, spec: QuantSpec | None = None) -> int:
        """Of the rows of W that are read."""
        kept = [d_in] * len(widths)
        if isinstance(rows, KeptRows):
            kept = [int(n) for n in np.asarray(rows.count).sum(axis=1)]
        item = self.dtype.itemsize
        return sum(item * n * w if spec is None else spec.bytes_of(n, w) for n, w in zip(kept, widths, strict=True))


def _both(name: str, build: Callable[[bool], Case]) -> Iterator[tuple[str, Callable[[], Case]]]:
    for sparse in (False, True):
        yield f"{name} {_path(sparse)}", functools.partial(build, sparse)


def _path(sparse: bool) -> str:
    return "sparse" if sparse else "dense"
