"""`quantization_config` of a `config.json` -> what the importer must know; what it cannot unpack is refused by name.

Read are the 4-bit checkpoints of AutoAWQ's GEMM version and of AutoGPTQ and GPTQModel, formats `gptq` (v1) and
`gptq_v2`. The fields are those of transformers' `AwqConfig` and `GPTQConfig`, with older writers' synonyms.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from teal_jax.errors import UnsupportedModelError

FIELD = "quantization_config"
METHODS = ("awq", "gptq")
FORMATS = {"awq": ("gemm",), "gptq": ("gptq", "gptq_v2")}
"""The packings that are read, by method."""

_ORIGINAL = "use the original checkpoint in bfloat16, float16 or float32, and quantise it here if you like"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization:
    """How the projections of a checkpoint are quantised.

    Attributes:
      method: `"awq"` or `"gptq"`.
      format: the packing: `"gemm"`; `"gptq"`, which stores zero points less one, or `"gptq_v2"`, which does not.
      group_size: input channels that share a scale and a zero point; None: all of a column.
      act_order: GPTQ's `desc_act`: a group is any set of input channels, listed in `g_idx`.
      symmetric: GPTQ's `sym`: every zero point is 8; None: not said.
      lm_head: the lm_head is quantised too.
      excluded: parts of the names of modules that may have been left as they were.
      only: if any, the ends of the names of the modules of a block that are quantised.
      by_gptqmodel: whether GPTQModel wrote it.
    """

    method: Literal["awq", "gptq"]
    format: str
    group_size: int | None
    act_order: bool = False
    symmetric: bool | None = None
    lm_head: bool = False
    excluded: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    by_gptqmodel: bool = False

    def num_groups(self, d_in: int) -> int:
        """Groups of a column of `d_in` input channels; the last one may be smaller."""
        return -(-d_in // (self.group_size or d_in))

    def covers(self, module: str) -> bool | None:
        """Whether the module, `"model.layers.0.mlp.up_proj"`, must be quantised; None: it may be or not."""
        if any(part in module for part in self.excluded):
            return None
        if module == "lm_head":
            return self.lm_head
        return not self.only or module.endswith(self.only)


def parse_quantization(fields: Mapping[str, Any]) -> Quantization | None:
    """What the parsed `config.json` says of its quantisation; None: nothing.

    Raises `UnsupportedModelError` for another method, another number of bits, another packing or a malformed field.
    """
    raw = fields.get(FIELD)
    if not raw:
        return None
    method = raw.get("quant_method", "?") if isinstance(raw, Mapping) else raw
    if not isinstance(raw, Mapping) or str(method).lower() not in METHODS:
        raise UnsupportedModelError(
            f"quantised checkpoints ({FIELD}: {method}) are not supported: expected one of {', '.join(METHODS)}",
            hint=_ORIGINAL,
        )
    method = str(method).lower()
    bits = _first(raw, ("bits", "w_bit"), 4)
    if bits != 4 or isinstance(bits, bool):
        raise _unsupported(method, f"with bits {bits!r}", "4 bits")
    group_size = _first(raw, ("group_size", "q_group_size"), 128)
    if not isinstance(group_size, int) or isinstance(group_size, bool) or (group_size != -1 and group_size < 1):
        raise _unsupported(method, f"with group_size {group_size!r}", "a whole number >= 1, or -1 for whole columns")
    shared: dict[str, Any] = {"format": _format(raw, method), "group_size": None if group_size == -1 else group_size}
    if method == "awq":
        return Quantization(method="awq", excluded=_names(raw, "modules_to_not_convert"), **shared, **_awq(raw))
    return Quantization(method="gptq", only=_names(raw, "modules_in_block_to_quantize"), **shared, **_gptq(raw))


def _format(raw: Mapping[str, Any], method: str) -> str:
    if method == "awq":
        packing = _first(raw, ("version", "checkpoint_format", "format"), "gemm")
        if (backend := raw.get("backend")) == "llm-awq":
            packing = backend
    else:
        packing = "marlin" if raw.get("is_marlin_format") else _first(raw, ("checkpoint_format", "format"), "gptq")
    packing = str(packing).lower()
    if packing not in FORMATS[method]:
        raise _unsupported(method, f"in the format {packing!r}", f"one of {', '.join(FORMATS[method])}")
    if (word := raw.get("pack_dtype") or "int32") not in ("int32", "torch.int32"):
        raise _unsupported(method, f"packed into {word!r}", "int32")
    return packing


def _awq(raw: Mapping[str, Any]) -> dict[str, Any]:
    if not _flag(raw, "zero_point", True):
        raise _unsupported("awq", "without zero points (zero_point false)", "zero_point true")
    return {"lm_head": _flag(raw, "lm_head", False)}


def _gptq(raw: Mapping[str, Any]) -> dict[str, Any]:
    # Each changes what the packed numbers mean, module by module, in the basis of the channels, or by an addend.
    for name in ("dynamic", "rotation", "adapter"):
        if raw.get(name):
            raise _unsupported("gptq", f"with {name!r} ({raw[name]!r})", f"none of {name}")
    meta = raw.get("meta")
    writers = meta.get("quantizer") if isinstance(meta, Mapping) else None
    names = writers if isinstance(writers, list) else [writers]
    return {
        "act_order": _flag(raw, "desc_act", False),
        "symmetric": _flag(raw, "sym", False) if raw.get("sym") is not None else None,
        "lm_head": _flag(raw, "lm_head", False),
        "by_gptqmodel": any(str(name).startswith("gptqmodel") for name in names),
    }


def _first(raw: Mapping[str, Any], names: tuple[str, ...], default: Any) -> Any:
    return next((raw[name] for name in names if raw.get(name) is not None), default)


def _flag(raw: Mapping[str, Any], name: str, default: bool) -> bool:
    value = default if raw.get(name) is None else raw[name]
    if value not in (True, False):  # 0 and 1 are among what people wrote
        raise UnsupportedModelError(f"{FIELD}: {name} must be true or false, got {value!r}")
    return bool(value)


def _names(raw: Mapping[str, Any], name: str) -> tuple[str, ...]:
    """A list of names, or GPTQ's list of lists."""
    value = raw.get(name) or []
    flat = (
        [n for item in value for n in (item if isinstance(item, list) else [item])] if isinstance(value, list) else [0]
    )
    if not all(isinstance(item, str) and item for item in flat):
        raise UnsupportedModelError(f"{FIELD}: {name} must be a list of module names, got {value!r}")
    return tuple(flat)


def _unsupported(method: str, what: str, expected: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{method} checkpoints {what} are not supported ({FIELD} in config.json): expected {expected}", hint=_ORIGINAL
    )
