import dataclasses
import json
from pathlib import Path

import pytest

from converters import config_from_hf, config_to_hf, read_config
from teal_jax.config import ModelConfig, RopeConfig
from teal_jax.errors import CheckpointError, ModelNotFoundError, UnsupportedModelError
from tests.converters.tiny_checkpoint import CONFIG, HF_CONFIG

LLAMA3_ROPE = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# The published files, without the fields that carry no meaning here.
LLAMA_1_7B = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 2048, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": 0, "rms_norm_eps": 1e-06,
    "tie_word_embeddings": False, "torch_dtype": "float16", "vocab_size": 32000,
}  # fmt: skip
LLAMA_2_70B = {
    "architectures": ["LlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 8192, "intermediate_size": 28672, "max_position_embeddings": 4096, "model_type": "llama",
    "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip
LLAMA_32_1B = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                     "original_max_position_embeddings": 8192, "rope_type": "llama3"},
    "rope_theta": 500000.0, "tie_word_embeddings": True, "vocab_size": 128256,
}  # fmt: skip
MISTRAL_V01 = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip


def changed(**fields: object) -> dict:
    return {**HF_CONFIG, **fields}


def without(*names: str) -> dict:
    return {name: value for name, value in HF_CONFIG.items() if name not in names}


def test_every_field_arrives():
    assert config_from_hf(HF_CONFIG) == CONFIG


def test_llama_1_has_no_theta_and_no_grouped_heads():
    config = config_from_hf(LLAMA_1_7B)
    assert (config.num_kv_heads, config.head_dim, config.norm_eps) == (32, 128, 1e-6)
    assert config.rope == RopeConfig(theta=10000.0)
    assert config.num_params == 6_738_415_616


def test_llama_2_70b():
    config = config_from_hf(LLAMA_2_70B)
    assert (config.num_kv_heads, config.head_dim, config.tie_embeddings) == (8, 128, False)
    assert config.num_params == 68_976_648_192


def test_llama_3_2_has_scaled_rope_a_tied_head_and_three_eos():
    config = config_from_hf(LLAMA_32_1B)
    assert config.rope == RopeConfig(
        theta=500000.0,
        type="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position=8192,
    )
    assert config.tie_embeddings
    assert config.eos_token_ids == (128001, 128008, 128009)
    assert config.num_params == 1_235_814_400


def test_mistral_v01_has_a_window_and_v02_none():
    assert config_from_hf(MISTRAL_V01).sliding_window == 4096
    assert config_from_hf({**MISTRAL_V01, "sliding_window": None}).sliding_window is None
    assert config_from_hf(MISTRAL_V01).num_params == 7_241_732_096


def test_missing_fields_take_transformers_defaults():
    llama = config_from_hf(
        without("rms_norm_eps", "head_dim", "max_position_embeddings", "bos_token_id", "eos_token_id")
    )
    assert (llama.norm_eps, llama.head_dim, llama.max_position) == (1e-6, 2, 2048)
    assert (llama.bos_token_id, llama.eos_token_ids) == (1, (2,))
    mistral = config_from_hf(
        {
            name: value
            for name, value in MISTRAL_V01.items()
            if name not in ("sliding_window", "num_key_value_heads", "max_position_embeddings")
        }
    )
    assert (mistral.sliding_window, mistral.num_kv_heads, mistral.max_position) == (4096, 8, 131072)


def test_squared_relu_is_read_and_written_under_its_name():
    config = config_from_hf(changed(hidden_act="relu2"))
    assert config.hidden_act == config_to_hf(config)["hidden_act"] == "relu2"
    assert ModelConfig.from_dict(config.to_dict()) == config
    assert config.fingerprint != config_from_hf(changed(hidden_act="silu")).fingerprint


def test_models_from_before_there_were_two_activations_keep_their_form_and_fingerprint():
    config = config_from_hf(LLAMA_1_7B)
    assert "hidden_act" not in config.to_dict()
    assert config.fingerprint == "8980b377635a40e7"


def test_what_the_other_family_has_is_ignored_as_transformers_does():
    assert config_from_hf(changed(sliding_window=4)).sliding_window is None
    assert not config_from_hf({**MISTRAL_V01, "attention_bias": True}).attention_bias


@pytest.mark.parametrize(
    ("v4", "v5"),
    [
        ({"rope_theta": 5e5, "rope_scaling": None}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        (
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}},
            {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3_ROPE}},
        ),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}},
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_parameters": {"rope_type": "linear", "factor": 2}}),
        ({}, {"rope_parameters": None}),
    ],
)
def test_both_layouts_mean_the_same(v4: dict, v5: dict):
    base = without("rope_theta")
    assert config_from_hf({**base, **v4}) == config_from_hf({**base, **v5})


def test_theta_inside_rope_parameters_wins():
    fields = changed(rope_theta=1.0, rope_parameters={"rope_theta": 7.0, "rope_type": "default"})
    assert config_from_hf(fields).rope.theta == 7.0


@pytest.mark.parametrize(
    ("ids", "more", "expected"),
    [(2, None, (2,)), ([3, 2], 2, (3, 2)), (2, [5, 2, 4], (2, 5, 4)), (None, None, ()), (None, 7, (7,))],
)
def test_eos_ids_are_united(ids: object, more: object, expected: tuple[int, ...]):
    assert config_from_hf(changed(eos_token_id=ids), generation_config={"eos_token_id": more}).eos_token_ids == expected


def test_generation_config_file_is_read(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [9, 2]}')
    assert read_config(str(tmp_path)).eos_token_ids == (2, 9)


def test_fixtures_of_both_layouts(fixtures: Path):
    llama, mistral, biases = (read_config(fixtures / f"tiny_{name}") for name in ("llama3", "mistral", "biases"))
    assert "rope_parameters" in (fixtures / "tiny_llama3" / "config.json").read_text()
    assert llama.rope == RopeConfig(theta=1e4, type="llama3", factor=8.0, original_max_position=32)
    assert (llama.eos_token_ids, llama.tie_embeddings) == ((2, 0), True)
    assert "rope_theta" in json.loads((fixtures / "tiny_mistral" / "config.json").read_text())
    assert (mistral.sliding_window, mistral.head_dim, mistral.d_model, mistral.rope.theta) == (8, 16, 48, 1000.0)
    assert biases.rope == RopeConfig(type="linear", factor=4.0)
    assert biases.attention_bias
    assert biases.mlp_bias


UNSUPPORTED = {
    "model_type": (changed(model_type="qwen2"), "model_type 'qwen2'.*llama, mistral"),
    "no model_type": (without("model_type"), "no model_type"),
    "architecture": (changed(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
    "yarn": (changed(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "'yarn'"),
    "dynamic": (changed(rope_scaling={"type": "dynamic", "factor": 2.0}), "'dynamic'"),
    "longrope": (changed(rope_parameters={"rope_type": "longrope", "rope_theta": 1.0}), "'longrope'"),
    "rope per layer": (changed(rope_parameters={"full_attention": {"rope_type": "default"}}), "per kind of layer"),
    "partial rotary": (changed(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    "partial rotary v5": (changed(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor 0.5"),
    "activation": (changed(hidden_act="gelu"), "hidden_act 'gelu'"),
    "quantised": (changed(quantization_config={"quant_method": "bitsandbytes"}), "quantised.*bitsandbytes"),
    "layer types": (changed(layer_types=["full_attention", "sliding_attention"]), "layer_types"),
    "heads": (changed(num_key_value_heads=3), "multiple of num_kv_heads"),
    "odd head": (changed(head_dim=5), "even"),
    "indivisible": ({**without("head_dim"), "hidden_size": 9}, "9 is not a multiple of num_attention_heads 4"),
    "missing size": (without("hidden_size"), "hidden_size is missing: expected a whole number"),
    "size of text": (changed(hidden_size="8"), "hidden_size must be a whole number >= 1, got '8'"),
    "boolean size": (changed(vocab_size=True), "vocab_size must be a whole number >= 1, got True"),
    "zero layers": (changed(num_hidden_layers=0), "num_hidden_layers must be a whole number >= 1, got 0"),
    "null size": (changed(intermediate_size=None), "intermediate_size must be a whole number >= 1, got None"),
    "eps": (changed(rms_norm_eps="tiny"), "rms_norm_eps must be a number > 0, got 'tiny'"),
    "infinite theta": (changed(rope_theta=float("inf")), "rope_theta must be a number > 0, got inf"),
    "tie": (changed(tie_word_embeddings="yes"), "tie_word_embeddings must be true or false"),
    "eos": (changed(eos_token_id=["</s>"]), "eos_token_id must be a token id"),
    "bos": (changed(bos_token_id=-1), "bos_token_id must be a whole number >= 0 or null"),
    "rope of text": (changed(rope_scaling="linear"), "rope_scaling must be an object"),
    "linear without factor": (changed(rope_scaling={"type": "linear"}), "rope_scaling.factor is missing"),
    "llama3 incomplete": (
        changed(rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        "rope_scaling.original_max_position_embeddings is missing",
    ),
    "shrinking": (changed(rope_scaling={"type": "linear", "factor": 0.5}), "factor >= 1"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_refused_by_name(name: str):
    fields, message = UNSUPPORTED[name]
    with pytest.raises(UnsupportedModelError, match=message):
        config_from_hf(fields)


def test_missing_files(tmp_path: Path):
    with pytest.raises(ModelNotFoundError, match="no such directory"):
        read_config(tmp_path / "absent")
    with pytest.raises(ModelNotFoundError, match=r"no config\.json"):
        read_config(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe{}", b"[1]", b"[" * 100_000])
def test_broken_json(tmp_path: Path, content: bytes):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json (is not valid JSON|must hold a JSON object)"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    "fields", [HF_CONFIG, LLAMA_1_7B, LLAMA_2_70B, LLAMA_32_1B, MISTRAL_V01], ids=lambda f: f["hidden_size"]
)
def test_export_and_import_agree(fields: dict):
    config = config_from_hf(fields)
    exported = json.loads(json.dumps(config_to_hf(config)))
    assert config_from_hf(exported) == config
    # Each transformers version sees only its own keys.
    v4 = {name: value for name, value in exported.items() if name not in ("rope_parameters", "dtype")}
    v5 = {name: value for name, value in exported.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert config_from_hf(v4) == config_from_hf(v5) == config


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sliding_window": 8}, "llama has no sliding window"),
        ({"model_type": "mistral", "attention_bias": True}, "mistral has no biases"),
        ({"model_type": "other"}, "model_type 'other' has no HuggingFace form"),
    ],
)
def test_export_refuses_what_transformers_would_ignore(fields: dict, message: str):
    with pytest.raises(UnsupportedModelError, match=message):
        config_to_hf(dataclasses.replace(CONFIG, **fields))
