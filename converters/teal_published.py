"""The files that the authors of TEAL published (arXiv 2408.14690): activation histograms and greedy look-up tables.

    histograms/layer-{i}/{self_attn,mlp}/histograms.pt      a torch zip: h1, h1_centers, h2, h2_centers
    lookup/layer-{i}/results.csv                            one row per step of the greedy search

Neither torch nor trust is needed: `converters.torch_zip` rebuilds plain tensors and refuses anything else.
"""

import csv
import dataclasses
import re
from pathlib import Path

import numpy as np

from converters.torch_zip import load_tensors
from teal_jax.config import PROJECTIONS, SITES, ModelConfig
from teal_jax.errors import CheckpointError

LOOKUP_COLUMNS = ("Effective Sparsity", "Activation Error", "Baseline Error", *PROJECTIONS)
"""The columns of a look-up table: size-weighted sparsity, greedy's and uniform's error, the seven sparsities."""

# In the order of SITES: the input of q, k, v; of o; of gate, up; of down.
_FILE_OF_SITE = (("self_attn", "h1"), ("self_attn", "h2"), ("mlp", "h1"), ("mlp", "h2"))
assert len(_FILE_OF_SITE) == len(SITES)

_WIDTH_TOLERANCE = 1e-3
"""Counts are float32 and saturate a little; the nearest two models' ratios differ by 5e-3 (Llama-2 7B and 13B)."""


@dataclasses.dataclass(frozen=True, eq=False)
class SiteHistogram:
    """The signed values of one activation site over the calibration tokens.

    Attributes:
      counts: float32 [bins]. centers: float32 [bins], ascending; TEAL has 10,000 bins, the outer two wider.
      num_values: all of them, tokens x width of the site.
    """

    counts: np.ndarray
    centers: np.ndarray
    num_values: int


type LayerHistograms = tuple[SiteHistogram, ...]
"""One `SiteHistogram` per site, in the order of `teal_jax.config.SITES`."""


def read_histograms(directory: str | Path) -> tuple[LayerHistograms, ...]:
    """The histograms of every layer; `directory` is a model's folder or its `histograms/`.

    Raises `CheckpointError` for a missing, corrupt or malformed file, and for one that holds more than tensors.
    """
    layers = _layer_folders(Path(directory), "histograms")
    return tuple(tuple(_read_site(folder, *file) for file in _FILE_OF_SITE) for folder in layers)


def read_lookup(directory: str | Path) -> tuple[np.ndarray, ...]:
    """Per layer the greedy path, float64 [steps, 10] in `LOOKUP_COLUMNS`; `directory` is a model's or its `lookup/`.

    Raises `CheckpointError` for a missing or malformed table.
    """
    return tuple(_read_table(folder / "results.csv") for folder in _layer_folders(Path(directory), "lookup"))


def check_widths(config: ModelConfig, histograms: tuple[LayerHistograms, ...]) -> None:
    """Raise `CheckpointError` unless the histograms can be of `config`: as many layers, and sites as wide.

    All sites of a layer saw the same tokens, so their totals stand to each other as their widths do. The published
    folder of Llama-3-8B fails here: it holds Llama-2-7B's histograms, with 11008 / 4096 in place of 14336 / 4096.
    """
    if len(histograms) != config.num_layers:
        raise CheckpointError(
            f"the histograms are of {len(histograms)} layers, the model has {config.num_layers}",
            hint="use the histograms of this model",
        )
    reference = SITES.index("mlp_in")
    for layer, sites in enumerate(histograms):
        for site, width, histogram in zip(SITES, config.site_widths, sites, strict=True):
            found = histogram.num_values / sites[reference].num_values
            expected = width / config.site_widths[reference]
            if abs(found / expected - 1) > _WIDTH_TOLERANCE:
                raise CheckpointError(
                    f"the histograms are of another model: in layer {layer}, {site} has {found:.4f} times the values "
                    f"of {SITES[reference]}, the model's widths make it {expected:.4f}",
                    hint="calibrate this model, or find its own histograms: TEAL's Llama-3-8B folder holds "
                    "Llama-2-7B's, and the real ones in its subfolder Untitled",
                )


def _layer_folders(directory: Path, kind: str) -> list[Path]:
    root = directory / kind if (directory / kind).is_dir() else directory
    found = {}
    for path in root.glob("layer-*") if root.is_dir() else ():
        if match := re.fullmatch(r"layer-(\d+)", path.name):
            found[int(match[1])] = path
    if not found:
        raise CheckpointError(f"no layer-0, layer-1, ... in {root}", hint=f"give the folder that holds TEAL's {kind}/")
    if absent := set(range(max(found) + 1)) - set(found):
        raise CheckpointError(f"{root} lacks layer-{min(absent)} of its {max(found) + 1} layers")
    return [found[layer] for layer in sorted(found)]


def _read_site(folder: Path, module: str, name: str) -> SiteHistogram:
    path = folder / module / "histograms.pt"
    tensors = load_tensors(path)
    if absent := {name, f"{name}_centers"} - set(tensors):
        raise CheckpointError(
            f"{path} lacks {', '.join(sorted(absent))}: it has {', '.join(sorted(map(str, tensors)))}"
        )
    counts, centers = (np.asarray(tensors[key], np.float32) for key in (name, f"{name}_centers"))
    if counts.ndim != 1 or counts.shape != centers.shape or counts.size < 2:
        raise CheckpointError(
            f"{path}: {name} and its centers must be two rows of bins, got {counts.shape}, {centers.shape}"
        )
    if not (np.isfinite(counts).all() and np.isfinite(centers).all() and (counts >= 0).all() and counts.any()):
        raise CheckpointError(f"{path}: {name} must hold finite counts >= 0, not all of them 0")
    if (np.diff(centers) < 0).any():
        raise CheckpointError(f"{path}: {name}_centers must ascend")
    return SiteHistogram(counts, centers, round(float(counts.sum(dtype=np.float64))))


def _read_table(path: Path) -> np.ndarray:
    if not path.is_file():
        raise CheckpointError(f"no such file: {path}", hint="each layer needs its results.csv")
    try:
        with path.open(newline="", encoding="utf-8") as file:
            header, *rows = [row for row in csv.reader(file) if row]
        if tuple(header) != LOOKUP_COLUMNS:
            raise CheckpointError(f"{path} has columns {', '.join(header)}: expected {', '.join(LOOKUP_COLUMNS)}")
        table = np.array([[float(value) for value in row] for row in rows], np.float64)
    except (ValueError, csv.Error) as error:
        raise CheckpointError(f"{path} is not a table of numbers: {error}") from error
    if table.shape[1:] != (len(LOOKUP_COLUMNS),) or not np.isfinite(table).all():
        raise CheckpointError(f"{path} must hold rows of {len(LOOKUP_COLUMNS)} finite numbers")
    return table
