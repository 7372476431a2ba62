"""`teal allocate`: calibration and target in, plan out."""

from pathlib import Path
from typing import Annotated

import typer

from teal_jax.cli.models import check_file, open_model
from teal_jax.cli.options import (
    Debug,
    Dtype,
    Json,
    Method,
    MethodName,
    Model,
    Offline,
    Quiet,
    Revision,
    Target,
    examples,
)
from teal_jax.cli.session import Session

EPILOG = examples(
    "teal allocate mistral-7b calib.npz --sparsity 0.4 -o plan.json",
    "teal allocate mistral-7b calib.npz -s 0.5 --method uniform -o uniform.json",
    "teal allocate llama-2-7b --from-teal models/Llama-2-7B -s 0.5 -o published.json",
)


def command(
    model: Model,
    sparsity: Target,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.json", show_default=False, help="Where to.")],
    calibration: Annotated[
        Path | None, typer.Argument(metavar="[CALIB.npz]", show_default=False, help="From teal calibrate.")
    ] = None,
    method: Method = MethodName.greedy,
    from_teal: Annotated[
        Path | None,
        typer.Option("--from-teal", metavar="DIR", help="TEAL's published files in place of a calibration."),
    ] = None,
    dtype: Dtype = None,
    revision: Revision = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Share a target sparsity out over the projections and set their thresholds.

    The greedy path is kept in the calibration file, so that the next target is a look-up.
    """
    if (calibration is None) == (from_teal is None):
        raise typer.BadParameter("give either a calibration file or --from-teal DIR")
    if from_teal is not None and method not in (MethodName.greedy, MethodName.uniform):
        raise typer.BadParameter(f"--from-teal has greedy and uniform plans only, got --method {method.value}")
    with Session(quiet=quiet, as_json=as_json, debug=debug, offline=offline) as session:
        from teal_jax.tables import plan_line

        check_file(output)
        if from_teal is not None:
            plan = _published(session, model, from_teal, sparsity, method, revision)
        else:
            from teal_jax.sparsity.allocation import allocate
            from teal_jax.sparsity.statistics import Calibration

            assert calibration is not None
            statistics = Calibration.load(calibration)
            walked = statistics.path
            lm = open_model(session, model, dtype=dtype, revision=revision)
            plan = allocate(lm, statistics, sparsity, method=method.value, progress=session.progress)
            if statistics.path is not walked:
                statistics.save(calibration)
                session.note(f"{calibration} now holds the greedy path: another target is a look-up")
        path = plan.save(output)
        session.result({"path": str(path), **plan.to_dict()}, f"{path}  ({plan_line(plan)})")


def _published(session: Session, model: str, folder: Path, sparsity: float, method: MethodName, revision: str | None):
    import converters
    from teal_jax import hub
    from teal_jax.sparsity.published import import_plan

    config = converters.read_config(hub.resolve(model, revision=revision, offline=session.offline))
    lookup = folder if method is MethodName.greedy else None
    return import_plan(config, sparsity, histograms=folder, lookup=lookup, model=model)
