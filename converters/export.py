"""Parameters -> a HuggingFace checkpoint that transformers, vLLM and `read_params` read; bit for bit what came in.

The files are written into a folder beside the target, which is renamed when all of them are complete.
"""

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from converters.hf_config import CONFIG_FILE, GATES_FIELD, config_to_hf
from converters.keys import TensorKey, check_shapes, leaves, tensor_keys
from converters.reader import DTYPES, ProgressBar
from converters.shards import INDEX_FILE, WEIGHTS_FILE
from teal_jax.config import ModelConfig
from teal_jax.errors import ArtifactError, CheckpointError

MAX_SHARD_BYTES = 5 * 10**9
_STORED_NAME = {numpy_name: name for name, numpy_name in DTYPES.items()}

type _Tensor = tuple[TensorKey, Any]


def export_checkpoint(
    params: Mapping[str, Any],
    config: ModelConfig,
    directory: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
    copy_files: Iterable[str | Path] = (),
    gates: Mapping[str, Any] | None = None,
    progress: ProgressBar | None = None,
) -> Path:
    """Write `config.json` and safetensors in HuggingFace's layout; every tensor keeps its dtype and its bits.

    Args:
      params: the nested dict of arrays that `read_params` returns; float32, bfloat16 or float16.
      config: what the parameters are of.
      directory: where to; it must not exist or be empty.
      max_shard_bytes: above this, the weights are split into files of at most this size and an index (a larger
        tensor has a file of its own).
      overwrite: replace the directory; only if it holds a checkpoint, so that a mistyped path costs nothing.
      copy_files: more files to go along, such as the tokenizer's.
      gates: a sparsity plan as JSON-ready values, for `config.json`.
      progress: told of every tensor.

    Returns:
      The absolute path written. Host memory: two tensors.

    Raises:
      CheckpointError: parameters that do not fit `config` or whose dtype HuggingFace's layout has no name for.
      ArtifactError: the directory exists, or cannot be written; nothing is left behind then.
    """
    directory = Path(directory).resolve()
    tensors = _tensors(params, config)
    shards = _split(tensors, max_shard_bytes)
    hf_config = config_to_hf(config, dtype=_main_dtype(tensors))
    if gates is not None:
        hf_config[GATES_FIELD] = dict(gates)
    _check_target(directory, overwrite=overwrite)
    sources = [Path(source) for source in copy_files]
    if absent := [str(source) for source in sources if not source.is_file()]:
        raise ArtifactError(f"no such file: {', '.join(absent)}")
    if progress is not None:
        progress.start("Writing weights", len(tensors))
    with _written_aside(directory) as folder:
        for source in sources:
            shutil.copyfile(source, folder / source.name)
        _write_text(folder / CONFIG_FILE, json.dumps(hf_config, indent=2) + "\n")
        for file, shard in shards.items():
            _write_safetensors(folder / file, shard, progress)
        if len(shards) > 1:
            total = sum(_num_bytes(tensor) for tensor in tensors)
            weight_map = {key.name: file for file, shard in shards.items() for key, _ in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            _write_text(folder / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    return directory


def _tensors(params: Mapping[str, Any], config: ModelConfig) -> list[_Tensor]:
    """Each key with its leaf, checked, in the order of the model."""
    found = dict(leaves(params))
    keys = tensor_keys(config)
    for path, leaf in found.items():
        kind = leaf.dtype.name if isinstance(leaf, jax.Array | np.ndarray) else type(leaf).__name__
        if kind not in _STORED_NAME:
            raise CheckpointError(
                f"{_dotted(path)} is {kind}: expected an array of {', '.join(_STORED_NAME)}",
                hint="export the weights as they were before quantisation",
            )
    check_shapes(
        {_dotted(key.path): key.tree_shape for key in keys},
        {_dotted(path): leaf.shape for path, leaf in found.items()},
        what="the parameter tree",
    )
    return [(key, found[key.path]) for key in keys]


def _dotted(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


def _num_bytes(tensor: _Tensor) -> int:
    key, leaf = tensor
    return int(np.prod(key.shape)) * leaf.dtype.itemsize


def _main_dtype(tensors: list[_Tensor]) -> str:
    sizes: Counter[str] = Counter()
    for key, leaf in tensors:
        sizes[leaf.dtype.name] += int(np.prod(key.shape))
    return sizes.most_common(1)[0][0]


def _split(tensors: list[_Tensor], max_shard_bytes: int) -> dict[str, list[_Tensor]]:
    """File names with their tensors: the first fit in the order of the model, as HuggingFace does."""
    shards: list[list[_Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        size = _num_bytes(tensor)
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    if len(shards) == 1:
        return {WEIGHTS_FILE: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _write_safetensors(path: Path, tensors: list[_Tensor], progress: ProgressBar | None) -> None:
    # Written by hand, because safetensors' own writers take a whole shard in memory; the format is a length, a JSON
    # header and the bytes. Wider types first: then every tensor starts at a multiple of its width.
    tensors = sorted(tensors, key=lambda tensor: -tensor[1].dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it, transformers refuses the file
    offset = 0
    for key, leaf in tensors:
        end = offset + _num_bytes((key, leaf))
        dtype = _STORED_NAME[leaf.dtype.name]
        header[key.name] = {"dtype": dtype, "shape": list(key.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, leaf in tensors:
            array = np.ascontiguousarray(_transpose(leaf) if key.transpose else leaf)
            file.write(array.reshape(-1).view(np.uint8).data)
            if progress is not None:
                progress.advance()
        file.flush()
        os.fsync(file.fileno())


@jax.jit
def _transpose(x: jax.Array) -> jax.Array:
    return x.T


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _check_target(directory: Path, *, overwrite: bool) -> None:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not overwrite:
        raise ArtifactError(f"{directory} exists", hint="choose another directory or ask to overwrite it")
    if not (directory / CONFIG_FILE).is_file():
        raise ArtifactError(
            f"{directory} is no checkpoint (it has no {CONFIG_FILE}) and will not be overwritten",
            hint="remove it yourself or choose another directory",
        )


@contextlib.contextmanager
def _written_aside(directory: Path) -> Generator[Path]:
    """A new folder beside `directory`, renamed to it at the end; removed when anything fails."""
    aside = directory.with_name(f".{directory.name}.writing-{os.getpid()}")
    replaced = directory.with_name(f".{directory.name}.replaced-{os.getpid()}")
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
        yield aside
        if directory.exists():
            directory.rename(replaced)
        aside.rename(directory)
    except OSError as error:
        what = error.strerror or str(error)
        raise ArtifactError(f"cannot write {directory}: {what}", hint="is the disk full or write-protected?") from error
    finally:
        if replaced.exists() and not directory.exists():  # stopped between the two renames
            replaced.rename(directory)
        shutil.rmtree(replaced, ignore_errors=True)
        shutil.rmtree(aside, ignore_errors=True)
