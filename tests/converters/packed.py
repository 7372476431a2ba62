"""Packing as the public writers do it, one number at a time: independent of the code under test.

AutoAWQ `WQLinear_GEMM.from_linear`, AutoGPTQ `QuantLinear.pack`, GPTQModel's v2 -> v1.
"""

import numpy as np

from converters import config_from_hf, tensor_keys
from tests.converters.tiny_checkpoint import HF_CONFIG

PACKABLE = HF_CONFIG | {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8}
"""A config whose widths are multiples of eight."""

GROUP = 8


def in_words(numbers) -> int:
    """Eight numbers, the first in the lowest bits, as the int32 of those bits."""
    word = 0
    for place, number in enumerate(numbers):
        assert 0 <= number <= 15
        word |= int(number) << (4 * place)
    return word - 2**32 if word >= 2**31 else word


def pack_rows(codes: np.ndarray) -> np.ndarray:
    d_in, d_out = codes.shape
    words = [[in_words(codes[8 * r : 8 * r + 8, o]) for o in range(d_out)] for r in range(d_in // 8)]
    return np.array(words, np.int32)


def pack_columns(codes: np.ndarray, order=(0, 1, 2, 3, 4, 5, 6, 7)) -> np.ndarray:
    n, d = codes.shape
    words = [[in_words([codes[i, 8 * c + place] for place in order]) for c in range(d // 8)] for i in range(n)]
    return np.array(words, np.int32)


def awq_tensors(codes, scales, zeros) -> dict[str, np.ndarray]:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    return {"qweight": pack_columns(codes, order), "qzeros": pack_columns(zeros, order), "scales": scales}


def gptq_tensors(codes, scales, zeros, group_of, *, v2: bool = False) -> dict[str, np.ndarray]:
    stored = zeros if v2 else zeros.astype(int) - 1
    return {
        "qweight": pack_rows(codes),
        "qzeros": pack_columns(stored),
        "scales": scales,
        "g_idx": np.asarray(group_of, np.int32),
    }


def numbers(rng: np.random.Generator, d_in: int, d_out: int, groups: int, *, symmetric: bool = False):
    """Random `(codes, scales, zeros)` as a quantiser leaves them; zero points from 1 on, which every format holds."""
    codes = rng.integers(0, 16, (d_in, d_out), np.uint8)
    scales = rng.uniform(0.001, 0.02, (groups, d_out)).astype(np.float16)
    zeros = np.full((groups, d_out), 8, np.uint8) if symmetric else rng.integers(1, 16, (groups, d_out), np.uint8)
    return codes, scales, zeros


def dequantized(codes, scales, zeros, group_of) -> np.ndarray:
    """float64 `[d_in, d_out]`, one number at a time."""
    d_in, d_out = codes.shape
    weight = np.empty((d_in, d_out))
    for i in range(d_in):
        for o in range(d_out):
            g = group_of[i]
            weight[i, o] = float(scales[g, o]) * (int(codes[i, o]) - int(zeros[g, o]))
    return weight


CONFIG = config_from_hf(PACKABLE)
"""What `PACKABLE` means."""

QUANTIZATION = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": True, "sym": False},
}


def packed_checkpoint(method: str, *, lm_head: bool = False, plain=numbers, group: int = GROUP) -> tuple[dict, dict]:
    """The tensors of a checkpoint, and the float64 weights `[d_in, d_out]` of its packed projections by name."""
    rng = np.random.default_rng(0)
    tensors, weights = {}, {}
    for key in tensor_keys(CONFIG):
        name = key.name.removesuffix(".weight")
        if not key.transpose or (name == "lm_head" and not lm_head):
            tensors[key.name] = rng.standard_normal(key.shape, np.float32).astype(np.float16)
            continue
        d_in, d_out = key.tree_shape
        group_of = [i // group for i in range(d_in)]
        if method == "gptq":
            group_of = rng.permutation(group_of)
        groups = len(set(group_of))
        made = plain(rng, d_in, d_out, groups)
        parts = awq_tensors(*made) if method == "awq" else gptq_tensors(*made, group_of)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        weights[key.name] = dequantized(*made, group_of)
    return tensors, weights


def config(method: str, **changes) -> dict:
    return PACKABLE | {"quantization_config": QUANTIZATION[method] | changes}
