"""The sweep on a real trained model: what must hold of any method on any text."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


def evaluate(path, model, test, train, *options):
    # A process of its own: what compiles fast, as the tests do, runs slowly, and here running is most.
    command = ["eval", model, "--data", test, "--calibration-data", train, "-o", path, "--quiet", *options]
    subprocess.run(
        [sys.executable, "-m", "teal_jax.cli", *map(str, command)],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"},
        check=True,
    )
    return json.loads((path / "report.json").read_text())


@pytest.mark.slow
def test_a_sweep(shared, tmp_path):
    data = shared / "data"
    text, train = data / "text" / "tinystories_test.jsonl", data / "text" / "tinystories_train_2MB_sample.txt"
    options = ("--max-tokens", 8000, "--context", 128, "--window", 128, "-s", "0.4,0.6", "--dtype", "float32")
    report = evaluate(tmp_path / "run", data / "models" / "stories260K", text, train, *options)
    dense, *rows = report["rows"]
    assert dense["ppl"] == pytest.approx(3.94, rel=0.1)
    # Bits per byte of the dense model by another road: bits a token over bytes a token.
    assert dense["bits_per_byte"] == pytest.approx(
        np.log2(dense["ppl"]) * report["text"]["tokens"] / report["text"]["bytes"], rel=1e-6
    )
    assert [(row["method"], row["target"]) for row in rows] == [
        ("greedy", 0.4),
        ("uniform", 0.4),
        ("greedy", 0.6),
        ("uniform", 0.6),
    ]
    assert all(row["reached"] for row in rows)
    for low, high in ((rows[0], rows[2]), (rows[1], rows[3])):
        assert low["ppl"] < high["ppl"]
        assert low["kl"] < high["kl"]
        assert low["agreement"] > high["agreement"]
        assert low["weight_bytes"] > high["weight_bytes"]
    for greedy, uniform in ((rows[0], rows[1]), (rows[2], rows[3])):
        assert greedy["ppl"] < uniform["ppl"]
    # On its own text a model's excess and its divergence are the same thing, up to the text's noise.
    for row in rows:
        assert np.log(row["ratio"]) == pytest.approx(row["kl"], rel=0.4)
        assert row["depth_error"] == sorted(row["depth_error"])
    # TEAL, figure 2: what enters down is Laplace-like.
    assert {fit["better"] for fit in report["activations"] if fit["site"] == "mlp_hidden"} == {"laplace"}
