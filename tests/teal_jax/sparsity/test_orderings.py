"""An ordering that TEAL claims on comparable terms (section 5.2), on a trained model."""

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

    def of(method, target):
        sparse = lm.sparsify(teal_jax.allocate(lm, calibration, target, method=method, progress=False))
        text = texts / "tinystories_test.jsonl"
        return teal_jax.perplexity(sparse, text, context=128, window=128, max_tokens=768, progress=False).nll

    return of


def test_all_projections_a_little_beat_three_of_seven(loss):
    assert loss("uniform", 0.4) < loss("cats", 0.4) - 0.03
