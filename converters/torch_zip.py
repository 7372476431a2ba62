"""Tensors out of a `torch.save` file, without torch and without running what a pickle may hold.

Such a file is a zip of `NAME/data.pkl` and raw storages `NAME/data/KEY`. A pickle is a program; this unpickler knows
the four or five names that plain tensors need and stops at any other before it is called.
"""

import io
import math
import pickle
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from teal_jax.errors import CheckpointError

_STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
}
_MAX_PICKLE_BYTES = 1 << 20  # a dict of some tensors takes 1 kB


class _Refused(Exception):
    """The pickle holds what a dict of plain tensors does not."""


def load_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """The dict of tensors saved in `path`; raises `CheckpointError` when it is anything else."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no such file: {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            tensors = _TensorUnpickler(archive).load()
    except _Refused as error:
        raise CheckpointError(
            f"{path} was not loaded: {error}", hint="only dicts of plain tensors are read; loading more could run code"
        ) from error
    except (zipfile.BadZipFile, NotImplementedError) as error:
        hint = "download it again; a file from before torch 1.6 must be saved again by a newer torch"
        raise CheckpointError(f"{path} is no whole zip file as torch.save writes it: {error}", hint=hint) from error
    # A damaged pickle fails in many ways, none of them the caller's business.
    except Exception as error:
        raise CheckpointError(f"{path} is corrupt: {type(error).__name__}: {error}") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, np.ndarray) for value in tensors.values()):
        raise CheckpointError(f"{path} must hold a dict of tensors, got {type(tensors).__name__}")
    return tensors


class _TensorUnpickler(pickle.Unpickler):
    def __init__(self, archive: zipfile.ZipFile):
        names = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
        if len(names) != 1:
            raise _Refused("it has no data.pkl")
        self._archive = archive
        self._root = names[0].removesuffix("data.pkl")
        order = f"{self._root}byteorder"
        if order in archive.namelist() and self._read("byteorder", 16) != b"little":
            raise _Refused("it is not in little-endian byte order")
        super().__init__(io.BytesIO(self._read("data.pkl", _MAX_PICKLE_BYTES)))

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for one of the allowed names; nothing is imported."""
        if module == "torch" and name in _STORAGES:
            return name
        # A pickle may also set attributes on what it was given, so the function is a new one for every file.
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda *args: _rebuild_tensor(*args)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise _Refused(f"it asks for {module}.{name}")

    def persistent_load(self, pid: Any) -> np.ndarray:
        """The storage that a tensor lies in: `("storage", type, key, device, number of elements)`."""
        if not (isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage" and pid[1] in _STORAGES):
            raise _Refused(f"it refers to {pid!r}")
        _, kind, key, _, size = pid
        dtype = _STORAGES[kind]
        if not str(key).isalnum():
            raise _Refused(f"it refers to a storage named {key!r}")
        content = self._read(f"data/{key}", size * dtype.itemsize)
        if len(content) != size * dtype.itemsize:
            raise _Refused(f"storage {key} has {len(content)} bytes, not {size} x {dtype.itemsize}")
        return np.frombuffer(content, dtype)

    def _read(self, name: str, most: int) -> bytes:
        entry = self._archive.getinfo(self._root + name)
        # torch never compresses; a compressed entry may unfold into more than the memory holds.
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size > most:
            raise _Refused(f"{entry.filename} is compressed or larger than {most} bytes")
        return self._archive.read(entry)


def _rebuild_tensor(
    storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> np.ndarray:
    contiguous = tuple(math.prod(size[axis + 1 :]) for axis in range(len(size)))
    if tuple(stride) != contiguous:
        raise _Refused(f"a tensor of shape {tuple(size)} has strides {tuple(stride)}, expected {contiguous}")
    count = math.prod(size)
    if offset < 0 or count < 0 or offset + count > storage.size:
        raise _Refused(f"a tensor reaches beyond its storage of {storage.size} elements")
    return storage[offset : offset + count].reshape(size).copy()
