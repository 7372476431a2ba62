import json

import jax
import jax.numpy as jnp
import pytest

from tests.teal_jax.command import teal


@pytest.fixture
def no_gpu():
    if jax.default_backend() != "cpu":
        pytest.skip("this test is about machines without a GPU")


@pytest.mark.parametrize("command", [(), ("decode",), ("kernels",)])
def test_help_has_examples(command):
    run = teal("bench", *command, "--help")
    assert run.exit_code == 0, run.output
    assert "Examples:" in run.output
    assert " ".join(("teal bench", *command)) in run.output


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("command", ["decode", "kernels"])
def test_without_a_gpu_the_error_says_what_is_needed(command):
    run = teal("bench", command)
    assert run.exit_code == 3
    assert not run.stdout
    error, hint = run.stderr.splitlines()
    assert error.startswith("error: a benchmark needs an NVIDIA GPU")
    assert hint.startswith("hint: ")
    assert "CUDA" in hint


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("decode", "--shape", "llama-9"), 3, "llama-9"),
        (("decode", "--sparsity", "0,two"), 2, "numbers"),
        (("decode", "--sparsity", "1"), 2, "[0, 1)"),
        (("kernels", "--sparsity", "1.5"), 2, "[0, 1)"),
        (("kernels", "--dtype", "int8"), 2, "int8"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_wrong_arguments(arguments, code, said):
    run = teal("bench", *arguments)
    assert run.exit_code == code, run.output
    assert said in run.stderr
    assert not run.stdout


@pytest.fixture
def pretend_gpu(monkeypatch):
    """The command from end to end on a CPU: XLA decodes, half of the rows count as kept, nothing can be profiled."""
    from teal_jax.model import model_functions

    def fake_count(config):
        kept = jnp.array([[d_in // 2 for d_in, _ in config.projection_shapes]] * config.num_layers, jnp.int32)
        step = model_functions(config, "xla").decode_step
        return lambda params, token, cache: (*step(params, token, cache), kept)

    monkeypatch.setattr("teal_jax.benchmark.device.cuda_device", lambda: jax.devices()[0])
    monkeypatch.setattr("teal_jax.benchmark.device.read_bandwidth", lambda: 1e9)
    monkeypatch.setattr("teal_jax.benchmark.decode.fused_counting_step", fake_count)
    monkeypatch.setattr("teal_jax.model.use_fused_step", lambda *arguments: False)


@pytest.mark.usefixtures("pretend_gpu")
def test_decode_from_end_to_end(fixtures, tmp_path):
    sizes = ("--context", 24, "--tokens", 8, "--repeats", 1, "--dtype", "float32", "-s", "0.5")
    run = teal("bench", "decode", "--shape", fixtures / "tiny_llama3", *sizes, "--no-peer", "--output", tmp_path)
    assert run.exit_code == 0, run.output + repr(run.exception)
    assert "dense, tok/s" in run.stderr  # as it came
    assert "no profile" in run.stderr
    assert "greedy-like 50 %" in run.stdout
    assert {path.name for path in tmp_path.iterdir()} == {f"decode-tiny_llama3.{end}" for end in ("json", "md", "png")}
    values = json.loads((tmp_path / "decode-tiny_llama3.json").read_text())
    assert [row["realised"] for row in values["rows"]] == [0.0, 0.5, 0.5, 0.5]
    assert values["command"].startswith("teal bench decode --shape tiny_llama3 --sparsity 0.5 --context 24")
    assert str(fixtures) not in json.dumps(values)
    few = ("-s", "0.25", "--quantize", "int8", "--json", "--quiet")
    run = teal("bench", "decode", "--shape", fixtures / "tiny_llama3", *sizes, "--no-peer", *few)
    report = json.loads(run.stdout)
    assert [row["name"] for row in report["rows"]] == ["dense", "sparse 25 %", "int8, dense", "int8, sparse 25 %"]
    assert [row["quantization"] for row in report["rows"]] == [None, None, "int8", "int8"]
    assert report["rows"][2]["bytes_per_token"] < report["rows"][0]["bytes_per_token"] / 2
    assert report["command"].endswith("--no-peer --quantize int8")
    assert not run.stderr


@pytest.mark.parametrize(
    ("command", "arguments", "said"),
    [
        ("decode", ("--quantize", "int8,int3-g8"), "int8, and int4 in groups of a power of two, got int3-g8"),
        ("decode", ("--quantize", "int4-g8", "--lm-head", "int8"), "the lm_head is the embedding"),
        ("decode", ("--quantize", "int5"), "bits must be 8, 4, 3 or 2, got 5"),
        ("kernels", ("--quantize", "int4-g48"), "groups of 48 do not divide"),
    ],
)
def test_formats_that_no_kernel_takes(fixtures, command, arguments, said):
    run = teal("bench", command, "--shape", fixtures / "tiny_llama3", *arguments)
    assert run.exit_code == 3
    assert said in run.stderr


@pytest.mark.usefixtures("pretend_gpu", "no_gpu")
def test_failed_measurements_are_loud(fixtures, monkeypatch):
    monkeypatch.setattr("teal_jax.benchmark.cases.ROTATION", 1)  # two calls are enough to fail
    run = teal("bench", "kernels", "--shape", fixtures / "tiny_llama3", "--quiet", "--iterations", 1)
    assert run.exit_code == 3
    assert "FAILED: qkv dense: " in run.stderr
    assert "measurements failed" in run.stderr


@pytest.mark.usefixtures("pretend_gpu")
def test_too_little_memory(monkeypatch):
    monkeypatch.setattr("teal_jax.memory.free_bytes", lambda: 20 * 10**9)
    run = teal("bench", "decode", "--shape", "llama-3-70b", "--no-peer")
    assert run.exit_code == 3
    assert "need 144.7 GiB with a kv_cache of 512 tokens" in run.stderr
    assert "llama-3-8b" in run.stderr
