"""From the name of a shape to a model config: a named workload, or the config of a model on this machine."""

from pathlib import Path
from typing import Any

import converters
from pallas_kernels.workloads import WORKLOADS, Workload
from teal_jax import hub
from teal_jax.config import ModelConfig, RopeConfig
from teal_jax.errors import ModelNotFoundError

_LLAMA_3_2 = RopeConfig(theta=5e5, type="llama3", factor=32.0)

NUMERICS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {"max_position": 4096, "rope": RopeConfig(theta=1e4)},
    "llama-3-8b": {"max_position": 8192, "rope": RopeConfig(theta=5e5)},
    "llama-3-70b": {"max_position": 8192, "rope": RopeConfig(theta=5e5)},
    "mistral-7b": {"max_position": 32768, "rope": RopeConfig(theta=1e4), "sliding_window": 4096},
    "llama-3.2-1b": {"max_position": 131072, "rope": _LLAMA_3_2},
}
"""What a config has beyond sizes, by workload; Mistral's is that of version 0.1, which the TEAL paper measures."""


def shape_config(shape: str) -> tuple[str, ModelConfig]:
    """The name and the config of `shape`: a workload, else the directory of an HF checkpoint, whose name it takes.

    Raises:
      ModelNotFoundError: neither.
    """
    if shape in WORKLOADS:
        return shape, workload_config(WORKLOADS[shape])
    directory = hub.EMBEDDED_DIRECTORY if shape == hub.EMBEDDED else Path(shape).expanduser()
    if not (directory / "config.json").is_file():
        raise ModelNotFoundError(
            f"no shape or directory with a config.json called {shape!r}", hint=f"shapes: {', '.join(WORKLOADS)}"
        )
    return directory.resolve().name, converters.read_config(directory)


def workload_config(workload: Workload) -> ModelConfig:
    """The config of a named workload."""
    return ModelConfig(
        vocab_size=workload.vocab_size,
        d_model=workload.d_model,
        d_mlp=workload.d_mlp,
        num_layers=workload.num_layers,
        num_heads=workload.num_heads,
        num_kv_heads=workload.num_kv_heads,
        head_dim=workload.head_dim,
        norm_eps=1e-5,
        tie_embeddings=workload.tied,
        **NUMERICS[workload.name],
    )
