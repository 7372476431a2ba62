"""AutoAWQ's GEMM packing, 4 bits (Lin et al., AWQ, 2306.00978; AutoAWQ's `WQLinear_GEMM`).

    qweight int32 [d_in, d_out / 8]    eight outputs of one input channel to a word
    qzeros  int32 [groups, d_out / 8]  likewise
    scales  float16 [groups, d_out]    groups of neighbouring input channels

The four-bit places of a word, from the lowest, hold its outputs 0 2 4 6 1 3 5 7: the order in which the CUDA kernel
takes two at a time. The zero points are stored as they are.
"""

from collections.abc import Mapping

import numpy as np

from converters.grouped import PER_WORD, GroupedWeight, check_packable, check_scales, in_sequence, unpack_columns
from converters.quantization_config import Quantization
from teal_jax.errors import CheckpointError

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, of a word's eight, that each four-bit place holds."""

OPTIONAL: frozenset[str] = frozenset()
"""The parts of `shapes` that a checkpoint may lack."""


def shapes(module: str, d_in: int, d_out: int, quantization: Quantization) -> dict[str, tuple[int, ...]]:
    """The tensors that stand for the weight of `module`, by the last part of their names.

    Raises `CheckpointError` when the sizes cannot be packed or the groups do not divide the input.
    """
    check_packable(module, d_in, d_out, rows=False)
    if quantization.group_size and d_in % quantization.group_size:
        raise CheckpointError(
            f"{module} has {d_in} inputs, which group_size {quantization.group_size} does not divide",
            hint="do config.json and the weights belong together?",
        )
    groups = quantization.num_groups(d_in)
    return {
        "qweight": (d_in, d_out // PER_WORD),
        "qzeros": (groups, d_out // PER_WORD),
        "scales": (groups, d_out),
    }


def unpack(module: str, parts: Mapping[str, np.ndarray], quantization: Quantization) -> GroupedWeight:
    """The weight of `module` from its tensors, which have `shapes`; raises `CheckpointError` for a broken scale."""
    check_scales(module, parts["scales"])
    return GroupedWeight(
        codes=unpack_columns(parts["qweight"], ORDER),
        scales=parts["scales"],
        zeros=unpack_columns(parts["qzeros"], ORDER),
        group_of=in_sequence(len(parts["qweight"]), quantization.group_size),
    )
