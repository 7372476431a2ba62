"""`teal analyse`: TEAL's own analyses, of any model."""

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teal_jax.cli.models import Sparsifier, check_texts, open_model
from teal_jax.cli.options import (
    CalibrateOn,
    CalibrationFile,
    Debug,
    Dtype,
    Json,
    Model,
    Offline,
    Quiet,
    Revision,
    ScoredText,
    Seed,
    examples,
    parse_sparsities,
)
from teal_jax.cli.session import Session

if TYPE_CHECKING:
    from teal_jax.model import LanguageModel
    from teal_jax.sparsity.statistics import Calibration

EPILOG = examples(
    "teal analyse embedded",
    "teal analyse stories3M --data test.jsonl --calibration-data train.txt --seq-len 256 -o results",
    "teal analyse mistral-7b --what distribution --published teal_published -s 0.5",
)


class What(enum.StrEnum):
    """The analyses."""

    up = "up"
    distribution = "distribution"
    prefill = "prefill"
    batch = "batch"


class Allocation(enum.StrEnum):
    """The methods whose plans are one threshold a projection, which is what is analysed."""

    greedy = "greedy"
    uniform = "uniform"


def _batches(text: str) -> list[int]:
    """`"1,2,4"` as batch sizes; a usage error where it is not that, or where one does not divide the largest."""
    try:
        values = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError as error:
        raise typer.BadParameter(f"expected whole numbers separated by commas, got {text!r}") from error
    if not values or values[0] < 1 or any(values[-1] % value for value in values):
        raise typer.BadParameter(f"batch sizes must be >= 1 and divide the largest, got {text!r}")
    return values


def command(
    model: Model,
    what: Annotated[
        list[What] | None, typer.Option("--what", help="One analysis; may be repeated. All of them if not given.")
    ] = None,
    data: ScoredText = None,
    calibration: CalibrationFile = None,
    calibration_data: CalibrateOn = None,
    sparsity: Annotated[
        str, typer.Option("--sparsity", "-s", metavar="LIST", help="Targets above 0, separated by commas.")
    ] = "0.25,0.4,0.5",
    method: Annotated[
        Allocation, typer.Option("--method", help="Of the plans under prefill and batch.")
    ] = Allocation.greedy,
    published: Annotated[
        Path | None,
        typer.Option("--published", metavar="PATH", help="TEAL's published greedy tables, to stand beside ours."),
    ] = None,
    batches: Annotated[
        str, typer.Option("--batches", metavar="LIST", help="Sequences decoded together; each divides the largest.")
    ] = "1,2,4,8,16",
    tokens: Annotated[int, typer.Option("--tokens", min=2, help="Tokens to run over, prompts included.")] = 8192,
    seq_len: Annotated[
        int | None, typer.Option("--seq-len", min=2, help="Tokens a row; 512, or what the model takes.")
    ] = None,
    prompt: Annotated[
        int | None, typer.Option("--prompt", min=1, help="Leading tokens of a row that are not scored; a half.")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option("--calibration-tokens", min=2, help="To calibrate on.")] = 20480,
    search_rows: Annotated[
        int | None, typer.Option("--search-rows", min=1, help="Calibration rows that the greedy search sees; all.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="DIR", help="Also write JSON and plots here.")
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    revision: Revision = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """The analyses of TEAL's paper, section 5.4: what is thinned, where, and what it costs.

    up: by its input or by its output. distribution: of greedy over depth and projections. prefill: the prompt thinned,
    too. batch: sequences decoded together.
    """
    targets, sizes = parse_sparsities(sparsity), _batches(batches)
    if targets[0] == 0:
        raise typer.BadParameter("dense is always measured: give targets above 0")
    names = [name.value for name in what or What]
    if published is not None and "distribution" not in names:
        raise typer.BadParameter("--published stands beside the distribution: add --what distribution")
    with Session(quiet=quiet, as_json=as_json, debug=debug, offline=offline) as session:
        from teal_jax.analysis.plots import draw
        from teal_jax.analysis.rows import evaluation_rows
        from teal_jax.analysis.run import analyse
        from teal_jax.analysis.tables import tables
        from teal_jax.evaluation.overlap import refuse_same_file
        from teal_jax.sparsity.greedy import GreedySettings

        refuse_same_file(data or [], calibration_data or [])
        check_texts([*(data or ()), *(calibration_data or ())])
        lm = open_model(session, model, dtype=dtype, revision=revision).dense()
        seq_len = min(512, lm.config.max_position) if seq_len is None else seq_len
        sizing = {"num_tokens": calibration_tokens, "seq_len": seq_len, "seed": seed}
        statistics = _statistics(session, lm, model, calibration, calibration_data, sizing)
        rows = evaluation_rows(
            lm,
            data or [_bundled(session)],
            num_tokens=tokens,
            seq_len=seq_len,
            prompt=prompt,
            multiple=sizes[-1] if "batch" in names else 1,
            seed=seed,
            unseen_by=statistics.tokens,
        )
        found = analyse(
            lm,
            statistics,
            rows,
            what=names,
            sparsities=targets,
            method=method.value,
            settings=None if search_rows is None else GreedySettings(max_rows=search_rows),
            published=published,
            batches=sizes,
            seed=seed,
            progress=session.progress,
        )
        shown: list[Any] = tables(found)
        if output is not None:
            shown += [f"written: {path}" for path in (found.write(output), *draw(found, output))]
        session.result(found.to_dict(), *shown)


def _statistics(
    session: Session,
    lm: "LanguageModel",
    model: str,
    saved: Path | None,
    data: list[Path] | None,
    sizing: dict[str, int],
) -> "Calibration":
    from teal_jax.sparsity.statistics import Calibration

    if saved is not None:
        return Calibration.load(saved)
    return Sparsifier(session, lm, model, data=data or None, **sizing).calibration


def _bundled(session: Session) -> Path:
    from teal_jax.embedded import HELDOUT_TEXT

    session.note("no --data: scoring the bundled children's stories")
    return HELDOUT_TEXT
