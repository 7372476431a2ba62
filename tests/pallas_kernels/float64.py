"""What the kernels should give, in float64, and how far float32 sums and the rounding of results may be from it."""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.coded import CodedMatrix, Matrix
from pallas_kernels.kept import KeptRows

UNIT = 2.0**-24
"""The relative error of one float32 operation."""

SPARSITIES = (0.0, 0.3, 0.5, 0.9, 1.0)


def f64(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


@dataclasses.dataclass(frozen=True)
class Bounded:
    """Values, and for each how far a correct kernel may be off."""

    value: np.ndarray
    error: np.ndarray

    def rounded(self, dtype) -> "Bounded":
        """After rounding to `dtype`."""
        info = jnp.finfo(dtype)
        with np.errstate(invalid="ignore"):
            half = float(info.eps) / 2 * (np.abs(self.value) + self.error)
        return Bounded(self.value, self.error + half + float(info.smallest_subnormal))

    def plus(self, other: np.ndarray) -> "Bounded":
        """Plus what is exact, in float32."""
        value = self.value + other
        return Bounded(value, self.error + UNIT * (np.abs(value) + self.error))

    def check(self, got, case: object = "") -> None:
        """Raise where `got` is further off, or not the same infinity or NaN."""
        got = f64(got)
        assert got.shape == self.value.shape, (case, got.shape, self.value.shape)
        finite = np.isfinite(self.value)
        np.testing.assert_array_equal(got[~finite], self.value[~finite], err_msg=str(case))
        off = np.abs(got[finite] - self.value[finite]) - self.error[finite]
        # A NaN where a number should be is not <= 0.
        assert np.all(off <= 0), f"{case}: {off.max()} further off than {self.error[finite].max()}"


def product(x: np.ndarray, weight: np.ndarray, depth: int | None = None) -> Bounded:
    """`x @ weight`; no term goes through more than `depth` additions, by default as many as there are terms."""
    depth = x.shape[1] if depth is None else depth
    with np.errstate(invalid="ignore"):
        return Bounded(x @ weight, (depth + 2) * UNIT * (np.abs(x) @ np.abs(weight)))


def silu_product(gate: Bounded, up: Bounded, dtype) -> Bounded:
    """`silu(gate) * up`, rounded where the model rounds."""
    gate, up = gate.rounded(dtype), up.rounded(dtype)
    with np.errstate(invalid="ignore", over="ignore"):
        silu = gate.value / (1 + np.exp(-gate.value))
        # silu's slope is below 1.1; exp(g) is as far off as the rounding of g; 1 / exp(89) is 0 in float32.
        error = 1.1 * gate.error + (np.abs(gate.value) + 8) * UNIT * np.abs(silu) + 1e-36
        off = np.abs(up.value) * error + (np.abs(silu) + error) * up.error + UNIT * np.abs(silu * up.value)
        return Bounded(silu * up.value, off).rounded(dtype)


def rms_norm(h: np.ndarray, weight: np.ndarray, eps: float, dtype) -> Bounded:
    """`w * h / sqrt(mean(h^2) + eps)`, rounded where the model rounds."""
    with np.errstate(invalid="ignore", divide="ignore"):
        x = h / np.sqrt(np.mean(h * h, axis=-1, keepdims=True) + eps)
        normed = Bounded(x, np.abs(x) * (h.shape[-1] / 2 + 8) * UNIT).rounded(dtype)
        return Bounded(weight * normed.value, np.abs(weight) * normed.error).rounded(dtype)


def keep(x: np.ndarray, threshold: float) -> np.ndarray:
    return ~(np.abs(x) <= np.float64(np.float32(threshold)))


def masked(x: np.ndarray, thresholds: Sequence[float]) -> list[np.ndarray]:
    """x of every segment, with zeros where its threshold drops a value."""
    return [np.where(keep(x, t), x, 0.0) for t in thresholds]


def kept_rows(x: np.ndarray, thresholds: Sequence[float], width: int) -> KeptRows:
    """The lists of x `[batch, d_in]`, made one channel at a time."""
    batch, d_in = x.shape
    lists = -(-d_in // width)
    index = np.zeros((len(thresholds), lists, width), np.int32)
    value = np.zeros((len(thresholds), lists, batch, width), np.float32)
    count = np.zeros((len(thresholds), lists), np.int32)
    for s, threshold in enumerate(thresholds):
        kept = keep(x, threshold)
        for n in range(lists):
            channels = range(n * width, (n + 1) * width)
            listed = [c for c in channels if c < d_in and kept[:, c].any()]
            index[s, n] = listed + [c for c in channels if c not in listed]
            for j, c in enumerate(listed):
                value[s, n, :, j] = np.where(kept[:, c], x[:, c], 0)
            count[s, n] = len(listed)
    return jax.tree.map(jnp.asarray, KeptRows(index, value, count))


def exactly(weight: Matrix) -> np.ndarray:
    """W in float64, a coded one decoded one output at a time."""
    if not isinstance(weight, CodedMatrix):
        return f64(weight)
    codes, scale = np.asarray(weight.codes).astype(np.int64), f64(weight.scale)
    if weight.group is None:
        return codes * scale
    w = np.empty(weight.shape)
    for j in range(w.shape[1]):
        code, g = codes[:, j // 2] >> 4 * (j % 2) & 15, j // weight.group
        with np.errstate(invalid="ignore"):
            w[:, j] = (code - (8 if weight.zero is None else f64(weight.zero)[:, g])) * scale[:, g]
    return w


def coded(rng: np.random.Generator, d_in: int, d_out: int, kind: str, dtype) -> CodedMatrix:
    """Random codes of a kind: `"int8"`, `"int4-g64"`, `"int4-g64-asym"`."""
    dtype = jnp.dtype(dtype).name
    if kind == "int8":
        codes = jnp.asarray(rng.integers(-128, 128, (d_in, d_out)), jnp.int8)
        return CodedMatrix(codes, jnp.asarray(rng.normal(size=d_out) / 64, jnp.float32), float_dtype=dtype)
    group = int(kind.split("-")[1][1:])
    shape = (d_in, d_out // group)
    zero = jnp.asarray(rng.integers(0, 16, shape), jnp.uint8) if kind.endswith("asym") else None
    codes = jnp.asarray(rng.integers(0, 256, (d_in, d_out // 2)), jnp.uint8)
    return CodedMatrix(codes, jnp.asarray(rng.normal(size=shape) / 4, jnp.bfloat16), zero, group, dtype)


def poisoned(weight: Matrix, x: np.ndarray) -> Matrix:
    """`weight` with NaN and infinity, or other codes, in the rows that no row of x (masked) needs: not to be read."""
    unread = np.flatnonzero((x == 0).all(axis=0))
    if not isinstance(weight, CodedMatrix):
        return weight.at[unread[::2]].set(np.nan).at[unread[1::2]].set(np.inf)
    weight = dataclasses.replace(weight, codes=weight.codes.at[unread].set(85))
    if weight.group is None:
        return weight
    return dataclasses.replace(weight, scale=poisoned(weight.scale, x))


def check_rows(rows: KeptRows, x: Bounded, thresholds: Sequence[float], width: int, case: object = "") -> None:
    """Raise unless `rows` are the lists of x, which is known up to its error, and so is what is kept."""
    batch, d_in = x.value.shape
    lists = -(-d_in // width)
    assert rows.index.shape == (len(thresholds), lists, width), case
    assert rows.value.shape == (len(thresholds), lists, batch, width), case
    index, value, count = np.asarray(rows.index), f64(rows.value), np.asarray(rows.count)
    for s, threshold in enumerate(thresholds):
        t = np.float64(np.float32(threshold))
        got = np.zeros((batch, lists * width))
        for n in range(lists):
            entries, used = index[s, n], count[s, n]
            assert sorted(entries) == list(range(n * width, (n + 1) * width)), case
            assert (np.diff(entries[:used]) > 0).all(), case
            assert (entries[:used] < d_in).all(), case
            assert not value[s, n, :, used:].any(), case
            assert (value[s, n, :, :used] != 0).any(axis=0).all(), case  # no entry that nobody keeps
            got[:, entries] = value[s, n]
        got = got[:, :d_in]
        assert ((got == 0) | ~(np.abs(got) <= t)).all(), case
        with np.errstate(invalid="ignore"):
            surely = ~(np.abs(x.value) - x.error <= t)
            surely_not = np.abs(x.value) + x.error <= t
        assert (got[surely] != 0).all(), case
        assert not got[surely_not].any(), case
        kept = got != 0
        error = np.where(kept, x.error, np.inf)
        Bounded(np.where(kept, x.value, 0), error).check(got, case)


def draws(
    rng: np.random.Generator, batch: int, d_in: int, segments: int, width: int, dtype
) -> Iterator[tuple[str, np.ndarray, list[float]]]:
    """Name, x `[batch, d_in]` that `dtype` holds, a threshold for each segment: everything that lists can be."""

    def some_x() -> np.ndarray:
        x = rng.normal(size=(batch, d_in))
        return f64(jnp.asarray(np.where(x == 0, 1, x), dtype))

    for sparsity in SPARSITIES:
        x = some_x()
        t = 0.0 if sparsity == 0 else float(np.quantile(np.abs(x), sparsity))
        yield f"sparsity {sparsity}", x, [t] * segments
    yield "a segment keeps all, one half, one none", some_x(), [0.0, 0.7, np.inf][:segments]
    x = some_x()
    x[:, :width] = 0
    yield "the first list is empty", x, [0.3] * segments
    x = some_x()
    x[:, width // 2 :] = 0
    yield "only the first list is not", x, [0.3, 0.0, 0.6][:segments]
    x = some_x()
    x[0, d_in // 3], x[-1, d_in // 2] = np.inf, np.nan
    yield "infinity and NaN", x, [0.5, 99.0, np.inf][:segments]


def same_bits(a, b) -> bool:
    """Whether two pytrees of arrays are the same, NaN and all."""
    return all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
