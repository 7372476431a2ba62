import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from teal_jax.nn.quantized import QuantSpec
from teal_jax.quantization import awq
from teal_jax.quantization.awq import AwqSettings, awq_block
from teal_jax.quantization.grid import best_shrink
from teal_jax.quantization.layer import map_matrices, matrix
from teal_jax.quantization.rtn import round_to_nearest
from teal_jax.sparsity.blocks import dense_block, embed
from tests import reference
from tests.reference import TINY, tiny_model, tiny_tokens
from tests.teal_jax.quantization import float64

BIASED = dataclasses.replace(TINY, attention_bias=True, mlp_bias=True)
ONLY_ROUND = AwqSettings(ratios=(0.0,), shrinks=(1.0,))


def outlying(config=TINY, dtype="float32"):
    """A block some of whose channels are twenty times as active, and its input."""
    lm = tiny_model(config, scale=4.0, dtype=dtype)
    layer = lm.params["weights"]["layers"][0]
    grown = jnp.ones(config.d_model, dtype).at[jnp.array([3, 11])].set(20)
    layer["attn_norm"]["weight"], layer["mlp_norm"]["weight"] = grown, grown
    layer["mlp"]["up_proj"]["weight"] *= jnp.ones(config.d_mlp, dtype).at[:5].set(8)
    for part, name in (("attn", "v_proj"), ("mlp", "up_proj")):
        if "bias" in layer[part][name]:
            layer[part][name]["bias"] += 0.5
    return lm, layer, embed(lm, tiny_tokens(4, 32))


def error64(lm, layer, x):
    """Squared error of the block's output against the unquantised block, both in float64 numpy."""
    dense = lm.params["weights"]["layers"][0]
    total = 0.0
    for row in np.asarray(x, np.float64):
        outputs = []
        for which in (dense, layer):
            plain = {
                part: {
                    name: {
                        key: float64.dequantize(leaf)
                        if key == "weight" and hasattr(leaf, "codes")
                        else np.float64(leaf)
                        for key, leaf in own.items()
                    }
                    for name, own in which[part].items()
                }
                for part in ("attn", "mlp")
            }
            plain |= {norm: {"weight": np.float64(which[norm]["weight"])} for norm in ("attn_norm", "mlp_norm")}
            outputs.append(reference.block(plain, row, lm.config)[0])
        total += ((outputs[0] - outputs[1]) ** 2).sum()
    return total


@pytest.mark.parametrize("spec", ["int8", "int4-g16", "int4-g16-asym"])
def test_ratio_0_is_rounding_to_nearest(spec):
    spec = QuantSpec.parse(spec)
    _, layer, x = outlying()
    found = awq_block(TINY, spec, layer, [x], ONLY_ROUND)
    for i in range(7):
        expected = round_to_nearest(matrix(layer, i), spec)
        np.testing.assert_array_equal(matrix(found, i).codes, expected.codes)
        np.testing.assert_array_equal(matrix(found, i).scale, expected.scale)


@pytest.mark.parametrize("site", range(4))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_folding_changes_nothing(site, dtype):
    """Powers of two: the very same numbers, whatever the scales."""
    _, layer, x = outlying(BIASED, dtype)
    width = (32, 16, 32, 80)[site]
    scale = jnp.exp2(jnp.asarray(np.random.default_rng(site).integers(-6, 7, width), jnp.float32))
    folded = awq._fold(BIASED, layer, site, scale)
    before, after = dense_block(BIASED, layer, x), dense_block(BIASED, folded, x)
    np.testing.assert_allclose(np.float32(after[0]), np.float32(before[0]), rtol=1e-6)
    per_channel = awq._per_channel(BIASED, site, scale)
    np.testing.assert_allclose(
        np.float32(after[1][site]) * per_channel, np.float32(before[1][site]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(("spec", "less"), [("int8", 0.8), ("int4-g16", 0.9), ("int3-g16-asym", 0.9)])
def test_the_search_finds_less_error_in_float64(spec, less):
    spec = QuantSpec.parse(spec)
    lm, layer, x = outlying()
    found = awq_block(TINY, spec, layer, [x[:2], x[2:]], AwqSettings())
    rounded = map_matrices(layer, lambda _, weight: round_to_nearest(weight, spec))
    assert error64(lm, found, x) < less * error64(lm, rounded, x)


def test_a_factor_on_a_row_changes_no_code_of_its_groups():
    """Why there is nothing to search at a norm where groups lie along the outputs."""
    w = np.random.default_rng(0).normal(size=(32, 64)).astype(np.float32)
    spec = QuantSpec.parse("int4-g16")
    scale = np.exp2(np.random.default_rng(1).integers(-6, 7, (32, 1))).astype(np.float32)
    np.testing.assert_array_equal(
        round_to_nearest(jnp.asarray(w * scale), spec).codes, round_to_nearest(jnp.asarray(w), spec).codes
    )


def test_the_best_span_in_float64():
    generator = np.random.default_rng(0)
    w = generator.standard_t(3, (24, 32)).astype(np.float32)
    importance = generator.uniform(0.1, 5, 24).astype(np.float32)
    shrinks = np.linspace(1, 0.5, 6)
    for name in ("int8", "int4-g16", "int3-g16-asym"):
        spec = QuantSpec.parse(name)
        chosen = best_shrink(jnp.asarray(w), spec, jnp.asarray(importance), jnp.asarray(shrinks, jnp.float32))

        def error(shrink, spec=spec):
            back = float64.dequantize(round_to_nearest(jnp.asarray(w), spec, shrink))
            squared = importance[:, None] * (back - w) ** 2
            return squared.sum(0) if spec.group is None else squared.reshape(24, -1, spec.group).sum(2)

        least = np.min([error(shrink) for shrink in shrinks], axis=0)
        np.testing.assert_allclose(error(chosen), least, rtol=1e-4)
