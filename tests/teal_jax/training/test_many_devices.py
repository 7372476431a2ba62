"""Four devices of the host in a process of their own: as many as there are is fixed when jax starts."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from teal_jax.training.run_record import read_log
from tests.teal_jax.training.test_loop import losses, start
from tests.teal_jax.training.tiny import token_file

ROOT = Path(__file__).resolve().parents[3]
PROGRAM = """
import dataclasses, os, signal, sys
from pathlib import Path

import jax

from teal_jax.training.devices import make_mesh
from teal_jax.training.step import make_program
from teal_jax.training.token_file import open_token_file
from tests.teal_jax.training.test_loop import start
from tests.teal_jax.training.tiny import CONFIG, SETTINGS, model

here = Path(sys.argv[1])
tokens = open_token_file(here / "a.tokens")
in_parts = dataclasses.replace(SETTINGS, accumulate=2, remat=True)
start(tokens, here / "copies", in_parts, devices=None)

state = make_program(CONFIG, SETTINGS, make_mesh(), True).start(model().params["weights"], None)
shares = {leaf.addressable_shards[0].data.size / leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim}
assert len(jax.devices()) == 4 and shares == {0.25}, shares

def kill(row):
    if row["step"] == 4:
        os.kill(os.getpid(), signal.SIGKILL)

start(tokens, here / "shares", devices=None, fully_sharded=True, listen=kill)
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A directory with a run of copies, in parts and with remat, and a fully sharded one, killed after a checkpoint."""
    directory = tmp_path_factory.mktemp("runs")
    token_file(directory / "a.tokens")
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    flags += " --xla_backend_optimization_level=0"  # compiles in half the time
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROGRAM, str(directory)]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == -signal.SIGKILL, run.stderr[-3000:]
    return directory


def test_one_code_for_one_device_and_for_four(runs, tmp_path):
    tokens = token_file(tmp_path / "a.tokens")
    alone = start(tokens, tmp_path / "alone")
    # Neither parts nor blocks computed twice change what is computed.
    copies = [row["loss"] for row in read_log(runs / "copies" / "log.csv")]
    np.testing.assert_allclose(copies, losses(alone), rtol=1e-5)
    # What four devices began and a kill ended goes on here on one: the checkpoint knows no devices.
    resumed = start(tokens, runs / "shares", resume=True)
    np.testing.assert_allclose(losses(resumed), losses(alone), rtol=1e-5)
    assert (runs / "shares" / "checkpoints" / "3").is_dir()
