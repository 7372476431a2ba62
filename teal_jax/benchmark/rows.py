"""One line of each table, as measured: JSON-ready, None where something could not be measured."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeRow:
    """Whole tokens, one way to decode.

    Attributes:
      name: of the way.
      quantization: the format of the weights; None: floats.
      target: model sparsity asked for; None: a dense path.
      realised: model sparsity counted on the run.
      tokens_per_second, ms_per_token: of the best repeat.
      repeats: tokens a second, of all.
      bytes_per_token: weights and kv_cache read.
      bandwidth_share: bytes a second over the bandwidth measured in this run.
      kernels_per_token, kernel_ms: launches, and their device time summed.
      memory_bytes: on the device.
      first_token_s: until the first token; with compiling, where this row was the first of its program.
      thresholds_corrected: whether the counts asked for it.
      kernels: launches and milliseconds a token, by kernel.
      note: what went wrong, or what to know.
    """

    name: str
    quantization: str | None = None
    target: float | None = None
    realised: float | None = None
    tokens_per_second: float | None = None
    ms_per_token: float | None = None
    repeats: list[float] = dataclasses.field(default_factory=list)
    bytes_per_token: float | None = None
    bandwidth_share: float | None = None
    kernels_per_token: float | None = None
    kernel_ms: float | None = None
    memory_bytes: int | None = None
    first_token_s: float | None = None
    thresholds_corrected: bool | None = None
    kernels: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelRow:
    """One kernel, one way to run it.

    Attributes:
      kernel: which of a layer's.
      path: `"dense"`, `"sparse"`, `"xla"` (dense, `jnp.dot`) or `"sum"`.
      microseconds: on the device, a call.
      bytes: that it needs.
      limit_us: those bytes over the bandwidth measured in this run.
      ratio: microseconds over limit_us.
      note: what went wrong.
    """

    kernel: str
    path: str
    microseconds: float | None = None
    bytes: int | None = None
    limit_us: float | None = None
    ratio: float | None = None
    note: str = ""
