"""Whole checkpoints of packed projections, read by `read_params`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters import read_config, read_params, tensor_keys
from teal_jax.errors import CheckpointError, UnsupportedModelError
from tests.converters.packed import CONFIG, PACKABLE, config, packed_checkpoint

UP = "model.layers.0.mlp.up_proj"


def leaf(params: dict, path: tuple) -> jax.Array:
    for part in path:
        params = params[part]
    return params  # ty: ignore[invalid-return-type]


def refused(folder, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_params(folder, CONFIG)
    assert caught.value.hint


@pytest.mark.parametrize("method", ["awq", "gptq"])
@pytest.mark.parametrize("dtype", [None, "bfloat16", "float32"])
def test_every_weight_is_what_its_numbers_mean(write, recorder, method, dtype):
    tensors, weights = packed_checkpoint(method)
    folder = write(tensors, config=config(method))
    assert read_config(folder) == CONFIG
    params = read_params(folder, CONFIG, dtype=dtype, progress=recorder)
    keys = tensor_keys(CONFIG)
    assert len(weights) == 14
    assert (recorder.total, recorder.done) == (len(keys), len(keys))
    for key in keys:
        ours = leaf(params, key.path)
        assert isinstance(ours, jax.Array)
        assert (ours.shape, ours.dtype) == (key.tree_shape, jnp.dtype(dtype or "float16"))
        theirs = weights[key.name] if key.name in weights else tensors[key.name]
        theirs = theirs.T if key.transpose and key.name not in weights else theirs
        np.testing.assert_array_equal(ours, theirs.astype(ours.dtype))


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_projection_split_over_shards(write, method):
    tensors, weights = packed_checkpoint(method)
    last = [name for name in tensors if name.endswith((".scales", ".norm.weight"))]
    folder = write(tensors, shards=[[name for name in tensors if name not in last], last], config=config(method))
    params = read_params(folder, CONFIG, dtype="float32")
    np.testing.assert_array_equal(params["layers"][0]["mlp"]["up_proj"]["weight"], weights[f"{UP}.weight"])


def test_quantised_head(write):
    tensors, weights = packed_checkpoint("gptq", lm_head=True)
    params = read_params(write(tensors, config=config("gptq", lm_head=True)), CONFIG, dtype="float32")
    np.testing.assert_array_equal(params["lm_head"]["weight"], weights["lm_head.weight"])


def test_device(write):
    device = jax.devices()[0]
    tensors, _ = packed_checkpoint("awq")
    folder = write(tensors, config=config("awq"))
    for where in (device, jax.sharding.SingleDeviceSharding(device)):
        assert read_params(folder, CONFIG, device=where)["layers"][0]["mlp"]["up_proj"]["weight"].devices() == {device}


def test_modules_left_as_they_were(write):
    tensors, weights = packed_checkpoint("awq")
    names = [key.name for key in tensor_keys(CONFIG) if "down_proj" in key.name]
    for name in names:
        for part in ("qweight", "qzeros", "scales"):
            del tensors[name.removesuffix("weight") + part]
        tensors[name] = np.ascontiguousarray(weights[name].T.astype(np.float16))
    folder = write(tensors, config=config("awq", modules_to_not_convert=["down_proj"]))
    params = read_params(folder, CONFIG)
    np.testing.assert_array_equal(
        params["layers"][1]["mlp"]["down_proj"]["weight"], weights[names[1]].astype(np.float16)
    )


def test_the_caller_may_keep_the_numbers(write):
    tensors, weights = packed_checkpoint("gptq")
    folder = write(tensors, config=config("gptq"))
    kept = {}

    def keep(key, weight):
        kept[key.name] = weight.dequantize()
        return "kept"

    params = read_params(folder, CONFIG, on_quantized=keep)
    assert params["layers"][0]["mlp"]["up_proj"]["weight"] == "kept"
    assert kept.keys() == weights.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(kept[name], weight)


def test_biases_of_zeros_are_ignored(write):
    """AutoGPTQ wrote them beside every projection of models without biases."""
    tensors, _ = packed_checkpoint("gptq")
    biases = {f"{n.removesuffix('scales')}bias": t[0] * 0 for n, t in tensors.items() if n.endswith("scales")}
    folder = write(tensors | biases, config=config("gptq"))
    assert "bias" not in read_params(folder, CONFIG)["layers"][0]["mlp"]["up_proj"]
    biases[f"{UP}.bias"] = biases[f"{UP}.bias"] + 1
    save_file(tensors | biases, folder / "model.safetensors")
    refused(folder, f"{UP}.bias is not zero, and the model has no biases there")


def test_quantised_without_saying_so(write):
    tensors, _ = packed_checkpoint("awq")
    refused(write(tensors, config=PACKABLE), "quantised without a quantization_config in config.json, does not fit")


def test_saying_so_without_being_it(write):
    tensors, weights = packed_checkpoint("awq")
    plain = {name: tensor for name, tensor in tensors.items() if f"{name.rpartition('.')[0]}.weight" not in weights}
    plain |= {name: np.ascontiguousarray(weight.T.astype(np.float16)) for name, weight in weights.items()}
    refused(write(plain, config=config("awq")), "awq by its config.json, does not fit.* missing .*q_proj.qweight")


@pytest.mark.parametrize(("method", "other"), [("awq", "gptq"), ("gptq", "awq")])
def test_the_other_method(write, method, other):
    tensors, _ = packed_checkpoint(method)
    refused(write(tensors, config=config(other)), f"{other} by its config.json, does not fit .* 14 misshapen")


def test_another_group_size(write):
    tensors, _ = packed_checkpoint("awq")
    refused(write(tensors, config=config("awq", group_size=16)), r"q_proj.scales expected \[1, 32\], got \[2, 32\]")


def test_group_size_that_cannot_be(write):
    tensors, _ = packed_checkpoint("awq")
    folder = write(tensors, config=config("awq", group_size=12))
    refused(folder, "layers.0.self_attn.q_proj has 16 inputs, which group_size 12 does not divide")


def test_missing_part(write):
    tensors, _ = packed_checkpoint("gptq")
    del tensors[f"{UP}.qzeros"]
    refused(write(tensors, config=config("gptq")), rf"1 missing, 0 extra.*missing {UP}.qzeros \[2, 4\]")


@pytest.mark.parametrize(("part", "dtype"), [("qweight", np.int64), ("qzeros", np.float16), ("scales", np.int32)])
def test_types_that_packing_has_not(write, part, dtype):
    tensors, _ = packed_checkpoint("awq")
    tensors[f"{UP}.{part}"] = np.zeros(tensors[f"{UP}.{part}"].shape, dtype)
    refused(write(tensors, config=config("awq")), rf"{UP}.{part} in model.safetensors has dtype \w+: expected ")


def test_an_unsupported_variant_is_refused_before_any_weight_is_read(write):
    tensors, _ = packed_checkpoint("awq")
    folder = write(tensors, config=config("awq", version="gemv"))
    for read in (read_config, lambda directory: read_params(directory, CONFIG)):
        with pytest.raises(UnsupportedModelError, match="'gemv'"):
            read(folder)


def test_scales_beyond_float16(write):
    tensors, _ = packed_checkpoint("awq")
    tensors[f"{UP}.scales"] = np.full_like(tensors[f"{UP}.scales"], 60000)
    folder = write(tensors, config=config("awq"))
    refused(folder, f"{UP}.weight holds .* more than float16 can")
    assert np.isfinite(read_params(folder, CONFIG, dtype="float32")["layers"][0]["mlp"]["up_proj"]["weight"]).all()


def test_numbers_are_read_as_written(write):
    """The file itself holds int32 and float16, as the public writers leave them."""
    tensors, _ = packed_checkpoint("gptq")
    stored = load_file(write(tensors, config=config("gptq")) / "model.safetensors")
    assert {str(stored[f"{UP}.{part}"].dtype) for part in ("qweight", "qzeros", "g_idx")} == {"int32"}
    assert stored[f"{UP}.scales"].dtype == np.float16
