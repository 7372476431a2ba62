"""Every error a user can cause, each with what to do next.

All of them derive from `TealError`; the command line turns one into a single line, its hint and exit
code 3. Errors that Python already names well (a wrong argument) derive from `ValueError` too.
"""


class TealError(Exception):
    """What went wrong, in one sentence, and `hint`: what to do about it (may be empty)."""

    def __init__(self, message: str, *, hint: str = ""):
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message} ({self.hint})" if self.hint else message

    @property
    def message(self) -> str:
        """The sentence without its hint."""
        return super().__str__()


class ModelNotFoundError(TealError):
    """No model of this name: unknown alias, missing directory, not in the cache, gated or incomplete."""


class UnsupportedModelError(TealError):
    """The model's config asks for something this library does not implement."""


class CheckpointError(TealError):
    """The weights do not fit the config: missing, extra, misshapen, truncated or NaN tensors."""


class PlanError(TealError, ValueError):
    """A sparsity plan that is malformed, from another model or from a newer version."""


class ArtifactError(TealError):
    """A saved artifact that cannot be written or read."""


class DataError(TealError, ValueError):
    """Text or tokens that cannot be used: empty, too short, not UTF-8, out of the vocabulary."""


class SparsityError(TealError, ValueError):
    """A sparsity outside its range."""


class QuantizationError(TealError, ValueError):
    """Weights that cannot be quantised as asked: a format that does not exist or fit, or weights that are broken."""


class ContextError(TealError, ValueError):
    """More tokens than the kv_cache or the model's positions hold."""


class DeviceMemoryError(TealError):
    """The model does not fit the device's memory."""


class TrainingError(TealError, ValueError):
    """A training that cannot run as asked, cannot be resumed, or had to stop."""
