"""Q-Sparse's gates against float64 numpy, forwards and backwards."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from teal_jax.errors import SparsityError
from teal_jax.model import model_functions
from teal_jax.nn.bitnet import ternary, ternary_weights
from teal_jax.nn.block_top_k import BlockTopK
from teal_jax.nn.compensation import Biased, LowRank, Rotated
from teal_jax.nn.gates import Dense, GateOutput, Gates, Soft, Threshold, TopK
from teal_jax.nn.int8 import Int8
from teal_jax.nn.project import project
from teal_jax.nn.q_sparse import kept_of, kept_shares, q_sparse_gates
from teal_jax.nn.relu import Relu
from teal_jax.nn.straight_through import StraightThrough
from tests.reference import TINY, tiny_model, tiny_tokens

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3, 16)).astype(np.float32)
X[0, 0] = np.round(X[0, 0])  # ties
W = RNG.normal(size=(16, 12)).astype(np.float32)
G = RNG.normal(size=(2, 3, 12)).astype(np.float32)
WHERE = np.array([[0, 1, 1], [1, 0, 1]], bool)
Q = np.linalg.qr(RNG.normal(size=(16, 16)))[0].astype(np.float32)
COUNT = jnp.int32(5)


def f64(x):
    return np.asarray(x).astype(np.float64)


def largest(x, count, block=None):
    """x with all but the `count` largest of every block at 0, one at a time."""
    x = f64(x)
    out = np.zeros_like(x)
    block = block or x.shape[-1]
    for place in np.ndindex(x.shape[:-1]):
        for start in range(0, x.shape[-1], block):
            part = x[place][start : start + block]
            for i in sorted(range(block), key=lambda i: (-abs(part[i]), i))[:count]:
                out[place][start + i] = part[i]
    return out


def int8(x):
    x = f64(x)
    top = np.abs(x).max(-1, keepdims=True) + 1e-5
    return np.clip(np.round(127 * x / top), -128, 127) * top / 127


THINNED = {
    "dense": (Dense(), f64(X)),
    "threshold": (Threshold(jnp.float32(0.7)), np.where(np.abs(f64(X)) > np.float32(0.7), X, 0)),
    "top_k": (TopK(COUNT), largest(X, 5)),
    "block": (BlockTopK(jnp.int32(3), 8), largest(X, 3, 8)),
    "relu": (Relu(), np.maximum(f64(X), 0)),
    "int8": (Int8(Dense()), int8(X)),
    "int8, top_k": (Int8(TopK(COUNT)), largest(int8(X), 5)),
    "int8, block": (Int8(BlockTopK(jnp.int32(1), 4)), largest(int8(X), 1, 4)),
    "rotated": (Rotated(TopK(COUNT), jnp.asarray(Q)), largest(f64(X) @ Q, 5) @ Q.T),
}


@pytest.mark.parametrize("name", THINNED)
@pytest.mark.parametrize("where", [None, WHERE], ids=["all", "some"])
def test_forwards_the_gate_backwards_none(name, where):
    gate, thinned = THINNED[name]
    if where is not None:
        gate, thinned = gate.on(jnp.asarray(where)), np.where(where[..., None], thinned, X)
    through = StraightThrough(gate)
    np.testing.assert_allclose(project(X, W, gate), thinned @ f64(W), atol=2e-5)
    y, pull = jax.vjp(lambda x, w: project(x, w, through), X, W)
    np.testing.assert_array_equal(y, project(X, W, gate))
    dx, dw = pull(G)
    np.testing.assert_allclose(dx, f64(G) @ f64(W).T, atol=2e-5)  # of every channel, kept or not
    np.testing.assert_allclose(dw, np.einsum("bsi,bso->io", thinned, f64(G)), atol=2e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_masked_is_exactly_0_and_what_is_kept_keeps_its_bits(dtype):
    x = jnp.asarray(X, dtype).at[1, 1, 3].set(jnp.inf)
    identity = jnp.eye(16, dtype=dtype)
    finite = np.isfinite(np.asarray(x, np.float32)).all(-1)
    for gate in (TopK(COUNT), BlockTopK(jnp.int32(5), 16)):
        y = np.asarray(project(x, identity, StraightThrough(gate)))[finite]
        assert ((y != 0).sum(-1) <= 5).all()
        np.testing.assert_array_equal(y[y != 0], np.asarray(x)[finite][y != 0])
    kept = StraightThrough(TopK(COUNT)).keep(x)
    assert (kept.sum(-1) == 5).all()
    assert kept[1, 1, 3]


def test_without_it_a_dropped_channel_learns_nothing():
    dx = jax.vjp(lambda x: project(x, W, TopK(COUNT)), X)[1](G)[0]
    np.testing.assert_array_equal(np.asarray(dx)[largest(X, 5) == 0], 0)


@pytest.mark.parametrize("gate", [TopK(COUNT), Int8(TopK(COUNT))])
@pytest.mark.parametrize("slope", [0.0, 0.25])
def test_a_dropped_channel_learns_a_share(gate, slope):
    y, pull = jax.vjp(lambda x: project(x, W, StraightThrough(gate, slope)), X)
    np.testing.assert_array_equal(y, project(X, W, gate))
    kept = np.asarray(gate.keep(jnp.asarray(X)))
    np.testing.assert_allclose(pull(G)[0], f64(G) @ f64(W).T * np.where(kept, 1, slope), atol=2e-5)


def test_a_bias_learns_beside_it():
    def loss(bias, x):
        return (project(x, W, StraightThrough(Biased(TopK(COUNT), bias)).on(jnp.asarray(WHERE))) * G).sum()

    bias, x = jax.grad(loss, argnums=(0, 1))(jnp.zeros(12), jnp.asarray(X))
    np.testing.assert_allclose(bias, np.where(WHERE[..., None], G, 0).sum((0, 1)), atol=1e-5)
    np.testing.assert_allclose(x, f64(G) @ f64(W).T, atol=2e-5)


@pytest.mark.parametrize(
    "gate", [GateOutput(jnp.float32(1)), Soft(jnp.float32(1), None, jnp.float32(1)), LowRank(Dense(), W, W)]
)
def test_gates_that_do_more_than_thin_are_refused(gate):
    with pytest.raises(TypeError, match=f"only thins its input was expected, got {type(gate).__name__}"):
        project(X, W, StraightThrough(gate))


def test_int8_of_zeros_and_of_the_largest():
    zeros = project(jnp.zeros((1, 16)), W, Int8(TopK(COUNT)))
    np.testing.assert_array_equal(zeros, 0)
    x = jnp.asarray([[-1.0, 1.0, 0.5, 3e-3]])
    got = Int8(Dense()).quantised(x)
    np.testing.assert_allclose(got, int8(x), rtol=1e-6)
    np.testing.assert_allclose(got[0, :2], [-1, 1], rtol=2e-5)
    # Codes tie where x did not: the lower index then.
    near = jnp.asarray([[1.0, 0.5001, 0.5002, 0.5]])
    np.testing.assert_array_equal(Int8(TopK(jnp.int32(2))).keep(near), [[True, True, False, False]])


def test_ternary_weights_and_their_gradient():
    w = RNG.normal(size=(9, 7)).astype(np.float32)
    scale = np.abs(f64(w)).mean() + 1e-5
    expected = np.clip(np.round(f64(w) / scale), -1, 1) * scale
    got, pull = jax.vjp(ternary, jnp.asarray(w))
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert len(np.unique(got)) == 3
    np.testing.assert_array_equal(pull(jnp.asarray(w) * 3)[0], w * 3)
    np.testing.assert_array_equal(ternary(jnp.zeros((2, 2))), 0)


def test_ternary_of_a_model_is_of_its_projections_alone():
    lm = tiny_model(dataclasses.replace(TINY, attention_bias=True))
    before = jax.tree_util.tree_leaves_with_path(lm.params["weights"])
    after = jax.tree_util.tree_leaves_with_path(ternary_weights(lm.params["weights"]))
    assert jax.tree.structure([a for _, a in before]) == jax.tree.structure([a for _, a in after])
    changed = 0
    for (path, old), (_, new) in zip(before, after, strict=True):
        if (old == new).all():
            continue
        changed += 1
        np.testing.assert_allclose(new, ternary(old), rtol=1e-6)
        assert "_proj" in jax.tree_util.keystr(path)
        assert old.ndim == 2
    assert changed == 7 * TINY.num_layers


def test_a_model_learns_through_its_gates():
    config = dataclasses.replace(TINY, num_layers=1)
    lm = tiny_model(config)
    tokens, where = jnp.asarray(tiny_tokens(2, 6)), jnp.ones((2, 6), bool)
    gates = q_sparse_gates(config, 0.25, block=8, int8=True)

    @jax.jit
    def run(weights, gates):
        params = {"weights": weights, "gates": gates}
        return (model_functions(config).forward(params, tokens, where)[0] ** 2).mean()

    through, slope = jax.value_and_grad(run)(lm.params["weights"], gates)
    assert through == pytest.approx(float(run(lm.params["weights"], gates.gate)), rel=1e-6)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(slope))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(slope["layers"]))


def test_unlike_gates_step_down_to_projections():
    gates = StraightThrough(Gates(((Dense(), TopK(COUNT)),))).on(WHERE)
    dense, top_k = gates[0]
    assert dense == StraightThrough(Dense())
    np.testing.assert_array_equal(project(X, W, top_k), project(X, W, TopK(COUNT, WHERE)))


def test_shares_of_sites_projections_and_layers():
    assert kept_of(TINY, 0.6).tolist() == [[19, 19, 19, 19, 19, 19, 48]] * 2
    sites = kept_of(TINY, [0.5, 0.25, 1, 0.1])
    assert sites.tolist() == [[16, 16, 16, 8, 32, 32, 8]] * 2
    np.testing.assert_array_equal(kept_of(TINY, [0.5, 0.5, 0.5, 0.25, 1, 1, 0.1]), sites)
    assert kept_of(TINY, 1e-6).min() == 1
    assert kept_of(TINY, 0.5, block=16).tolist() == [[8] * 7] * 2
    shares = RNG.uniform(0.1, 1, (2, 7))
    np.testing.assert_array_equal(kept_shares(TINY, shares), shares)
    gates = q_sparse_gates(TINY, 0.5)
    np.testing.assert_array_equal(gates.gate.count, kept_of(TINY, 0.5))


@pytest.mark.parametrize("bad", [0, -0.1, 1.0001, float("nan"), [0.5, 0, 0.5, 0.5]])
def test_shares_outside_their_range(bad):
    with pytest.raises(SparsityError, match=r"must lie in \(0, 1\], got"):
        q_sparse_gates(TINY, bad)


def test_shares_and_blocks_that_do_not_fit():
    with pytest.raises(SparsityError, match=r"expected one, one for each of attn_in.*got \[3\]"):
        q_sparse_gates(TINY, [0.5, 0.5, 0.5])
    with pytest.raises(SparsityError, match="must be numbers, got 'half'"):
        q_sparse_gates(TINY, "half")
    with pytest.raises(SparsityError, match="blocks of 32 channels do not fill 80"):
        q_sparse_gates(TINY, 0.5, block=32)
    with pytest.raises(SparsityError, match="blocks of 5 channels do not fill 16"):
        BlockTopK(COUNT, 5).keep(X)
