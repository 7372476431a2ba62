"""Sharing a model's sparsity out over its projections: calibration and target in, plan out."""

import dataclasses
import warnings
from collections.abc import Callable

import numpy as np

from teal_jax.config import PROJECTIONS
from teal_jax.errors import PlanError, SparsityError
from teal_jax.model import LanguageModel
from teal_jax.sparsity.greedy import GreedySettings, greedy_path
from teal_jax.sparsity.plan import SparsityPlan, check_sparsity
from teal_jax.sparsity.statistics import Calibration

type Method = Callable[[LanguageModel, Calibration, float, GreedySettings, bool], tuple[np.ndarray, dict]]
"""Sparsities `[layers, 7]` for a target, and notes for the plan."""


def uniform(
    lm: LanguageModel, calibration: Calibration, target: float, settings: GreedySettings, progress: bool
) -> tuple[np.ndarray, dict]:
    """Every projection of every block at the target."""
    return np.full((lm.config.num_layers, len(PROJECTIONS)), target), {}


def greedy(
    lm: LanguageModel, calibration: Calibration, target: float, settings: GreedySettings, progress: bool
) -> tuple[np.ndarray, dict]:
    """TEAL's block-wise greedy search; a block where uniform sparsity has less error takes that.

    The path is kept in `calibration.path`: another target is then a look-up.
    """
    path = calibration.path
    wanted = dataclasses.asdict(settings)
    if path is None or any(path.settings[name] != value for name, value in wanted.items()):
        path = calibration.path = greedy_path(lm, calibration, settings=settings, progress=progress)
    if target > path.effective[-1]:
        raise SparsityError(
            f"the greedy path ends at {path.effective[-1]:.3f}, got a target of {target}",
            hint="search further: GreedySettings(max_sparsity=...)",
        )
    if settings.error == "teal":
        # Parity: the reference takes the nearest row, and never looks at uniform.
        return path.nearest(target)[0], dict(path.settings)
    sparsity, worse = path.at(target)
    sparsity[worse] = target
    layers = np.flatnonzero(worse).tolist()
    if layers:
        warnings.warn(f"uniform sparsity had less error than greedy in blocks {layers}: they take it", stacklevel=3)
    return sparsity, path.settings | {"uniform_blocks": layers}


METHODS: dict[str, Method] = {"greedy": greedy, "uniform": uniform}
"""Allocation methods by name; add a function to offer another."""


def allocate(
    lm: LanguageModel,
    calibration: Calibration,
    sparsity: float,
    *,
    method: str = "greedy",
    error: str | None = None,
    settings: GreedySettings | None = None,
    progress: bool = True,
) -> SparsityPlan:
    """Share `sparsity` out over the projections and set their thresholds.

    Args:
      lm: the model; its gates are ignored.
      calibration: of this model, from `teal_jax.calibrate`.
      sparsity: target model sparsity in [0, 1): the mean over projections weighted by `d_in * d_out`.
      method: `"greedy"` or `"uniform"`.
      error: what the greedy search minimises, `"mse"` or `"teal"` (the reference's, which also takes the nearest row
        of the path as it is). None: what `settings` say.
      settings: of the greedy search. None: those of the path kept in `calibration` if it reaches the target, else
        the defaults.
      progress: draw a progress bar.

    Returns:
      A `SparsityPlan` for `lm.sparsify`.

    Raises:
      SparsityError: outside [0, 1), or beyond the end of a greedy path.
      PlanError: the calibration is of a model of another shape.
    """
    target = check_sparsity(sparsity)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if calibration.config.fingerprint != lm.config.fingerprint:
        raise PlanError(
            f"the calibration is for another model ({calibration.notes.get('model', 'unknown')})",
            hint="calibrate this model: teal_jax.calibrate(lm, ...)",
        )
    if settings is None:
        default = GreedySettings(error=error or GreedySettings.error)
        settings = _walked(calibration, target, default.error) or default
    elif error is not None:
        settings = dataclasses.replace(settings, error=error)
    shares, notes = METHODS[method](lm, calibration, target, settings, progress)
    return SparsityPlan(
        sparsity=shares,
        thresholds=calibration.thresholds(shares),
        target=target,
        method=method,
        fingerprint=lm.config.fingerprint,
        projection_sizes=lm.config.projection_sizes,
        model=lm.name,
        notes={"calibration": calibration.notes, "allocation": notes},
    )


def _walked(calibration: Calibration, target: float, error: str) -> GreedySettings | None:
    """The settings of the path already there, if it has this error and reaches `target`: who states none takes it."""
    path = calibration.path
    if path is None or path.settings["error"] != error or target > path.effective[-1]:
        return None
    return GreedySettings(**{field.name: path.settings[field.name] for field in dataclasses.fields(GreedySettings)})
