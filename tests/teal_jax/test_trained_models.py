"""Real trained Llamas: what others measured on them, from the checkpoint to the perplexity of a sparse model."""

import json

import numpy as np
import pytest

import teal_jax
from teal_jax.data import tokenize

# Perplexity at context 256 on the TinyStories test set, and its ratio to dense under uniform thresholds at 25 and
# 40 %, measured with other code; see the data folder's README.
MEASURED = {"stories260K": (3.94, 1.039, 1.24), "stories3M": (3.91, 1.085, 1.52)}


@pytest.mark.parametrize("name", MEASURED)
def test_perplexity_dense_and_uniform(shared, name):
    data = shared / "data"
    lm = teal_jax.load(data / "models" / name, dtype="float32", progress=False)
    lines = (data / "text" / "tinystories_test.jsonl").read_text(encoding="utf-8").splitlines()
    stream = np.concatenate(tokenize(lm, [json.loads(line) for line in lines[:120]]))
    rows = stream[: len(stream) // 256 * 256].reshape(-1, 256)[:80]
    calibration = teal_jax.calibrate(
        lm, data / "text" / "tinystories_train_2MB_sample.txt", num_tokens=16384, seq_len=256, progress=False
    )
    dense, *ratios = MEASURED[name]
    score = lambda lm: teal_jax.perplexity(lm, rows, context=192, window=64, progress=False)  # noqa: E731
    found = score(lm)
    assert found.num_tokens == 80 * 255
    assert found.ppl == pytest.approx(dense, rel=0.05)
    for target, ratio in zip((0.25, 0.4), ratios, strict=True):
        sparse = score(lm.sparsify(teal_jax.allocate(lm, calibration, target, method="uniform")))
        assert sparse.realised_sparsity == pytest.approx(target, abs=0.015)
        assert np.log(sparse.ppl / found.ppl) == pytest.approx(np.log(ratio), rel=0.15)
