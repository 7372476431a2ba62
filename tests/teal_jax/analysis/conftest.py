import numpy as np
import pytest

import teal_jax
from teal_jax.analysis.cost import constant
from teal_jax.analysis.forward import KEEP_ALL, Limits, score, threshold_step
from teal_jax.analysis.rows import Rows
from tests.reference import tiny_model, tiny_tokens


@pytest.fixture(scope="package")
def lm():
    return tiny_model(scale=3.0)


@pytest.fixture(scope="package")
def calibration(lm):
    return teal_jax.calibrate(lm, tiny_tokens(8, 24, seed=1), progress=False)


@pytest.fixture(scope="package")
def plans(lm, calibration):
    return [teal_jax.allocate(lm, calibration, share, method="uniform") for share in (0.3, 0.6)]


@pytest.fixture(scope="package")
def rows():
    return Rows(tiny_tokens(4, 20, seed=2), 8, "tokens")


@pytest.fixture(scope="package")
def dense(lm, rows):
    nothing = Limits(constant(lm.config, KEEP_ALL), np.full(lm.config.num_layers, KEEP_ALL, np.float32))
    return score(lm, rows, threshold_step, nothing)
