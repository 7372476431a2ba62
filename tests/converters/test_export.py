import dataclasses
import errno
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from converters import export_checkpoint, read_config, read_params
from teal_jax.errors import ArtifactError, CheckpointError, UnsupportedModelError
from tests.converters.tiny_checkpoint import CONFIG, HF_SHAPES


@pytest.fixture
def params(tensors, write) -> dict:
    return read_params(write(tensors), CONFIG)


def stored(folder: Path) -> dict[str, np.ndarray]:
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not set(part) & set(tensors)
        tensors |= part
    return tensors


def assert_same_bits(left: dict, right: dict) -> None:
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype
        assert tensor.shape == right[name].shape
        assert np.asarray(tensor).tobytes() == np.asarray(right[name]).tobytes(), name


@pytest.mark.parametrize("max_shard_bytes", [10**9, 60_000])
@pytest.mark.parametrize("name", ["tiny_llama3", "tiny_mistral", "tiny_biases"])
def test_huggingface_tensors_survive_bit_for_bit(fixtures: Path, tmp_path: Path, name: str, max_shard_bytes: int):
    source = fixtures / name
    config = read_config(source)
    params = read_params(source, config)
    target = export_checkpoint(params, config, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    assert_same_bits(stored(source), stored(target))
    assert read_config(target) == config
    again = read_params(target, config)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(params), strict=True):
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def test_shards_and_index(params, tmp_path: Path, recorder):
    target = export_checkpoint(params, CONFIG, tmp_path / "out", max_shard_bytes=1000, progress=recorder)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    files = sorted(file.name for file in target.glob("*.safetensors"))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert sorted(set(index["weight_map"].values())) == files
    assert set(index["weight_map"]) == set(HF_SHAPES)
    assert index["metadata"]["total_size"] == 2 * CONFIG.num_params
    for file in files:
        with safe_open(target / file, framework="numpy") as shard:
            assert shard.metadata() == {"format": "pt"}  # transformers asks for it
            assert {name for name, f in index["weight_map"].items() if f == file} == set(shard.keys())
            sizes = [2 * int(np.prod(HF_SHAPES[name])) for name in shard.keys()]  # noqa: SIM118
        assert sum(sizes) <= 1000 or len(sizes) == 1
    assert (recorder.total, recorder.done) == (len(HF_SHAPES), len(HF_SHAPES))


def test_each_tensor_keeps_its_dtype(params, tmp_path: Path):
    params["final_norm"]["weight"] = params["final_norm"]["weight"].astype(jnp.float32)
    target = export_checkpoint(params, CONFIG, tmp_path / "out")
    tensors = stored(target)
    assert tensors["model.norm.weight"].dtype == np.float32
    assert tensors["lm_head.weight"].dtype == jnp.bfloat16
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == "bfloat16"
    np.testing.assert_array_equal(tensors["lm_head.weight"], params["lm_head"]["weight"].T)


def test_numpy_parameters(params, tmp_path: Path):
    target = export_checkpoint(jax.tree.map(np.asarray, params), CONFIG, tmp_path / "out")
    np.testing.assert_array_equal(stored(target)["lm_head.weight"], params["lm_head"]["weight"].T)


def test_more_files_go_along(params, fixtures: Path, tmp_path: Path):
    tokenizer = fixtures / "tiny_mistral" / "tokenizer.json"
    target = export_checkpoint(params, CONFIG, tmp_path / "out", copy_files=[tokenizer])
    assert (target / "tokenizer.json").read_bytes() == tokenizer.read_bytes()
    with pytest.raises(ArtifactError, match="no such file: absent"):
        export_checkpoint(params, CONFIG, tmp_path / "other", copy_files=["absent"])
    assert not (tmp_path / "other").exists()


def test_existing_checkpoint_is_only_replaced_when_asked(params, tmp_path: Path):
    target = export_checkpoint(params, CONFIG, tmp_path / "out", max_shard_bytes=1000)
    before = stored(target)
    with pytest.raises(ArtifactError, match="exists"):
        export_checkpoint(params, CONFIG, target)
    assert_same_bits(stored(target), before)
    export_checkpoint(params, CONFIG, target, overwrite=True)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    assert [path.name for path in tmp_path.iterdir() if path.name != "checkpoint"] == ["out"]


def test_an_empty_directory_is_filled_and_another_one_never_overwritten(params, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    export_checkpoint(params, CONFIG, tmp_path / "empty")
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match=r"no checkpoint .* will not be overwritten"):
        export_checkpoint(params, CONFIG, home, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError):
        export_checkpoint(params, CONFIG, tmp_path / "file", overwrite=True)
    assert (home / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_and_nothing_else(params, tmp_path: Path, monkeypatch, error: BaseException):
    target = export_checkpoint(params, CONFIG, tmp_path / "out")
    before = stored(target)
    calls = []

    def fail(*args: object) -> None:
        calls.append(args)
        if len(calls) > 3:
            raise error

    monkeypatch.setattr("converters.export.os.fsync", fail)
    expected = ArtifactError if isinstance(error, OSError) else KeyboardInterrupt
    for folder in (target, tmp_path / "new"):
        with pytest.raises(expected) as caught:
            export_checkpoint(params, CONFIG, folder, overwrite=True, max_shard_bytes=1000)
        if isinstance(error, OSError):
            assert "No space left on device" in str(caught.value)
    assert_same_bits(stored(target), before)
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "checkpoint") == ["out"]


def test_a_failure_between_the_two_renames_brings_the_old_back(params, tmp_path: Path, monkeypatch):
    target = export_checkpoint(params, CONFIG, tmp_path / "out")
    rename = Path.rename

    def fail_to_finish(self: Path, goal: Path) -> Path:
        if ".writing-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, goal)

    monkeypatch.setattr(Path, "rename", fail_to_finish)
    with pytest.raises(ArtifactError, match="Input/output error"):
        export_checkpoint(params, CONFIG, target, overwrite=True)
    assert (target / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "checkpoint") == ["out"]


def test_parameters_that_do_not_fit(params, tmp_path: Path):
    config = dataclasses.replace(CONFIG, vocab_size=21)
    with pytest.raises(CheckpointError, match=r"embed.weight expected \[21, 8\], got \[20, 8\]"):
        export_checkpoint(params, config, tmp_path / "out")
    del params["layers"][1]["mlp"]["up_proj"]
    params["layers"][0]["attn"]["q_norm"] = {"weight": jnp.ones(6)}
    with pytest.raises(CheckpointError, match=r"missing layers.1.mlp.up_proj.weight .*extra layers.0.attn.q_norm"):
        export_checkpoint(params, CONFIG, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_quantised_parameters_are_refused(params, tmp_path: Path):
    params["lm_head"]["weight"] = jnp.ones((8, 20), jnp.int8)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is int8: expected an array of bfloat16"):
        export_checkpoint(params, CONFIG, tmp_path / "out")
    params["lm_head"]["weight"] = object()
    with pytest.raises(CheckpointError, match=r"lm_head.weight is object"):
        export_checkpoint(params, CONFIG, tmp_path / "out")


def test_a_config_without_huggingface_form(params, tmp_path: Path):
    with pytest.raises(UnsupportedModelError):
        export_checkpoint(params, dataclasses.replace(CONFIG, sliding_window=4), tmp_path / "out")
    assert not (tmp_path / "out").exists()
