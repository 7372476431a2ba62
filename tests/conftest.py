"""Where the tests run: the CPU unless there is a CUDA device, and never on the network unless asked for."""

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def _cuda_here() -> bool:
    # Not asked of jax: importing it would fix its platform before it can be set.
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    driver = Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi")
    return bool(driver) and any(importlib.util.find_spec(name) for name in plugins)


def _network_asked(config: pytest.Config) -> bool:
    return "network" in config.option.markexpr


def _compile_quickly(config: pytest.Config) -> None:
    """Nearly all of the time is XLA's: no slow passes, and one compilation of a program for all the workers."""
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:  # also in the workers, which inherit it
        return
    programs = tempfile.mkdtemp(prefix="teal-jax-tests-")
    config.add_cleanup(lambda: shutil.rmtree(programs, ignore_errors=True))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")  # smaller ones cost more to keep


def pytest_configure(config: pytest.Config) -> None:
    # Before any test module is imported: jax and huggingface_hub read these once.
    if not os.environ.get("TEAL_TEST_GPU") and not _cuda_here():
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        _compile_quickly(config)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # several workers share one GPU
    os.environ.setdefault("MPLBACKEND", "Agg")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if not _network_asked(config):
        os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if _network_asked(config):
        return
    networked = [item for item in items if item.get_closest_marker("network")]
    if networked:
        config.hook.pytest_deselected(items=networked)
        items[:] = [item for item in items if item not in networked]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import jax

        if jax.default_backend() != "gpu":
            pytest.skip(f"needs a CUDA device, jax runs on {jax.default_backend()}")


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The committed test data."""
    return Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The project's shared folder beside the checkout (or TEAL_SHARED), with data too large to commit."""
    directory = Path(os.environ.get("TEAL_SHARED") or ROOT.parent / "shared")
    if not directory.is_dir():
        pytest.skip(f"no shared folder at {directory} (TEAL_SHARED names another)")
    return directory
