import types

import jax
import pytest
from jax.experimental.pallas import triton

from pallas_kernels import support


@pytest.fixture
def device(monkeypatch):
    """Pretends that jax runs on a GPU with these attributes."""

    def pretend(**attributes):
        gpu = types.SimpleNamespace(device_kind="some card", **attributes)
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        monkeypatch.setattr(jax, "devices", lambda *_: [gpu])

    support._device_reason.cache_clear()
    yield pretend
    support._device_reason.cache_clear()


def test_no_gpu_is_no_surprise(monkeypatch, recwarn):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert support.why_not() == "there is no GPU, jax runs on cpu"
    assert not recwarn


@pytest.mark.parametrize("capability", ["8.0", "8.9", "9.0", "10.0", "12.0"])
def test_ampere_and_later(device, capability, recwarn):
    device(compute_capability=capability)
    assert support.why_not() is None
    assert not recwarn


@pytest.mark.parametrize("attributes", [{"compute_capability": "7.5"}, {}], ids=str)
def test_an_old_gpu_is_warned_of_once(device, attributes, recwarn):
    device(**attributes)
    for _ in range(3):
        assert "some card has compute capability" in support.why_not()
    assert len(recwarn) == 1
    assert "XLA reads every weight" in str(recwarn[0].message)


@pytest.mark.parametrize("gone", ["CompilerParams", "atomic_add"])
def test_a_jax_without_the_backend(device, monkeypatch, gone):
    device(compute_capability="9.0")
    monkeypatch.delattr(triton, gone)
    assert not support.backend_available()
    with pytest.warns(UserWarning, match="no Pallas-Triton backend"):
        assert jax.__version__ in support.why_not()


def test_this_jax_has_the_backend():
    assert support.backend_available()


def test_a_gpu_of_another_maker(device):
    device(compute_capability="gfx942")
    with pytest.warns(UserWarning, match="some card"):
        assert "gfx942" in support.why_not()
