"""`teal inspect`: what a model, plan or calibration is."""

from pathlib import Path
from typing import Annotated, Any

import typer

from teal_jax.cli.options import Debug, Json, Offline, Quiet, check_sparsity, examples
from teal_jax.cli.session import Session

EPILOG = examples(
    "teal inspect mistral-40",
    "teal inspect plan.json --plot plan.png",
    "teal inspect calib.npz --sparsity 0.5 --json",
)


def command(
    target: Annotated[
        str,
        typer.Argument(
            metavar="WHAT", show_default=False, help="Artifact, HF directory or alias, plan.json, calib.npz."
        ),
    ],
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the plan as a heat map.")
    ] = None,
    sparsity: Annotated[
        float,
        typer.Option("--sparsity", "-s", callback=check_sparsity, help="Of the thresholds shown for a calibration."),
    ] = 0.5,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a plan layer by layer, with its target and provenance; a model's sizes and the bytes a token reads."""
    with Session(quiet=quiet, as_json=as_json, debug=debug, offline=offline) as session:
        path = Path(target).expanduser()
        if path.suffix == ".npz":
            _show_calibration(session, path, plot, sparsity)
        elif path.suffix == ".json":
            from teal_jax.sparsity.plan import SparsityPlan

            plan = SparsityPlan.load(path)
            _show(session, {}, plan, plot)
        else:
            _show_model(session, target, plot)


def _show_model(session: Session, name: str, plot: Path | None) -> None:
    import json

    import converters
    from teal_jax import artifact, hub
    from teal_jax.config import ModelConfig
    from teal_jax.sparsity.plan import SparsityPlan
    from teal_jax.tables import decode_bytes, model_facts

    directory = hub.resolve(name, offline=session.offline)
    plan, formats = None, {}
    if artifact.is_artifact(directory):
        manifest = artifact.read_manifest(directory)
        config, dtype = ModelConfig.from_dict(manifest["model_config"]), manifest["dtype"]
        plan = SparsityPlan.load(directory / artifact.PLAN) if manifest["sparse"] else None
        formats = manifest.get("quantization", {})
        origin = {"name": manifest["name"], "created_with": manifest.get("created_with")}
    else:
        config = converters.read_config(directory)
        fields = json.loads((directory / "config.json").read_text())
        dtype = fields.get("dtype") or fields.get("torch_dtype") or "float32"
        origin = {"name": name, "created_with": None}
    itemsize = 4 if dtype == "float32" else 2
    facts = {"path": str(directory), **origin, **model_facts(config, itemsize, dtype, formats)}
    if plan is not None:
        facts["bytes_per_token_sparse"] = decode_bytes(config, itemsize, plan.model_sparsity, formats)
    _show(session, facts, plan, plot)


def _show(session: Session, facts: dict[str, Any], plan, plot: Path | None) -> None:
    from teal_jax.plots import plot_plan
    from teal_jax.tables import facts_table, plan_line, plan_table

    values: dict[str, Any] = {"model": facts} if facts else {}
    shown: list[Any] = [facts_table(_flat(facts))] if facts else []
    if plan is not None:
        values["plan"] = plan.to_dict()
        shown += [plan_table(plan), f"{plan_line(plan)}"]
        shown += [facts_table(_flat({"model": plan.model, "fingerprint": plan.fingerprint, **plan.notes}))]
    elif plot is not None:
        raise typer.BadParameter("only a plan can be plotted, and this model is dense")
    if plot is not None:
        values["plot"] = str(plot_plan(plan, plot))
        shown.append(f"plot: {plot}")
    session.result(values, *shown)


def _show_calibration(session: Session, path: Path, plot: Path | None, sparsity: float) -> None:
    from teal_jax.sparsity.statistics import Calibration
    from teal_jax.tables import calibration_table, facts_table

    if plot is not None:
        raise typer.BadParameter("only a plan can be plotted: teal allocate makes one")
    calibration = Calibration.load(path)
    end = float(calibration.path.effective[-1]) if calibration.path else None
    facts = {"path": str(path), "tokens": int(calibration.tokens.size), **calibration.notes}
    facts |= {"fingerprint": calibration.config.fingerprint, "greedy_path_ends_at": end}
    thresholds = calibration.thresholds(sparsity)
    session.result(
        {**facts, "sparsity": sparsity, "thresholds": thresholds},
        facts_table(facts),
        calibration_table(calibration, sparsity),
    )


def _flat(facts: dict[str, Any]) -> dict[str, Any]:
    """Nested facts on one line each."""
    return {
        name: ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        for name, value in facts.items()
    }
