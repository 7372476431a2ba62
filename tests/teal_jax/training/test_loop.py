import csv
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from teal_jax.errors import DataError, TrainingError
from teal_jax.loading import load
from teal_jax.training import loop
from teal_jax.training.loop import train
from teal_jax.training.run_record import Log, read_log
from teal_jax.training.sparsity import q_sparse_plan
from tests.teal_jax.training.test_sparsity import threshold_plan
from tests.teal_jax.training.tiny import SETTINGS, model, token_file

PLAN = q_sparse_plan(model(), 0.5)


class Killed(Exception):
    pass


def kill_after(step):
    def listen(row):
        if row["step"] == step:
            raise Killed

    return listen


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    return token_file(tmp_path_factory.mktemp("tokens") / "a.tokens")


def start(tokens, directory, settings=SETTINGS, **options):
    options = {"plan": PLAN, "save_every": 3, "progress": False, "devices": 1} | options
    return train(model(), tokens, directory, settings=settings, **options)


@pytest.fixture(scope="module")
def whole(tokens, tmp_path_factory):
    return start(tokens, tmp_path_factory.mktemp("whole") / "run")


def losses(run):
    return [row["loss"] for row in run.log]


def test_it_learns_and_says_so(whole):
    assert [row["step"] for row in whole.log] == list(range(1, 7))
    assert losses(whole)[-1] < losses(whole)[0]
    assert all(row["sparsity"] == pytest.approx(PLAN.target, abs=1e-6) for row in whole.log)
    assert {path.name for path in whole.directory.iterdir()} >= {"run.json", "log.csv", "loss.png", "model"}
    assert (whole.directory / "loss.png").stat().st_size > 5000


@pytest.mark.parametrize("step", [1, 4])
def test_killed_it_goes_on_with_the_same_losses(whole, tokens, tmp_path, step):
    with pytest.raises(Killed):
        start(tokens, tmp_path / "run", listen=kill_after(step))
    resumed = start(tokens, tmp_path / "run", resume=True)
    assert losses(resumed) == losses(whole)
    for a, b in zip(*(jax.tree.leaves(run.lm.params["weights"]) for run in (whole, resumed)), strict=True):
        assert (np.asarray(a) == np.asarray(b)).all()


def test_what_was_trained_decodes_under_its_gates(whole):
    loaded = load(whole.directory / "model", progress=False)
    assert loaded.plan.gate == "top_k"
    assert loaded.plan.notes["training"]["steps"] == 6
    prompt = np.arange(5)[None]
    expected = whole.lm.logits(prompt)
    assert (np.asarray(loaded.logits(prompt)) == np.asarray(expected)).all()
    assert loaded.plan.trained is not None


def test_another_configuration_is_refused_and_nothing_overwritten(whole, tokens, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in whole.directory.rglob("*")}
    with pytest.raises(TrainingError, match="holds a run"):
        start(tokens, whole.directory)
    for changes in ({"learning_rate": 0.02}, {"seed": 1}, {"steps": 7}):
        with pytest.raises(TrainingError, match=f"settings.{next(iter(changes))} was"):
            start(tokens, whole.directory, dataclasses.replace(SETTINGS, **changes), resume=True)
    with pytest.raises(TrainingError, match="plan"):
        start(tokens, whole.directory, plan=q_sparse_plan(model(), 0.75), resume=True)
    other = token_file(tmp_path / "b.tokens", [(np.arange(300) % 64, None)])
    with pytest.raises(TrainingError, match=r"tokens\.digest was"):
        start(other, whole.directory, resume=True)
    assert {path: path.stat().st_mtime_ns for path in whole.directory.rglob("*")} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(TrainingError, match="exists and holds no run"):
            start(tokens, tmp_path / "mine", resume=resume)


@pytest.mark.parametrize(("bad", "good"), [(5, 3), (4, None)])
def test_not_a_number_stops_with_the_last_good_checkpoint(whole, tokens, tmp_path, monkeypatch, bad, good):
    real = loop.make_program

    def poisoned(*arguments):
        program = real(*arguments)

        def step(state, *inputs):
            # From here on as after an update that overflowed: step 4 begins with the weights of checkpoint 3.
            if int(state["step"]) == bad - 1:
                state["weights"]["final_norm"]["weight"] *= jnp.nan
            return program.step(state, *inputs)

        return program._replace(step=step)

    monkeypatch.setattr(loop, "make_program", poisoned)
    said = f"checkpoint is that of step {good}, its model in" if good else "no good checkpoint yet"
    with pytest.raises(TrainingError, match=rf"step {bad}: the loss is nan, .*{said}"):
        start(tokens, tmp_path / "run")
    assert [row["loss"] for row in read_log(tmp_path / "run" / "log.csv")] == losses(whole)[: bad - 1]
    if good:
        saved = load(tmp_path / "run" / "model", progress=False)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved.params["weights"]))


def test_bad_input(tokens, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(TrainingError, match="seq_len must lie in"):
        start(tokens, run, dataclasses.replace(SETTINGS, seq_len=33))
    with pytest.raises(TrainingError, match="save_every"):
        start(tokens, run, save_every=0)
    with pytest.raises(TrainingError, match="cudnn needs an NVIDIA GPU, here is a cpu"):
        start(tokens, run, dataclasses.replace(SETTINGS, attention="cudnn", dtype="bfloat16"))
    with pytest.raises(TrainingError, match="devices must lie in"):
        start(tokens, run, devices=1000)
    with pytest.raises(DataError, match="one row needs"):
        start(token_file(tmp_path / "s.tokens", [(np.arange(5), None)]), run)

    class Other:
        fingerprint = "of another"

    with pytest.raises(DataError, match="another tokenizer"):
        train(dataclasses.replace(model(), tokenizer=Other()), tokens, run, settings=SETTINGS, progress=False)
    assert not run.exists()


def test_thresholds_keep_their_share(tokens, tmp_path):
    settings = dataclasses.replace(SETTINGS, steps=40)
    found = start(tokens, tmp_path / "run", settings, plan=threshold_plan(0.01, 0.4), save_every=40)
    assert found.log[0]["sparsity"] < 0.3
    assert found.log[-1]["sparsity"] == pytest.approx(0.4, abs=0.05)
    assert (found.lm.plan.thresholds != np.float32(0.01)).all()


def test_a_line_cut_short_is_dropped(tmp_path):
    path = tmp_path / "log.csv"
    log = Log(path, done=0)
    for step in range(1, 5):
        log.write(step=step, tokens=10, loss=0.5)
    log.close()
    with path.open("a") as file:
        file.write("5,1")
    assert [row["step"] for row in read_log(path)] == [1, 2, 3, 4]
    Log(path, done=2).close()
    assert [row["step"] for row in csv.DictReader(path.open())] == ["1", "2"]


def test_a_watcher_sees_the_model_of_its_step(whole, tokens, tmp_path):
    seen = {}
    start(tokens, tmp_path / "run", watch=lambda step, lm: seen.update({step: lm}), watch_every=4)
    assert list(seen) == [4, 6]
    prompt = np.arange(5)[None]
    assert (np.asarray(seen[6].logits(prompt)) == np.asarray(whole.lm.logits(prompt))).all()
    assert (np.asarray(seen[4].logits(prompt)) != np.asarray(seen[6].logits(prompt))).any()
    assert seen[4].plan.gate == "top_k"
    with pytest.raises(TrainingError, match="watch_every"):
        start(tokens, tmp_path / "other", watch_every=0)
