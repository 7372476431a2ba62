"""Ahead-of-time compilation for NVIDIA GPUs where there is none: XLA, Triton and ptxas run, the result does not."""

import functools
import importlib.util
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

TARGETS = ("h200", "a100", "rtx4090", "rtxpro6000")
"""Compute capability 9.0, 8.0, 8.9 and 12.0."""

PACKAGES = "jax-cuda13-plugin and jax-cuda13-pjrt (of jax's version), nvidia-cuda-nvcc and nvidia-nvvm (13.0.*)"
"""What compiling needs beside jax; no driver, no cuBLAS, no cuDNN."""

ABSENT = ("No PTX compilation provider is available", "libdevice not found")
"""How XLA says that the wheels of ptxas and libdevice are missing."""

MOVES_NOTHING = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "custom-call", "while", "call"}
"""HLO operations that do not copy an array; a custom call here is a kernel of ours, which says what it writes."""

RESULT = re.compile(r"^\s*(?:ROOT )?%\S+ = \w+\[([\d,]+)\]\S* ([\w-]+)\(", re.MULTILINE)


@functools.cache
def missing() -> str | None:
    """Why nothing can be compiled here and what to install, for `pytest.skip`; None: it works."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        return f"no jax CUDA 13 plugin: install {PACKAGES}"
    try:
        compile_for("h200", jnp.exp, jax.ShapeDtypeStruct((128,), jnp.float32))  # exp is in libdevice
    except jax.errors.JaxRuntimeError as error:
        if any(message in str(error) for message in ABSENT):
            return f"no ptxas or no libdevice: install {PACKAGES}"
        raise
    return None


@functools.cache
def _mesh(target: str) -> jax.sharding.Mesh:
    description = Path(__file__).parent / "targets" / f"{target}.txtpb"
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=description.read_text("utf-8"), topology="1x1x1"
    )
    return topologies.make_mesh(topo=topology, mesh_shape=(1,), axis_names=("x",))


def compile_for(
    target: str, f: Callable[..., Any], *args: Any, donate: tuple[int, ...] = (), spills: bool = True
) -> jax.stages.Compiled:
    """`jax.jit(f, donate_argnums=donate)` compiled for one GPU of `TARGETS`.

    Args:
      target: of `TARGETS`.
      f: a function of arrays; bind static arguments with `functools.partial`.
      args: pytrees of `jax.ShapeDtypeStruct`.
      donate: positions of the arguments that may be overwritten.
      spills: False: raise `jax.errors.JaxRuntimeError` where a kernel needs more registers than it may use.
    """
    mesh = _mesh(target)
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    args = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=here), args)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(f, donate_argnums=donate).lower(*args)
    options = {
        "xla_gpu_autotune_level": 0,  # tuning would time candidates on a device
        "xla_gpu_fail_ptx_compilation_on_register_spilling": not spills,
        # As on a GPU, although tests on a CPU leave slow passes out (conftest.py).
        "xla_backend_optimization_level": 3,
        "xla_llvm_disable_expensive_passes": False,
    }
    return lowered.compile(compiler_options=options)


def _hlo(compiled: jax.stages.Compiled) -> str:
    text = compiled.as_text()
    assert text is not None
    return text


def kernels(compiled: jax.stages.Compiled) -> int:
    """Pallas-Triton kernels in the program, each counted where it is called."""
    return _hlo(compiled).count('custom_call_target="__gpu$xla.gpu.triton"')


def copies(compiled: jax.stages.Compiled, size: int) -> Iterator[str]:
    """HLO operations that write an array of at least `size` elements, outside our kernels: `copy[4096,1024]`."""
    for shape, operation in RESULT.findall(_hlo(compiled)):
        if operation not in MOVES_NOTHING and math.prod(map(int, shape.split(","))) >= size:
            yield f"{operation}[{shape}]"


def aliased_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes of the donated arguments that the results overwrite."""
    analysis: Any = compiled.memory_analysis()
    return analysis.alias_size_in_bytes
