import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_kernels.attention import context_block, context_splits, decode_attention, decode_attention_reference
from pallas_kernels.kept import Cut


def cut_of(threshold: float | None) -> Cut | None:
    return None if threshold is None else Cut.of(jnp.asarray([threshold]))


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes, and how the kernel cuts them."""

    heads: int
    kv_heads: int
    dim: int
    slots: int
    lengths: tuple[int, ...]
    window: int | None = None
    splits: int | None = None
    block: int | None = 16
    dtype: str = "float32"

    def sees(self, length: int, slot: int) -> bool:
        """Whether the new token at position `length` sees what the slot held before."""
        held = [p for p in range(length) if p % self.slots == slot]
        overwritten = slot == length % self.slots
        return bool(held) and not overwritten and (self.window is None or length - held[-1] < self.window)

    def inputs(self, seed: int = 0) -> dict[str, Any]:
        """The arguments up to values; what has no effect is NaN."""
        rng = np.random.default_rng(seed)
        batch = len(self.lengths)
        angles = rng.uniform(-3, 3, size=(batch, self.dim // 2))
        cache = rng.normal(size=(2, batch, self.slots, self.kv_heads, self.dim))
        for b, length in enumerate(self.lengths):
            cache[:, b, [not self.sees(length, s) for s in range(self.slots)]] = np.nan
        qkv = rng.normal(size=(batch, (self.heads + 2 * self.kv_heads) * self.dim))
        return {
            "qkv": jnp.asarray(qkv, self.dtype),
            "rotary": (jnp.asarray(np.cos(angles), jnp.float32), jnp.asarray(np.sin(angles), jnp.float32)),
            "length": jnp.asarray(self.lengths, jnp.int32),
            "keys": jnp.asarray(cache[0], self.dtype),
            "values": jnp.asarray(cache[1], self.dtype),
        }

    def run(self, inputs, threshold=None):
        counters = jnp.zeros(self.kv_heads + 3, jnp.int32)
        sizes = {"num_heads": self.heads, "window": self.window, "splits": self.splits, "block": self.block}
        return decode_attention(**inputs, counters=counters, cut=cut_of(threshold), **sizes, interpret=True)

    def reference(self, inputs, threshold=None):
        f = functools.partial(decode_attention_reference, num_heads=self.heads, window=self.window)
        return jax.jit(f)(**inputs, cut=cut_of(threshold))


CASES = [
    Case(2, 2, 16, 20, (0,), splits=1),  # an empty cache
    Case(4, 2, 24, 40, (1, 39, 40, 0), splits=2),  # odd sizes, rows of unlike lengths, a full cache
    Case(4, 2, 32, 20, (5, 19, 20, 47), window=20, splits=2),  # a ring
    Case(4, 2, 32, 20, (123,)),  # a ring without a window
    Case(3, 1, 64, 90, (3, 77, 195), window=30, splits=4, block=32),  # slots past the window and past the end
    Case(20, 1, 8, 50, (50,), splits=4),  # query heads and channels that fill no tile
    Case(2, 1, 256, 256, (255, 250, 225, 0), splits=16),  # a step each, loaded before the length is known
    Case(16, 1, 128, 512, (511, 200, 0), splits=32, block=16),  # partials combined in several steps, some of them empty
    Case(2, 1, 128, 300, (200,), block=None),  # the kernel's own choices
    Case(4, 2, 64, 70, (66, 5), splits=2, block=32, dtype="bfloat16"),
    Case(4, 2, 64, 70, (66, 5), splits=2, block=32, dtype="float16"),
]


def expected(case: Case, inputs) -> tuple[np.ndarray, np.ndarray]:
    """attn_out `[batch, heads, dim]` and the new keys `[batch, kv_heads, dim]` in float64, rounded like the model."""

    def rounded(x):
        return np.asarray(jnp.asarray(x, case.dtype), np.float64)

    qkv, cos, sin, keys, values = (
        np.asarray(x, np.float64) for x in (inputs["qkv"], *inputs["rotary"], inputs["keys"], inputs["values"])
    )
    out = np.zeros((len(case.lengths), case.heads, case.dim))
    new_keys = np.zeros((len(case.lengths), case.kv_heads, case.dim))
    for b, length in enumerate(case.lengths):
        x = qkv[b].reshape(-1, case.dim)
        complex_x = (x[:, : case.dim // 2] + 1j * x[:, case.dim // 2 :]) * (cos[b] + 1j * sin[b])
        turned = rounded(np.concatenate([complex_x.real, complex_x.imag], axis=1))
        new_keys[b] = turned[case.heads : case.heads + case.kv_heads]
        seen = [s for s in range(case.slots) if case.sees(length, s)]
        for h in range(case.heads):
            g = h // (case.heads // case.kv_heads)
            k = np.concatenate([keys[b, seen, g], new_keys[b, g : g + 1]])
            v = np.concatenate([values[b, seen, g], x[case.heads + case.kv_heads + g][None]])
            weights = np.exp(k @ turned[h] / case.dim**0.5)
            out[b, h] = weights @ v / weights.sum()
    return out, new_keys


def tolerance(case: Case) -> float:
    return 3e-6 if case.dtype == "float32" else 3 * float(jnp.finfo(case.dtype).eps)


def check_cache(case: Case, inputs, keys, values, new_keys) -> None:
    """Only the new token's slot changed."""
    heads = inputs["qkv"].reshape(len(case.lengths), -1, case.dim)
    for b, length in enumerate(case.lengths):
        slot = length % case.slots
        np.testing.assert_allclose(np.asarray(keys[b, slot], np.float64), new_keys[b], atol=tolerance(case))
        np.testing.assert_array_equal(values[b, slot], heads[b, -case.kv_heads :])
        others = np.arange(case.slots) != slot
        for old, new in ((inputs["keys"], keys), (inputs["values"], values)):
            np.testing.assert_array_equal(
                np.asarray(new[b], np.float64)[others], np.asarray(old[b], np.float64)[others]
            )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matches_float64(case):
    inputs = case.inputs()
    out, new_keys = expected(case, inputs)
    rows, keys, values, counters = case.run(inputs)
    assert rows.dtype == inputs["qkv"].dtype
    np.testing.assert_allclose(np.asarray(rows, np.float64), out.reshape(rows.shape), atol=tolerance(case))
    assert not np.asarray(counters).any()
    check_cache(case, inputs, keys, values, new_keys)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_matches_float64(case):
    inputs = case.inputs()
    out, new_keys = expected(case, inputs)
    rows, keys, values = case.reference(inputs)
    np.testing.assert_allclose(np.asarray(rows, np.float64), out.reshape(rows.shape), atol=tolerance(case))
    check_cache(case, inputs, keys, values, new_keys)


LISTS = Case(6, 2, 24, 40, (7, 33), splits=2)  # 72 channels a kv head, in lists of 128


@pytest.mark.parametrize("run", [lambda *a: LISTS.run(*a)[0], lambda *a: LISTS.reference(*a)[0]], ids=["kernel", "jnp"])
def test_lists_hold_what_the_dense_output_keeps(run):
    inputs = LISTS.inputs()
    x = np.asarray(run(inputs), np.float32).reshape(2, 2, 72)
    for threshold in (0.0, 0.2, 99.0):
        rows = run(inputs, threshold)
        assert (rows.index.shape, rows.value.shape, rows.count.shape) == ((1, 2, 128), (1, 2, 2, 128), (1, 2))
        for g in range(2):
            keep = np.abs(x[:, g]) > threshold
            kept = np.flatnonzero(keep.any(axis=0))
            assert rows.count[0, g] == len(kept)
            np.testing.assert_array_equal(rows.index[0, g, : len(kept)], g * 72 + kept)
            value = np.where(keep, x[:, g], 0)[:, kept]
            np.testing.assert_allclose(rows.value[0, g, :, : len(kept)], value, atol=1e-6)
            assert sorted(np.asarray(rows.index[0, g])) == list(range(g * 72, g * 72 + 128))
            assert not np.asarray(rows.value[0, g, :, len(kept) :]).any()


def test_values_are_rounded_to_the_model_dtype():
    case = dataclasses.replace(LISTS, dtype="bfloat16")
    value = case.run(case.inputs(), 0.1)[0].value
    np.testing.assert_array_equal(value, value.astype(jnp.bfloat16).astype(jnp.float32))


def test_a_broken_activation_shows():
    inputs = LISTS.inputs()
    inputs["qkv"] = inputs["qkv"].at[0, 0].set(jnp.nan)  # query head 0 of row 0
    rows = LISTS.run(inputs, 0.2)[0]
    index, count = np.asarray(rows.index[0, 0]), int(rows.count[0, 0])
    np.testing.assert_array_equal(np.sort(index[np.isnan(rows.value[0, 0, 0])]), np.arange(24))
    assert set(range(24)) <= set(index[:count])
    assert np.isfinite(rows.value[0, 0, 1]).all()
    assert np.isfinite(rows.value[0, 1:]).all()


@pytest.mark.parametrize("slots", [1, 17, 64, 500, 4096, 131072])
@pytest.mark.parametrize(("kv_heads", "batch"), [(1, 1), (8, 1), (32, 1), (8, 8), (32, 8), (6, 3)])
def test_splits_are_a_power_of_two_with_a_block_each(slots, kv_heads, batch):
    splits = context_splits(slots, kv_heads, batch, 32)
    assert splits & (splits - 1) == 0
    assert 1 <= splits <= -(-slots // 32)
    assert splits == 1 or splits * kv_heads * batch <= 256


def test_default_sizes():
    assert [context_splits(slots, 8, 1, 64) for slots in (16, 512, 1024, 2048, 8192, 131072)] == [1, 8, 8, 16, 32, 32]
    assert [context_block(dim, "bfloat16") for dim in (16, 64, 80, 128, 256)] == [128, 128, 64, 64, 32]
    assert [context_block(dim, "float32") for dim in (64, 128, 256)] == [64, 32, 16]


SMALL = Case(4, 2, 16, 20, (3,))
WRONG = {
    "qkv": ({"qkv": jnp.zeros((1, 100))}, ValueError, "qkv: expected shape"),
    "qkv dtype": ({"qkv": jnp.zeros((1, 128), jnp.int32)}, TypeError, "qkv: expected one of"),
    "keys ndim": ({"keys": jnp.zeros((1, 20, 32))}, ValueError, "keys: expected"),
    "keys dtype": ({"keys": jnp.zeros((1, 20, 2, 16), jnp.bfloat16)}, TypeError, "keys: expected float32"),
    "values": ({"values": jnp.zeros((1, 21, 2, 16))}, ValueError, "values: expected shape"),
    "batch": ({"keys": jnp.zeros((9, 20, 2, 16))}, ValueError, "batch: expected 1 to 8, got 9"),
    "dim": ({"keys": jnp.zeros((1, 20, 2, 15))}, ValueError, "head_dim: expected an even number"),
    "length": ({"length": jnp.zeros(1, jnp.float32)}, TypeError, "length: expected int32"),
    "rotary": ({"rotary": (jnp.zeros((1, 8)), jnp.zeros((1, 16)))}, ValueError, "sine: expected shape"),
    "few counters": ({"counters": jnp.zeros(1, jnp.int32)}, ValueError, "counters: expected"),
    "counters dtype": ({"counters": jnp.zeros(2)}, TypeError, "counters: expected int32"),
    "cut": (
        {"cut": Cut.of(jnp.asarray([0.1, 0.2]))},
        ValueError,
        "thresholds: expected one for each of 1 segments, got 2",
    ),
    "heads": ({"num_heads": 3}, ValueError, "num_heads: expected a multiple of 2"),
    "window": ({"window": 0}, ValueError, "window: expected >= 1"),
    "splits": ({"splits": 3}, ValueError, "splits: expected a power of two"),
    "block": ({"block": 24}, ValueError, "block: expected a power of two"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_use_raises(wrong):
    change, error, message = WRONG[wrong]
    arguments = SMALL.inputs() | {"counters": jnp.zeros(2, jnp.int32), "cut": None, "num_heads": 4}
    with pytest.raises(error, match=message):
        decode_attention(**(arguments | change))


H200 = AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("sparse", [True, False], ids=["lists", "dense"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "slots", "batch"),
    [
        (32, 8, 128, 512, 1),
        (32, 8, 128, 131072, 1),
        (64, 8, 128, 4096, 8),
        (32, 32, 80, 4096, 2),
    ],
)
def test_lowers_to_one_kernel_in_place(heads, kv_heads, dim, slots, batch, dtype, sparse):
    def f(keys, values, counters, qkv, cos, sin, length, thresholds, layer):
        cut = Cut(thresholds, layer, (3,)) if sparse else None
        return decode_attention(qkv, (cos, sin), length, keys, values, counters, cut, num_heads=heads)

    s = jax.ShapeDtypeStruct
    cache, angles = s((batch, slots, kv_heads, dim), dtype), s((batch, dim // 2), jnp.float32)
    qkv = s((batch, (heads + 2 * kv_heads) * dim), dtype)
    one, several = s((1,), jnp.int32), s((batch,), jnp.int32)
    arguments = (cache, cache, s((64,), jnp.int32), qkv, angles, angles, several, s((32, 7), jnp.float32), one)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=H200)):
        lowered = jax.jit(f, donate_argnums=(0, 1, 2)).trace(*arguments).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    assert text.count("__gpu$xla.gpu.triton") == 1
    assert text.count("#stablehlo.output_operand_alias") == 3
    assert text.count("tf.aliasing_output") == 3
