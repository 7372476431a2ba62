"""AWQ's and GPTQ's own checkpoints into few bits, from one projection to the command line."""

import json
import re
import warnings

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import teal_jax
from converters import GroupedWeight
from converters.grouped import in_sequence
from teal_jax.cli import app
from teal_jax.errors import CheckpointError, QuantizationError
from teal_jax.nn.quantized import QuantizedWeight, QuantSpec
from teal_jax.quantization import checkpoint
from teal_jax.quantization.regroup import regrouped
from tests.converters.packed import CONFIG, config, dequantized, numbers, packed_checkpoint
from tests.teal_jax.quantization import float64

D_IN, D_OUT = 32, 48
INT8, INT4, ASYM = QuantSpec(8), QuantSpec.parse("int4-g16"), QuantSpec.parse("int4-g16-asym")
UP = "model.layers.0.mlp.up_proj"


def grouped(groups: int, **changes) -> GroupedWeight:
    codes, scales, zeros = numbers(np.random.default_rng(0), D_IN, D_OUT, groups)
    fields = {"codes": codes, "scales": scales, "zeros": zeros, "group_of": in_sequence(D_IN, D_IN // groups)}
    return GroupedWeight(**(fields | changes))


def exact(weight: GroupedWeight) -> np.ndarray:
    return dequantized(weight.codes, weight.scales, weight.zeros, weight.group_of)


def lossless(weight: GroupedWeight, spec: QuantSpec) -> QuantizedWeight:
    found, error = regrouped(weight, spec, "float32", "w")
    assert error == 0
    assert found.spec == spec
    np.testing.assert_array_equal(float64.dequantize(found), exact(weight))
    return found


def repeated(rng, groups, group, choose) -> np.ndarray:
    return np.repeat(choose(rng, (groups, D_OUT // group)), group, axis=1)


def bfloat16_scales(rng, shape) -> np.ndarray:
    return rng.uniform(0.01, 0.02, shape).astype(ml_dtypes.bfloat16)


def test_int8_holds_columns_of_one_scale_whatever_their_zero_points():
    lossless(grouped(1), INT8)
    scales = np.repeat(np.linspace(0.01, 0.02, D_OUT, dtype=np.float16)[None], 4, axis=0)
    weight = grouped(4, scales=scales)
    assert len(np.unique(weight.zeros[:, 0])) > 1
    lossless(weight, INT8)


@pytest.mark.parametrize("act_order", [False, True])
def test_int4_holds_groups_of_outputs_that_agree(act_order):
    rng = np.random.default_rng(1)
    scales = repeated(rng, 4, 16, bfloat16_scales)
    zeros = repeated(rng, 4, 16, lambda rng, shape: rng.integers(0, 16, shape, np.uint8))
    group_of = rng.permutation(in_sequence(D_IN, 8)) if act_order else in_sequence(D_IN, 8)
    weight = grouped(4, scales=scales, zeros=zeros, group_of=group_of)
    np.testing.assert_array_equal(float64.unpack(lossless(weight, ASYM)), weight.codes)
    assert regrouped(weight, INT4, "float32", "w")[1] > 0
    symmetric = grouped(4, scales=scales, zeros=np.full_like(zeros, 8), group_of=group_of)
    lossless(symmetric, ASYM)
    np.testing.assert_array_equal(float64.unpack(lossless(symmetric, INT4)), weight.codes)


@pytest.mark.parametrize("difference", ["scale", "zero", "not in bfloat16"])
@pytest.mark.parametrize("spec", [INT4, ASYM])
def test_int4_is_not_called_lossless_for_less(difference, spec):
    scales = np.full((4, D_OUT), 0.0103 if difference == "not in bfloat16" else 2**-6, np.float16)
    zeros = np.full((4, D_OUT), 8, np.uint8)
    if difference == "scale":
        scales[3, 5] *= 1.5
    if difference == "zero":
        zeros[3, 5] += 1
    assert regrouped(grouped(4, scales=scales, zeros=zeros), spec, "float32", "w")[1] > 0


@pytest.mark.parametrize("name", ["int8", "int4-g16", "int4-g16-asym", "int3-g16"])
def test_what_cannot_be_held_is_rounded_to_nearest_and_the_error_told(name):
    weight, spec = grouped(4), QuantSpec.parse(name)
    found, error = regrouped(weight, spec, "bfloat16", "w")
    assert (found.spec, found.dtype) == (spec, "bfloat16")
    ours, theirs = float64.dequantize(found), exact(weight)
    expected = float64.round_to_nearest(theirs, spec.bits, spec.group, spec.symmetric)
    assert (np.abs(ours - expected) < 1e-6).mean() > 0.995
    assert error == pytest.approx(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs), rel=1e-5)
    assert 0 < error < {8: 0.01, 4: 0.1, 3: 0.2}[spec.bits]


@pytest.mark.parametrize("spec", [INT8, INT4, ASYM])
def test_columns_of_zeros_stay_and_a_broken_weight_is_named(spec):
    weight = grouped(4)
    weight.scales[:, :16] = 0
    assert not regrouped(weight, spec, "float32", "w")[0].dequantize()[:, :16].any()
    with pytest.raises(QuantizationError, match="w is zero throughout"):
        regrouped(grouped(4, scales=np.zeros((4, D_OUT), np.float16)), spec, "float32", "w")
    huge = np.full((4, D_OUT), 3e38, np.float32)
    with pytest.raises(QuantizationError, match="w: input channel 0, output channel 1 is -inf"):
        regrouped(grouped(4, scales=huge), spec, "float32", "w")


@pytest.fixture
def write(tmp_path):
    """Writes a packed checkpoint into a new folder: its tensors, and changes of its quantization_config."""

    def write(method, tensors, **changes):
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config(method, **changes)))
        save_file(tensors, folder / "model.safetensors")
        return folder

    return write


def agreeing(rng, d_in, d_out, groups, width=8):
    """Numbers that int4 in groups of `width` outputs can hold."""
    codes, scales, _ = numbers(rng, d_in, d_out, groups, symmetric=True)
    few = scales[:, ::width].astype(ml_dtypes.bfloat16).astype(np.float16)
    return codes, np.repeat(few, width, axis=1), np.full((groups, d_out), 8, np.uint8)


TOKENS = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 12))


def both(folder, spec, **arguments):
    """The checkpoint dequantised, and in few bits."""
    plain = teal_jax.load(folder, dtype="float32", progress=False)
    return plain, teal_jax.load(folder, dtype="float32", quantize=spec, progress=False, **arguments)


def projections(lm):
    return {
        f"layers.{index}.{part}.{name}": lm.params["weights"]["layers"][index][part][name]["weight"]
        for index in range(CONFIG.num_layers)
        for part, names in (("attn", "qkvo"), ("mlp", ("gate", "up", "down")))
        for name in (f"{n}_proj" for n in names)
    }


@pytest.mark.parametrize(
    ("method", "spec", "made"),
    [
        ("awq", "int4-g8", {"plain": agreeing}),
        ("gptq", "int4-g8-asym", {"plain": agreeing}),
        ("gptq", "int8", {"group": 32}),
    ],
)
def test_a_checkpoint_that_the_layout_holds_is_the_same_model(write, method, spec, made):
    tensors, weights = packed_checkpoint(method, **made)
    folder = write(method, tensors, **({"group_size": -1} if "group" in made else {}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, found = both(folder, spec)
    assert plain.quantization is None
    assert found.quantization == spec
    for name, weight in projections(found).items():
        key = f"model.{name.replace('attn', 'self_attn')}.weight"
        np.testing.assert_array_equal(float64.dequantize(weight), weights[key])
    np.testing.assert_array_equal(found.logits(TOKENS), plain.logits(TOKENS))


@pytest.mark.parametrize(("method", "spec"), [("awq", "int4-g8"), ("gptq", "int8")])
def test_the_error_told_is_that_of_the_model(write, method, spec):
    tensors, _ = packed_checkpoint(method)
    with pytest.warns(UserWarning, match=f"rounded once more, to {spec}") as caught:
        plain, found = both(write(method, tensors), spec)
    mean, most = map(
        float, re.findall(r"([\d.]+) on average over 14 projections, ([\d.]+) at most", str(caught[0].message))[0]
    )
    ours, theirs = projections(found), projections(plain)
    errors = [np.linalg.norm(float64.dequantize(ours[n]) - theirs[n]) / np.linalg.norm(theirs[n]) for n in ours]
    assert mean == pytest.approx(np.mean(errors), rel=0.01)
    assert most == pytest.approx(max(errors), rel=0.01)
    assert str(caught[0].filename) == __file__
    difference = np.linalg.norm(found.logits(TOKENS) - plain.logits(TOKENS)) / np.linalg.norm(plain.logits(TOKENS))
    assert 0 < difference < most


@pytest.mark.filterwarnings("ignore:the checkpoint's 4-bit weights are rounded")
def test_projections_left_plain_and_a_packed_head(write):
    tensors, weights = packed_checkpoint("gptq", lm_head=True)
    downs = [name for name in weights if "down_proj" in name]
    for name in downs:
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[name.removesuffix("weight") + part]
        tensors[name] = np.ascontiguousarray(weights[name].T.astype(np.float16))
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    folder = write("gptq", tensors, lm_head=True, modules_in_block_to_quantize=[*names, "mlp.gate_proj", "mlp.up_proj"])
    found = teal_jax.load(folder, quantize="int8", lm_head="int8", progress=False)
    head, down = found.params["weights"]["lm_head"]["weight"], projections(found)["layers.0.mlp.down_proj"]
    assert (head.spec, head.dtype, down.spec, down.dtype) == (INT8, "float16", INT8, "float16")
    for weight, name in ((head, "lm_head.weight"), (down, downs[0])):
        step = np.abs(np.asarray(weight.scale))
        assert np.all(np.abs(float64.dequantize(weight) - weights[name]) < 1.01 * step)
    dense = teal_jax.load(folder, quantize="int8", progress=False)
    assert isinstance(dense.params["weights"]["lm_head"]["weight"], jax.Array)


def test_other_methods_read_it_as_any_checkpoint(write, monkeypatch):
    folder = write("awq", packed_checkpoint("awq")[0])
    monkeypatch.setattr(checkpoint, "quantize_layers", lambda lm, spec, layer_of, **_: {i: layer_of(i) for i in (0, 1)})
    plain, found = both(folder, "int8", quantize_method="gptq", data=TOKENS)
    same = zip(jax.tree.leaves(found.params), jax.tree.leaves(plain.params), strict=True)
    assert all(np.array_equal(a, b) for a, b in same)


@pytest.mark.filterwarnings("ignore:the checkpoint's 4-bit weights are rounded")
def test_memory_stays_near_one_projection_and_the_result(write, monkeypatch):
    folder = write("awq", packed_checkpoint("awq")[0])
    before, peak = {id(leaf) for leaf in jax.live_arrays()}, []
    alive = lambda: sum(leaf.nbytes for leaf in jax.live_arrays() if id(leaf) not in before)  # noqa: E731
    dequantize = GroupedWeight.dequantize

    def watched(weight, dtype="float32"):
        exact = dequantize(weight, dtype)
        peak.append(alive())
        return exact

    monkeypatch.setattr(GroupedWeight, "dequantize", watched)
    lm = teal_jax.load(folder, dtype="float32", quantize="int4-g8", progress=False)
    result = sum(leaf.nbytes for leaf in jax.tree.leaves(lm.params))
    assert len(peak) == 14
    assert max(peak) < result + 1.1 * 4 * CONFIG.d_model * CONFIG.d_mlp


def test_what_cannot_be(write):
    tensors, _ = packed_checkpoint("awq")
    folder = write("awq", tensors)
    with pytest.raises(QuantizationError, match=r"groups of 64 do not divide the outputs of q.*16, 8, 4"):
        teal_jax.load(folder, quantize="int4", progress=False)
    tensors[f"{UP}.scales"] = np.full_like(tensors[f"{UP}.scales"], 60000)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{UP}.weight holds .* more than float16 can"):
        teal_jax.load(folder, quantize="int8", progress=False)
    (folder / "config.json").write_text(json.dumps(config("awq", group_size=16)))
    with pytest.raises(CheckpointError, match=r"q_proj.scales expected \[1, 32\], got \[2, 32\]"):
        teal_jax.load(folder, quantize="int8", progress=False)
    (folder / "config.json").write_text(json.dumps(config("gptq")))
    with pytest.raises(CheckpointError, match=r"gptq by its config.json, does not fit .* 14 misshapen"):
        teal_jax.load(folder, quantize="int4-g8", progress=False)


def test_the_command_line_tells_the_error_and_the_artifact_comes_back(write, tmp_path):
    folder, out = write("awq", packed_checkpoint("awq")[0]), tmp_path / "out"
    made = CliRunner().invoke(app, ["convert", str(folder), "-o", str(out), "--quantize", "int4-g8", "--json"])
    assert made.exit_code == 0, made.output
    assert json.loads(made.stdout)["quantization"] == "int4-g8"
    assert "warning: the checkpoint's 4-bit weights are rounded once more, to int4-g8" in made.stderr
    assert teal_jax.load(out).quantization == "int4-g8"
