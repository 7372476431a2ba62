"""The GPU that is measured: whether there is one, and how fast it reads."""

import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import support
from teal_jax.errors import TealError

READ_BYTES = 1 << 31
"""Of the array that measures the read bandwidth: far beyond any cache."""


class DeviceError(TealError):
    """No device that this measurement can run on."""


def cuda_device() -> Any:
    """The first CUDA device; raises `DeviceError` where there is none that the kernels run on."""
    reason = support.why_not()
    if reason is not None:
        raise DeviceError(
            f"a benchmark needs an NVIDIA GPU that the kernels run on: {reason}",
            hint="an Ampere or later GPU and a CUDA build of jax (teal-jax[cuda13]); teal doctor shows what jax sees",
        )
    return jax.devices()[0]


def memory_limit(device: Any) -> int | None:
    """Bytes that jax may use on the device, where it says so."""
    return (device.memory_stats() or {}).get("bytes_limit")


def peak_memory(device: Any) -> int | None:
    """The most bytes that jax used on the device so far, where it says so."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use")


def read_bandwidth(*, num_bytes: int = READ_BYTES, reads: int = 20, repeats: int = 5) -> float:
    """Bytes a second that the device reads: sums over a large bfloat16 array, the best of two ways to cut them.

    `reads` sums are queued at a time, so that the host's own time does not count.
    """
    x = jnp.ones((num_bytes // 2 // 4096, 4096), jnp.bfloat16)
    sums: list[Callable[[jax.Array], jax.Array]] = [
        jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32)),
        jax.jit(lambda x: jnp.sum(x, axis=1, dtype=jnp.float32)),
    ]
    best = float("inf")
    for total in sums:
        jax.block_until_ready(total(x))
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready([total(x) for _ in range(reads)])
            best = min(best, (time.perf_counter() - start) / reads)
    return x.nbytes / best


def hardware(device: Any) -> dict[str, Any]:
    """What identifies the hardware, JSON-ready."""
    return {"gpu": device.device_kind, "memory_bytes": memory_limit(device), "driver": _driver()}


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip().partition("\n")[0] or None
