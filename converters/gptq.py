"""GPTQ's packing, 4 bits (Frantar et al., GPTQ, 2210.17323; AutoGPTQ's and GPTQModel's `QuantLinear`).

    qweight int32 [d_in / 8, d_out]    eight input channels of one output to a word
    qzeros  int32 [groups, d_out / 8]  eight outputs of one group to a word
    scales  float16 [groups, d_out]
    g_idx   int32 [d_in]               the group of each input channel; may be missing where neighbours form a group

The places of a word, from the lowest, are in order. Format v1 stores every zero point less one, v2 as it is.
With act order (`desc_act`) channels were quantised by falling activation and grouped in that order. The rows of
`qweight` are in the model's order all the same; `g_idx` alone says who shares a scale.
"""

from collections.abc import Mapping

import numpy as np

from converters.grouped import (
    PER_WORD,
    GroupedWeight,
    check_packable,
    check_scales,
    in_sequence,
    unpack_columns,
    unpack_rows,
)
from converters.quantization_config import Quantization
from teal_jax.errors import CheckpointError

OPTIONAL = frozenset({"g_idx"})
"""The parts of `shapes` that a checkpoint may lack."""

_ONES = np.uint32(0x11111111)
_TOGETHER = "do config.json and the weights belong together?"


def shapes(module: str, d_in: int, d_out: int, quantization: Quantization) -> dict[str, tuple[int, ...]]:
    """The tensors that stand for the weight of `module`, by the last part of their names.

    Raises `CheckpointError` when the sizes cannot be packed.
    """
    check_packable(module, d_in, d_out, rows=True)
    groups = quantization.num_groups(d_in)
    return {
        "qweight": (d_in // PER_WORD, d_out),
        "qzeros": (groups, d_out // PER_WORD),
        "scales": (groups, d_out),
        "g_idx": (d_in,),
    }


def unpack(module: str, parts: Mapping[str, np.ndarray], quantization: Quantization) -> GroupedWeight:
    """The weight of `module` from its tensors, which have `shapes`.

    Raises `CheckpointError` for a broken scale, for a `g_idx` or zero points that contradict the config, and for zero
    points whose meaning depends on who wrote them.
    """
    check_scales(module, parts["scales"])
    return GroupedWeight(
        codes=unpack_rows(parts["qweight"]),
        scales=parts["scales"],
        zeros=_zeros(module, parts["qzeros"], quantization),
        group_of=_group_of(module, PER_WORD * len(parts["qweight"]), parts.get("g_idx"), quantization),
    )


def _zeros(module: str, words: np.ndarray, quantization: Quantization) -> np.ndarray:
    if quantization.format == "gptq_v2":
        zeros = unpack_columns(words)
    else:
        # GPTQModel takes one off a whole word: under a zero point of 0 the next one is lent from, and adding undoes it.
        # AutoGPTQ takes it off each number, and -1 spills over all places above; its kernels then read 16 or 0.
        if not quantization.by_gptqmodel and (unpack_columns(words) == 15).any():
            raise CheckpointError(
                f"{module}.qzeros holds 15, a zero point of 0 less one, which AutoGPTQ's writer and readers treat "
                "differently",
                hint="quantise the model again in format gptq_v2, or symmetrically",
            )
        zeros = unpack_columns((words.view(np.uint32) + _ONES).view(np.int32))
    if quantization.symmetric and (zeros != 8).any():
        raise CheckpointError(
            f"{module}.qzeros means zero points {zeros.min()} to {zeros.max()} in format {quantization.format}, and "
            "quantization_config says sym: true, where all are 8",
            hint="checkpoint_format may be wrong: 'gptq' stores zero points less one, 'gptq_v2' does not",
        )
    return zeros


def _group_of(module: str, d_in: int, g_idx: np.ndarray | None, quantization: Quantization) -> np.ndarray:
    neighbours = in_sequence(d_in, quantization.group_size)
    groups = quantization.num_groups(d_in)
    if g_idx is None:
        if quantization.act_order and groups > 1:
            raise CheckpointError(
                f"{module}.g_idx is missing, and quantization_config says desc_act: true", hint=_TOGETHER
            )
        return neighbours
    if g_idx.min() < 0 or g_idx.max() >= groups:
        raise CheckpointError(
            f"{module}.g_idx names groups {g_idx.min()} to {g_idx.max()}, there are {groups}", hint=_TOGETHER
        )
    wanted, counts = np.bincount(neighbours), np.bincount(g_idx, minlength=groups)
    if (wrong := np.flatnonzero(counts != wanted)).size:
        group = wrong[0]
        raise CheckpointError(
            f"{module}.g_idx gives group {group} {counts[group]} input channels: expected {wanted[group]}",
            hint=_TOGETHER,
        )
    if not quantization.act_order and (g_idx != neighbours).any():
        first = np.flatnonzero(g_idx != neighbours)[0]
        raise CheckpointError(
            f"{module}.g_idx is out of order at input channel {first}, and quantization_config says desc_act: false",
            hint="set desc_act to true if the model was quantised with act order",
        )
    return g_idx.astype(np.int32)
