"""HuggingFace's `config.json` -> `ModelConfig` and back; what the library cannot run is refused by name.

Both layouts are read: transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 writes `rope_parameters`.
A missing field takes the value that transformers gives it, so the same file means the same model here and there.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from converters.quantization_config import Quantization, parse_quantization
from teal_jax.config import ModelConfig, RopeConfig
from teal_jax.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError

CONFIG_FILE = "config.json"
GATES_FIELD = "activation_sparsity"
"""Of `config.json`, ours; transformers keeps it and runs the model dense."""

GENERATION_CONFIG_FILE = "generation_config.json"

ARCHITECTURES = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}
"""The supported `model_type`s, and the class that transformers runs each with."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048, "num_key_value_heads": None, "sliding_window": None},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
}
"""What transformers' `LlamaConfig` and `MistralConfig` put in for a missing field, where the two differ."""

_REQUIRED = object()


def read_config(directory: str | Path) -> ModelConfig:
    """The model that `directory/config.json` describes; the eos ids of `generation_config.json` are added to it.

    Raises:
      ModelNotFoundError: no such directory, or no `config.json` in it.
      CheckpointError: a file that is not JSON.
      UnsupportedModelError: a field that is missing or of the wrong type, or asks for what is not implemented.
    """
    directory = Path(directory)
    path = directory / CONFIG_FILE
    if not path.is_file():
        what = f"no {CONFIG_FILE} in {directory}" if directory.is_dir() else f"no such directory: {directory}"
        raise ModelNotFoundError(
            what, hint="give a HuggingFace checkpoint: a folder with config.json and *.safetensors"
        )
    generation = directory / GENERATION_CONFIG_FILE
    extra = _read_json(generation) if generation.is_file() else {}
    return config_from_hf(_read_json(path), generation_config=extra)


def read_quantization(directory: str | Path) -> Quantization | None:
    """How the weights in `directory` are quantised, by its `config.json`; None: they are not, or there is no such file.

    Raises as `read_config` does.
    """
    path = Path(directory) / CONFIG_FILE
    return parse_quantization(_read_json(path)) if path.is_file() else None


def read_gates(directory: str | Path) -> Any:
    """What `directory/config.json` says of activation sparsity, as `export_checkpoint` wrote it; None: nothing."""
    path = Path(directory) / CONFIG_FILE
    return _read_json(path).get(GATES_FIELD) if path.is_file() else None


def config_from_hf(fields: Mapping[str, Any], *, generation_config: Mapping[str, Any] | None = None) -> ModelConfig:
    """The model that the parsed `config.json` describes; raises `UnsupportedModelError` as `read_config` does."""
    family = _family(fields)
    _refuse_unsupported(fields)
    defaults = DEFAULTS[family]
    d_model = _int(fields, "hidden_size")
    num_heads = _int(fields, "num_attention_heads")
    head_dim = _int(fields, "head_dim", None, nullable=True)
    if head_dim is None:
        if d_model % num_heads:
            raise UnsupportedModelError(
                f"{CONFIG_FILE}: hidden_size {d_model} is not a multiple of num_attention_heads {num_heads}",
                hint="add head_dim to config.json if the heads are of another width",
            )
        head_dim = d_model // num_heads
    # A window or biases written into a config of the other family are ignored by transformers, so they are here.
    is_mistral = family == "mistral"
    eos = _token_ids(fields, "eos_token_id", 2) + _token_ids(generation_config or {}, "eos_token_id", None)
    return ModelConfig(
        vocab_size=_int(fields, "vocab_size"),
        d_model=d_model,
        d_mlp=_int(fields, "intermediate_size"),
        num_layers=_int(fields, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=_int(fields, "num_key_value_heads", defaults["num_key_value_heads"], nullable=True) or num_heads,
        head_dim=head_dim,
        max_position=_int(fields, "max_position_embeddings", defaults["max_position_embeddings"]),
        norm_eps=_float(fields, "rms_norm_eps", 1e-6),
        rope=_rope(fields),
        sliding_window=_int(fields, "sliding_window", defaults["sliding_window"], nullable=True)
        if is_mistral
        else None,
        tie_embeddings=_bool(fields, "tie_word_embeddings", False),
        attention_bias=not is_mistral and _bool(fields, "attention_bias", False),
        mlp_bias=not is_mistral and _bool(fields, "mlp_bias", False),
        hidden_act=fields.get("hidden_act", "silu"),
        bos_token_id=_int(fields, "bos_token_id", 1, nullable=True, least=0),
        eos_token_ids=tuple(dict.fromkeys(eos)),
        model_type=family,
    )


def config_to_hf(config: ModelConfig, *, dtype: str = "float32") -> dict[str, Any]:
    """The `config.json` of `config` for transformers 4 and 5: the rope and the dtype are given under both names.

    Raises `UnsupportedModelError` when transformers' class of that `model_type` would ignore a part of `config`.
    """
    if config.model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"model_type {config.model_type!r} has no HuggingFace form: expected one of {', '.join(ARCHITECTURES)}"
        )
    if config.model_type == "llama" and config.sliding_window is not None:
        raise UnsupportedModelError("HuggingFace's llama has no sliding window", hint="set model_type to 'mistral'")
    if config.model_type == "mistral" and (config.attention_bias or config.mlp_bias):
        raise UnsupportedModelError("HuggingFace's mistral has no biases", hint="set model_type to 'llama'")
    rope: dict[str, Any] = {"rope_type": config.rope.type}
    if config.rope.type != "default":
        rope["factor"] = config.rope.factor
    if config.rope.type == "llama3":
        rope["low_freq_factor"] = config.rope.low_freq_factor
        rope["high_freq_factor"] = config.rope.high_freq_factor
        rope["original_max_position_embeddings"] = config.rope.original_max_position
    eos = list(config.eos_token_ids)
    family: dict[str, Any] = {"sliding_window": config.sliding_window}
    if config.model_type == "llama":
        family = {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    return {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_mlp,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": config.hidden_act,
        **family,
        "rope_theta": config.rope.theta,
        "rope_scaling": None if config.rope.type == "default" else rope,
        "rope_parameters": {"rope_theta": config.rope.theta, **rope},
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": (eos[0] if len(eos) == 1 else eos) if eos else None,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}", hint="download the checkpoint again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _family(fields: Mapping[str, Any]) -> str:
    known = f"expected one of {', '.join(ARCHITECTURES)}"
    hint = "this library runs Llama- and Mistral-family decoders"
    family = fields.get("model_type")
    if family is None:
        raise UnsupportedModelError(f"{CONFIG_FILE} has no model_type: {known}", hint=hint)
    if not isinstance(family, str) or family not in ARCHITECTURES:
        raise UnsupportedModelError(f"model_type {family!r} is not supported: {known}", hint=hint)
    architectures = fields.get("architectures") or [ARCHITECTURES[family]]
    if architectures != [ARCHITECTURES[family]]:
        raise UnsupportedModelError(
            f"architecture {architectures!r} is not supported for model_type {family!r}: "
            f"expected {[ARCHITECTURES[family]]!r}",
            hint=hint,
        )
    return family


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    """The options that transformers' Llama and Mistral obey and this library does not."""
    parse_quantization(fields)  # only for what it refuses
    kinds = sorted(set(map(str, fields.get("layer_types") or ())))
    if len(kinds) > 1:
        raise UnsupportedModelError(f"layer_types {', '.join(kinds)}: layers of more than one kind are not supported")


def _rope(fields: Mapping[str, Any]) -> RopeConfig:
    # transformers 5 lets a non-empty rope_scaling win over rope_parameters, and a theta inside over one outside.
    name = "rope_scaling" if fields.get("rope_scaling") else "rope_parameters"
    rope = fields.get(name) or {}
    if not isinstance(rope, Mapping):
        raise UnsupportedModelError(f"{CONFIG_FILE}: {name} must be an object or null, got {rope!r}")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise UnsupportedModelError(f"{name} per kind of layer ({', '.join(rope)}) is not supported")
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor"))
    if partial not in (None, 1):
        raise UnsupportedModelError(f"partial_rotary_factor {partial!r} is not supported: expected 1")
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = _float(fields, "rope_theta", 10000.0)
    theta = _float(rope, "rope_theta", theta, where=name)
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind == "linear":
        return RopeConfig(theta=theta, type=kind, factor=_float(rope, "factor", where=name))
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            type=kind,
            factor=_float(rope, "factor", where=name),
            low_freq_factor=_float(rope, "low_freq_factor", where=name),
            high_freq_factor=_float(rope, "high_freq_factor", where=name),
            original_max_position=_int(rope, "original_max_position_embeddings", where=name),
        )
    return RopeConfig(theta=theta, type=kind)  # an unknown type: RopeConfig refuses it, naming those that it knows


def _field(
    fields: Mapping[str, Any], name: str, default: Any, where: str, what: str, valid: Callable[[Any], bool]
) -> Any:
    """`fields[name]`, or `default` where it is missing; refused unless `valid`."""
    place = f"{CONFIG_FILE}: " + (f"{where}." if where else "") + name
    value = fields.get(name, default)
    if value is _REQUIRED:
        raise UnsupportedModelError(f"{place} is missing: expected {what}", hint="is the checkpoint complete?")
    if not valid(value):
        raise UnsupportedModelError(f"{place} must be {what}, got {value!r}")
    return value


def _is_int(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _int(
    fields: Mapping[str, Any],
    name: str,
    default: Any = _REQUIRED,
    *,
    nullable: bool = False,
    least: int = 1,
    where: str = "",
) -> Any:
    what = f"a whole number >= {least}" + (" or null" if nullable else "")
    return _field(fields, name, default, where, what, lambda v: _is_int(v, least) or (nullable and v is None))


def _float(fields: Mapping[str, Any], name: str, default: Any = _REQUIRED, *, where: str = "") -> float:
    def valid(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")

    return float(_field(fields, name, default, where, "a number > 0", valid))


def _bool(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    return _field(fields, name, default, "", "true or false", lambda v: isinstance(v, bool))


def _token_ids(fields: Mapping[str, Any], name: str, default: int | None) -> list[int]:
    def as_list(value: Any) -> list[Any]:
        return value if isinstance(value, list) else [] if value is None else [value]

    what = "a token id, a list of them or null"
    return as_list(_field(fields, name, default, "", what, lambda v: all(_is_int(i, 0) for i in as_list(v))))
