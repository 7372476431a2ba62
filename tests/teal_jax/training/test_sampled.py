import dataclasses

import numpy as np
import pytest

import teal_jax
from teal_jax.decode.sampling import Sampling
from teal_jax.errors import DataError, TrainingError
from teal_jax.training.order import num_rows
from teal_jax.training.sampled import sample_tokens
from tests.teal_jax.training.tiny import model


def bos_model():
    lm = model()
    return dataclasses.replace(lm, config=dataclasses.replace(lm.config, bos_token_id=1, eos_token_ids=(2,)))


def test_rows_are_what_the_model_samples_from_its_begin_token(tmp_path):
    lm = bos_model()
    tokens = sample_tokens(lm, tmp_path / "own.tokens", rows=5, length=6, batch=3, seed=4, progress=False)
    written = np.asarray(tokens.tokens).reshape(5, 6)
    assert (written[:, 0] == 1).all()
    alone = teal_jax.generate(lm, [1], max_new_tokens=5, sampler=Sampling(), seed=4 + 3, ignore_eos=True)
    assert written[3, 1:].tolist() == list(alone.tokens)
    assert num_rows(tokens, 6) == 4  # the last one has no token after it
    assert len({tuple(row) for row in written.tolist()}) == 5
    with pytest.raises(DataError, match="exists"):
        sample_tokens(lm, tmp_path / "own.tokens", rows=5, length=6, batch=3, progress=False)


def test_what_cannot_be_sampled(tmp_path):
    with pytest.raises(TrainingError, match="no begin token"):
        sample_tokens(model(), tmp_path / "a.tokens", rows=1, length=4)
    for wrong in ({"rows": 0}, {"length": 1}, {"length": 33}, {"batch": 0}):
        with pytest.raises(DataError, match="length lie in"):
            sample_tokens(bos_model(), tmp_path / "a.tokens", **({"rows": 1, "length": 4} | wrong))
