"""What the GPU kernels take, and whether they can run here.

Imports none of them: a jax may have dropped their backend.
"""

import functools
import warnings
from typing import Literal

import jax
import jax.numpy as jnp

type Implementation = Literal["pallas", "xla"]
"""The GPU kernels, or what runs anywhere and reads every weight."""

MAX_BATCH = 8
"""Most tokens that one call of a decode kernel takes."""

FLOATS = (jnp.bfloat16, jnp.float16, jnp.float32)
"""Dtypes that the kernels take."""

MIN_COMPUTE_CAPABILITY = 8.0
"""Ampere: Pallas-Triton takes nothing older."""


def use_pallas(implementation: str | None, dtype: jax.typing.DTypeLike, batch: int, reason: str | None = None) -> bool:
    """Whether the kernels run; raises `NotImplementedError` if they were asked for by name and cannot.

    `reason` is the caller's own, why they cannot.
    """
    if implementation not in ("pallas", "xla", None):
        raise ValueError(f'implementation: expected "pallas", "xla" or None, got {implementation!r}')
    if implementation == "xla":
        return False
    reason = reason or why_not()
    if reason is None and dtype not in FLOATS:
        reason = f"they take bfloat16, float16 and float32, got {jnp.dtype(dtype).name}"
    if reason is None and not 1 <= batch <= MAX_BATCH:
        reason = f"they take 1 to {MAX_BATCH} rows, got {batch}"
    if implementation == "pallas" and reason is not None:
        raise NotImplementedError(f'implementation="pallas": the GPU kernels cannot run here: {reason}')
    return reason is None


def why_not() -> str | None:
    """The reason why Pallas-Triton kernels cannot run on the default device; None: they can."""
    if jax.default_backend() != "gpu":
        return f"there is no GPU, jax runs on {jax.default_backend()}"
    return _device_reason()


@functools.cache
def _device_reason() -> str | None:
    """The reason on this GPU; warned of once, since a user with a GPU expects its speed."""
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "unknown"))
    reason = None
    if not _at_least(capability, MIN_COMPUTE_CAPABILITY):
        reason = f"{device.device_kind} has compute capability {capability}, the kernels need {MIN_COMPUTE_CAPABILITY}"
    elif not backend_available():
        reason = f"jax {jax.__version__} has no Pallas-Triton backend; jax >= 0.11.2, < 0.13 has it"
    if reason is not None:
        warnings.warn(f"the sparse GPU kernels are not used, XLA reads every weight: {reason}", stacklevel=2)
    return reason


def _at_least(capability: str, least: float) -> bool:
    """Whether `capability` is a number of NVIDIA's, and large enough; another maker's is a name."""
    try:
        return float(capability) >= least
    except ValueError:
        return False


def backend_available() -> bool:
    """Whether this jax still has the Pallas-Triton backend, which is deprecated since 0.11."""
    try:
        from jax.experimental.pallas import triton

        return hasattr(triton, "CompilerParams") and hasattr(triton, "atomic_add")
    except ImportError:
        return False
