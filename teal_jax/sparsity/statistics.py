"""What calibration leaves behind: histograms, tokens, and the greedy path once it has been walked."""

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from teal_jax.config import PROJECTIONS, SITE_OF_PROJECTION, SITES, ModelConfig
from teal_jax.errors import DataError, PlanError
from teal_jax.sparsity.greedy_path import GreedyPath
from teal_jax.sparsity.histogram import NUM_BINS, magnitude_quantiles, share_below
from teal_jax.sparsity.parity import SignedHistogram

FORMAT_VERSION = 1
_MADE = "make one: teal calibrate"


@dataclasses.dataclass(kw_only=True)
class Calibration:
    """Activation statistics of one model on one text.

    Attributes:
      config: of the model.
      counts: int64 `[layers, 4, NUM_BINS]`, histograms of |x| per site.
      tokens: int32 `[rows, seq]`, the calibration tokens.
      notes: how it was made.
      signed: per layer and site, the reference's histograms; only under `threshold_rule="signed"`.
      path: the greedy path, filled by the first greedy allocation, so that another target is a look-up.
      memo: what other methods found out on the way to a first plan, for the next target; not saved.
    """

    config: ModelConfig
    counts: np.ndarray
    tokens: np.ndarray
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    signed: list[list[SignedHistogram]] | None = None
    path: GreedyPath | None = None
    memo: dict[str, Any] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @property
    def threshold_rule(self) -> str:
        """`"magnitude"` or `"signed"`."""
        return "magnitude" if self.signed is None else "signed"

    def thresholds(self, sparsity: np.ndarray | float) -> np.ndarray:
        """Thresholds float32 `[layers, 7]` that drop the given shares of the calibration activations.

        Args:
          sparsity: `[layers, 7]`, or anything that broadcasts to it, >= 0. Shares above 1 (one greedy step can
            overshoot in parity mode) drop everything.
        """
        sparsity = np.asarray(sparsity, np.float64)
        if not (np.isfinite(sparsity).all() and (sparsity >= 0).all()):
            raise ValueError(f"sparsity must be >= 0 and finite, got {sparsity.min()} to {sparsity.max()}")
        sparsity = np.broadcast_to(sparsity, (self.config.num_layers, len(PROJECTIONS)))
        columns = [self.site_thresholds(i, sparsity[:, i]) for i in range(len(PROJECTIONS))]
        return np.stack(columns, axis=1)

    def site_thresholds(self, projection: int, shares: np.ndarray) -> np.ndarray:
        """Thresholds of one projection, float32, for shares `[layers, ...]`: each layer has its own."""
        site = SITE_OF_PROJECTION[projection]
        if self.signed is not None:
            rule = [np.vectorize(layer[site].threshold, otypes=[np.float32]) for layer in self.signed]
            return np.stack([rule[i](row) for i, row in enumerate(shares)])
        return np.stack([magnitude_quantiles(self.counts[i, site], np.minimum(row, 1)) for i, row in enumerate(shares)])

    def realised(self, thresholds: np.ndarray) -> np.ndarray:
        """Share of the calibration activations that thresholds `[layers, 7]` drop, float64 `[layers, 7]`."""
        shares = [
            [share_below(self.counts[layer, site], thresholds[layer, i]) for i, site in enumerate(SITE_OF_PROJECTION)]
            for layer in range(self.config.num_layers)
        ]
        return np.array(shares)

    def check_finite(self) -> None:
        """Raise `DataError` where an activation was inf or NaN: its thresholds would mean nothing."""
        broken = self.counts[:, :, 0x7F800000 >> 15 :].sum(axis=-1)
        if broken.any():
            layer, site = np.argwhere(broken)[0]
            raise DataError(
                f"calibration met {broken[layer, site]} inf or NaN activations, first at layer {layer} {SITES[site]}",
                hint="check the checkpoint, or load it with dtype='float32'",
            )

    def save(self, path: str | Path) -> Path:
        """Write everything to an .npz file (a few MB); returns the path."""
        path = Path(path)
        header = {"format_version": FORMAT_VERSION, "config": self.config.to_dict(), "notes": self.notes}
        arrays: dict[str, Any] = {"counts": self.counts, "tokens": self.tokens}
        if self.signed is not None:
            arrays["signed_counts"] = np.array([[site.counts for site in layer] for layer in self.signed])
            arrays["signed_centers"] = np.array([[site.centers for site in layer] for layer in self.signed])
        if self.path is not None:
            arrays |= self.path.to_arrays()
            header["path"] = self.path.settings
        aside = path.with_name(path.name + ".part")
        try:
            with aside.open("wb") as file:
                np.savez_compressed(file, header=np.array(json.dumps(header)), **arrays)
            aside.replace(path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise PlanError(
                f"cannot write the calibration to {path}: {error.strerror}",
                hint="give a file in a directory that exists",
            ) from error
        return path

    @classmethod
    def load(cls, path: str | Path) -> "Calibration":
        """Read what `save` wrote; raises `PlanError` where it is not one."""
        path = Path(path)
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            header = json.loads(str(arrays.pop("header")))
            version = header["format_version"]
        except FileNotFoundError as error:
            raise PlanError(f"no calibration at {path}", hint=_MADE) from error
        except OSError as error:
            raise PlanError(f"{path} is not a calibration: {error.strerror or error}", hint=_MADE) from error
        except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            # numpy's own words would have the reader allow pickles.
            raise PlanError(f"{path} is not a calibration: expected an .npz of teal calibrate", hint=_MADE) from error
        if version > FORMAT_VERSION:
            raise PlanError(
                f"{path} has format version {version}; this teal_jax reads up to {FORMAT_VERSION}",
                hint="upgrade teal_jax: pip install -U teal-jax",
            )
        config = ModelConfig.from_dict(header["config"])
        if arrays["counts"].shape != (config.num_layers, len(SITES), NUM_BINS):
            raise PlanError(
                f"{path}: histograms have shape {list(arrays['counts'].shape)}, which does not fit its config"
            )
        signed = None
        if "signed_counts" in arrays:
            pairs = zip(arrays["signed_counts"], arrays["signed_centers"], strict=True)
            signed = [[SignedHistogram(*site) for site in zip(*layer, strict=True)] for layer in pairs]
        greedy = GreedyPath.from_arrays(arrays, header["path"]) if "path" in header else None
        return cls(
            config=config,
            counts=arrays["counts"],
            tokens=arrays["tokens"],
            notes=header["notes"],
            signed=signed,
            path=greedy,
        )
