"""Orderings that papers claim on comparable terms, on a trained model."""

import functools
import warnings

import pytest

import teal_jax


@pytest.fixture(scope="module")
def loss(shared):
    """`(method, target)` to log perplexity, every token thinned."""
    lm = teal_jax.load(shared / "data" / "models" / "stories260K", dtype="float32", progress=False)
    texts = shared / "data" / "text"
    calibration = teal_jax.calibrate(
        lm, texts / "tinystories_train_2MB_sample.txt", num_tokens=4096, seq_len=256, progress=False
    )

    @functools.cache
    def of(method, target):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # top-k gates round to whole channels
            sparse = lm.sparsify(teal_jax.allocate(lm, calibration, target, method=method, progress=False))
        text = texts / "tinystories_test.jsonl"
        return teal_jax.perplexity(sparse, text, context=128, window=128, max_tokens=768, progress=False).nll

    return of


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        pytest.param("wina", "top_k", id="the norm of the row helps the score (WINA)", marks=pytest.mark.slow),  # sorts
        pytest.param("uniform", "cats", id="all projections a little beat three of seven (TEAL)"),
    ],
)
def test_orderings(loss, better, worse):
    assert loss(better, 0.4) < loss(worse, 0.4) - 0.03
