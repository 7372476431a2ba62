import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from teal_jax.nn.block_top_k import BlockTopK
from teal_jax.nn.compensation import Biased, Centred, LowRank, Rotated
from teal_jax.nn.gates import Dense, GateOutput, Gates, Soft, Threshold, TopK
from teal_jax.nn.implementation import use_fused_step
from teal_jax.nn.int8 import Int8
from teal_jax.nn.project import project
from teal_jax.nn.straight_through import StraightThrough
from teal_jax.sparsity.methods.r_sparse import factors
from tests.reference import TINY, norm, silu, tiny_model, tiny_tokens, weights64
from tests.reference import block as reference_block

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 5, 16)).astype(np.float32)
W = RNG.normal(size=(16, 12)).astype(np.float32)
SCALE = RNG.uniform(0.2, 1, 16).astype(np.float32)
WHERE = np.array([[0, 0, 1, 1, 1], [0, 1, 0, 1, 1]], bool)
BIAS = RNG.normal(size=12).astype(np.float32)
CENTRE = RNG.normal(size=16).astype(np.float32)
Q = np.linalg.qr(RNG.normal(size=(16, 16)))[0].astype(np.float32)


def keep_by_threshold(x, threshold, scale=1.0):
    return np.abs(x.astype(np.float64)) * scale > threshold


def keep_by_count(x, count, scale=1.0):
    """One token at a time, by numpy's own stable sort of (-score, index)."""
    score = np.float32(scale) * np.abs(x)
    kept = np.zeros(x.shape, bool)
    for place in np.ndindex(x.shape[:-1]):
        kept[place][np.lexsort((np.arange(x.shape[-1]), -score[place]))[:count]] = True
    return kept


def dot(x, weight=W):
    return x.astype(np.float64) @ weight.astype(np.float64)


def where_sparse(sparse, dense):
    return np.where(WHERE[..., None], sparse, dense)


A, B = (np.asarray(part) for part in factors(jnp.asarray(W)))
KEPT = keep_by_threshold(X, 0.7)
CASES = {
    "threshold": (Threshold(jnp.float32(0.7)), dot(X * KEPT)),
    "scaled": (Threshold(jnp.float32(0.4), scale=jnp.asarray(SCALE)), dot(X * keep_by_threshold(X, 0.4, SCALE))),
    "top_k": (TopK(jnp.int32(5)), dot(X * keep_by_count(X, 5))),
    "scaled top_k": (TopK(jnp.int32(5), scale=jnp.asarray(SCALE)), dot(X * keep_by_count(X, 5, SCALE))),
    "biased": (Biased(Threshold(jnp.float32(0.7)), jnp.asarray(BIAS)), dot(X * KEPT) + BIAS),
    "centred": (
        Centred(Threshold(jnp.float32(0.7)), jnp.asarray(CENTRE)),
        dot(np.where(keep_by_threshold(X - CENTRE, 0.7), X, CENTRE)),
    ),
    "low rank": (
        LowRank(Threshold(jnp.float32(0.7)), jnp.asarray(A[:, :3]), jnp.asarray(B[:3])),
        dot(X * KEPT) + dot(dot(X * ~KEPT, A[:, :3]), B[:3]),
    ),
    "rotated": (
        Rotated(TopK(jnp.int32(5)), jnp.asarray(Q)),
        dot(dot(X, Q) * keep_by_count(dot(X, Q), 5), dot(Q.T, W)),
    ),
    "soft": (Soft(jnp.float32(0.7), None, jnp.float32(0.2)), dot(X * KEPT)),
}


@pytest.mark.parametrize("name", CASES)
def test_projections_match_float64(name):
    gate, expected = CASES[name]
    np.testing.assert_allclose(project(X, W, gate), expected, atol=2e-5)
    on = project(X, W, gate.on(jnp.asarray(WHERE)))
    np.testing.assert_allclose(on, where_sparse(expected, dot(X)), atol=2e-5)


def test_an_unknown_gate_is_refused():
    with pytest.raises(TypeError, match="got str"):
        project(X, W, "dense")


def test_top_k_ties_go_to_the_lower_index_and_nan_is_kept():
    x = jnp.array([1.0, -2.0, 2.0, 0.5, -1.0, 2.0, jnp.nan, 1.0])
    kept = np.asarray(TopK(jnp.int32(4)).keep(x))
    np.testing.assert_array_equal(np.flatnonzero(kept), [1, 2, 5, 6])
    for count in range(9):
        assert np.asarray(TopK(jnp.int32(count)).keep(x)).sum() == count
    ties = jnp.ones(8)
    np.testing.assert_array_equal(TopK(jnp.int32(3)).keep(ties), np.arange(8) < 3)


def test_one_program_serves_every_count():
    traces = []

    @jax.jit
    def run(x, gate):
        traces.append(1)
        return project(x, jnp.asarray(W), gate)

    for count in (0, 5, 16):
        got = run(jnp.asarray(X), TopK(jnp.int32(count)))
        np.testing.assert_allclose(got, dot(X * keep_by_count(X, count)), atol=2e-5)
    assert len(traces) == 1


def test_full_rank_and_no_sparsity_are_dense():
    nothing = TopK(jnp.int32(16))
    full = LowRank(Threshold(jnp.float32(1e9)), jnp.asarray(A), jnp.asarray(B))
    np.testing.assert_allclose(project(X, W, full), dot(X), atol=2e-5)
    np.testing.assert_allclose(project(X, W, Rotated(nothing, jnp.asarray(Q))), dot(X), atol=2e-5)
    np.testing.assert_allclose(project(X, W, Centred(nothing, jnp.asarray(CENTRE))), dot(X), atol=2e-5)


def test_cats_skips_the_same_hidden_channels_in_up_and_down():
    lm = tiny_model(scale=3.0)
    tokens = tiny_tokens(2, 12)
    cats = (*[Dense()] * 5, GateOutput(jnp.float32(0.3)), Threshold(jnp.float32(0)))
    params = {"weights": lm.params["weights"], "gates": Gates((cats, cats))}
    got = dataclasses.replace(lm, params=params).logits(tokens)
    x = np.asarray(lm.params["weights"]["embed"]["weight"], np.float64)[tokens]
    weights = weights64(lm)
    rows = []
    for row in x:
        for layer in (weights["layers"][i] for i in range(2)):
            after, (_, _, mlp_in, hidden) = reference_block(layer, row, lm.config)
            gated = silu(mlp_in @ layer["mlp"]["gate_proj"]["weight"])
            dead = np.abs(gated) <= 0.3
            row = after - np.where(dead, hidden, 0) @ layer["mlp"]["down_proj"]["weight"]
        rows.append(norm(row, weights["final_norm"]["weight"], lm.config.norm_eps))
    expected = np.stack(rows) @ weights["lm_head"]["weight"]
    np.testing.assert_allclose(got, expected, atol=2e-3)


def test_soft_gates_have_the_slope_of_the_soft_mask():
    width, value = 0.3, 0.7
    slope = jax.grad(lambda t: Soft(t, None, jnp.float32(width)).mask(jnp.asarray(X)).sum())(jnp.float32(value))
    soft = lambda t: (1 / (1 + np.exp(-(np.abs(X.astype(np.float64)) / t - 1) / width))).sum()  # noqa: E731
    assert slope == pytest.approx((soft(value + 1e-5) - soft(value - 1e-5)) / 2e-5, rel=1e-3)
    assert slope < 0


@pytest.mark.parametrize("kind", ["gates", "biased", "top_k", "scaled"])
def test_scoring_and_decoding_agree_for_every_kind(kind):
    lm = tiny_model()
    layers = range(TINY.num_layers)
    ones = tuple(tuple(jnp.linspace(0.5, 1, d_in) for d_in, _ in TINY.projection_shapes) for _ in layers)
    biases = tuple(tuple(jnp.linspace(-1, 1, d_out) for _, d_out in TINY.projection_shapes) for _ in layers)
    values = jnp.full((2, 7), 0.3)
    gates = {
        "gates": Gates(tuple((*[Dense()] * 3, *[Threshold(jnp.float32(0.3))] * 4) for _ in layers)),
        "biased": Biased(Threshold(values), biases),
        "top_k": TopK(jnp.full((2, 7), 20), scale=ones),
        "scaled": Threshold(values, scale=ones),
    }[kind]
    lm = dataclasses.replace(lm, params={"weights": lm.params["weights"], "gates": gates})
    tokens = jnp.asarray(tiny_tokens(2, 10))
    expected = lm.logits(tokens, dense_prefix=6)
    logits, cache = lm.prefill(lm.params, tokens[:, :6], lm.init_cache(2, 10))
    step = jax.jit(lm.decode_step)
    for position in range(6, 10):
        logits, cache = step(lm.params, tokens[:, position], cache)
        np.testing.assert_allclose(logits, expected[:, position], atol=2e-4)
    assert float(jnp.abs(expected - lm.dense().logits(tokens)).max()) > 0.1


def test_the_kernels_refuse_gates_that_they_do_not_take(monkeypatch):
    monkeypatch.setattr("pallas_kernels.support.why_not", lambda: None)
    plain = Threshold(jnp.zeros((2, 7)))
    top = TopK(jnp.zeros((2, 7), jnp.int32))
    blocks, odd = (BlockTopK(top.count, size) for size in (8, 24))
    taken = (
        plain,
        dataclasses.replace(plain, scale=((), ())),
        Biased(plain, ((), ())),
        Dense(),
        top,
        Int8(top),
        Biased(top, ()),
        blocks,
        Int8(blocks),
    )
    for gates in (*taken, *map(StraightThrough, taken)):
        assert use_fused_step(TINY, None, jnp.float32, 1, gates)
    for gates in (odd, Int8(plain), Int8(odd), StraightThrough(odd), Biased(odd, ((), ())), Gates(())):
        assert not use_fused_step(TINY, None, jnp.float32, 1, gates)
        with pytest.raises(
            NotImplementedError,
            match="they take Dense gates, Threshold, TopK, BlockTopK of a power of two up to 256",
        ):
            use_fused_step(TINY, "pallas", jnp.float32, 1, gates)
