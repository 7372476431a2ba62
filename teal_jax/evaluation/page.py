"""The report as one HTML page: no script, no font, no image from elsewhere; it reads from a disk without a network."""

from pathlib import Path
from typing import Any

from teal_jax.config import SITES
from teal_jax.errors import ArtifactError
from teal_jax.evaluation import figures
from teal_jax.evaluation.report import EvaluationReport
from teal_jax.evaluation.table import against_one, columns_of, method_name
from teal_jax.tables import size

_TEMPLATES = Path(__file__).parent


def render(report: EvaluationReport) -> str:
    """The page, HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    layers = sorted({fit["layer"] for fit in report.activations})
    fits = {(fit["layer"], fit["site"]): fit for fit in report.activations}
    drawn = {plan["method"] for plan in report.plans} if report.plans else set()
    heat_maps = figures.plan_figures(report)
    return environment.get_template("page.html.j2").render(
        report=report,
        columns=columns_of(report),
        against=against_one(report),
        styles=figures.method_styles(report),
        quality=figures.quality_figures(report),
        depth=figures.depth_figures(report),
        plans=heat_maps,
        uniform=sorted(drawn - {figure.caption.partition(":")[0] for figure in heat_maps}),
        activations=figures.activation_figures(report),
        fits=[(layer, [fits.get((layer, site)) for site in SITES]) for layer in layers],
        sites=SITES,
        facts=_facts(report),
        method_name=method_name,
    )


def write_page(report: EvaluationReport, path: Path) -> Path:
    """`render` to `path`, never half-written; returns the path.

    Raises:
      ArtifactError: it cannot be written.
    """
    text, aside = render(report), path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.write_text(text, "utf-8")
        aside.replace(path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror}", hint="name another place") from error
    return path


def _facts(report: EvaluationReport) -> list[tuple[str, str]]:
    """Names and values of how the report was made."""
    facts, made, text = report.facts, report.made, report.text
    calibration, settings = report.calibration, report.settings
    found: list[tuple[str, Any]] = [
        ("Command", made["command"]),
        (
            "Model",
            f"{report.model}: {facts['parameters'] / 1e6:,.1f}M parameters, {facts['layers']} layers, "
            f"{facts['dtype']}, {size(facts['bytes_per_token_dense'])} of weights a token when dense, lm_head included",
        ),
        ("Protocol", report.protocol),
        (
            "Text",
            f"{text['source']}: {text['tokens']:,} tokens scored"
            + (f", {text['bytes']:,} bytes" if text["bytes"] else "")
            + f", in {text['windows']:,} windows of {text['documents']:,} documents",
        ),
        (
            "Intervals",
            f"{100 * settings['confidence']:g} %, percentile bootstrap of {text['resampled']}, "
            f"{settings['resamples']:,} draws, the same for every method",
        ),
    ]
    if text["prompts"]:
        found.append(
            (
                "Generation",
                f"{text['prompts']} prompts of {settings['prompt_tokens']} tokens from the text, at most "
                f"{settings['new_tokens']} new tokens, greedy and at temperature {settings['temperature']:g}",
            )
        )
    if calibration:
        of = f"{calibration['data']}: {calibration['tokens']:,} tokens in rows of {calibration['seq_len']}"
        shared = calibration["overlap"]
        found.append(("Calibration", of))
        found.append(
            ("Overlap", f"{100 * shared['of_evaluation']:.2f} % of the text's 24-token sequences were calibrated on")
        )
        if calibration["search"]:
            found.append(("Greedy search", _pairs(calibration["search"])))
    found += [
        ("Seeds", _pairs(made["seeds"])),
        ("Hardware", made["hardware"]),
        ("Versions", _pairs(made["versions"])),
        ("Commit", made["commit"] or "unknown"),
        ("Date", f"{made['date']}; {made['seconds']:,.0f} s of measuring"),
    ]
    return [(name, str(value)) for name, value in found]


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
