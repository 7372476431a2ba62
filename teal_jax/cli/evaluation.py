"""What `teal eval` does: from its options to a swept directory and a report."""

import dataclasses
import functools
import hashlib
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teal_jax.cli.models import Sparsifier, check_texts, open_model
from teal_jax.cli.session import Session
from teal_jax.errors import ArtifactError, PlanError

if TYPE_CHECKING:
    from teal_jax.evaluation.report import EvaluationReport
    from teal_jax.evaluation.run_directory import RunDirectory
    from teal_jax.evaluation.settings import EvaluationSettings
    from teal_jax.model import LanguageModel
    from teal_jax.sparsity.statistics import Calibration

_BUNDLED_TOKENS = 8192
"""Scored of the bundled text unless told otherwise: a sweep of the embedded model then takes minutes on a CPU."""

_HOME = Path("teal-eval")
_KEPT_CALIBRATION = "calibration.npz"


def parse_methods(text: str) -> list[str]:
    """`"greedy,uniform"` as names, in order and without repeats; `"all"` is every method.

    Raises:
      ValueError: a name that is no method.
    """
    from teal_jax.sparsity.allocation import METHODS

    names = [name.strip() for name in text.split(",") if name.strip()]
    if names == ["all"]:
        return list(METHODS)
    unknown = [name for name in names if name not in METHODS]
    if unknown or not names:
        raise ValueError(f"method must be all, or some of {', '.join(METHODS)}, got {', '.join(unknown) or text!r}")
    return list(dict.fromkeys(names))


class Evaluation:
    """One command: what it measures, of which model, on which text."""

    def __init__(
        self,
        session: Session,
        model: str,
        *,
        methods: str,
        targets: Sequence[float],
        texts: Sequence[Path],
        layout: dict[str, Any],
        settings: "EvaluationSettings",
        calibration: Path | None,
        calibration_data: Sequence[Path],
        full_search: bool,
        measured: bool,
        loading: dict[str, Any],
        quantising: dict[str, Any],
    ):
        """Load model and text; nothing is measured yet. Arguments are the command's."""
        import jax

        from teal_jax.embedded import HELDOUT_TEXT
        from teal_jax.evaluation.overlap import refuse_same_file
        from teal_jax.evaluation.text import read_text
        from teal_jax.sparsity.statistics import Calibration

        self._session, self._settings = session, settings
        self._methods, self._targets = parse_methods(methods), list(targets)
        refuse_same_file(texts, calibration_data)
        # Before a directory is named after it: one made for a broken file would refuse the right one.
        self._given = None if calibration is None else Calibration.load(calibration)
        check_texts([*texts, *calibration_data])
        text = {"data": list(calibration_data) or None, "seed": settings.seed}
        self._lm = open_model(session, model, **loading, **quantising, **text)
        if self._given is not None and self._given.config.fingerprint != self._lm.config.fingerprint:
            raise PlanError(
                f"the calibration is for another model ({self._given.notes.get('model', 'unknown')})",
                hint="calibrate this model: leave --calibration out, or teal calibrate",
            )
        if not texts:
            session.note("no --data: scoring the bundled children's stories")
            texts = [HELDOUT_TEXT]
            if layout["max_tokens"] is None:
                layout = layout | {"max_tokens": _BUNDLED_TOKENS}
        self._text = read_text(self._lm, list(texts), **layout)
        self._calibration_file, self._calibration_data = calibration, list(calibration_data)
        self._sparsifier = Sparsifier(session, self._lm, model, data=self._calibration_data or None, seed=settings.seed)
        self._measured = measured
        self._quick = jax.default_backend() == "cpu" and not full_search
        self._saved_with = _file_digest(Path(model).expanduser() / "calibration.npz")

    def open(self, path: Path | None) -> "RunDirectory":
        """The directory of this evaluation, `path` or one named after what is measured.

        Raises:
          ArtifactError: it is another evaluation's.
        """
        from teal_jax.evaluation.run_directory import RunDirectory, digest

        configuration = self._configuration()
        name = Path(self._lm.name).name or "model"
        return RunDirectory(path or _HOME / f"{name}-{digest(configuration)}", configuration)

    def _configuration(self) -> dict[str, Any]:
        """Everything that makes cells comparable."""
        import jax

        from teal_jax.benchmark.report import versions
        from teal_jax.evaluation.run_directory import weights_digest

        names = [str(file) for file in self._calibration_data]
        return {
            "model": {
                "name": self._lm.name,
                "fingerprint": self._lm.config.fingerprint,
                "weights": weights_digest(self._lm),
                "dtype": str(self._lm.dtype),
            }
            # Of a model in 16 bits not a word, so that a directory begun before goes on.
            | ({} if self._lm.quantization is None else {"quantization": self._lm.quantization}),
            "text": {"source": self._text.source, "digest": self._text.digest, "tokens": self._text.num_tokens},
            "calibration": {
                "file": None if self._calibration_file is None else _file_digest(self._calibration_file),
                "text": {Path(name).name: _file_digest(Path(name)) for name in names} or "default",
                "saved": self._saved_with,
            },
            "quick_search": self._quick and "greedy" in self._methods,
            "settings": self._settings.of_cells(),
            "versions": {name: versions()[name] for name in ("teal_jax", "jax", "jaxlib")},
            "platform": jax.default_backend(),
        }

    def run(self, directory: "RunDirectory") -> "EvaluationReport":
        """Measure what the directory lacks."""
        from teal_jax.benchmark.report import device_name
        from teal_jax.evaluation.overlap import refuse_overlap
        from teal_jax.evaluation.report import make_report
        from teal_jax.evaluation.sweep import sweep

        if self._measured and directory.empty:
            raise ArtifactError(
                f"no cell has been measured in {directory.path}",
                hint="--measured reports on a sweep that was begun: give its options and its --out",
            )
        calibration, shared, notes = None, None, []
        if any(target > 0 for target in self._targets):
            calibration = self._calibrate(directory)
            # Before the directory is taken: with other text it would be refused.
            shared = refuse_overlap(self._text.layout.streams, calibration.tokens, self._text.source)
            directory.begin()
            if not (kept := directory.path / _KEPT_CALIBRATION).exists():
                calibration.save(kept)
            notes = self._search(calibration, directory)
        cells, failures, prompted = sweep(
            self._lm,
            self._text,
            methods=self._methods,
            targets=self._targets,
            sparsify=lambda method, target: self._sparsifier(target, method),
            directory=directory,
            settings=self._settings,
            measured=self._measured,
            progress=self._session.progress,
        )
        if self._measured:
            there = {(cell.method, cell.target) for cell in cells}
            wanted = [(method, target) for target in self._targets if target > 0 for method in self._methods]
            missing = [f"{method} {100 * target:g} %" for method, target in wanted if (method, target) not in there]
            notes = [*notes, *([f"Not measured: {', '.join(missing)}."] if missing else [])]
        return make_report(
            self._lm,
            self._text,
            cells,
            failures,
            prompted,
            self._settings,
            calibration=calibration,
            shared=shared,
            command=_command(sys.argv[1:]),
            hardware=device_name(),
            seeds={"calibration": self._settings.seed, "sampling and bootstrap": self._settings.seed},
            notes=notes,
        )

    def models(self, directory: "RunDirectory") -> "Iterator[tuple[str, float, Callable[[], LanguageModel]]]":
        """The dense model, and every method and target that has been measured: name, target, how to get it."""
        yield "dense", 0.0, self._lm.dense
        for method in self._methods:
            for target in self._targets:
                if target > 0 and directory.cell(method, target) is not None:
                    yield method, target, functools.partial(self._sparsifier, target, method)

    def _calibrate(self, directory: "RunDirectory") -> "Calibration":
        from teal_jax.sparsity.statistics import Calibration

        kept = directory.path / _KEPT_CALIBRATION
        if kept.exists():
            self._sparsifier.calibration = Calibration.load(kept)
        elif self._given is not None:
            self._sparsifier.calibration = self._given
        return self._sparsifier.calibration

    def _search(self, calibration: "Calibration", directory: "RunDirectory") -> list[str]:
        """Walk the greedy path before the first cell, so that it is kept; what to say about it."""
        from teal_jax.demo import GREEDY
        from teal_jax.sparsity.greedy import GreedySettings, greedy_path

        if "greedy" not in self._methods or self._measured:
            return []
        if calibration.path is None:
            settings = GreedySettings()
            if self._quick:
                settings = dataclasses.replace(GREEDY, max_sparsity=max(GREEDY.max_sparsity, settings.max_sparsity))
            calibration.path = greedy_path(self._lm, calibration, settings=settings, progress=self._session.progress)
            calibration.save(directory.path / _KEPT_CALIBRATION)
        found, default = calibration.path.settings, GreedySettings()
        if found["step"] <= default.step and found["max_rows"] is None:
            return []
        return [
            f"The greedy search was coarser than the library's default: steps of {found['step']:g} instead of "
            f"{default.step:g}, on {found['max_rows'] or 'all'} calibration rows. Greedy at its best: --full-search."
        ]


def show(
    session: Session,
    report: "EvaluationReport",
    folder: Path,
    *,
    stem: str = "report",
    plot: Path | None = None,
    again: bool = False,
    more: tuple[dict[str, Any], list[Any]] = ({}, []),
) -> None:
    """Write `stem`.json (not `again`) and `stem`.html into `folder`; tables and paths are the result."""
    from teal_jax.evaluation.page import write_page
    from teal_jax.evaluation.run_directory import write_json
    from teal_jax.evaluation.table import against_table, evaluation_table

    paths = [] if again else [write_json(folder / f"{stem}.json", report.to_dict())]
    paths.append(write_page(report, folder / f"{stem}.html"))
    about = (
        f"{report.protocol}; {report.tokens:,} tokens scored; {report.facts['dtype']}; read: weights, lm_head included"
    )
    shown: list[Any] = [
        evaluation_table(report, title=f"What sparsity costs {report.model}", width=session.stdout.width),
        about,
    ]
    against = against_table(report)
    if against is not None:
        shown += [against, "Loss: log perplexity over the dense model's, at the same target and on the same text."]
    shown += [f"note: {note}" for note in report.notes]
    values = report.to_dict() | more[0] | {"files": [str(path) for path in paths]}
    if plot is not None:
        values["plot"] = str(_plot(report, plot))
        paths.append(plot)
    session.result(values, *shown, *more[1], *(f"written: {path}" for path in paths))


def _plot(report: "EvaluationReport", path: Path) -> Path:
    from teal_jax.plots import plot_perplexity

    curves: dict[str, list[tuple[float, float]]] = {}
    for row in report.rows:
        if row["target"] > 0:
            curves.setdefault(row["method"], []).append((row["unread"], row["ppl"]))
    return plot_perplexity(curves, path, dense=report.rows[0]["ppl"], title=f"Perplexity of {report.model}")


def _command(arguments: Sequence[str]) -> str:
    """The command as it was given, of absolute paths the last part: a report travels, a machine's folders do not."""
    shown = [Path(argument).name if Path(argument).is_absolute() else argument for argument in arguments]
    return shlex.join(["teal", *shown])


def _file_digest(path: Path) -> str | None:
    """16 hex digits over a file; None where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if path.is_file() else None
