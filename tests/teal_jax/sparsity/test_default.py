"""Which method is taken where none is named, and why not the best one."""

import dataclasses

import numpy as np
import pytest

from teal_jax.benchmark.shapes import shape_config
from teal_jax.config import SITES
from teal_jax.model import LanguageModel
from teal_jax.sparsity.default import LEAST_TOKENS, default_method, learning_bytes
from teal_jax.sparsity.histogram import NUM_BINS
from teal_jax.sparsity.statistics import Calibration

GIB = 2**30


@pytest.fixture
def config():
    return shape_config("llama-3-8b")[1]


@pytest.fixture
def lm(config):
    weight = np.zeros((1, 1), np.float16)  # only its dtype is looked at
    return LanguageModel(config=config, params={"weights": {"embed": {"weight": weight}}})


def calibration(config, rows, seq=2048):
    counts = np.zeros((config.num_layers, len(SITES), NUM_BINS), np.int64)
    return Calibration(config=config, counts=counts, tokens=np.zeros((rows, seq), np.int32), notes={})


def test_learned_where_it_fits(lm, config):
    assert default_method(lm, calibration(config, 10), free=8 * GIB) == ("learned", None)
    assert default_method(lm, calibration(config, 10)) == ("learned", None)  # a CPU does not say


def test_greedy_says_why(lm, config):
    method, reason = default_method(lm, calibration(config, 10), free=GIB)
    assert method == "greedy"
    assert reason is not None
    assert reason.endswith("GiB beside the weights, 1.0 are free")
    method, reason = default_method(lm, calibration(config, 3), free=8 * GIB)
    assert (method, reason) == ("greedy", f"learned needs {LEAST_TOKENS:,} calibration tokens, got 6,144")


def test_bytes_are_above_what_xla_plans(config):
    """XLA's plans for an H200, in GiB, of a step and of counting: compiled ahead of time for 8 and for 2 layers."""
    assert 2.12 < learning_bytes(dataclasses.replace(config, num_layers=8), 2, 2048) / GIB < 2 * 3.21
    assert 1.78 < learning_bytes(dataclasses.replace(config, num_layers=2), 2, 256) / GIB < 2 * 1.78
