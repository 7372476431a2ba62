import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import teal_jax
from teal_jax import artifact
from teal_jax.config import PROJECTIONS
from teal_jax.errors import PlanError
from teal_jax.nn.compensation import Biased
from teal_jax.nn.gates import Threshold, TopK
from teal_jax.sparsity.gating import gates_of, kept_counts, layer_weights, norm_scales
from teal_jax.sparsity.plan import Score, SparsityPlan, array_name
from tests.reference import TINY, tiny_model, tiny_tokens

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def lm():
    return tiny_model()


def make_plan(**changes):
    fields = {
        "sparsity": np.full((2, 7), 0.4),
        "thresholds": np.full((2, 7), 0.3),
        "target": 0.4,
        "method": "test",
        "fingerprint": TINY.fingerprint,
        "projection_sizes": TINY.projection_sizes,
    }
    return SparsityPlan(**(fields | changes))


def biases():
    return {
        array_name("bias", layer, i): RNG.normal(size=d_out).astype(np.float32)
        for layer in range(2)
        for i, (_, d_out) in enumerate(TINY.projection_shapes)
    }


def everything():
    """A plan with one array of every kind."""
    arrays = biases()
    arrays["scale.0.q"] = RNG.uniform(0.5, 1, 32).astype(np.float32)
    arrays["low_rank_a.0.down"] = RNG.normal(size=(80, 3)).astype(np.float32)
    arrays["low_rank_b.0.down"] = RNG.normal(size=(3, 32)).astype(np.float32)
    arrays["rotation.1.gate"] = np.linalg.qr(RNG.normal(size=(32, 32)))[0].astype(np.float32)
    return make_plan(arrays=arrays, score=Score(norm=2, exponent=[[0.5] * 7, [1.0] * 7]))


def test_plain_plans_give_thresholds_and_are_still_written_as_version_1(lm):
    plan = make_plan()
    gates = gates_of(plan, TINY, lm.params["weights"])
    assert isinstance(gates, Threshold)
    assert gates.scale is None
    fields = plan.to_dict()
    assert fields["format_version"] == 1
    assert not {"gate", "score", "arrays"} & set(fields)


@pytest.mark.parametrize("norm", [1, 2])
def test_scales_are_norms_of_the_rows(lm, norm):
    exponents = RNG.uniform(0, 1.5, (2, 7))
    scales = norm_scales(lm.params["weights"], TINY, Score(norm=norm, exponent=exponents.tolist()))
    for layer in range(2):
        for i, weight in enumerate(layer_weights(lm.params["weights"], layer)):
            norms = np.linalg.norm(np.asarray(weight, np.float64), ord=norm, axis=1)
            np.testing.assert_allclose(scales[layer][i], (norms / norms.max()) ** exponents[layer, i], rtol=1e-5)


def test_equal_norms_are_plain_magnitude(lm):
    """WINA with rows of one length is top-K of |x|."""
    weights = jax.tree.map(lambda leaf: leaf, lm.params["weights"])
    for layer in weights["layers"].values():
        for part in ("attn", "mlp"):
            for projection in layer[part].values():
                shape = projection["weight"].shape
                projection["weight"] = jnp.asarray(RNG.choice([-0.25, 0.25], shape), jnp.float32)
    equal = dataclasses.replace(lm, params={"weights": weights, "gates": lm.params["gates"]})
    tokens = tiny_tokens(2, 16)
    for gate in ("top_k", "threshold"):
        scaled = equal.sparsify(make_plan(gate=gate, score=Score(norm=2)))
        plain = equal.sparsify(make_plan(gate=gate))
        np.testing.assert_array_equal(scaled.logits(tokens), plain.logits(tokens))


def test_top_k_plans_count_channels(lm):
    sparsity = RNG.uniform(0, 1, (2, 7))
    plan = make_plan(gate="top_k", sparsity=sparsity)
    gates = gates_of(plan, TINY, lm.params["weights"])
    assert isinstance(gates, TopK)
    widths = np.array([d_in for d_in, _ in TINY.projection_shapes])
    np.testing.assert_allclose(gates.count, np.round((1 - sparsity) * widths))
    assert (kept_counts(TINY, np.zeros((2, 7))) == widths).all()


def test_biases_alone_stay_together(lm):
    plan = make_plan(arrays=biases())
    gates = gates_of(plan, TINY, lm.params["weights"])
    assert isinstance(gates, Biased)
    assert isinstance(gates.gate, Threshold)
    np.testing.assert_array_equal(gates[1][6].bias, plan.arrays["bias.1.down"])
    assert (plan.extra_weights, plan.extra_vectors) == (0, sum(2 * d_out for _, d_out in TINY.projection_shapes))


def test_a_rotation_serves_its_site_and_is_held_once(lm):
    gates = gates_of(everything(), TINY, lm.params["weights"])
    gate, up = gates[1][4], gates[1][5]
    assert gate.gate.rotation is up.gate.rotation


def test_plans_with_arrays_round_trip(lm, tmp_path):
    plan = everything()
    path = plan.save(tmp_path / "plan.json")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["plan.arrays.npz", "plan.json"]
    assert path.stat().st_size < 4000
    loaded = SparsityPlan.load(path)
    assert (loaded.score, loaded.gate) == (plan.score, plan.gate)
    assert loaded.extra_weights == 80 * 3 + 3 * 32 + 32 * 32
    assert loaded.reached == pytest.approx(0.4 - loaded.extra_weights / (2 * sum(TINY.projection_sizes)))
    tokens = tiny_tokens(2, 16)
    np.testing.assert_array_equal(lm.sparsify(loaded).logits(tokens), lm.sparsify(plan).logits(tokens))


def test_artifacts_keep_the_arrays(lm, tmp_path):
    sparse = lm.sparsify(everything())
    loaded = artifact.load(artifact.save(sparse, tmp_path / "saved"))
    tokens = tiny_tokens(2, 16)
    np.testing.assert_array_equal(loaded.logits(tokens), sparse.logits(tokens))


def test_lost_or_foreign_arrays_are_an_error(tmp_path):
    path = everything().save(tmp_path / "plan.json")
    other = make_plan(arrays=biases()).save(tmp_path / "other.json")
    (tmp_path / "other.arrays.npz").replace(tmp_path / "plan.arrays.npz")
    with pytest.raises(PlanError, match="another plan's"):
        SparsityPlan.load(path)
    with pytest.raises(PlanError, match=r"arrays are missing.*beside"):
        SparsityPlan.load(other)
    (tmp_path / "plan.arrays.npz").write_bytes(b"PK broken")
    with pytest.raises(PlanError, match="does not hold"):
        SparsityPlan.load(path)
    with pytest.raises(PlanError, match="none were given"):
        SparsityPlan.from_dict(json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "softmax"}, "plan.gate must be one of"),
        ({"arrays": {"bias.9.q": np.zeros(32)}}, "expected names like bias.0.down"),
        ({"arrays": {"tail.0.q": np.zeros(32)}}, "expected names like bias.0.down"),
        ({"arrays": {"rotation.0.v": np.eye(32)}}, "stands under"),
    ],
)
def test_malformed_plans(changes, message):
    with pytest.raises(PlanError, match=message):
        make_plan(**changes)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"bias.0.q": np.zeros(31)}, "does not fit a projection"),
        ({"rotation.0.q": np.eye(31)}, "does not fit a projection"),
        ({"low_rank_a.0.q": np.zeros((32, 2))}, "do not match"),
        ({"low_rank_a.0.q": np.zeros((32, 2)), "low_rank_b.0.q": np.zeros((3, 32))}, "do not match"),
    ],
)
def test_arrays_that_do_not_fit(lm, arrays, message):
    with pytest.raises(PlanError, match=message):
        lm.sparsify(make_plan(arrays=arrays))


def test_scores_are_checked():
    with pytest.raises(PlanError, match="norm must be 1 or 2"):
        Score(norm=3)
    with pytest.raises(PlanError, match=r"\[2\]\[7\]"):
        Score(norm=2, exponent=[[1.0, 2.0]]).exponents(2)


def test_every_projection_has_a_name():
    assert teal_jax.sparsity.plan.array_place("bias.1.up", 2) == ("bias", 1, PROJECTIONS.index("up"))
