import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import teal_jax
from teal_jax.errors import CheckpointError, DataError, ModelNotFoundError, SparsityError
from tests.converters.packed import awq_tensors, dequantized, gptq_tensors

STORY = "Once there was a small boat. It sailed over the wide blue sea and came home in the evening. "


@pytest.fixture
def hub_cache(tmp_path, fixtures, monkeypatch):
    """A HF cache, offline, that holds the tiny Mistral under the name of the real one."""
    root = tmp_path / "hub" / "models--mistralai--Mistral-7B-v0.1"
    commit = "26bca36bde8333b5d7f72e9ed20ccda6a618af24"
    shutil.copytree(fixtures / "tiny_mistral", root / "snapshots" / commit)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path


def test_load_and_sparsify_mistral_7b(hub_cache):
    with pytest.warns(UserWarning, match="greedy in place of the default method: learned needs 8,192"):
        fast = teal_jax.load_and_sparsify(
            "mistral-7b", 0.4, data=STORY * 60, num_tokens=512, seq_len=64, dtype="float32", progress=False
        )
    assert fast.name == "mistral-7b"
    assert fast.plan.method == "greedy"
    assert fast.plan.model_sparsity == pytest.approx(0.4)
    out = teal_jax.generate(fast, "Once there was", max_new_tokens=8)
    assert len(out.tokens) == 8
    again = teal_jax.generate(fast.dense(), "Once there was", max_new_tokens=8)
    assert fast.dense().plan is None
    assert again.tokens != out.tokens or again.text == out.text
    scored = teal_jax.perplexity(fast, STORY * 5, context=24, window=8, progress=False)
    assert scored.realised_sparsity == pytest.approx(0.4, abs=0.08)
    fast.save(hub_cache / "out")
    reloaded = teal_jax.load(hub_cache / "out")
    np.testing.assert_array_equal(teal_jax.generate(reloaded, "Once there was", max_new_tokens=8).tokens, out.tokens)


def test_the_default_method_is_learned(hub_cache, monkeypatch):
    asked = []

    def allocate(lm, calibration, target, *, method, progress):
        asked.append(method)
        return teal_jax.allocate(lm, calibration, target, method="uniform", progress=progress)

    monkeypatch.setattr("teal_jax.loading.allocate", allocate)
    tokens = np.arange(8192, dtype=np.int32).reshape(128, 64) % 256
    teal_jax.load_and_sparsify("mistral-7b", 0.4, data=tokens, progress=False)
    teal_jax.load_and_sparsify("mistral-7b", 0.4, data=tokens, method="greedy", progress=False)
    assert asked == ["learned", "greedy"]


def test_without_data_it_warns_and_takes_the_bundled_text(hub_cache):
    with pytest.warns(UserWarning, match="bundled"):
        fast = teal_jax.load_and_sparsify(
            "mistral-7b", 0.3, method="uniform", num_tokens=256, seq_len=64, progress=False
        )
    assert fast.plan.notes["calibration"]["data"] == "bundled stories"


def test_plans_and_calibrations_are_taken_as_files(hub_cache):
    lm = teal_jax.load("mistral-7b", progress=False)
    calibration = teal_jax.calibrate(lm, STORY * 60, num_tokens=256, seq_len=64, progress=False)
    plan = teal_jax.allocate(lm, calibration, 0.5, method="uniform")
    calibration.save(hub_cache / "c.npz")
    plan.save(hub_cache / "p.json")
    options = {"method": "uniform", "progress": False}
    by_plan = teal_jax.load_and_sparsify("mistral-7b", 0.5, plan=hub_cache / "p.json", **options)
    by_calibration = teal_jax.load_and_sparsify("mistral-7b", 0.5, calibration=str(hub_cache / "c.npz"), **options)
    np.testing.assert_array_equal(by_plan.plan.thresholds, by_calibration.plan.thresholds)
    with pytest.raises(ValueError, match=r"target is 0\.5"):
        teal_jax.load_and_sparsify("mistral-7b", 0.4, plan=plan, **options)


def test_errors_come_before_any_work(hub_cache):
    with pytest.raises(SparsityError, match=r"\[0, 1\)"):
        teal_jax.load_and_sparsify("mistral-7b", 40)
    with pytest.raises(ModelNotFoundError, match="mistral-7b"):
        teal_jax.load("mistral-7", progress=False)


def test_a_checkpoint_without_tokenizer_takes_tokens_only(fixtures):
    lm = teal_jax.load(fixtures / "tiny_biases", dtype="float32", progress=False)
    assert lm.tokenizer is None
    with pytest.raises(DataError, match="no tokenizer"):
        teal_jax.calibrate(lm, STORY, progress=False)
    tokens = np.arange(32, dtype=np.int32)[None]
    assert teal_jax.perplexity(lm, tokens, context=16, window=8, progress=False).num_tokens == 31


def test_a_broken_checkpoint(tmp_path, fixtures):
    broken = shutil.copytree(fixtures / "tiny_llama3", tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(CheckpointError):
        teal_jax.load(broken, progress=False)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_a_4_bit_checkpoint_is_the_model_of_its_numbers(tmp_path, fixtures, method):
    """The tiny Mistral's projections, rounded to 4 bits: packed, they load as the model that holds them in float32."""
    source, group = fixtures / "tiny_mistral", 8
    plain, packed = {}, {}
    for file in source.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            plain[name] = tensor.astype(np.float32)
            if not name.endswith("_proj.weight"):
                packed[name] = plain[name]
                continue
            weight = plain[name].T
            blocks = weight.reshape(-1, group, weight.shape[1])
            scales = np.ascontiguousarray(np.abs(blocks).max(axis=1) / 7, np.float16)
            codes = np.clip(np.rint(blocks / scales[:, None].astype(np.float32)) + 8, 0, 15)
            numbers = codes.reshape(weight.shape).astype(np.uint8), scales, np.full(scales.shape, 8, np.uint8)
            group_of = np.arange(len(weight)) // group
            parts = awq_tensors(*numbers) if method == "awq" else gptq_tensors(*numbers, group_of)
            packed |= {name.replace("weight", part): tensor for part, tensor in parts.items()}
            plain[name] = np.ascontiguousarray(dequantized(*numbers, group_of).T.astype(np.float32))
    config = json.loads((source / "config.json").read_text())
    settings = {"quant_method": method, "bits": 4, "group_size": group}
    logits = []
    for name, tensors, changes in (("plain", plain, {}), ("packed", packed, {"quantization_config": settings})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config | changes))
        save_file(tensors, tmp_path / name / "model.safetensors")
        lm = teal_jax.load(tmp_path / name, dtype="float32", progress=False)
        tokens = np.arange(24, dtype=np.int32)[None]
        logits.append(lm.prefill(lm.params, tokens, lm.init_cache(1, 32))[0])
    np.testing.assert_array_equal(*logits)
