"""Whether the GPU kernels can run here, and if not, why."""

import functools
import warnings

import jax

MIN_COMPUTE_CAPABILITY = 8.0
"""Ampere: Pallas-Triton takes nothing older."""


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
