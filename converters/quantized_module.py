"""Which projections of a checkpoint are packed, the tensors that stand for each, and how they become one weight."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from converters import awq, gptq
from converters.grouped import GroupedWeight
from converters.keys import TensorKey
from converters.quantization_config import FIELD, Quantization
from converters.shards import Header
from teal_jax.errors import CheckpointError

WORD = "I32"
SCALES = ("F16", "BF16", "F32")
"""The stored types of integers and of scales, as safetensors names them."""

_METHODS = {"awq": awq, "gptq": gptq}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedModule:
    """A projection that is stored packed.

    Attributes:
      name: `"model.layers.0.mlp.up_proj"`. quantization: how it is packed.
      shapes: of its tensors, by the last part of their names.
      zero_bias: a bias lies in the file though the model has none; it must be all zeros.
    """

    name: str
    quantization: Quantization
    shapes: Mapping[str, tuple[int, ...]]
    zero_bias: bool

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of it, by its name in the file."""
        return {f"{self.name}.{part}": shape for part, shape in self.shapes.items()}


def quantized_modules(
    keys: tuple[TensorKey, ...], quantization: Quantization | None, headers: Mapping[str, Header]
) -> dict[str, QuantizedModule]:
    """The packed projections by the names that their weights would have; empty without `quantization`.

    Raises `CheckpointError` when sizes cannot be packed, or a tensor that is there has a type that packing has not.
    """
    modules: dict[str, QuantizedModule] = {}
    if quantization is None:
        return modules
    wanted = {key.name for key in keys}
    for key in keys:
        name = key.name.removesuffix(".weight")
        if not key.transpose:
            continue
        covered = quantization.covers(name)
        if not (f"{name}.qweight" in headers if covered is None else covered):
            continue
        packing = _METHODS[quantization.method]
        shapes = packing.shapes(name, *key.tree_shape, quantization)
        present = {
            part: shape for part, shape in shapes.items() if part not in packing.OPTIONAL or f"{name}.{part}" in headers
        }
        # AutoGPTQ wrote a bias of zeros beside every projection.
        zero_bias = f"{name}.bias" in headers and f"{name}.bias" not in wanted
        if zero_bias:
            present["bias"] = key.tree_shape[1:]
        modules[key.name] = QuantizedModule(name=name, quantization=quantization, shapes=present, zero_bias=zero_bias)
    for module in modules.values():
        _check_types(module, headers)
    return modules


def _check_types(module: QuantizedModule, headers: Mapping[str, Header]) -> None:
    for part in module.shapes:
        header = headers.get(f"{module.name}.{part}")
        expected = SCALES if part in ("scales", "bias") else (WORD,)
        if header is not None and header.dtype not in expected:
            raise CheckpointError(
                f"{module.name}.{part} in {header.file} has dtype {header.dtype}: expected {' or '.join(expected)} "
                f"({module.quantization.method}, {module.quantization.format})",
                hint=f"is the packing what {FIELD} in config.json says?",
            )


def read_module(module: QuantizedModule, read: Callable[[str], np.ndarray]) -> GroupedWeight:
    """The weight of `module`; `read` gives a tensor by its name in the file.

    Raises `CheckpointError` for broken scales, contradictions with the config, or a bias that is not zero.
    """
    parts = {part: read(f"{module.name}.{part}") for part in module.shapes}
    if module.zero_bias and np.any(parts["bias"]):
        raise CheckpointError(
            f"{module.name}.bias is not zero, and the model has no biases there",
            hint="attention_bias and mlp_bias in config.json say where a Llama has biases",
        )
    return _METHODS[module.quantization.method].unpack(module.name, parts, module.quantization)
