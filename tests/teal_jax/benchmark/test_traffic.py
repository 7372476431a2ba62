import dataclasses

import pytest

from pallas_kernels.workloads import WORKLOADS
from teal_jax.benchmark.shapes import shape_config, workload_config
from teal_jax.benchmark.traffic import limit, token_bytes
from teal_jax.errors import ModelNotFoundError
from teal_jax.memory import cache_bytes
from tests.teal_jax.benchmark.tiny import CONFIG

BILLIONS = {"llama-2-7b": 6.74, "llama-3-8b": 8.03, "llama-3-70b": 70.55, "mistral-7b": 7.24, "llama-3.2-1b": 1.24}


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_have_the_published_sizes(name):
    workload = WORKLOADS[name]
    config = workload_config(workload)
    assert config.num_params / 1e9 == pytest.approx(BILLIONS[name], abs=0.006)
    assert tuple(workload.projection_shapes.values()) == config.projection_shapes
    assert shape_config(name) == (name, config)


def test_a_checkpoint_is_a_shape_too(fixtures):
    name, config = shape_config(str(fixtures / "tiny_mistral"))
    assert name == "tiny_mistral"
    assert config.model_type == "mistral"
    with pytest.raises(ModelNotFoundError, match="llama-9"):
        shape_config("llama-9")


def test_bytes_of_a_token():
    config = workload_config(WORKLOADS["llama-3-8b"])
    blocks = 32 * (4096 * (4096 * 2 + 2 * 1024) + 3 * 4096 * 14336)
    head = 128256 * 4096
    assert token_bytes(config, 2, 0.0, range(1)) == 2 * (blocks + head)
    assert token_bytes(config, 2, 0.5, range(1)) == 2 * (blocks / 2 + head)
    cache = 2 * 2 * 32 * 8 * 128
    assert cache_bytes(config, 2, 512) == 512 * cache
    assert token_bytes(config, 2, 0.0, range(384, 512)) == 2 * (blocks + head) + 447.5 * cache
    assert limit(config, 2, 0.0, range(1), 2 * (blocks + head)) == 1
    assert token_bytes(config, 2, 0.0, range(1), {"lm_head.weight": "int8"}) == 2 * blocks + head + 4 * 128256


def test_a_window_bounds_the_cache():
    windowed = dataclasses.replace(CONFIG, sliding_window=8)
    assert cache_bytes(windowed, 2, 100) == cache_bytes(CONFIG, 2, 8)
