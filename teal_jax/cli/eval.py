"""`teal eval`: perplexity by sparsity."""

import enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teal_jax.cli.models import Sparsifier, open_model
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
    Seed,
    examples,
    parse_sparsities,
)
from teal_jax.cli.session import Session
from teal_jax.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from teal_jax.tables import Quality

EPILOG = examples(
    "teal eval mistral-40 --data wikitext2_test.txt",
    "teal eval mistral-7b --data test.jsonl --calibration-data train.jsonl --sparsity 0,0.25,0.4,0.5",
    "teal eval llama-2-7b --data test.txt --protocol teal --calibration calib.npz --plot ppl.png",
)

_NEEDLE = 24
"""Tokens that two texts hardly share by chance."""


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
    model: Model,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", metavar="FILE", help="Text to score, .txt or .jsonl; may be repeated."),
    ] = None,
    sparsity: Annotated[
        str, typer.Option("--sparsity", "-s", metavar="LIST", help="Targets, separated by commas; 0 is dense.")
    ] = "0,0.25,0.4,0.5",
    method: Method = MethodName.greedy,
    context: Annotated[int | None, typer.Option("--context", min=1, help="Tokens before the scored ones.")] = None,
    window: Annotated[int | None, typer.Option("--window", min=1, help="Tokens scored at a time.")] = None,
    dense_prefix: Annotated[
        str | None, typer.Option("--dense-prefix", help="Leading tokens left dense: 0.5 is a share, 128 a count.")
    ] = None,
    protocol: Annotated[
        Protocol, typer.Option("--protocol", help="strided scores every token; teal is the reference code's.")
    ] = Protocol.strided,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", min=1, help="Score no more than this.")] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", metavar="FILE.npz", help="From teal calibrate.")
    ] = None,
    calibration_data: Annotated[
        list[Path] | None,
        typer.Option("--calibration-data", metavar="FILE", help="Calibrate on this; may be repeated."),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw perplexity over sparsity.")
    ] = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    revision: Revision = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Perplexity of a text at several sparsities, with target and realised sparsity.

    Thresholds must come from other text: a calibration on the evaluation text is refused.
    """
    targets, prefix = parse_sparsities(sparsity), _prefix(dense_prefix)
    with Session(quiet=quiet, as_json=as_json, debug=debug, offline=offline) as session:
        from teal_jax.scoring import perplexity
        from teal_jax.sparsity.statistics import Calibration
        from teal_jax.tables import Quality, quality_table

        texts = data or [_bundled(session)]
        _refuse_same_file(texts, calibration_data or [])
        lm = open_model(session, model, dtype=dtype, revision=revision)
        sparsifier = Sparsifier(session, lm, model, data=calibration_data or None, seed=seed)
        if calibration is not None:
            sparsifier.calibration = Calibration.load(calibration)
        if targets[-1] > 0:
            _refuse_known_text(lm, texts, sparsifier.calibration.tokens)
        rows, found = [], None
        for target in targets:
            found = perplexity(
                sparsifier(target, method.value),
                texts,
                context=context,
                window=window,
                dense_prefix=prefix,
                protocol=protocol.value,
                max_tokens=max_tokens,
                progress=session.progress,
            )
            name = method.value if target else "dense"
            rows.append(Quality(name, target, found.realised_sparsity, found.ppl))
        assert found is not None
        values: dict[str, Any] = {"model": lm.name, "protocol": found.protocol, "tokens": found.num_tokens}
        values["rows"] = [row._asdict() for row in rows]
        about = f"{found.protocol}; {found.num_tokens:,} tokens scored"
        shown: list[Any] = [quality_table(rows, f"Perplexity of {lm.name}"), about]
        if plot is not None:
            values["plot"] = str(_plot(rows, plot, f"Perplexity of {lm.name}"))
            shown.append(f"plot: {plot}")
        session.result(values, *shown)


def _bundled(session: Session) -> Path:
    from teal_jax.embedded import HELDOUT_TEXT

    session.note("no --data: scoring the bundled children's stories")
    return HELDOUT_TEXT


def _refuse_same_file(texts: list[Path], calibration: list[Path]) -> None:
    for text in texts:
        if any(text.exists() and other.exists() and text.samefile(other) for other in calibration):
            raise DataError(
                f"{text} is the calibration text, too: its perplexity would flatter the plan",
                hint="score text that the calibration has not seen",
            )


def _refuse_known_text(lm: Any, texts: list[Path], tokens: "np.ndarray") -> None:
    """Raise `DataError` where a tenth of the calibration rows or more occur in the evaluation text."""
    import numpy as np

    from teal_jax.data import evaluation_streams

    streams, source = evaluation_streams(lm, texts)
    haystack = b"".join(np.ascontiguousarray(stream, np.int32).tobytes() for stream in streams)
    middle = tokens.shape[1] // 2
    needles = [np.ascontiguousarray(row[middle : middle + _NEEDLE], np.int32).tobytes() for row in tokens]
    known = sum(needle in haystack for needle in needles)
    if known >= max(1, len(needles) / 10):
        raise DataError(
            f"{source} is the calibration text, too: {known} of {len(needles)} calibration rows occur in it",
            hint="score text that the calibration has not seen, or calibrate on other text",
        )


def _plot(rows: list["Quality"], path: Path, title: str) -> Path:
    from teal_jax.plots import plot_perplexity

    dense = next((row.ppl for row in rows if row.target == 0), None)
    points = [(row.realised, row.ppl) for row in rows if row.target > 0]
    return plot_perplexity({rows[-1].method: points} if points else {}, path, dense=dense, title=title)
