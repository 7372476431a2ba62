"""Sharing a model's sparsity out over its projections: calibration and target in, plan out."""

import dataclasses
import warnings

from teal_jax.errors import PlanError
from teal_jax.model import LanguageModel
from teal_jax.sparsity.distil import DistilSettings
from teal_jax.sparsity.greedy import GreedySettings
from teal_jax.sparsity.methods import (
    cats,
    cross_block,
    greedy,
    larosa,
    learned,
    r_sparse,
    spon,
    top_k,
    uniform,
    was,
    wina,
    wisparse,
)
from teal_jax.sparsity.methods.choice import Method, Task
from teal_jax.sparsity.plan import SparsityPlan, check_sparsity
from teal_jax.sparsity.statistics import Calibration

TOLERANCE = 0.005
"""How near `SparsityPlan.reached` is to the target, or `allocate` warns. A top-k gate then rounds to whole channels."""

METHODS: dict[str, Method] = {
    "greedy": greedy.choose,
    "uniform": uniform.choose,
    "top_k": top_k.choose,
    "cats": cats.choose,
    "wina": wina.choose,
    "was": was.choose,
    "wisparse": wisparse.choose,
    "r_sparse": r_sparse.choose,
    "larosa": larosa.choose,
    "spon": spon.choose,
    "cross_block": cross_block.choose,
    "learned": learned.choose,
}
"""Allocation methods by name; add a function to offer another."""


def allocate(
    lm: LanguageModel,
    calibration: Calibration,
    sparsity: float,
    *,
    method: str = "greedy",
    error: str | None = None,
    settings: GreedySettings | None = None,
    distil: DistilSettings | None = None,
    progress: bool = True,
) -> SparsityPlan:
    """Share `sparsity` out over the projections and set their thresholds, and what the method adds to them.

    Args:
      lm: the model; its gates are ignored.
      calibration: of this model, from `teal_jax.calibrate`.
      sparsity: target model sparsity in [0, 1): the mean over projections weighted by `d_in * d_out`.
      method: a name in `METHODS`.
      error: what the greedy search minimises, `"mse"` or `"teal"` (the reference's, which also takes the nearest row
        of the path as it is). None: what `settings` say.
      settings: of the greedy search. None: those of the path kept in `calibration` if it reaches the target, else
        the defaults.
      distil: settings of the training of `"learned"` and `"spon"`. None: the defaults.
      progress: draw a progress bar.

    Returns:
      A `SparsityPlan` for `lm.sparsify`. Warns where it does not reach the target to within `TOLERANCE`.

    Raises:
      SparsityError: outside [0, 1), or more than the method can drop (the end of a greedy path; cats).
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
    task = Task(
        lm=lm,
        calibration=calibration,
        target=target,
        greedy=settings,
        distil=distil or DistilSettings(),
        progress=progress,
    )
    choice = METHODS[method](task)
    thresholds = calibration.thresholds(choice.sparsity) if choice.thresholds is None else choice.thresholds
    plan = SparsityPlan(
        sparsity=choice.sparsity,
        thresholds=thresholds,
        target=target,
        method=method,
        fingerprint=lm.config.fingerprint,
        projection_sizes=lm.config.projection_sizes,
        model=lm.name,
        notes={"calibration": calibration.notes, "allocation": choice.notes},
        gate=choice.gate,
        score=choice.score,
        arrays=choice.arrays,
    )
    if abs(plan.reached - target) > TOLERANCE:
        warnings.warn(
            f"{method} leaves {plan.reached:.1%} of the block weights unread where {target:.1%} were asked for",
            stacklevel=2,
        )
    return plan


def _walked(calibration: Calibration, target: float, error: str) -> GreedySettings | None:
    """The settings of the path already there, if it has this error and reaches `target`: who states none takes it."""
    path = calibration.path
    if path is None or path.settings["error"] != error or target > path.effective[-1]:
        return None
    return GreedySettings(**{field.name: path.settings[field.name] for field in dataclasses.fields(GreedySettings)})
