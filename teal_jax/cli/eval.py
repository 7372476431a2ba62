"""`teal eval`: what sparsity costs, by method and target."""

import enum
from pathlib import Path
from typing import Annotated

import typer

from teal_jax.cli.options import (
    CalibrateOn,
    CalibrationFile,
    Debug,
    Dtype,
    Json,
    LmHead,
    Offline,
    Quantize,
    QuantizeMethod,
    QuantizeMethodName,
    Quiet,
    Revision,
    ScoredText,
    Seed,
    examples,
    parse_sparsities,
)
from teal_jax.cli.session import Session

EPILOG = examples(
    "teal eval embedded",
    "teal eval mistral-7b --data test.jsonl --calibration-data train.jsonl --sparsity 0.25,0.4,0.5 --out mistral-eval",
    "teal eval llama-2-7b --data test.txt --protocol teal --calibration calib.npz --method greedy --plot ppl.png",
    "teal eval mistral-7b --sparsity 0.4 --tasks hellaswag,gsm8k --task-limit 200",
    "teal eval mistral-7b --quantize int4 --quantize-method gptq",
    "teal eval --render mistral-eval/report.json",
)


class Protocol(enum.StrEnum):
    """How windows are laid and scored."""

    strided = "strided"
    teal = "teal"


def _prefix(text: str | None) -> float | int | None:
    """`"0.5"` as a share, `"128"` as a count."""
    if text is None:
        return None
    try:
        value = float(text) if "." in text else int(text)
    except ValueError as error:
        raise typer.BadParameter(f"expected a share such as 0.5 or a token count, got {text!r}") from error
    if value < 0 or (isinstance(value, float) and value > 1):
        raise typer.BadParameter("a share must lie in [0, 1], a token count must be >= 0")
    return value


def command(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", show_default=False, help="Alias, hub id, HF directory or saved artifact."),
    ] = None,
    data: ScoredText = None,
    sparsity: Annotated[
        str, typer.Option("--sparsity", "-s", metavar="LIST", help="Targets, separated by commas; 0 is dense.")
    ] = "0,0.25,0.4,0.5,0.65",
    method: Annotated[
        str, typer.Option("--method", metavar="LIST", help="Methods, separated by commas; all: every one there is.")
    ] = "greedy,uniform",
    context: Annotated[int | None, typer.Option("--context", min=1, help="Tokens before the scored ones.")] = None,
    window: Annotated[int | None, typer.Option("--window", min=1, help="Tokens scored at a time.")] = None,
    dense_prefix: Annotated[
        str | None, typer.Option("--dense-prefix", help="Leading tokens left dense: 0.5 is a share, 128 a count.")
    ] = None,
    sparse_prefill: Annotated[
        bool,
        typer.Option(
            "--sparse-prefill/--dense-prefill",
            help="Thin what stands before a window's scored tokens, too; generation leaves its prompt dense.",
        ),
    ] = True,
    protocol: Annotated[
        Protocol, typer.Option("--protocol", help="strided scores every token; teal is the reference code's.")
    ] = Protocol.strided,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, help="Score no more than this. [default: all; of the bundled text 8192]"),
    ] = None,
    prompts: Annotated[
        int, typer.Option("--prompts", min=0, help="Prompts to continue, for agreement and repetition; 0: none.")
    ] = 24,
    confidence: Annotated[float, typer.Option("--confidence", help="Of the bootstrap intervals.")] = 0.95,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="How far from its target a method may end before the report says so.")
    ] = 0.02,
    calibration: CalibrationFile = None,
    calibration_data: CalibrateOn = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks", metavar="LIST", help="Also tasks of lm-evaluation-harness (names, .yaml files; default: ours)."
        ),
    ] = None,
    task_limit: Annotated[int | None, typer.Option("--task-limit", min=1, help="Documents a task; to try out.")] = None,
    full_search: Annotated[
        bool,
        typer.Option("--full-search", help="On a CPU too, the greedy search that allocate does; it takes minutes."),
    ] = False,
    measured: Annotated[
        bool, typer.Option("--measured", help="Measure no method: report on what the directory holds.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Report and measured cells; the same command goes on there. [default: teal-eval/MODEL-DIGEST]",
            show_default=False,
        ),
    ] = None,
    render: Annotated[
        Path | None,
        typer.Option("--render", metavar="REPORT.json", help="Draw this report again; nothing is measured."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Also perplexity over sparsity, as a picture.")
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    quantize: Quantize = None,
    quantize_method: QuantizeMethod = QuantizeMethodName.rtn,
    lm_head: LmHead = None,
    revision: Revision = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """What sparsity costs on a text, by method and target: a table, report.json, and report.html with plots.

    Perplexity, bits per byte, divergence from the dense model, agreement with it, repetition, realised sparsity, bytes
    read per token; confidence intervals; error by depth; plans and activations. What has been measured is kept in the
    directory as it is done, and not measured again. With --quantize all of it is of the quantised model: its dense
    row is quantised, and thresholds are calibrated on it. Thresholds must come from other text than the one scored: an
    overlap is refused.
    """
    targets, prefix = parse_sparsities(sparsity), _prefix(dense_prefix)
    if (model is None) == (render is None):
        raise typer.BadParameter("give a MODEL to evaluate, or --render REPORT.json")
    with Session(quiet=quiet, as_json=as_json, debug=debug, offline=offline) as session:
        from teal_jax.cli.eval_tasks import parse_tasks, score_tasks, show_tasks
        from teal_jax.cli.evaluation import Evaluation, show
        from teal_jax.evaluation.report import EvaluationReport
        from teal_jax.evaluation.settings import EvaluationSettings

        if render is not None:
            show(session, EvaluationReport.load(render), out or render.parent, stem=render.stem, plot=plot, again=True)
            return
        assert model is not None
        evaluation = Evaluation(
            session,
            model,
            methods=method,
            targets=targets,
            texts=data or [],
            layout={
                "context": context,
                "window": window,
                "dense_prefix": prefix,
                "sparse_prefill": sparse_prefill,
                "protocol": protocol.value,
                "max_tokens": max_tokens,
            },
            settings=EvaluationSettings(prompts=prompts, confidence=confidence, tolerance=tolerance, seed=seed),
            calibration=calibration,
            calibration_data=calibration_data or [],
            full_search=full_search,
            measured=measured,
            loading={"dtype": dtype, "revision": revision},
            quantising={"quantize": quantize, "quantize_method": quantize_method.value, "lm_head": lm_head},
        )
        names = None if tasks is None else parse_tasks(tasks)
        directory = evaluation.open(out)
        report, more = evaluation.run(directory), ({}, [])
        if names is not None:
            models = evaluation.models(directory)
            more = show_tasks(score_tasks(models, names, directory.path, limit=task_limit, progress=session.progress))
        show(session, report, directory.path, plot=plot, more=more)
