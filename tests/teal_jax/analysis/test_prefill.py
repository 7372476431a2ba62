import numpy as np
import pytest

from teal_jax.analysis.prefill import compare_prefill, first_token_attention, policies
from teal_jax.errors import PlanError
from tests.reference import TINY, norm, tiny_model, weights64
from tests.reference import forward as reference
from tests.teal_jax.analysis.float64 import attend, forward


def test_policies():
    found = policies(12, 8, first=(1, 3, 9))
    assert {name: np.flatnonzero(mask).tolist() for name, mask in found.items()} == {
        "all": list(range(12)),
        "second half": list(range(6, 12)),
        "after the prompt": list(range(8, 12)),
        "all but the first 1": list(range(1, 12)),
        "all but the first 3": list(range(3, 12)),
        "only the first 1": [0],
        "only the prompt's last 1": [7],
        "only the first 3": [0, 1, 2],
        "only the prompt's last 3": [5, 6, 7],
    }
    assert np.flatnonzero(policies(5, 2)["second half"])[0] == 3  # the first ceil(n / 2) stay dense, as in TEAL's code
    assert "after the prompt" not in policies(12, 6)


def test_costs_match_float64(lm, plans, rows, dense):
    found = compare_prefill(lm, plans[1:], rows, dense, first=(2,), progress=False)
    masks = policies(20, 8, first=(2,))
    assert [row.policy for row in found] == list(masks)
    for row in found:
        where, thresholds = masks[row.policy], plans[1].thresholds
        keep = lambda layer, i, x, gate: (np.abs(x) > thresholds[layer, i]) | ~where[:, None]  # noqa: B023, E731
        nll, _ = forward(lm, rows.tokens, keep)
        assert row.cost.excess == pytest.approx(nll[:, 7:].mean() - dense.nll.mean(), abs=2e-4), row.policy
        assert row.thinned == where.mean()
        assert row.target == 0.6


def test_a_plan_of_another_model(plans, rows, dense):
    import dataclasses

    other = tiny_model(dataclasses.replace(TINY, num_layers=3))
    with pytest.raises(PlanError, match="2 layers; the model has 3"):
        compare_prefill(other, plans, rows, dense, progress=False)


def test_first_token_attention_matches_float64(lm, rows):
    weights = weights64(lm)
    shares = np.zeros(2)
    for tokens in rows.tokens:
        x = weights["embed"]["weight"][tokens]
        inputs = [taps[0] for taps in reference(lm, tokens)[1]]
        np.testing.assert_allclose(inputs[0], norm(x, weights["layers"][0]["attn_norm"]["weight"], TINY.norm_eps))
        for layer, attn_in in enumerate(inputs):
            attn = weights["layers"][layer]["attn"]
            _, given = attend(*(attn_in @ attn[f"{name}_proj"]["weight"] for name in "qkv"), TINY)
            shares[layer] += given[:, rows.prompt :, 0].mean() / len(rows.tokens)
    np.testing.assert_allclose(first_token_attention(lm, rows), shares, rtol=1e-4)
