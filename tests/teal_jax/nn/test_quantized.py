import jax
import jax.numpy as jnp
import numpy as np
import pytest

import teal_jax
from teal_jax.nn.implementation import use_fused_step
from teal_jax.nn.quantized import QuantizedWeight, QuantSpec
from teal_jax.quantization.rtn import round_to_nearest
from tests.reference import TINY, tiny_model, tiny_tokens

MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def swapped(lm, name):
    """The model with quantised projections, and one with what they dequantise to."""
    spec = QuantSpec.parse(name)

    def swap(path, leaf):
        place = [getattr(part, "key", None) for part in path]
        return round_to_nearest(leaf, spec) if place[-2] in MATRICES and place[-1] == "weight" else leaf

    quantised = jax.tree_util.tree_map_with_path(swap, lm.params["weights"])
    dense = jax.tree.map(
        lambda leaf: leaf.dequantize() if isinstance(leaf, QuantizedWeight) else leaf,
        quantised,
        is_leaf=lambda leaf: isinstance(leaf, QuantizedWeight),
    )
    gates = lm.params["gates"]
    return (
        teal_jax.LanguageModel(config=lm.config, params={"weights": quantised, "gates": gates}),
        teal_jax.LanguageModel(config=lm.config, params={"weights": dense, "gates": gates}),
    )


@pytest.mark.parametrize("name", ["int8", "int4-g16-asym"])
def test_everything_runs_as_on_the_dequantised_model(name):
    quantised, dense = swapped(tiny_model(), name)
    assert quantised.quantization == str(QuantSpec.parse(name))
    assert dense.quantization is None
    tokens, results = tiny_tokens(4, 32), []
    for lm in (quantised, dense):
        calibration = teal_jax.calibrate(lm, tokens, progress=False)
        plan = teal_jax.allocate(lm, calibration, 0.5, method="uniform", progress=False)
        sparse = lm.sparsify(plan)
        scored = teal_jax.perplexity(sparse, tiny_tokens(2, 32, seed=1), context=16, window=8, progress=False)
        prompt, cache = jnp.asarray(tokens[:1]), sparse.init_cache(1, 40)
        logits, cache = jax.jit(sparse.prefill)(sparse.params, prompt, cache)
        step, _ = jax.jit(sparse.decode_step)(sparse.params, jnp.argmax(logits, -1), cache)
        results.append((plan.thresholds, scored.nll, logits, step))
    for of_quantised, of_dense in zip(*results, strict=True):
        np.testing.assert_allclose(of_quantised, of_dense, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["wina", "r_sparse"])
def test_methods_that_read_weights_take_quantised_ones(method):
    quantised, dense = swapped(tiny_model(), "int8")
    calibration = teal_jax.calibrate(quantised, tiny_tokens(4, 32), progress=False)
    found = [
        lm.sparsify(teal_jax.allocate(lm, calibration, 0.4, method=method, progress=False)) for lm in (quantised, dense)
    ]
    tokens = tiny_tokens(2, 8)
    np.testing.assert_allclose(found[0].logits(tokens), found[1].logits(tokens), rtol=2e-3, atol=2e-3)


def test_the_kernels_refuse_by_name():
    with pytest.raises(NotImplementedError, match=r"quantised|cannot run here"):
        use_fused_step(TINY, "pallas", jnp.bfloat16, 1, None, "int4-g64")
    assert not use_fused_step(TINY, None, jnp.bfloat16, 1, None, "int4-g64")
