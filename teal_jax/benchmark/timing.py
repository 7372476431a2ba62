"""Device time of kernels, and wall time of what must not be profiled."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import jax

from teal_jax.benchmark.device import DeviceError

type Launches = list[tuple[str, float]]
"""Kernels in the order of their launch: name, and seconds on the device."""


class DeviceTimer(Protocol):
    """`timer(call, iterations)`: the launches of each of `iterations` runs of `call`, after one that does not count."""

    def __call__(self, call: Callable[[], Any], iterations: int) -> list[Launches]:
        """See the class."""
        ...


def cupti_timer(call: Callable[[], Any], iterations: int) -> list[Launches]:
    """A `DeviceTimer` of CUPTI's.

    What `jax.experimental.mosaic.gpu.profiler.Cupti(finalize=False).measure` does, for a call with state: that one
    jits what it measures, so that buffers updated in place would be copied first, and the copies measured.

    Raises:
      DeviceError: this jax has no CUPTI, or it saw nothing.
    """
    try:
        from jax._src.lib import mosaic_gpu

        profiler = mosaic_gpu._mosaic_gpu_ext
        start, stop = profiler._cupti_init, profiler._cupti_get_timings
    except (ImportError, AttributeError) as error:
        raise DeviceError(f"this jax cannot measure device time: {error}", hint="jax 0.11.2 with CUDA can") from error
    jax.block_until_ready(call())
    start()
    try:
        for _ in range(iterations):
            last = call()
        jax.block_until_ready(last)
    finally:
        # False: stay attached, the next measurement follows.
        timings = stop(False)
    if not timings or len(timings) % iterations:
        raise DeviceError(
            f"CUPTI saw {len(timings or [])} kernels in {iterations} runs of the same work",
            hint="is another profiler attached, or is profiling forbidden to this user?",
        )
    launches = [(name, milliseconds / 1e3) for name, milliseconds in timings]
    each = len(launches) // iterations
    return [launches[i * each : (i + 1) * each] for i in range(iterations)]


def wall_time(prepare: Callable[[], Any], call: Callable[[Any], Any], repeats: int) -> tuple[float, list[float]]:
    """Seconds of the first `call(prepare())`, and of `repeats` more; preparing does not count."""
    times = []
    for _ in range(1 + repeats):
        prepared = jax.block_until_ready(prepare())
        start = time.perf_counter()
        jax.block_until_ready(call(prepared))
        times.append(time.perf_counter() - start)
    return times[0], times[1:]
