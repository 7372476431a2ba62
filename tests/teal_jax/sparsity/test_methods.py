import numpy as np
import pytest

import teal_jax
from teal_jax.cli.options import MethodName
from teal_jax.errors import SparsityError
from teal_jax.sparsity.allocation import METHODS, TOLERANCE, allocate
from teal_jax.sparsity.distil import DistilSettings
from teal_jax.sparsity.divergence import divergence, sample
from teal_jax.sparsity.gating import kept_counts
from teal_jax.sparsity.greedy import GreedySettings
from teal_jax.sparsity.methods.cross_block import GRID, share_out
from teal_jax.sparsity.methods.r_sparse import factors, options
from teal_jax.sparsity.objective import Positions, block_errors, prepare
from teal_jax.sparsity.plan import model_sparsity
from tests.reference import TINY, silu, tiny_model, tiny_tokens, weights64
from tests.reference import block as reference_block

TARGET = 0.4
EXACT = [name for name in METHODS if name != "larosa"]


@pytest.fixture(scope="module")
def lm():
    return tiny_model(scale=3.0)


@pytest.fixture(scope="module")
def calibration(lm):
    return teal_jax.calibrate(lm, tiny_tokens(8, 32), progress=False)


@pytest.fixture(scope="module")
def plans(lm, calibration):
    made = {}

    def plan(name, target=TARGET):
        if (name, target) not in made:
            made[name, target] = allocate(
                lm,
                calibration,
                target,
                method=name,
                settings=GreedySettings(step=0.25, max_sparsity=0.8),
                distil=DistilSettings(steps=10, tokens_per_step=128),
                progress=False,
            )
        return made[name, target]

    return plan


def realised(lm, plan, tokens):
    """On the calibration tokens."""
    return teal_jax.perplexity(lm.sparsify(plan), tokens, context=24, window=8, progress=False)


@pytest.mark.parametrize("name", EXACT)
def test_every_method_reaches_its_target(name, lm, calibration, plans):
    plan = plans(name)
    assert plan.method == name
    assert plan.reached == pytest.approx(TARGET, abs=TOLERANCE)
    found = realised(lm, plan, calibration.tokens)
    sparsity = plan.sparsity
    if plan.gate == "top_k":
        widths = np.array([d_in for d_in, _ in TINY.projection_shapes])
        sparsity = 1 - kept_counts(TINY, plan.sparsity) / widths
    # Thresholds come from the dense model: what earlier layers drop moves later ones a little.
    assert found.realised_sparsity == pytest.approx(model_sparsity(TINY, sparsity), abs=0.03)
    assert np.isfinite(found.nll)


def test_larosa_says_what_its_rotations_read(plans):
    with pytest.warns(UserWarning, match=r"larosa leaves .* unread where 40.0% were asked for"):
        plan = plans("larosa")
    assert plan.model_sparsity == pytest.approx(TARGET)
    assert plan.reached == pytest.approx(TARGET - 2 * 32 * 32 / sum(TINY.projection_sizes))
    for name, turn in plan.arrays.items():
        np.testing.assert_allclose(turn.T @ turn, np.eye(32), atol=1e-5, err_msg=name)


@pytest.mark.filterwarnings("ignore:larosa leaves")
def test_rotation_and_low_rank_without_sparsity_are_dense(lm, calibration, plans):
    tokens = calibration.tokens[:2]
    for name in ("larosa", "r_sparse", "top_k"):
        np.testing.assert_allclose(lm.sparsify(plans(name, 0.0)).logits(tokens), lm.logits(tokens), atol=2e-3)


def test_the_command_line_knows_every_method():
    assert {name.value for name in MethodName} == set(METHODS)


def test_cats_stops_where_up_and_down_end(plans):
    sizes = np.array(TINY.projection_sizes)
    most = (sizes[5] + sizes[6]) / sizes.sum()
    assert plans("cats").sparsity[:, :5].max() == 0
    with pytest.raises(SparsityError, match=f"at most {most:.3f}"):
        plans("cats", 0.6)


def test_cats_thresholds_are_quantiles_of_the_gate_outputs(lm, calibration, plans):
    plan = plans("cats")
    x = np.asarray(lm.params["weights"]["embed"]["weight"], np.float64)[calibration.tokens]
    for layer in range(2):
        params = weights64(lm)["layers"][layer]
        found = [reference_block(params, row, TINY) for row in x]
        gated = silu(np.stack([sites[2] for _, sites in found]) @ params["mlp"]["gate_proj"]["weight"])
        share = (np.abs(gated) <= plan.thresholds[layer, 5]).mean()
        assert share == pytest.approx(plan.sparsity[layer, 5], abs=0.005)
        x = np.stack([y for y, _ in found])


@pytest.mark.parametrize("name", ["was", "wisparse"])
def test_scaled_thresholds_drop_what_the_plan_says(name, lm, calibration, plans):
    """Scores in float64, from the dense model."""
    plan = plans(name)
    x = np.asarray(lm.params["weights"]["embed"]["weight"], np.float64)[calibration.tokens]
    exponents = plan.score.exponents(2)
    for layer in range(2):
        params = weights64(lm)["layers"][layer]
        found = [reference_block(params, row, TINY) for row in x]
        down = params["mlp"]["down_proj"]["weight"]
        norms = np.linalg.norm(down, ord=plan.score.norm, axis=1)
        score = np.abs(np.stack([sites[3] for _, sites in found])) * (norms / norms.max()) ** exponents[layer, 6]
        share = (score <= plan.thresholds[layer, 6]).mean()
        assert share == pytest.approx(plan.sparsity[layer, 6], abs=0.006)
        x = np.stack([y for y, _ in found])


def test_scaled_block_errors_match_whole_blocks(lm):
    """Candidates of the greedy search under scaled scores, against float64 blocks; attention keeps all."""
    rng = np.random.default_rng(0)
    x = np.asarray(rng.normal(size=(2, 12, 32)), np.float32)
    scale = tuple(np.asarray(rng.uniform(0.3, 1, d_in), np.float32) for d_in, _ in TINY.projection_shapes)
    now, tried = (np.array([0] * 4 + [value] * 3, np.float32) for value in (0.1, 0.3))
    params, reference = lm.params["weights"]["layers"][0], weights64(lm)["layers"][0]
    prepared = prepare(TINY, params, x, Positions(dense=0, scored=6))
    got = block_errors(TINY, params, prepared, now, tried, tried, "mse", scale)

    def thinned(row, thresholds):
        keep = lambda value, i: np.where(np.abs(value) * scale[i] > thresholds[i], value, 0)  # noqa: E731
        mlp = reference["mlp"]
        after, (_, _, mlp_in, hidden) = reference_block(reference, row, TINY)
        middle = after - hidden @ mlp["down_proj"]["weight"]
        hidden = silu(keep(mlp_in, 4) @ mlp["gate_proj"]["weight"]) * (keep(mlp_in, 5) @ mlp["up_proj"]["weight"])
        return middle + keep(hidden, 6) @ mlp["down_proj"]["weight"], after

    for candidate in (4, 5, 6):
        thresholds = now.copy()
        thresholds[candidate] = tried[candidate]
        pairs = [thinned(row, thresholds) for row in x]
        expected = np.mean([(sparse - dense)[6:] ** 2 for sparse, dense in pairs])
        assert got[candidate] == pytest.approx(expected, rel=1e-3)


def test_wina_keeps_greedys_shares(plans):
    np.testing.assert_array_equal(plans("wina").sparsity, plans("greedy").sparsity)


def test_low_rank_factors_are_the_best_and_share_the_budget(lm):
    weight = np.asarray(lm.params["weights"]["layers"][0]["mlp"]["down_proj"]["weight"], np.float64)
    a, b = (np.asarray(part, np.float64) for part in factors(weight.astype(np.float32)))
    np.testing.assert_allclose(a @ b, weight, atol=1e-4)
    values = np.linalg.svd(weight, compute_uv=False)
    assert np.linalg.norm(weight - a[:, :5] @ b[:5]) == pytest.approx(np.linalg.norm(values[5:]), rel=1e-4)
    for rank, share in options(0.4, 80, 32):
        assert (1 - share) * 80 * 32 + rank * (80 + 32) == pytest.approx(0.6 * 80 * 32)


def test_cross_block_gives_more_to_blocks_that_mind_less():
    curves = np.stack([GRID**2, 4 * GRID**2])
    shares = share_out(0.4, 0.9, curves)
    assert shares.mean() == pytest.approx(0.4)
    # Equal slopes: 2 s = 8 s'.
    np.testing.assert_allclose(shares, [0.64, 0.16], atol=0.06)
    np.testing.assert_array_equal(share_out(0.9, 0.9, curves), [0.9, 0.9])


def test_cross_block_takes_what_diverges_less(plans):
    notes = plans("cross_block").notes["allocation"]
    assert notes["taken"] == min(notes["divergence"], key=notes["divergence"].get)


def test_without_sparsity_nothing_is_learnt(plans):
    plan = plans("learned", 0.0)
    assert not plan.thresholds.any()
    assert not plan.sparsity.any()
    assert not plan.arrays


def test_learning_begins_with_the_nearer_of_the_plans_there_are(lm):
    fresh = teal_jax.calibrate(lm, tiny_tokens(8, 32), progress=False)
    how = {
        "settings": GreedySettings(step=0.25, max_sparsity=0.8),
        "distil": DistilSettings(steps=2, tokens_per_step=64),
        "progress": False,
    }

    def start():
        return allocate(lm, fresh, TARGET, method="learned", **how).notes["allocation"]["start"]

    assert start() == "uniform"
    greedy = allocate(lm, fresh, TARGET, method="greedy", **how)
    cost = {
        name: divergence(lm, fresh.thresholds(shares), sample(fresh))
        for name, shares in {"uniform": TARGET, "greedy": greedy.sparsity}.items()
    }
    assert start() == min(cost, key=cost.__getitem__)
