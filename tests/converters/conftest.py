"""Tiny checkpoints for the tests of the converters."""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.converters.tiny_checkpoint import HF_CONFIG, HF_SHAPES

type Tensors = dict[str, np.ndarray]


@pytest.fixture
def tensors() -> Tensors:
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape, np.float32).astype(ml_dtypes.bfloat16) for name, shape in HF_SHAPES.items()
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a checkpoint into a new folder: `write(tensors)`, or `write(tensors, shards=[names, names])`."""

    def write(tensors: Tensors, *, shards: list[list[str]] | None = None, config: dict | None = None) -> Path:
        folder = tmp_path / "checkpoint"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config or HF_CONFIG))
        if shards is None:
            save_file(tensors, folder / "model.safetensors")
            return folder
        weight_map = {}
        for number, names in enumerate(shards, 1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            save_file({name: tensors[name] for name in names}, folder / file)
            weight_map |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    return write


class Recorder:
    """A progress bar that remembers."""

    def __init__(self):
        self.total = self.done = 0

    def start(self, description: str, total: int) -> None:
        self.total = total

    def advance(self, n: int = 1) -> None:
        self.done += n


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()
