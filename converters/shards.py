"""Which safetensors files make up a checkpoint, and what their headers say; no weight is read here."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from teal_jax.errors import CheckpointError, ModelNotFoundError

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pth", "*.pt", "*.ckpt")
_DOWNLOAD_AGAIN = "download the checkpoint again"


@dataclasses.dataclass(frozen=True)
class Header:
    """Where a tensor lies and what it is: `dtype` as safetensors names it (`"BF16"`)."""

    file: str
    shape: tuple[int, ...]
    dtype: str


def find_shards(directory: Path) -> dict[str, set[str] | None]:
    """The files of the checkpoint, each with the tensors that the index promises in it (None: there is no index).

    Raises `CheckpointError` when there are none, when one is missing or when there are only pickles.
    """
    if not directory.is_dir():
        raise ModelNotFoundError(f"no such directory: {directory}")
    if (directory / WEIGHTS_FILE).is_file():  # transformers prefers it to an index, too
        return {WEIGHTS_FILE: None}
    index = directory / INDEX_FILE
    if not index.is_file():
        raise _no_weights(directory)
    shards = _read_index(index)
    if missing := [file for file in sorted(shards) if not (directory / file).is_file()]:
        raise CheckpointError(
            f"{INDEX_FILE} names {len(shards)} files, of which {len(missing)} are not in {directory}: "
            f"{', '.join(missing)}",
            hint=f"{_DOWNLOAD_AGAIN}; it is incomplete",
        )
    return dict(shards)


def read_headers(directory: Path, shards: dict[str, set[str] | None]) -> dict[str, Header]:
    """The header of every tensor in `shards`; raises `CheckpointError` for a corrupt file or a doubled tensor."""
    headers: dict[str, Header] = {}
    for file, promised in sorted(shards.items()):
        with open_shard(directory / file) as shard:
            names = list(shard.keys())
            for name in names:
                if name in headers:
                    raise CheckpointError(
                        f"tensor {name} lies in both {headers[name].file} and {file}", hint=_DOWNLOAD_AGAIN
                    )
                entry = shard.get_slice(name)
                headers[name] = Header(file, tuple(entry.get_shape()), entry.get_dtype())
        if promised is not None and (absent := sorted(promised - set(names))):
            raise CheckpointError(
                f"{INDEX_FILE} places {len(absent)} tensors in {file} that are not there: {', '.join(absent[:8])}",
                hint=f"{_DOWNLOAD_AGAIN}; its files are not of one version",
            )
    return headers


def open_shard(path: Path) -> Any:
    """The mapped file, as safetensors' context manager; raises `CheckpointError` when it is truncated or corrupt."""
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {_damage(path) or error}", hint=_DOWNLOAD_AGAIN) from error


def _damage(path: Path) -> str:
    """What is wrong with the file in words: an 8-byte header length, that much JSON, then the tensors' bytes."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = int.from_bytes(file.read(8), "little")
        if size < 8 or head > size - 8:
            return f"it has {size} bytes, too few for its header: truncated or not a safetensors file"
        try:
            entries = json.loads(file.read(head))
            ends = [entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"]
            expected = 8 + head + max(ends, default=0)
        except (ValueError, AttributeError, KeyError, IndexError, TypeError):
            return "its header is not what safetensors writes: corrupt or another kind of file"
    return f"it has {size} bytes, its header promises {expected}: truncated or corrupt" if size != expected else ""


def _read_index(path: Path) -> dict[str, set[str]]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[str, set[str]] = {}
        for name, file in weight_map.items():
            shards.setdefault(file, set()).add(name)
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is no index of safetensors files: {error!r}", hint=_DOWNLOAD_AGAIN) from error
    if not shards:
        raise CheckpointError(f"{path} names no tensors", hint=_DOWNLOAD_AGAIN)
    for file in shards:
        # A path would let a checkpoint read files outside its directory.
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path} names {file!r}: expected the name of a .safetensors file beside it")
    return shards


def _no_weights(directory: Path) -> CheckpointError:
    expected = f"no {WEIGHTS_FILE} or {INDEX_FILE} in {directory}"
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        return CheckpointError(
            f"{expected}, only pickles, which can run any code when loaded: {', '.join(pickles[:4])}",
            hint="convert it once with transformers: "
            "AutoModelForCausalLM.from_pretrained(dir).save_pretrained(new_dir, safe_serialization=True)",
        )
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if others:
        return CheckpointError(
            f"{expected}; it has {', '.join(others[:4])}",
            hint="use the HuggingFace layout of this model (Mistral's own layout has consolidated.safetensors)",
        )
    return CheckpointError(expected, hint=f"{_DOWNLOAD_AGAIN}: *.safetensors and *.json")
