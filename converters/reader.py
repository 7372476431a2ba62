"""HuggingFace safetensors -> parameters on the device, one tensor at a time.

All headers are checked against the config before a single weight is read, so a wrong checkpoint fails in a moment.
Then, shard by shard in file order: copy one tensor out of the mapped file, look for NaN, start its way to the device,
where it is cast and transposed, and read the next one meanwhile. Host memory: one mapped shard and two tensors.
The projections of an AWQ or GPTQ checkpoint are unpacked on the way, one by one, and become what the caller asks for.
"""

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from converters.grouped import GroupedWeight
from converters.hf_config import read_quantization
from converters.keys import Path as TreePath
from converters.keys import TensorKey, check_shapes, is_ignored, set_leaf, tensor_keys
from converters.quantized_module import QuantizedModule, quantized_modules, read_module
from converters.shards import Header, find_shards, open_shard, read_headers
from teal_jax.config import ModelConfig
from teal_jax.errors import CheckpointError

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""The stored types that are read, as safetensors and as numpy name them."""

# The exponent is all ones in inf and NaN and in nothing else: as an integer, the bits are at least this.
_INF_BITS = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}
_FLOAT16_MAX = 65504.0


class ProgressBar(Protocol):
    """What shows how far a read or an export has come."""

    def start(self, description: str, total: int) -> None:
        """Name the work and its number of steps."""

    def advance(self, n: int = 1) -> None:
        """`n` more steps are done."""


def read_params(
    directory: str | Path,
    config: ModelConfig,
    *,
    dtype: Any = None,
    device: jax.Device | jax.sharding.Sharding | None = None,
    progress: ProgressBar | None = None,
    on_quantized: Callable[[TensorKey, GroupedWeight], Any] | None = None,
    only: Callable[[TreePath], bool] | None = None,
) -> dict[str, Any]:
    """The weights in `directory` as the nested dict of arrays that the model takes; projections are `[d_in, d_out]`.

    Args:
      directory: holds `model.safetensors`, or `model.safetensors.index.json` and its shards.
      config: what the weights must fit, from `read_config`.
      dtype: bfloat16, float16 or float32, by name or as a dtype; None keeps the stored one (of mixed ones, the dtype
        of most weights). A quantised weight counts with that of its scales.
      device: where to put them; None is JAX's default device. A sharding must suit every tensor.
      progress: told of every tensor.
      on_quantized: what to put in the place of a quantised projection, from its key and its numbers; None: the array
        that they stand for, exact but for the rounding to `dtype`.
      only: which tensors to read, by their path in the tree; None: all. All are checked all the same.

    Raises:
      UnsupportedModelError: quantised in a way that cannot be unpacked; see `converters.quantization_config`.
      CheckpointError: missing, extra, duplicate or misshapen tensors, a missing, truncated or corrupt file, a dtype
        that is not supported, a weight that is NaN or infinite, or a checkpoint that exists only as a pickle.
    """
    directory = Path(directory)
    keys = tensor_keys(config)
    headers = read_headers(directory, find_shards(directory))
    modules = quantized_modules(keys, read_quantization(directory), headers)
    _check(directory, config, keys, headers, modules)
    target = _target_dtype(dtype, headers, keys, modules)
    by_name = {_main_tensor(key, modules): key for key in keys if only is None or only(key.path)}
    params: dict[str, Any] = {}
    if progress is not None:
        progress.start("Reading weights", len(by_name))
    in_flight: Any = None
    for file in sorted({headers[name].file for name in by_name}):
        with open_shard(directory / file) as shard:
            # File order, so that the disk reads forward.
            for name in shard.offset_keys():
                if (key := by_name.get(name)) is None:
                    continue
                if key.name in modules:
                    read = functools.partial(_read_part, directory, headers, shard, file)
                    weight = read_module(modules[key.name], read)
                    if target == "float16":
                        # 15 steps are the most that a code lies from its zero point.
                        _check_float16(key.name, 15 * float(np.abs(weight.scales.astype(np.float32)).max()))
                    array = on_quantized(key, weight) if on_quantized else _dequantized(weight, target, device)
                else:
                    array = _to_device(_read(shard, file, name, target), key, target, device)
                # Waiting for the one before bounds what is on its way, and still overlaps reading with sending.
                jax.block_until_ready(in_flight)
                in_flight = array
                set_leaf(params, key.path, array)
                if progress is not None:
                    progress.advance()
    jax.block_until_ready(in_flight)
    return params


def parse_dtype(dtype: Any) -> str:
    """The name of a dtype that weights may have; raises `CheckpointError` for any other."""
    name = ""
    with contextlib.suppress(TypeError):
        name = jnp.dtype(dtype).name
    if name not in DTYPES.values():
        raise CheckpointError(f"weights cannot have dtype {dtype!r}: expected one of {', '.join(DTYPES.values())}")
    return name


def _check(
    directory: Path,
    config: ModelConfig,
    keys: tuple[TensorKey, ...],
    headers: dict[str, Header],
    modules: Mapping[str, QuantizedModule],
) -> None:
    found = {name: header.shape for name, header in headers.items() if not is_ignored(name, config)}
    expected: dict[Any, tuple[int, ...]] = {}
    for key in keys:
        expected |= modules[key.name].tensors if key.name in modules else {key.name: key.shape}
    what = f"the checkpoint in {directory}"
    if modules:
        what += f", {next(iter(modules.values())).quantization.method} by its config.json,"
    elif any(name.endswith(".qweight") for name in found):
        what += ", quantised without a quantization_config in config.json,"
    check_shapes(expected, found, what=what)
    for key in keys:
        if key.name not in modules and (header := headers[key.name]).dtype not in DTYPES:
            raise CheckpointError(
                f"{key.name} in {header.file} has dtype {header.dtype}: expected one of {', '.join(DTYPES)}",
                hint="use the checkpoint in bfloat16, float16 or float32, or quantised by AWQ or GPTQ to 4 bits",
            )


def _main_tensor(key: TensorKey, modules: Mapping[str, QuantizedModule]) -> str:
    """The tensor at whose place in the file the weight is read."""
    return f"{modules[key.name].name}.qweight" if key.name in modules else key.name


def _target_dtype(
    dtype: Any, headers: dict[str, Header], keys: tuple[TensorKey, ...], modules: Mapping[str, QuantizedModule]
) -> str:
    if dtype is not None:
        return parse_dtype(dtype)
    sizes: Counter[str] = Counter()
    for key in keys:
        name = f"{modules[key.name].name}.scales" if key.name in modules else key.name
        sizes[DTYPES[headers[name].dtype]] += int(np.prod(key.shape))
    return sizes.most_common(1)[0][0]


def _read_part(directory: Path, headers: Mapping[str, Header], shard: Any, file: str, name: str) -> np.ndarray:
    """A tensor of a quantised projection: from the open shard, or from the one where a split left it."""
    if headers[name].file == file:
        return shard.get_tensor(name)
    with open_shard(directory / headers[name].file) as other:
        return other.get_tensor(name)


def _read(shard: Any, file: str, name: str, target: str) -> np.ndarray:
    array = shard.get_tensor(name)
    if not is_finite(array):
        raise CheckpointError(
            f"{name} in {file} holds NaN or infinite weights", hint="the file is damaged: download the checkpoint again"
        )
    if target == "float16" and array.dtype != np.float16:
        _check_float16(f"{name} in {file}", float(max(array.max(), -array.min())))
    return array


def _check_float16(what: str, largest: float) -> None:
    if largest > _FLOAT16_MAX:
        raise CheckpointError(
            f"{what} holds {largest:.4g}, more than float16 can ({_FLOAT16_MAX:.0f})",
            hint="read it as bfloat16 or float32",
        )


def is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite.

    Two integer maxima over the same bits, as signed for the positive half and unsigned for the negative one: they
    run at the speed of memory and allocate nothing, where `np.isfinite` is slow in bfloat16 and makes a mask.
    """
    inf = _INF_BITS[array.dtype.name]
    width = 8 * array.dtype.itemsize
    sign = 1 << (width - 1)
    return bool(array.view(f"int{width}").max() < inf and array.view(f"uint{width}").max() < sign + inf)


def _to_device(array: np.ndarray, key: TensorKey, dtype: str, device: Any) -> jax.Array:
    # Transposed on the device: there it is a blocked copy at memory speed, on a CPU in parallel, where numpy's
    # strided copy takes 2-3 times as long on one core and needs the host to hold both layouts.
    return _arrange(jax.device_put(array, device), transpose=key.transpose, dtype=dtype)


@functools.partial(jax.jit, static_argnames=("transpose", "dtype"))
def _arrange(x: jax.Array, *, transpose: bool, dtype: str) -> jax.Array:
    x = x.astype(dtype)
    return x.T if transpose else x


def _dequantized(weight: GroupedWeight, dtype: str, device: Any) -> jax.Array:
    array = weight.dequantize(dtype)
    return array if device is None else jax.device_put(array, device)
