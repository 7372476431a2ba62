"""`bench_kernels`: device time of every kernel of a layer against the bytes that it needs."""

from collections.abc import Callable, Sequence

import numpy as np

from teal_jax.benchmark.cases import GEMVS, Case, Cases
from teal_jax.benchmark.device import DeviceError
from teal_jax.benchmark.rows import KernelRow
from teal_jax.benchmark.timing import DeviceTimer, cupti_timer


def bench_kernels(
    cases: Cases,
    bandwidth: float,
    keep_going: Callable[[str, Exception], None],
    on_row: Callable[[KernelRow], None],
    *,
    iterations: int = 20,
    timer: DeviceTimer = cupti_timer,
) -> list[KernelRow]:
    """All rows, each handed to `on_row` as it comes; one that fails goes to `keep_going` and is left out."""
    rows: list[KernelRow] = []
    for what, build in cases:
        try:
            case = build()
            row = _row(case.kernel, case.path, measure(case, timer, iterations), case.bytes, bandwidth)
        except Exception as error:
            # One kernel that fails must not cost the others' rows.
            keep_going(what, error)
            continue
        rows.append(row)
        on_row(row)
    for path in ("dense", "sparse", "xla"):
        total = sum_of_gemvs(rows, path, bandwidth)
        if total is not None:
            rows.append(total)
            on_row(total)
    return rows


def measure(case: Case, timer: DeviceTimer, iterations: int) -> float:
    """Seconds of a call on the device: the median of `iterations` rounds through all weights.

    Raises:
      DeviceError: the kernel was not launched once a call.
    """
    rounds = []
    for launches in timer(case.start(), iterations):
        times = [seconds for name, seconds in launches if case.launch is None or case.launch in name]
        if not times or (case.launch is not None and len(times) != case.calls):
            seen = ", ".join(sorted({name for name, _ in launches})) or "nothing"
            raise DeviceError(
                f"{case.kernel} ({case.path}): expected {case.calls} launches of {case.launch or 'a kernel'}, "
                f"got {len(times)}; seen: {seen[:300]}"
            )
        rounds.append(sum(times) / case.calls)
    return float(np.median(rounds))


def sum_of_gemvs(rows: Sequence[KernelRow], path: str, bandwidth: float) -> KernelRow | None:
    """The four matrix products of a layer together; None where one is missing."""
    found = [row for row in rows if row.kernel in GEMVS and row.path == path]
    if len(found) < len(GEMVS):
        return None
    seconds = sum(row.microseconds or 0 for row in found) / 1e6
    return _row("four GEMVs", path, seconds, sum(row.bytes or 0 for row in found), bandwidth)


def _row(kernel: str, path: str, seconds: float, needed: int, bandwidth: float) -> KernelRow:
    least = needed / bandwidth
    return KernelRow(
        kernel=kernel,
        path=path,
        microseconds=1e6 * seconds,
        bytes=needed,
        limit_us=1e6 * least,
        ratio=seconds / least,
    )
