"""Lowering for NVIDIA GPUs where there is none: what Pallas hands to XLA, without compiling it."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh

DEVICES = {
    "h200": "NVIDIA H200",
    "a100": "NVIDIA A100-SXM4-80GB",
    "rtx4090": "NVIDIA GeForce RTX 4090",
    "b200": "NVIDIA B200",
}
"""Compute capability 9.0, 8.0, 8.9 and 10.0."""

KERNEL = "__gpu$xla.gpu.triton"


def lower(device: str, f: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> str:
    """`jax.jit(f, donate_argnums=donate)` as text, for one of `DEVICES`; args are pytrees of `jax.ShapeDtypeStruct`."""
    gpu = AbstractDevice(device_kind=DEVICES[device], num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
        return jax.jit(f, donate_argnums=donate).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
