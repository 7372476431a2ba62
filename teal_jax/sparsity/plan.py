"""The sparsity plan, a few kB of JSON: how much each projection of each block drops, and under which threshold."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from teal_jax.config import PROJECTIONS, ModelConfig
from teal_jax.errors import PlanError, SparsityError

FORMAT_VERSION = 1


def check_sparsity(sparsity: float) -> float:
    """`sparsity` as a float; raises `SparsityError` outside [0, 1)."""
    value = float(sparsity)
    if not 0 <= value < 1:
        raise SparsityError(
            f"sparsity must lie in [0, 1), got {sparsity}", hint="0.4 drops 40 % of the input channels on average"
        )
    return value


def model_sparsity(config: ModelConfig, sparsity: np.ndarray) -> float:
    """Mean of `sparsity [layers, 7]` weighted by `d_in * d_out`: the share of block weights that need no reading."""
    return float(np.average(np.asarray(sparsity, np.float64).mean(axis=0), weights=config.projection_sizes))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityPlan:
    """Sparsity and threshold per layer and projection, with how they came to be.

    Attributes:
      sparsity: float64 `[layers, 7]`, intended share of input channels dropped, in [0, 1].
      thresholds: float32 `[layers, 7]`, `|x| > t` is kept; >= 0 and finite, except that TEAL's signed rule
        (parity mode) may make one negative, which then drops nothing.
      target: the model sparsity asked for, in [0, 1).
      method: how the target was shared out (`"greedy"`, `"uniform"`).
      fingerprint: `ModelConfig.fingerprint` of the model it is for.
      projection_sizes: weights of each projection, the weights of the mean.
      model: name of that model, for people.
      notes: free facts about its making (calibration text, tokens, seed, layers that fell back to uniform).
    """

    sparsity: np.ndarray
    thresholds: np.ndarray
    target: float
    method: str
    fingerprint: str
    projection_sizes: tuple[int, ...]
    model: str = "model"
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        for name, dtype in (("sparsity", np.float64), ("thresholds", np.float32)):
            try:
                array = np.array(getattr(self, name), dtype)
            except (TypeError, ValueError) as error:
                raise PlanError(f"plan.{name} must be numbers [layers, 7]: {error}") from error
            if array.ndim != 2 or array.shape[1] != len(PROJECTIONS) or not len(array):
                raise PlanError(f"plan.{name} must have shape [layers, 7], got {list(array.shape)}")
            if not np.isfinite(array).all():
                raise PlanError(f"plan.{name} must be finite, got {array[~np.isfinite(array)][0]}")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if self.sparsity.shape != self.thresholds.shape:
            raise PlanError(f"plan: sparsity has {len(self.sparsity)} layers, thresholds {len(self.thresholds)}")
        if self.sparsity.min() < 0:
            raise PlanError(f"plan.sparsity must be >= 0, got {self.sparsity.min()}")
        if len(self.projection_sizes) != len(PROJECTIONS):
            raise PlanError(f"plan.projection_sizes must name 7 sizes, got {len(self.projection_sizes)}")

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the projection axis."""
        return PROJECTIONS

    @property
    def num_layers(self) -> int:
        """Blocks of the model."""
        return len(self.sparsity)

    @property
    def model_sparsity(self) -> float:
        """Size-weighted mean of `sparsity`."""
        return float(np.average(self.sparsity.mean(axis=0), weights=self.projection_sizes))

    def check_fits(self, config: ModelConfig) -> None:
        """Raise `PlanError` unless the plan was made for a model of this config."""
        if self.num_layers != config.num_layers:
            raise PlanError(
                f"the plan is for {self.model}, {self.num_layers} layers; the model has {config.num_layers}",
                hint="allocate a plan for this model",
            )
        if self.fingerprint != config.fingerprint:
            raise PlanError(
                f"the plan is for another model ({self.model}, fingerprint {self.fingerprint}; this one has "
                f"{config.fingerprint})",
                hint="allocate a plan for this model",
            )

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON; returns the path."""
        path = Path(path)
        aside = path.with_name(path.name + ".part")
        try:
            aside.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
            aside.replace(path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise PlanError(f"cannot write the plan to {path}: {error.strerror}") from error
        return path

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        # Seven significant digits name a float32 threshold nearly, nine exactly.
        thresholds = [[float(f"{t:.9g}") for t in row] for row in self.thresholds.tolist()]
        return {
            "format_version": FORMAT_VERSION,
            "model": self.model,
            "fingerprint": self.fingerprint,
            "method": self.method,
            "target": self.target,
            "model_sparsity": self.model_sparsity,
            "projections": list(PROJECTIONS),
            "projection_sizes": list(self.projection_sizes),
            "sparsity": self.sparsity.tolist(),
            "thresholds": thresholds,
            "notes": self.notes,
        }

    @classmethod
    def load(cls, path: str | Path) -> "SparsityPlan":
        """Read a plan written by `save`; raises `PlanError` where it is not one."""
        path = Path(path)
        try:
            fields = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise PlanError(f"no plan at {path}", hint="make one: teal allocate") from error
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PlanError(f"{path} is not a plan: {error}") from error
        return cls.from_dict(fields, source=str(path))

    @classmethod
    def from_dict(cls, fields: Any, *, source: str = "the plan") -> "SparsityPlan":
        """The plan that `to_dict` wrote; `source` names it in errors."""
        if not isinstance(fields, dict) or "format_version" not in fields:
            raise PlanError(f"{source} is not a sparsity plan: no format_version")
        version = fields["format_version"]
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise PlanError(
                f"{source} has format version {version}; this teal_jax reads up to {FORMAT_VERSION}",
                hint="upgrade teal_jax: pip install -U teal-jax",
            )
        if fields.get("projections") != list(PROJECTIONS):
            raise PlanError(f"{source}: projections must be {' '.join(PROJECTIONS)}, got {fields.get('projections')}")
        names = [field.name for field in dataclasses.fields(cls)]
        if missing := [name for name in names if name not in fields]:
            raise PlanError(f"{source} lacks {', '.join(missing)}")
        values: dict[str, Any] = {name: fields[name] for name in names}
        values["projection_sizes"] = tuple(values["projection_sizes"])
        return cls(**values)
