import dataclasses

import jax
import numpy as np
import pytest

import teal_jax
from teal_jax.errors import DataError, SparsityError
from teal_jax.sparsity.greedy import GreedySettings, greedy_path
from teal_jax.sparsity.greedy_path import GreedyPath
from teal_jax.sparsity.objective import Positions, block_errors, prepare
from teal_jax.sparsity.statistics import Calibration
from tests.reference import TINY, block, tiny_model, tiny_tokens, weights64

SETTINGS = GreedySettings(step=0.1, max_sparsity=0.8)


@pytest.fixture(scope="module")
def lm():
    return tiny_model()


@pytest.fixture(scope="module")
def calibration(lm):
    found = teal_jax.calibrate(lm, tiny_tokens(4, 32), progress=False)
    found.path = greedy_path(lm, found, settings=SETTINGS, progress=False)
    return found


def reference_error(lm, layer, x, thresholds, positions, error):
    """The block error of x [rows, seq, d], by the float64 reference."""
    params = weights64(lm)["layers"][layer]
    first = x.shape[1] - positions.scored
    dense = np.stack([block(params, row, lm.config)[0] for row in x])[:, first:]
    sparse = np.stack([block(params, row, lm.config, thresholds, positions.dense)[0] for row in x])[:, first:]
    difference = sparse - dense
    if error == "mse":
        return (difference**2).mean()
    return np.sqrt((difference**2).sum(axis=1)).mean()


@pytest.mark.parametrize(("error", "dense"), [("mse", 10), ("teal", 10), ("mse", 0)])
@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, sliding_window=6, attention_bias=True)])
def test_candidate_errors_match_whole_blocks(config, error, dense):
    lm = tiny_model(config)
    x = np.asarray(np.random.default_rng(0).normal(size=(2, 24, 32)), np.float32)
    now, tried, uniform = (np.linspace(*span, 7).astype(np.float32) for span in ((0.1, 0.5), (0.3, 0.9), (0.2, 0.2)))
    positions = Positions(dense=dense, scored=7)
    params = lm.params["weights"]["layers"][1]

    @jax.jit
    def evaluate(params, x):
        return block_errors(config, params, prepare(config, params, x, positions), now, tried, uniform, error)

    got = evaluate(params, x)
    for i in range(7):
        thresholds = now.copy()
        thresholds[i] = tried[i]
        expected = reference_error(lm, 1, x, thresholds, positions, error)
        assert got[i] == pytest.approx(expected, rel=1e-4)
    assert got[7] == pytest.approx(reference_error(lm, 1, x, uniform, positions, error), rel=1e-4)


def test_every_step_takes_the_least_error_and_drops_the_same_number_of_weights(lm, calibration):
    path = calibration.path
    moves = np.diff(path.sparsity, axis=1)
    assert ((moves > 0).sum(axis=-1) == 1).all()
    sizes = np.array(lm.config.projection_sizes)
    weighted = path.sparsity @ sizes / sizes.sum()
    np.testing.assert_allclose(weighted, np.tile(path.effective, (2, 1)), atol=1e-9)
    chosen = moves.argmax(axis=-1)
    np.testing.assert_array_equal(chosen, path.candidate_error[:, 1:].argmin(axis=-1))
    np.testing.assert_allclose(path.error[:, 1:], path.candidate_error[:, 1:].min(axis=-1))
    assert path.effective[-1] >= 0.8
    assert path.sparsity.max() <= 1 + 1e-9


def test_the_recorded_errors_are_the_block_errors(lm, calibration):
    row = 12
    thresholds = calibration.thresholds(calibration.path.sparsity[:, row])
    x = weights64(lm)["embed"]["weight"][calibration.tokens]
    positions = Positions(dense=16, scored=8)
    expected = reference_error(lm, 0, x, thresholds[0], positions, "mse")
    assert calibration.path.error[0, row] == pytest.approx(expected, rel=1e-3)
    uniform = calibration.thresholds(calibration.path.effective[row])
    expected = reference_error(lm, 0, x, uniform[0], positions, "mse")
    assert calibration.path.uniform_error[0, row] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("target", [0.0, 0.123, 0.4, 0.65, 0.8])
def test_any_target_is_a_look_up(lm, calibration, target, monkeypatch):
    monkeypatch.setattr("teal_jax.sparsity.methods.greedy.greedy_path", lambda *a, **k: pytest.fail("searched again"))
    plan = teal_jax.allocate(lm, calibration, target, settings=SETTINGS, progress=False)
    assert plan.model_sparsity == pytest.approx(target, abs=1e-9)
    assert plan.method == "greedy"
    np.testing.assert_allclose(calibration.realised(plan.thresholds), plan.sparsity, atol=0.005)


def test_greedy_is_never_worse_than_uniform_on_its_objective(lm, calibration):
    path = calibration.path
    for row in range(1, len(path.effective), 5):
        plan = teal_jax.allocate(lm, calibration, path.effective[row], settings=SETTINGS, progress=False)
        fell_back = plan.notes["allocation"]["uniform_blocks"]
        for layer in range(2):
            if layer in fell_back:
                np.testing.assert_allclose(plan.sparsity[layer], path.effective[row])
            else:
                assert path.error[layer, row] <= path.uniform_error[layer, row]


def test_who_states_no_settings_takes_the_path_there_but_never_another_error(lm, calibration):
    kept = calibration.path
    assert teal_jax.allocate(lm, calibration, 0.3, progress=False).notes["allocation"]["step"] == 0.1
    other = dataclasses.replace(calibration, path=dataclasses.replace(kept, settings=kept.settings | {"error": "teal"}))
    assert teal_jax.allocate(lm, other, 0.3, progress=False).notes["allocation"]["error"] == "mse"
    assert calibration.path is kept


def test_a_worse_block_falls_back_to_uniform_and_says_so(lm, calibration):
    path = calibration.path
    rigged = dataclasses.replace(path, uniform_error=np.stack([path.uniform_error[0], np.zeros_like(path.error[1])]))
    worse = dataclasses.replace(calibration, path=rigged)
    with pytest.warns(UserWarning, match=r"blocks \[1\]"):
        plan = teal_jax.allocate(lm, worse, 0.4, settings=SETTINGS, progress=False)
    np.testing.assert_allclose(plan.sparsity[1], 0.4)
    assert plan.sparsity[0].std() > 0.01
    assert plan.model_sparsity == pytest.approx(0.4)


def test_one_compilation_for_all_layers(lm, calibration):
    from teal_jax.sparsity.greedy import _walk

    before = _walk._cache_size()
    greedy_path(lm, calibration, settings=SETTINGS, progress=False)
    assert _walk._cache_size() == before


def test_the_path_is_saved_with_the_calibration(tmp_path, lm, calibration):
    loaded = Calibration.load(calibration.save(tmp_path / "c.npz"))
    for name in ("sparsity", "effective", "error", "uniform_error", "candidate_error"):
        np.testing.assert_array_equal(getattr(loaded.path, name), getattr(calibration.path, name))
    plan = teal_jax.allocate(lm, loaded, 0.3, settings=SETTINGS, progress=False)
    np.testing.assert_array_equal(
        plan.thresholds, teal_jax.allocate(lm, calibration, 0.3, settings=SETTINGS).thresholds
    )


def test_path_look_up_between_rows():
    sparsity = np.zeros((1, 3, 7))
    sparsity[0, 1, 0] = 0.5
    sparsity[0, 2] = [0.5, 0.5, 0, 0, 0, 0, 0]
    zeros = np.zeros((1, 3))
    path = GreedyPath(sparsity, np.array([0, 0.1, 0.2]), zeros, zeros, np.zeros((1, 3, 7)), {})
    np.testing.assert_allclose(path.at(0.15)[0][0, :2], [0.5, 0.25])
    np.testing.assert_allclose(path.nearest(0.16)[0][0, :2], [0.5, 0.5])
    with pytest.raises(ValueError, match="ends at"):
        path.at(0.3)


def test_wrong_use(lm, calibration):
    with pytest.raises(SparsityError, match="ends at"):
        teal_jax.allocate(lm, calibration, 0.95, settings=SETTINGS, progress=False)
    with pytest.raises(ValueError, match="method"):
        teal_jax.allocate(lm, calibration, 0.4, method="magic")
    with pytest.raises(SparsityError, match=r"\[0, 1\)"):
        teal_jax.allocate(lm, calibration, 1.0)
    with pytest.raises(ValueError, match="step"):
        GreedySettings(step=0)
    with pytest.raises(ValueError, match="error"):
        GreedySettings(error="l7")
    with pytest.raises(ValueError, match="dense_share"):
        GreedySettings(dense_share=0.9, scored_share=0.5)
    short = teal_jax.calibrate(lm, tiny_tokens(2, 3), progress=False)
    with pytest.raises(DataError, match="at least 4 tokens"):
        teal_jax.allocate(lm, short, 0.4, progress=False)


def test_a_plan_farther_from_the_dense_model_than_uniform_is_not_taken(lm, calibration):
    path = calibration.path
    # All in one block, which no search of single blocks would mind.
    uneven = np.stack([np.zeros_like(path.sparsity[0]), np.tile(2 * path.effective[:, None], 7)])
    rigged = dataclasses.replace(path, sparsity=uneven, uniform_error=np.full_like(path.uniform_error, np.inf))
    with pytest.warns(UserWarning, match="uniform sparsity leaves the model nearer"):
        plan = teal_jax.allocate(
            lm, dataclasses.replace(calibration, path=rigged), 0.4, settings=SETTINGS, progress=False
        )
    np.testing.assert_allclose(plan.sparsity, 0.4)
    notes = plan.notes["allocation"]["model"]
    assert notes["taken"] == "uniform"
    assert notes["divergence"]["uniform"] < notes["divergence"]["greedy"]
