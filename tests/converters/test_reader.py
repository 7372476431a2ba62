import dataclasses
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from converters import read_config, read_params
from converters.reader import is_finite, parse_dtype
from teal_jax.errors import CheckpointError, ModelNotFoundError
from tests.converters.tiny_checkpoint import CONFIG, HF_CONFIG, HF_SHAPES

NAMES = list(HF_SHAPES)
BF16 = ml_dtypes.bfloat16


def bits(array) -> np.ndarray:
    array = np.asarray(array)
    return array.view(f"uint{8 * array.dtype.itemsize}")


@pytest.mark.parametrize("shards", [None, [NAMES[:7], NAMES[7:]]])
def test_tensors_arrive_bit_for_bit_in_their_places(tensors, write, shards, recorder):
    params = read_params(write(tensors, shards=shards), CONFIG, progress=recorder)
    assert set(params) == {"embed", "layers", "final_norm", "lm_head"}
    assert set(params["layers"]) == {0, 1}
    pairs = [
        (params["embed"]["weight"], tensors["model.embed_tokens.weight"]),
        (params["layers"][1]["attn"]["k_proj"]["weight"], tensors["model.layers.1.self_attn.k_proj.weight"].T),
        (params["layers"][0]["mlp"]["down_proj"]["weight"], tensors["model.layers.0.mlp.down_proj.weight"].T),
        (params["layers"][0]["mlp_norm"]["weight"], tensors["model.layers.0.post_attention_layernorm.weight"]),
        (params["final_norm"]["weight"], tensors["model.norm.weight"]),
        (params["lm_head"]["weight"], tensors["lm_head.weight"].T),
    ]
    for ours, theirs in pairs:
        assert isinstance(ours, jax.Array)
        assert ours.dtype == jnp.bfloat16
        np.testing.assert_array_equal(bits(ours), bits(np.ascontiguousarray(theirs)))
    assert (recorder.total, recorder.done) == (len(NAMES), len(NAMES))


@pytest.mark.parametrize("name", ["tiny_llama3", "tiny_mistral", "tiny_biases"])
def test_what_transformers_saved_arrives_whole(fixtures: Path, name: str):
    config = read_config(fixtures / name)
    params = read_params(fixtures / name, config)
    stored = {}
    for file in (fixtures / name).glob("*.safetensors"):
        stored |= load_file(file)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert count == config.num_params == sum(tensor.size for tensor in stored.values())
    layer = params["layers"][config.num_layers - 1]
    prefix = f"model.layers.{config.num_layers - 1}."
    np.testing.assert_array_equal(layer["attn"]["o_proj"]["weight"], stored[prefix + "self_attn.o_proj.weight"].T)
    np.testing.assert_array_equal(layer["mlp"]["up_proj"]["weight"], stored[prefix + "mlp.up_proj.weight"].T)
    assert ("bias" in layer["attn"]["q_proj"]) == config.attention_bias
    assert ("bias" in layer["mlp"]["down_proj"]) == config.mlp_bias
    assert ("lm_head" in params) != config.tie_embeddings


@pytest.mark.parametrize("dtype", ["float32", jnp.float16, np.dtype(BF16), "bfloat16"])
def test_cast(tensors, write, dtype):
    params = read_params(write(tensors), CONFIG, dtype=dtype)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    np.testing.assert_array_equal(
        params["layers"][0]["attn"]["q_proj"]["weight"],
        tensors["model.layers.0.self_attn.q_proj.weight"].T.astype(jnp.dtype(dtype)),
    )


def test_mixed_dtypes_become_that_of_most_weights(tensors, write):
    mixed = {name: t.astype(np.float32) if "norm" in name else t for name, t in tensors.items()}
    params = read_params(write(mixed), CONFIG)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}


def test_device(tensors, write):
    device = jax.devices()[0]
    folder = write(tensors)
    for where in (device, jax.sharding.SingleDeviceSharding(device)):
        params = read_params(folder, CONFIG, device=where)
        assert params["lm_head"]["weight"].devices() == {device}


def test_parse_dtype_refuses_others():
    for dtype in ("int8", "float64", "nonsense", 3):
        with pytest.raises(CheckpointError, match="bfloat16, float16, float32"):
            parse_dtype(dtype)


def test_harmless_extras_are_ignored(tensors, write):
    extras = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32) for i in range(2)}
    params = read_params(write(tensors | extras), CONFIG)
    assert len(jax.tree.leaves(params)) == len(NAMES)


def test_a_tied_checkpoint_may_hold_its_head(tensors, write):
    params = read_params(write(tensors), dataclasses.replace(CONFIG, tie_embeddings=True))
    assert "lm_head" not in params


def refused(folder: Path, message: str, config=CONFIG) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_params(folder, config)
    assert caught.value.hint


def test_missing_tensor(tensors, write):
    del tensors["model.layers.1.mlp.up_proj.weight"]
    refused(write(tensors), r"1 missing, 0 extra.*missing model.layers.1.mlp.up_proj.weight \[12, 8\]")


def test_missing_head_says_how_a_tied_one_is_declared(tensors, write):
    del tensors["lm_head.weight"]
    refused(write(tensors), "tie_word_embeddings")


def test_extra_tensor(tensors, write):
    tensors["model.layers.2.mlp.up_proj.weight"] = np.zeros((12, 8), BF16)
    refused(write(tensors), r"1 extra.*extra model.layers.2.mlp.up_proj.weight \[12, 8\]")


def test_misshapen_tensor(tensors, write):
    tensors["model.norm.weight"] = np.zeros(9, BF16)
    refused(write(tensors), r"model.norm.weight expected \[8\], got \[9\]")


def test_transposed_tensor(tensors, write):
    name = "model.layers.0.mlp.gate_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    refused(write(tensors), r"gate_proj.weight expected \[12, 8\], got \[8, 12\]")


@pytest.mark.parametrize("dtype", [np.int8, np.float64, ml_dtypes.float8_e4m3fn])
def test_unsupported_stored_dtype(tensors, write, dtype):
    tensors["model.norm.weight"] = np.ones(8, dtype)
    refused(
        write(tensors),
        "model.norm.weight in model.safetensors has dtype (I8|F64|F8_E4M3): expected one of BF16, F16, F32",
    )


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_nan_and_infinite_weights_are_named(tensors, write, dtype, value):
    tensors = {name: tensor.astype(dtype) for name, tensor in tensors.items()}
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = value
    refused(write(tensors), "model.layers.1.mlp.down_proj.weight in model.safetensors holds NaN or infinite weights")


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
def test_is_finite_agrees_with_numpy(dtype):
    edges = [0.0, -0.0, float(ml_dtypes.finfo(dtype).max), float(ml_dtypes.finfo(dtype).min), 1e-8, -1.0]
    assert is_finite(np.array(edges, dtype))
    for bad in (np.inf, -np.inf, np.nan, -np.nan):
        assert not is_finite(np.array([*edges, bad], dtype))


def test_weights_beyond_float16_are_not_silently_infinite(tensors, write):
    tensors["lm_head.weight"][0, 0] = 1e5
    folder = write(tensors)
    with pytest.raises(CheckpointError, match=r"lm_head.weight .* more than float16 can"):
        read_params(folder, CONFIG, dtype="float16")
    read_params(folder, CONFIG, dtype="float32")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_file(tensors, write, keep: int):
    path = write(tensors) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(path.parent, r"model\.safetensors cannot be read: it has \d+ bytes, .*truncated")


def test_file_with_too_much_behind(tensors, write):
    path = write(tensors) / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"more")
    refused(path.parent, r"cannot be read: it has \d+ bytes, its header promises \d+")


def test_corrupt_header(tensors, write):
    path = write(tensors) / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[20:40] = b"\xff" * 20
    path.write_bytes(content)
    refused(path.parent, "its header is not what safetensors writes")


def test_a_failed_git_lfs_checkout(write, tensors):
    path = write(tensors) / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    refused(path.parent, "truncated or not a safetensors file")


def test_missing_shard(tensors, write):
    folder = write(tensors, shards=[NAMES[:7], NAMES[7:]])
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "names 2 files, of which 1 are not in .*: model-00002-of-00002.safetensors")


def test_tensor_in_two_shards(tensors, write):
    refused(
        write(tensors, shards=[NAMES[:8], NAMES[7:]]), f"tensor {NAMES[7]} lies in both model-00001-.* and model-00002-"
    )


def test_index_of_another_version(tensors, write):
    folder = write(tensors, shards=[NAMES[:7], NAMES[7:]])
    save_file({name: tensors[name] for name in NAMES[:6]}, folder / "model-00001-of-00002.safetensors")
    refused(folder, f"places 1 tensors in model-00001-of-00002.safetensors that are not there: {NAMES[6]}")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is no index"),
        ("[]", "is no index"),
        ('{"weight_map": [1]}', "is no index"),
        ('{"weight_map": {"a": ["b"]}}', "is no index"),
        ('{"weight_map": {}}', "names no tensors"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "expected the name of a .safetensors file"),
        ('{"weight_map": {"a": 3}}', "expected the name of a .safetensors file"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "expected the name of a .safetensors file"),
    ],
)
def test_broken_index(tmp_path: Path, index: str, message: str):
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message):
        read_params(tmp_path, CONFIG)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "pytorch_model-00001-of-00002.bin"])
def test_pickles_are_refused_with_the_way_to_convert(tmp_path: Path, file: str):
    (tmp_path / file).write_bytes(b"pickle")
    refused(tmp_path, rf"only pickles.*{file}.*save_pretrained\(new_dir, safe_serialization=True\)")


def test_mistral_s_own_layout(tmp_path: Path):
    save_file({"tok_embeddings.weight": np.zeros(1, np.float32)}, tmp_path / "consolidated.safetensors")
    refused(tmp_path, "it has consolidated.safetensors.*HuggingFace layout")


def test_nothing_there(tmp_path: Path):
    refused(tmp_path, r"no model\.safetensors")
    with pytest.raises(ModelNotFoundError):
        read_params(tmp_path / "absent", CONFIG)


def test_every_header_is_checked_before_any_weight_is_read(tensors, write, monkeypatch):
    tensors[NAMES[-1]] = np.zeros((1, 1), BF16)
    folder = write(tensors, shards=[NAMES[:7], NAMES[7:]])
    monkeypatch.setattr("converters.reader._read", lambda *_: pytest.fail("a weight was read"))
    refused(folder, "1 misshapen")


MEMORY_PROBE = """
    import ctypes, json, resource, sys
    import jax, jax.numpy as jnp, numpy as np
    from converters import read_config, read_params, reader

    folder, keep = sys.argv[1], sys.argv[2] == "keep"
    config = read_config(folder)

    # Compiled, imported and warm before the measurement starts.
    for key in reader.tensor_keys(config):
        reader._to_device(np.zeros(key.shape, np.float32), key, "float32", None).block_until_ready()

    on_its_way = [None]
    def place_elsewhere(array, *_):
        '''As on a GPU: a tensor stays here until the next one is sent, and nothing of it afterwards.'''
        on_its_way[0] = array
        return jnp.zeros(())

    if not keep:
        reader._to_device = place_elsewhere
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak starts again from here
    def status(name):
        lines = open("/proc/self/status").read().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
    before = status("VmRSS:")
    read_params(folder, config)
    print(status("VmHWM:") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak memory from /proc")
@pytest.mark.parametrize("keep", ["keep", "drop"])
def test_host_memory_is_one_mapped_shard_and_two_tensors(tmp_path: Path, keep: str):
    sizes = {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3, "head_dim": 64}
    sizes |= {"num_attention_heads": 16, "num_key_value_heads": 16}
    (tmp_path / "config.json").write_text(json.dumps(HF_CONFIG | sizes))
    config = read_config(tmp_path)
    d, m, v = config.d_model, config.d_mlp, config.vocab_size
    weight_map, largest, shard_bytes = {}, max(d * m, d * v) * 4, []

    def save(number: int, tensors: dict[str, tuple[int, ...]]) -> None:
        file = f"model-{number}.safetensors"
        save_file({name: np.full(shape, 0.5, np.float32) for name, shape in tensors.items()}, tmp_path / file)
        weight_map.update(dict.fromkeys(tensors, file))
        shard_bytes.append((tmp_path / file).stat().st_size)

    for i in range(3):
        names = {"input_layernorm": (d,), "post_attention_layernorm": (d,)}
        names |= {f"self_attn.{p}_proj": (d, d) for p in "qkvo"}
        names |= {"mlp.gate_proj": (m, d), "mlp.up_proj": (m, d), "mlp.down_proj": (d, m)}
        save(i, {f"model.layers.{i}.{name}.weight": shape for name, shape in names.items()})
    save(3, {"model.embed_tokens.weight": (v, d), "model.norm.weight": (d,), "lm_head.weight": (v, d)})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    probe = [sys.executable, "-c", textwrap.dedent(MEMORY_PROBE), str(tmp_path), keep]
    done = subprocess.run(probe, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    peak, total = int(done.stdout), sum(shard_bytes)
    # On the CPU the parameters themselves lie in host memory; on a GPU ("drop") they do not.
    bound = max(shard_bytes) + 2 * largest + (total if keep == "keep" else 0) + 24 * 2**20
    print(f"peak {peak / 2**20:.0f} MiB, bound {bound / 2**20:.0f}, all shards {total / 2**20:.0f}")
    assert peak <= bound
