import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest

import teal_jax
from teal_jax import artifact
from teal_jax.errors import ArtifactError, PlanError
from teal_jax.sparsity.statistics import Calibration
from tests.reference import tiny_model, tiny_tokens


@pytest.fixture(scope="module")
def sparse():
    lm = tiny_model(dtype="bfloat16")
    calibration = teal_jax.calibrate(lm, tiny_tokens(4, 32), progress=False)
    return lm.sparsify(teal_jax.allocate(lm, calibration, 0.4, method="uniform")), calibration


def same_weights(a, b):
    return all(
        left.dtype == right.dtype and np.array_equal(left, right)
        for left, right in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True)
    )


def test_reload_gives_identical_logits(tmp_path, sparse):
    lm, calibration = sparse
    artifact.save(lm, tmp_path / "model", calibration=calibration)
    loaded = teal_jax.load(tmp_path / "model")
    assert same_weights(lm, loaded)
    assert loaded.config == lm.config
    np.testing.assert_array_equal(loaded.plan.thresholds, lm.plan.thresholds)
    tokens = tiny_tokens(2, 16)
    np.testing.assert_array_equal(loaded.logits(tokens), lm.logits(tokens))
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "calibration.npz",
        "params",
        "sparsity_plan.json",
        "teal.json",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_dense_model_reloads_dense(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lm = tiny_model()
    lm.save("relative")
    assert teal_jax.load("relative").plan is None
    assert teal_jax.load("relative", dtype="bfloat16").dtype == "bfloat16"


def test_a_new_target_needs_no_new_pass(tmp_path, sparse, monkeypatch):
    lm, calibration = sparse
    artifact.save(lm, tmp_path / "model", calibration=calibration)
    monkeypatch.setattr("teal_jax.loading.calibrate", lambda *a, **k: pytest.fail("calibrated again"))
    other = teal_jax.load_and_sparsify(tmp_path / "model", 0.6, method="uniform", progress=False)
    assert other.plan.target == 0.6


def test_overwriting_is_asked_for(tmp_path, sparse):
    lm, _ = sparse
    lm.save(tmp_path / "model")
    with pytest.raises(ArtifactError, match="exists"):
        lm.dense().save(tmp_path / "model")
    assert teal_jax.load(tmp_path / "model").plan is not None
    lm.dense().save(tmp_path / "model", overwrite=True)
    assert teal_jax.load(tmp_path / "model").plan is None
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / "photos").mkdir()
    with pytest.raises(ArtifactError, match="not a saved model"):
        lm.save(tmp_path / "photos", overwrite=True)


def test_a_failing_save_leaves_the_old_artifact_and_nothing_else(tmp_path, sparse, monkeypatch):
    lm, calibration = sparse
    lm.save(tmp_path / "model")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Calibration, "save", full)
    with pytest.raises(ArtifactError, match="the disk is full"):
        artifact.save(lm.dense(), tmp_path / "model", calibration=calibration, overwrite=True)
    with pytest.raises(ArtifactError, match="the disk is full"):
        artifact.save(lm.dense(), tmp_path / "new", calibration=calibration)
    assert teal_jax.load(tmp_path / "model").plan is not None
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_too_little_space_is_said_before_writing(tmp_path, sparse, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("teal_jax.artifact.shutil.disk_usage", lambda _: usage)
    with pytest.raises(ArtifactError, match="GB needed"):
        sparse[0].save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_orbax_writes(tmp_path):
    """For real: the process may not write files beyond 64 kB."""
    script = """
        import resource, signal, sys
        import teal_jax
        from teal_jax.config import ModelConfig
        config = ModelConfig(vocab_size=4096, d_model=64, d_mlp=64, num_layers=1, num_heads=2, num_kv_heads=2,
                             head_dim=32, max_position=64, norm_eps=1e-5)
        lm = teal_jax.random_model(config)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
        try:
            lm.save(sys.argv[1])
        except teal_jax.TealError as error:
            print("refused:", error)
    """
    result = run(script, tmp_path / "model")
    assert "refused: cannot save to" in result.stdout, result.stderr
    assert not list(tmp_path.iterdir())


def run(script, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=300, check=False)


def environment():
    root = os.fspath(artifact.Path(__file__).parents[2])
    return os.environ | {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}


def test_killed_in_the_middle_of_a_save(tmp_path, sparse):
    lm, _ = sparse
    lm.save(tmp_path / "old")
    script = """
        import sys, time
        import teal_jax
        from teal_jax import artifact
        lm = teal_jax.load(sys.argv[1])
        original = artifact._card
        def slow(lm):
            print("writing", flush=True)
            time.sleep(60)
        artifact._card = slow
        artifact.save(lm.dense(), sys.argv[2], overwrite=True)
    """
    for target in ("old", "new"):
        command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "old"), str(tmp_path / target)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) as process:
            assert process.stdout.readline() == "writing\n"
            time.sleep(0.1)
            process.send_signal(signal.SIGKILL)
    assert teal_jax.load(tmp_path / "old").plan is not None
    assert not (tmp_path / "new").exists()
    lm.save(tmp_path / "new")  # what the kill left aside is in nobody's way
    assert teal_jax.load(tmp_path / "new").plan is not None


@pytest.fixture
def saved(tmp_path, sparse):
    return artifact.save(sparse[0], tmp_path / "model")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_newer_versions(saved):
    edit(saved / "teal.json", format_version=99)
    with pytest.raises(ArtifactError, match="upgrade teal_jax"):
        teal_jax.load(saved)
    edit(saved / "teal.json", format_version=1)
    edit(saved / "sparsity_plan.json", format_version=99)
    with pytest.raises(PlanError, match="upgrade teal_jax"):
        teal_jax.load(saved)


def test_broken_artifacts(saved):
    (saved / "sparsity_plan.json").unlink()
    with pytest.raises(PlanError, match="no plan"):
        teal_jax.load(saved)
    (saved / "teal.json").write_text("{")
    with pytest.raises(ArtifactError, match="broken"):
        teal_jax.load(saved)
    (saved / "teal.json").write_text('{"format_version": 1}')
    with pytest.raises(ArtifactError, match="lacks"):
        teal_jax.load(saved)


def test_missing_weights(saved):
    shutil.rmtree(saved / "params")
    with pytest.raises(ArtifactError, match="cannot be read"):
        teal_jax.load(saved)


def test_weights_of_another_shape(saved):
    manifest = json.loads((saved / "teal.json").read_text())
    edit(saved / "teal.json", model_config=manifest["model_config"] | {"d_mlp": 96})
    with pytest.raises(ArtifactError, match="cannot be read"):
        teal_jax.load(saved)
