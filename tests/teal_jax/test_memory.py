"""What does not fit the device is refused before its weights are read, and compiled programs are kept on a GPU only."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.workloads import WORKLOADS
from teal_jax import compilation_cache, loading, memory
from teal_jax.benchmark.shapes import workload_config
from teal_jax.errors import DeviceMemoryError

GIB = 1 << 30
CONFIG = workload_config(WORKLOADS["llama-3-8b"])


def test_what_a_model_needs_is_its_weights_its_cache_and_a_tenth():
    cache = 2 * 2 * 32 * 8 * 128  # keys and values, 2 bytes, 32 layers, 8 heads of 128
    assert memory.cache_bytes(CONFIG, 2, 512) == 512 * cache
    assert memory.needed_bytes(CONFIG, 2, 512) == round(1.1 * (2 * CONFIG.num_params + 512 * cache))
    windowed = dataclasses.replace(CONFIG, sliding_window=8)
    assert memory.cache_bytes(windowed, 2, 100) == 8 * cache


def test_a_model_that_fits():
    memory.check_fits(CONFIG, free=18 * GIB)
    memory.check_fits(CONFIG, jnp.float32, free=35 * GIB)


def test_a_model_that_does_not_fit_says_how_much_it_needs_and_what_would():
    with pytest.raises(DeviceMemoryError, match=r"8\.03G weights of 16 bits need 17\.0 GiB .* has 16\.0 GiB") as error:
        memory.check_fits(CONFIG, free=16 * GIB)
    assert "llama-2-7b" in error.value.hint
    with pytest.raises(DeviceMemoryError, match=r"32 bits need 34\.0 GiB"):
        memory.check_fits(CONFIG, jnp.float32, free=18 * GIB)
    with pytest.raises(DeviceMemoryError, match="131072 tokens"):
        memory.check_fits(CONFIG, context=131072, free=18 * GIB)
    with pytest.raises(DeviceMemoryError, match=r"8\.03G") as error:
        memory.check_fits(CONFIG, free=GIB)
    assert "none of the aliases" in error.value.hint


def test_nothing_is_read_where_it_does_not_fit(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 1 << 20)
    monkeypatch.setattr("converters.read_params", lambda *_, **__: pytest.fail("the weights were read"))
    with pytest.raises(DeviceMemoryError, match=r"0\.01G weights"):
        loading.load("embedded")


def test_a_cpu_does_not_say():
    if jax.default_backend() == "cpu":
        assert memory.free_bytes() is None
        memory.check_fits(CONFIG)


def test_programs_are_kept_on_a_gpu_where_nobody_chose_a_place(monkeypatch, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        if jax.default_backend() == "cpu":
            assert compilation_cache.enable() is None
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        jax.config.update("jax_compilation_cache_dir", None)
        assert compilation_cache.enable() == tmp_path / "teal_jax" / "programs"
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "teal_jax" / "programs")
        jax.config.update("jax_compilation_cache_dir", "chosen")
        assert compilation_cache.enable() is None
        assert jax.config.jax_compilation_cache_dir == "chosen"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
