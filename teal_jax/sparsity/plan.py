"""The sparsity plan, a few kB of JSON: how much each projection of each block drops, and under which threshold.

What a method learnt beside that (biases, scales, rotations) lies in an .arrays.npz file next to the JSON.
"""

import dataclasses
import hashlib
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from teal_jax.config import PROJECTIONS, SITE_OF_PROJECTION, ModelConfig
from teal_jax.errors import PlanError, SparsityError

FORMAT_VERSION = 3
"""1: thresholds of |x|, all that most plans need; they are still written as 1. 2: gate, score or arrays. 3: trained."""

_MADE = "make one: teal allocate"

GATES = ("threshold", "top_k", "gate_output", "relu")
ARRAYS = ("bias", "scale", "low_rank_a", "low_rank_b", "rotation")


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


@dataclasses.dataclass(frozen=True)
class Score:
    """A channel's score is `|x_i| * norm(W[i, :]) ** exponent`; the norms are taken from the weights, never saved.

    Attributes:
      norm: 1 or 2, the order of the norm of the row of W that x_i is multiplied by.
      exponent: one number, or `[layers][7]`.
    """

    norm: int
    exponent: float | tuple[tuple[float, ...], ...] = 1.0

    def __post_init__(self):
        if self.norm not in (1, 2):
            raise PlanError(f"plan.score.norm must be 1 or 2, got {self.norm!r}")
        if isinstance(self.exponent, list):
            object.__setattr__(self, "exponent", tuple(tuple(row) for row in self.exponent))

    def exponents(self, num_layers: int) -> np.ndarray:
        """The exponents, float64 `[layers, 7]`."""
        try:
            return np.broadcast_to(np.array(self.exponent, np.float64), (num_layers, len(PROJECTIONS)))
        except (TypeError, ValueError) as error:
            raise PlanError(f"plan.score.exponent must be a number or [{num_layers}][7]: {error}") from error


@dataclasses.dataclass(frozen=True)
class Trained:
    """The model was trained through the plan's gates: every token passes them, prompts included.

    Attributes:
      int8: activations are quantised to eight bits a token before they are thinned.
      block: M of Block Q-Sparse's N:M, a top-K gate over every M neighbouring channels; None: over all of them.
    """

    int8: bool = False
    block: int | None = None

    def __post_init__(self):
        if not isinstance(self.int8, bool):
            raise PlanError(f"plan.trained.int8 must be true or false, got {self.int8!r}")
        if self.block is not None and (not isinstance(self.block, int) or self.block < 1):
            raise PlanError(f"plan.trained.block must be a whole number >= 1 or null, got {self.block!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparsityPlan:
    """Sparsity and threshold per layer and projection, with how they came to be.

    Attributes:
      sparsity: float64 `[layers, 7]`, intended share of input channels dropped, in [0, 1].
      thresholds: float32 `[layers, 7]`, what is above is kept; >= 0 and finite, except that TEAL's signed rule
        (parity mode) may make one negative, which then drops nothing. 0 where the gate reads none.
      target: the model sparsity asked for, in [0, 1).
      method: how the target was shared out (`"greedy"`, `"uniform"`).
      fingerprint: `ModelConfig.fingerprint` of the model it is for.
      projection_sizes: weights of each projection, the weights of the mean.
      model: name of that model, for people.
      notes: free facts about its making (calibration text, tokens, seed, layers that fell back to uniform).
      gate: `"threshold"`: score > threshold; `"top_k"`: the `round((1 - sparsity) d_in)` largest scores of each token;
        `"gate_output"`: CATS, thresholds of up's column act on |silu(gate_proj x)|; `"relu"`: x > 0, whatever that
        drops.
      score: of a channel; None: |x_i|.
      arrays: by name, `"bias.3.down"`: what is added to or done around projection `down` of layer 3. Names are
        `bias` `[d_out]`, `scale` `[d_in]`, `low_rank_a` `[d_in, rank]`, `low_rank_b` `[rank, d_out]`, and `rotation`
        `[d_in, d_in]`, which stands under the first projection of its site for all of them.
      trained: how the model was trained through these gates; None: they came after its training.
    """

    sparsity: np.ndarray
    thresholds: np.ndarray
    target: float
    method: str
    fingerprint: str
    projection_sizes: tuple[int, ...]
    model: str = "model"
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)
    gate: str = "threshold"
    score: Score | None = None
    arrays: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    trained: Trained | None = None

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
        if self.gate not in GATES:
            raise PlanError(f"plan.gate must be one of {', '.join(GATES)}, got {self.gate!r}")
        if isinstance(self.score, dict):
            object.__setattr__(self, "score", Score(**self.score))
        if isinstance(self.trained, dict):
            object.__setattr__(self, "trained", _known(Trained, self.trained, "plan.trained"))
        if self.trained is not None:
            self._check_trained(self.trained)
        for name in self.arrays:
            kind, _, projection = array_place(name, self.num_layers)
            if kind == "rotation" and SITE_OF_PROJECTION.index(SITE_OF_PROJECTION[projection]) != projection:
                raise PlanError(f"plan.arrays: a rotation stands under q, o, gate or down, got {name!r}")

    def _check_trained(self, trained: Trained) -> None:
        if self.gate == "gate_output":
            raise PlanError("plan.trained: a model is trained through threshold or top_k gates, got gate_output")
        if trained.block is not None and (self.gate != "top_k" or self.score is not None or self.arrays):
            raise PlanError("plan.trained.block goes with top_k gates that have no score and no arrays")

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

    @property
    def extra_weights(self) -> int:
        """Matrix entries that every token reads beside the kept rows: low rank and rotations, in all layers."""
        return sum(array.size for array in self.arrays.values() if array.ndim == 2)

    @property
    def extra_vectors(self) -> int:
        """Entries of vectors that every token reads: biases and scales."""
        return sum(array.size for array in self.arrays.values() if array.ndim == 1)

    @property
    def reached(self) -> float:
        """Share of the block weights that the plan means to leave unread: rows, less what its matrices read instead."""
        return self.model_sparsity - self.extra_weights / (self.num_layers * sum(self.projection_sizes))

    def save(self, path: str | Path) -> Path:
        """Write the plan as JSON, and its arrays, if any, to a .arrays.npz of the same stem; returns the path."""
        path = Path(path)
        aside = path.with_name(path.name + ".part")
        try:
            if self.arrays:
                with aside.open("wb") as file:
                    arrays: dict[str, Any] = dict(self.arrays)
                    np.savez(file, **arrays)
                aside.replace(arrays_path(path))
            aside.write_text(json.dumps(self.to_dict(), indent=1) + "\n")
            aside.replace(path)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise PlanError(
                f"cannot write the plan to {path}: {error.strerror}", hint="give a file in a directory that exists"
            ) from error
        return path

    def to_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready values."""
        # Seven significant digits name a float32 threshold nearly, nine exactly.
        thresholds = [[float(f"{t:.9g}") for t in row] for row in self.thresholds.tolist()]
        plain = self.gate == "threshold" and self.score is None and not self.arrays
        fields = {
            "format_version": 3 if self.trained is not None else 1 if plain else 2,
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
        if not plain:
            fields["gate"] = self.gate
            fields["score"] = None if self.score is None else dataclasses.asdict(self.score)
            fields["arrays"] = {"digest": _digest(self.arrays), "count": len(self.arrays)} if self.arrays else None
        if self.trained is not None:
            fields["trained"] = dataclasses.asdict(self.trained)
        return fields

    @classmethod
    def load(cls, path: str | Path) -> "SparsityPlan":
        """Read a plan written by `save`; raises `PlanError` where it is not one."""
        path = Path(path)
        try:
            fields = json.loads(path.read_text())
        except FileNotFoundError as error:
            raise PlanError(f"no plan at {path}", hint=_MADE) from error
        except OSError as error:
            raise PlanError(f"{path} is not a plan: {error.strerror}", hint=_MADE) from error
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise PlanError(f"{path} is not a plan: expected JSON; {error}", hint=_MADE) from error
        arrays = _read_arrays(path) if isinstance(fields, dict) and fields.get("arrays") else None
        return cls.from_dict(fields, arrays, source=str(path))

    @classmethod
    def from_dict(
        cls, fields: Any, arrays: Mapping[str, np.ndarray] | None = None, *, source: str = "the plan"
    ) -> "SparsityPlan":
        """The plan that `to_dict` wrote, with the arrays it had; `source` names it in errors."""
        if not isinstance(fields, dict) or "format_version" not in fields:
            raise PlanError(f"{source} is not a sparsity plan: no format_version", hint=_MADE)
        version = fields["format_version"]
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise PlanError(
                f"{source} has format version {version}; this teal_jax reads up to {FORMAT_VERSION}",
                hint="upgrade teal_jax: pip install -U teal-jax",
            )
        if fields.get("projections") != list(PROJECTIONS):
            raise PlanError(f"{source}: projections must be {' '.join(PROJECTIONS)}, got {fields.get('projections')}")
        later = {"gate": "threshold", "score": None, "arrays": None, "trained": None}
        names = [field.name for field in dataclasses.fields(cls) if field.name not in later]
        if missing := [name for name in names if name not in fields]:
            raise PlanError(f"{source} lacks {', '.join(missing)}")
        values: dict[str, Any] = {name: fields[name] for name in names}
        values["projection_sizes"] = tuple(values["projection_sizes"])
        values |= {name: fields.get(name, default) for name, default in later.items()}
        expected = (values["arrays"] or {}).get("digest")
        if expected is not None and (arrays is None or _digest(arrays) != expected):
            found = "none were given" if arrays is None else "these are another plan's"
            raise PlanError(f"{source} needs its arrays: {found}", hint="keep the .arrays.npz beside the plan's .json")
        values["arrays"] = dict(arrays or {})
        return cls(**values)


def _known(kind: Any, fields: dict[str, Any], what: str) -> Any:
    try:
        return kind(**fields)
    except TypeError as error:
        raise PlanError(f"{what}: {error}", hint="made by a newer teal_jax? upgrade it") from error


def array_name(kind: str, layer: int, projection: int) -> str:
    """The name of an array in a plan: `"bias.3.down"`."""
    return f"{kind}.{layer}.{PROJECTIONS[projection]}"


def array_place(name: str, num_layers: int) -> tuple[str, int, int]:
    """Kind, layer and projection of a named array; raises `PlanError` where it is no such name."""
    kind, _, place = name.partition(".")
    layer, _, projection = place.partition(".")
    if kind not in ARRAYS or not layer.isdecimal() or int(layer) >= num_layers or projection not in PROJECTIONS:
        raise PlanError(
            f"plan.arrays: expected names like bias.0.down of {', '.join(ARRAYS)} and {num_layers} layers, got {name!r}"
        )
    return kind, int(layer), PROJECTIONS.index(projection)


def arrays_path(path: Path) -> Path:
    """Where the arrays of the plan at `path` lie."""
    return path.with_name(f"{path.stem}.arrays.npz")  # not .npz: a calibration may lie there


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    """16 hex digits over names, shapes and values."""
    found = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()[:16]


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    path = arrays_path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except FileNotFoundError as error:
        raise PlanError(f"the plan's arrays are missing: no {path}", hint="keep it beside the plan's .json") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise PlanError(f"{path} does not hold a plan's arrays: {error}") from error
