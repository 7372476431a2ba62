import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

import converters
import teal_jax
from teal_jax import artifact, memory
from teal_jax.cli import app
from teal_jax.errors import ArtifactError, QuantizationError
from teal_jax.evaluation.weight_bytes import unread_share, weight_bytes
from teal_jax.nn.quantized import QuantSpec
from teal_jax.quantization import driver
from teal_jax.quantization.layer import matrix
from teal_jax.quantization.storage import split_quantized
from teal_jax.tables import decode_bytes, model_facts
from tests.reference import TINY, tiny_model, tiny_tokens
from tests.teal_jax.quantization import float64

BIASED = dataclasses.replace(TINY, attention_bias=True, mlp_bias=True)


def block_error(lm, quantised, tokens):
    """Mean squared difference of the residual stream after the last block."""
    where = jnp.zeros(tokens.shape, bool)
    run = jax.jit(lambda params: teal_jax.model.model_functions(lm.config).forward(params, tokens, where)[0])
    return float(jnp.mean((run(lm.params) - run(quantised.params)) ** 2))


@pytest.fixture(scope="module")
def untied():
    return tiny_model(scale=4.0)


def test_rounding_is_what_float64_says(untied):
    found = teal_jax.quantize(untied, "int4-g16", progress=False)
    assert untied.quantization is None
    assert found.quantization == "int4-g16"
    for layer in range(TINY.num_layers):
        before = untied.params["weights"]["layers"][layer]
        after = found.params["weights"]["layers"][layer]
        for i in range(7):
            expected = float64.round_to_nearest(matrix(before, i), 4, 16, True)
            close = np.abs(float64.dequantize(matrix(after, i)) - expected) < 1e-5
            assert close.mean() > 0.999
        assert after["attn_norm"]["weight"] is before["attn_norm"]["weight"]
    assert found.params["weights"]["embed"] is untied.params["weights"]["embed"]


@pytest.mark.parametrize("spec", ["int8", "int4-g16", "int3-g16-asym"])
def test_gptq_and_awq_are_nearer_than_rounding(untied, spec):
    tokens = tiny_tokens(16, 64)
    found = {
        method: block_error(
            untied, teal_jax.quantize(untied, spec, method=method, data=tokens, progress=False), jnp.asarray(tokens)
        )
        for method in driver.METHODS
    }
    assert found["gptq"] < found["rtn"]
    # On random weights and tokens no channel stands out: with whole columns, no scale is better than none.
    assert found["awq"] <= found["rtn"] if spec == "int8" else found["awq"] < found["rtn"]


def test_the_lm_head_by_choice(untied):
    found = teal_jax.quantize(untied, "int8", lm_head="int8", progress=False)
    head = found.params["weights"]["lm_head"]["weight"]
    tokens = tiny_tokens(2, 16)
    assert head.spec == QuantSpec(8)
    np.testing.assert_allclose(found.logits(tokens), untied.logits(tokens), rtol=0.1, atol=0.15)
    tied = tiny_model(dataclasses.replace(TINY, tie_embeddings=True))
    with pytest.raises(QuantizationError, match="the lm_head is the embedding"):
        teal_jax.quantize(tied, "int8", lm_head="int8", progress=False)
    with pytest.raises(QuantizationError, match=r"do not divide the lm_head's 61"):
        teal_jax.quantize(untied, "int8", lm_head="int4", progress=False)


def with_value(lm, value, layer=1, name="up_proj"):
    weights = jax.tree.map(lambda leaf: leaf, lm.params["weights"])
    own = weights["layers"][layer]["mlp"][name]
    own["weight"] = own["weight"].at[5, 7].set(value)
    return dataclasses.replace(lm, params=lm.params | {"weights": weights})


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_weights_that_are_not_finite_are_named(untied, value):
    with pytest.raises(QuantizationError, match=r"layer 1 up: input channel 5, output channel 7 is (-?inf|nan)"):
        teal_jax.quantize(with_value(untied, value), "int8", progress=False)


def test_channels_of_zeros_are_warned_of_and_a_matrix_of_them_refused(untied):
    weights = jax.tree.map(lambda leaf: leaf, untied.params["weights"])
    own = weights["layers"][1]["attn"]["o_proj"]
    own["weight"] = own["weight"].at[:, 4].set(0).at[2].set(0)
    lm = dataclasses.replace(untied, params=untied.params | {"weights": weights})
    with pytest.warns(UserWarning, match="in 1 matrices, stay zero; layer 1 o: 1 input and 1 output channels"):
        found = teal_jax.quantize(lm, "int8", method="gptq", data=tiny_tokens(2, 16), progress=False)
    back = matrix(found.params["weights"]["layers"][1], 3).dequantize()
    assert not back[:, 4].any()
    own["weight"] = jnp.zeros_like(own["weight"])
    with pytest.raises(QuantizationError, match="layer 1 o is zero throughout"):
        teal_jax.quantize(lm, "int8", progress=False)


def test_bad_requests(untied):
    with pytest.raises(QuantizationError, match="groups of 64 do not divide the outputs of q"):
        teal_jax.quantize(untied, "int4", progress=False)
    with pytest.raises(QuantizationError, match=r"no quantisation method 'hqq'.*rtn, awq, gptq"):
        teal_jax.quantize(untied, "int8", method="hqq", progress=False)
    once = teal_jax.quantize(untied, "int8", progress=False)
    with pytest.raises(QuantizationError, match="is quantised already: int8"):
        teal_jax.quantize(once, "int8", progress=False)


@pytest.mark.parametrize("spec", ["int8", "int4-g16", "int4-g16-asym", "int3-g16"])
def test_an_artifact_gives_back_the_same_model(tmp_path, untied, spec):
    lm = teal_jax.quantize(untied, spec, lm_head="int8" if spec == "int4-g16" else None, progress=False)
    calibration = teal_jax.calibrate(lm, tiny_tokens(4, 32), progress=False)
    sparse = lm.sparsify(teal_jax.allocate(lm, calibration, 0.4, method="uniform"))
    artifact.save(sparse, tmp_path / "model", calibration=calibration)
    loaded = teal_jax.load(tmp_path / "model")
    assert loaded.quantization == lm.quantization
    before, after = jax.tree.leaves(sparse.params), jax.tree.leaves(loaded.params)
    assert all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    tokens = tiny_tokens(2, 16)
    np.testing.assert_array_equal(loaded.logits(tokens), sparse.logits(tokens))
    assert teal_jax.load(tmp_path / "model", dtype="bfloat16").logits(tokens).dtype == jnp.float32
    assert artifact.saved_calibration(tmp_path / "model", lm) is not None
    assert artifact.saved_calibration(tmp_path / "model", untied) is None


def test_a_broken_table_of_formats(tmp_path, untied):
    teal_jax.quantize(untied, "int4-g16", progress=False).save(tmp_path / "model")
    path = tmp_path / "model" / "teal.json"
    manifest = json.loads(path.read_text())
    assert manifest["format_version"] == 2
    for formats, says in [
        ({"layers.0.attn.q_proj.weight": "int9"}, "bits must be"),
        ({"layers.7.attn.q_proj.weight": "int8"}, "no weight layers.7"),
        ({"layers.0.attn.q_proj.weight": "int4-g64"}, "cannot be int4-g64"),
        (["int8"], "cannot be read"),
    ]:
        path.write_text(json.dumps(manifest | {"quantization": formats}))
        with pytest.raises(ArtifactError, match=says):
            teal_jax.load(tmp_path / "model")


@pytest.fixture
def checkpoint(tmp_path, untied):
    converters.export_checkpoint(untied.params["weights"], TINY, tmp_path / "hf", max_shard_bytes=40_000)
    return tmp_path / "hf"


def test_a_checkpoint_block_by_block_gives_what_the_loaded_model_gives(checkpoint, untied):
    tokens = tiny_tokens(4, 32)
    for method in ("rtn", "gptq"):
        found = teal_jax.load(
            checkpoint, quantize="int4-g16", quantize_method=method, lm_head="int8", data=tokens, progress=False
        )
        expected = teal_jax.quantize(untied, "int4-g16", method=method, lm_head="int8", data=tokens, progress=False)
        same = zip(jax.tree.leaves(found.params), jax.tree.leaves(expected.params), strict=True)
        assert all(np.array_equal(a, b) for a, b in same)


def test_memory_stays_near_one_block_and_the_result(checkpoint, monkeypatch):
    """Blocks that are alive when one is quantised: only its own."""
    config = dataclasses.replace(TINY, num_layers=2)
    before, peak = {id(leaf) for leaf in jax.live_arrays()}, []
    plain = driver._quantize_block

    def watched(*arguments):
        result = plain(*arguments)
        peak.append(sum(leaf.nbytes for leaf in jax.live_arrays() if id(leaf) not in before))
        return result

    monkeypatch.setattr(driver, "_quantize_block", watched)
    lm = teal_jax.load(checkpoint, quantize="int4-g16", progress=False)
    block = 4 * sum(config.projection_sizes)
    result = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
    assert max(peak) < result + 1.1 * block


def test_what_fits_a_device_counts_the_format():
    config = dataclasses.replace(TINY, num_layers=80, d_model=1024, d_mlp=4096, head_dim=64, num_heads=16)
    int4 = QuantSpec.parse("int4")
    whole = memory.needed_bytes(config, 2, 512)
    assert memory.needed_bytes(config, 2, 512, int4) < 0.31 * whole
    memory.check_fits(config, context=512, free=whole // 3, quantize=int4)
    with pytest.raises(teal_jax.TealError, match="16 bits need"):
        memory.check_fits(config, context=512, free=whole // 3)
    with pytest.raises(teal_jax.TealError, match="int4-g64 need"):
        memory.check_fits(config, context=512, free=whole // 5, quantize=int4)


def test_bytes_are_those_of_the_formats(untied):
    for spec, head in (("int8", None), ("int4-g16", "int8"), ("int4-g16-asym", None)):
        lm = teal_jax.quantize(untied, spec, lm_head=head, progress=False)
        facts = model_facts(TINY, 4, "float32", split_quantized(lm.params["weights"])[1])
        assert facts["weight_bytes"] == sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params["weights"]))
        assert facts["bytes_per_token_dense"] == weight_bytes(lm, np.zeros((2, 7)))
        half = decode_bytes(TINY, 4, 0.5, split_quantized(lm.params["weights"])[1])
        assert abs(half - weight_bytes(lm, np.full((2, 7), 0.5))) <= 1
        assert unread_share(lm, np.full((2, 7), 0.5)) == pytest.approx(0.5, abs=1e-4)


def test_eval_of_a_quantised_model(tmp_path, fixtures):
    text = (fixtures / "text.txt").read_text()
    (tmp_path / "first.txt").write_text(text[: len(text) // 2])
    (tmp_path / "second.txt").write_text(text[len(text) // 2 :])
    arguments = ["eval", fixtures / "tiny_mistral", "--data", tmp_path / "second.txt", "--calibration-data"]
    arguments += [tmp_path / "first.txt", "-s", "0,0.5", "--method", "uniform", "--context", 32, "--window", 32]
    arguments += ["--prompts", 0, "--max-tokens", 512, "--quantize", "int8", "-q", "-o", tmp_path / "out"]
    made = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert made.exit_code == 0, made.output + repr(made.exception)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["facts"]["dtype"].endswith(", int8")
    assert report["rows"][0]["weight_bytes"] == report["facts"]["bytes_per_token_dense"]


def test_thresholds_come_from_the_quantised_model(checkpoint, tmp_path, untied):
    tokens = tiny_tokens(4, 32)
    found = teal_jax.load_and_sparsify(
        checkpoint, 0.5, data=tokens, method="uniform", quantize="int3-g16", progress=False
    )
    quantised = teal_jax.quantize(untied, "int3-g16", progress=False)
    calibration = teal_jax.calibrate(quantised, tokens, progress=False)
    expected = teal_jax.allocate(quantised, calibration, 0.5, method="uniform")
    np.testing.assert_array_equal(found.plan.thresholds, expected.thresholds)
    # An artifact in 16 bits with a calibration: it is of other weights.
    artifact.save(untied, tmp_path / "model", calibration=teal_jax.calibrate(untied, tokens, progress=False))
    again = teal_jax.load_and_sparsify(
        tmp_path / "model", 0.5, data=tokens, method="uniform", quantize="int3-g16", progress=False
    )
    np.testing.assert_array_equal(again.plan.thresholds, expected.thresholds)


def test_generate_and_the_command_line(tmp_path, shared):
    text = shared / "data/text/tinystories_train_2MB_sample.txt"
    model, run = shared / "data/models/stories260K", CliRunner().invoke
    out = tmp_path / "small"
    made = run(app, ["convert", str(model), "-o", str(out), "--quantize", "int4-g4", "--json", "-q"])
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["quantization"] == "int4-g4"
    again = run(app, ["convert", str(model), "-o", str(out), "--quantize", "int4-g4"])
    assert again.exit_code == 3
    assert "exists" in again.output
    wrong = run(app, ["convert", str(model), "-o", str(tmp_path / "no"), "--quantize", "int4"])
    assert wrong.exit_code == 3
    assert "do not divide" in " ".join(wrong.output.split())
    sparse = tmp_path / "sparse"
    arguments = ["sparsify", str(model), "-s", "0.3", "-o", str(sparse), "--method", "uniform", "--quantize", "int8"]
    arguments += ["--quantize-method", "gptq", "--data", str(text), "--tokens", "1024", "--seq-len", "128", "-q"]
    made = run(app, [*arguments, "--json"])
    assert made.exit_code == 0, made.output
    lm = teal_jax.load(sparse)
    assert lm.quantization == "int8"
    assert lm.plan is not None
    assert str(teal_jax.generate(lm, "Once upon a time", max_new_tokens=8))
    assert Path(sparse, "calibration.npz").exists()
