import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from teal_jax.errors import TrainingError
from teal_jax.training.settings import TrainSettings, learning_rates, make_optimizer


def by_hand(schedule, step, *, peak=1.0, warmup=4, steps=20, final=0.1):
    if step < warmup:
        return peak * (1 + step * warmup / warmup) / (warmup + 1)
    done = (step - warmup) / (steps - warmup)
    shares = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "constant": None}
    share = shares[schedule]
    return peak if share is None else peak * (final + (1 - final) * share)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_learning_rates(schedule):
    settings = TrainSettings(steps=20, warmup=4, learning_rate=1.0, schedule=schedule)
    rates = learning_rates(settings)
    found = [float(rates(step)) for step in range(20)]
    np.testing.assert_allclose(found, [by_hand(schedule, step) for step in range(20)], rtol=1e-5)


def test_without_a_warm_up_the_first_step_has_the_peak():
    assert float(learning_rates(TrainSettings(steps=5, warmup=0, learning_rate=0.5))(0)) == 0.5


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 0},
        {"batch": 0},
        {"seq_len": 0},
        {"accumulate": 3, "batch": 8},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"clip": 0.0},
        {"weight_decay": -1.0},
        {"beta2": 1.0},
        {"distil": 1.5},
        {"final_rate": -0.1},
        {"warmup": 11, "steps": 10},
        {"schedule": "sawtooth"},
        {"dtype": "float16"},
        {"attention": "by hand"},
        {"attention": "cudnn", "dtype": "float32"},
    ],
    ids=str,
)
def test_refused(values):
    with pytest.raises(TrainingError, match=next(iter(values))):
        TrainSettings(**values)


def test_as_a_dict():
    settings = TrainSettings(steps=7)
    assert TrainSettings(**settings.to_dict()) == settings == dataclasses.replace(settings)


@pytest.mark.parametrize("clip", [1.0, None])
def test_a_gradient_is_clipped_to_its_norm(clip):
    weights = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
    slope = {"a": jnp.full((2, 2), 6.0), "b": jnp.full(2, 5.0)}
    optimizer = make_optimizer(TrainSettings(clip=clip))
    _, state = optimizer.update(slope, optimizer.init(weights), weights)
    norm = np.sqrt(4 * 36 + 2 * 25) if clip else 1
    for found, given in zip(jax.tree.leaves(optax.tree.get(state, "mu")), jax.tree.leaves(slope), strict=True):
        np.testing.assert_allclose(found, 0.1 * given / norm, rtol=1e-6)
