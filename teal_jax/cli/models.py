"""From the options of a command to a model: loaded, and under the sparsity asked for."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teal_jax.cli.session import Session
from teal_jax.errors import DataError, PlanError

if TYPE_CHECKING:
    from teal_jax.model import LanguageModel
    from teal_jax.sparsity.plan import SparsityPlan
    from teal_jax.sparsity.statistics import Calibration


def open_model(
    session: Session, name: str, *, dtype: str | None = None, revision: str | None = None, **quantising: Any
) -> "LanguageModel":
    """The model called `name`; `quantising` are further arguments of `teal_jax.load`."""
    from teal_jax import compilation_cache
    from teal_jax.loading import load

    compilation_cache.enable()
    return load(name, dtype=dtype, revision=revision, offline=session.offline, progress=session.progress, **quantising)


def check_texts(files: Iterable[Path] | None) -> None:
    """Raise `DataError` for a file that is not there: now, and not after minutes of loading weights."""
    for file in files or ():
        if not file.exists():
            raise DataError(f"no text file at {file}", hint="give a .txt or .jsonl file")


def check_file(output: Path) -> None:
    """Raise `PlanError` where a file cannot be made at `output`: now, and not after minutes of work."""
    if output.is_dir():
        raise PlanError(f"{output} is a directory", hint="give the name of a file")
    if not output.absolute().parent.is_dir():
        raise PlanError(f"no directory {output.parent} to write {output.name} in", hint="make it first")


class Sparsifier:
    """Puts a model under any target; calibrates it when first needed, from what was saved with it if possible."""

    def __init__(self, session: Session, lm: "LanguageModel", name: str, **calibration: Any):
        """`name` is what `lm` was loaded as; `calibration` are arguments of `teal_jax.calibrate`."""
        self._session, self._lm, self._name = session, lm, name
        self._arguments = calibration
        self._calibration: Calibration | None = None

    @property
    def calibration(self) -> "Calibration":
        """The calibration saved with the artifact, or a new one."""
        from teal_jax.artifact import saved_calibration
        from teal_jax.sparsity.calibration import calibrate

        if self._calibration is None and self._arguments.get("data") is None:
            self._calibration = saved_calibration(Path(self._name).expanduser(), self._lm)
        if self._calibration is None:
            self._calibration = calibrate(self._lm, progress=self._session.progress, **self._arguments)
        return self._calibration

    @calibration.setter
    def calibration(self, calibration: "Calibration") -> None:
        self._calibration = calibration

    def plan(self, target: float, method: str | None = "greedy") -> "SparsityPlan":
        """A plan for `target`; method None: the default of `load_and_sparsify`."""
        from teal_jax.sparsity.allocation import allocate
        from teal_jax.sparsity.default import default_method

        if method is None:
            method, reason = default_method(self._lm, self.calibration)
            if reason is not None:
                self._session.note(f"{method} in place of the default method: {reason}")
        return allocate(self._lm, self.calibration, target, method=method, progress=self._session.progress)

    def __call__(self, target: float, method: str = "greedy") -> "LanguageModel":
        """The model at `target`; 0 is dense."""
        if target == 0:
            return self._lm.dense()
        plan = self._lm.plan
        if plan is not None and abs(plan.target - target) < 1e-9 and plan.method == method:
            return self._lm
        return self._lm.sparsify(self.plan(target, method))


def choose(
    session: Session, name: str, sparsity: float | None, plan: Path | None, **loading: Any
) -> tuple["LanguageModel", Sparsifier]:
    """The model under `sparsity` or `plan`, as it was saved where neither is given; and its sparsifier."""
    from teal_jax.sparsity.plan import SparsityPlan

    given = None if plan is None else SparsityPlan.load(plan)
    lm = open_model(session, name, **loading)
    sparsifier = Sparsifier(session, lm, name)
    if given is not None:
        return lm.sparsify(given), sparsifier
    return lm if sparsity is None else sparsifier(sparsity), sparsifier
