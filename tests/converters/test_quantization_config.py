import json

import pytest

from converters import read_quantization
from converters.quantization_config import Quantization, parse_quantization
from teal_jax.errors import UnsupportedModelError

AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True, "sym": True}


def parse(fields) -> Quantization:
    found = parse_quantization({"quantization_config": fields})
    assert found is not None
    return found


@pytest.mark.parametrize("fields", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_not_quantised(fields):
    assert parse_quantization(fields) is None


def test_no_file(tmp_path):
    assert read_quantization(tmp_path) is None
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": AWQ}))
    assert read_quantization(tmp_path) == Quantization(method="awq", format="gemm", group_size=128)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (AWQ, {"format": "gemm"}),
        (AWQ | {"version": "GEMM", "backend": "autoawq"}, {"format": "gemm"}),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, {"format": "gemm", "group_size": 64}),
        (AWQ | {"modules_to_not_convert": ["down_proj"]}, {"format": "gemm", "excluded": ("down_proj",)}),
        (AWQ | {"group_size": -1}, {"format": "gemm", "group_size": None}),
        (GPTQ, {"format": "gptq", "act_order": True, "symmetric": True}),
        (GPTQ | {"checkpoint_format": "gptq_v2"}, {"format": "gptq_v2", "act_order": True, "symmetric": True}),
        (GPTQ | {"format": "GPTQ_v2", "desc_act": 0}, {"format": "gptq_v2", "symmetric": True}),
        ({"quant_method": "GPTQ", "bits": 4, "is_marlin_format": False, "dynamic": {}}, {"format": "gptq"}),
        (
            GPTQ | {"lm_head": True, "meta": {"quantizer": ["optimum:1.2", "gptqmodel:5.0.0"]}},
            {"format": "gptq", "act_order": True, "symmetric": True, "lm_head": True, "by_gptqmodel": True},
        ),
        (
            {"quant_method": "gptq", "meta": {"quantizer": "gptqmodel:0.9.1"}, "pack_dtype": "int32"},
            {"format": "gptq", "by_gptqmodel": True},
        ),
        (
            {"quant_method": "gptq", "modules_in_block_to_quantize": [["self_attn.k_proj"], ["mlp.up_proj"]]},
            {"format": "gptq", "only": ("self_attn.k_proj", "mlp.up_proj")},
        ),
    ],
)
def test_what_is_read(fields, expected):
    method = fields["quant_method"].lower()
    assert parse(fields) == Quantization(**({"method": method, "group_size": 128} | expected))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("fp8", "quantised checkpoints .*fp8.*expected one of awq, gptq"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes.*expected one of awq, gptq"),
        ({"quant_method": "fp8"}, "fp8"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ({"quant_method": "auto-round"}, "auto-round"),
        ({"quant_method": "marlin"}, "marlin"),
        ({"bits": 4}, r"quantization_config: \?"),
        (AWQ | {"bits": 8}, "awq checkpoints with bits 8 are not supported.*expected 4 bits"),
        (GPTQ | {"bits": 3}, "gptq checkpoints with bits 3"),
        (GPTQ | {"bits": True}, "gptq checkpoints with bits True"),
        (GPTQ | {"bits": "4"}, "gptq checkpoints with bits '4'"),
        (AWQ | {"group_size": 0}, "awq checkpoints with group_size 0.*expected a whole number >= 1, or -1"),
        (GPTQ | {"group_size": 64.0}, "group_size 64.0"),
        (AWQ | {"version": "gemv"}, "awq checkpoints in the format 'gemv' are not supported.*expected one of gemm"),
        (AWQ | {"version": "gemv_fast"}, "'gemv_fast'"),
        (AWQ | {"version": "exllama"}, "'exllama'"),
        (AWQ | {"version": "marlin"}, "'marlin'"),
        (AWQ | {"backend": "llm-awq"}, "'llm-awq'"),
        (AWQ | {"zero_point": False}, "awq checkpoints without zero points"),
        (AWQ | {"zero_point": "yes"}, "zero_point must be true or false, got 'yes'"),
        (AWQ | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert must be a list of module names"),
        (AWQ | {"modules_to_not_convert": [3]}, "modules_to_not_convert must be a list of module names"),
        (GPTQ | {"is_marlin_format": True}, "gptq checkpoints in the format 'marlin'"),
        (GPTQ | {"checkpoint_format": "bitblas"}, "'bitblas'.*expected one of gptq, gptq_v2"),
        (GPTQ | {"pack_dtype": "int16"}, "packed into 'int16'.*expected int32"),
        (GPTQ | {"dynamic": {"+:.*down.*": {"bits": 8}}}, "with 'dynamic'"),
        (GPTQ | {"rotation": "hadamard"}, "with 'rotation'"),
        (GPTQ | {"adapter": {"name": "lora"}}, "with 'adapter'"),
        (GPTQ | {"desc_act": "no"}, "desc_act must be true or false, got 'no'"),
    ],
)
def test_what_is_refused_by_name(fields, message):
    with pytest.raises(UnsupportedModelError, match=message):
        parse_quantization({"quantization_config": fields})


def test_which_modules_are_covered():
    awq = parse(AWQ | {"modules_to_not_convert": ["down_proj"]})
    assert awq.covers("model.layers.0.mlp.up_proj") is True
    assert awq.covers("model.layers.0.mlp.down_proj") is None
    assert awq.covers("lm_head") is False
    gptq = parse(GPTQ | {"lm_head": True, "modules_in_block_to_quantize": [["mlp.up_proj"]]})
    assert gptq.covers("model.layers.0.mlp.up_proj") is True
    assert gptq.covers("model.layers.0.mlp.down_proj") is False
    assert gptq.covers("lm_head") is True


def test_groups():
    assert parse(AWQ).num_groups(256) == 2
    assert parse(GPTQ).num_groups(257) == 3
    assert parse(GPTQ | {"group_size": -1}).num_groups(257) == 1
