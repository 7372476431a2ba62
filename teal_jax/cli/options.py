"""Options that several commands share, and how they are read."""

import enum
from pathlib import Path
from typing import Annotated

import typer


def examples(*lines: str) -> str:
    """An epilog for `--help`."""
    return "\n\n".join(["Examples:", *lines])


def check_sparsity(value: float | None) -> float | None:
    """`value`; a usage error outside [0, 1)."""
    if value is not None and not 0 <= value < 1:
        raise typer.BadParameter(f"must lie in [0, 1), got {value:g}; 0.4 skips 40 % of the block weights")
    return value


def parse_sparsities(text: str) -> list[float]:
    """`"0,0.25,0.4"` as numbers, in order and without repeats; a usage error where it is not that."""
    try:
        values = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise typer.BadParameter(f"expected numbers separated by commas, got {text!r}") from error
    if not values:
        raise typer.BadParameter("expected at least one number")
    for value in values:
        check_sparsity(value)
    return sorted(set(values))


class DType(enum.StrEnum):
    """Dtypes of weights, activations and kv_cache."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class QuantizeMethodName(enum.StrEnum):
    """Ways to quantise."""

    rtn = "rtn"
    awq = "awq"
    gptq = "gptq"


class MethodName(enum.StrEnum):
    """Allocation methods."""

    greedy = "greedy"
    uniform = "uniform"
    top_k = "top_k"
    cats = "cats"
    wina = "wina"
    was = "was"
    wisparse = "wisparse"
    r_sparse = "r_sparse"
    larosa = "larosa"
    spon = "spon"
    cross_block = "cross_block"
    learned = "learned"


Model = Annotated[
    str, typer.Argument(metavar="MODEL", show_default=False, help="Alias, hub id, HF directory or saved artifact.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Only the result: no progress, notes or warnings.")]
Json = Annotated[bool, typer.Option("--json", help="The result as one JSON object on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Offline = Annotated[bool, typer.Option("--offline", help="Use only what is on this machine.")]
Revision = Annotated[
    str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a hub repository.")
]
Dtype = Annotated[DType | None, typer.Option("--dtype", help="Of weights and activations; as stored if not given.")]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="FORMAT",
        help="Weights of the blocks: int8, int4 (groups of 64), int4-g128, int4-g64-asym; int3, int2: simulated.",
    ),
]
QuantizeMethod = Annotated[
    QuantizeMethodName,
    typer.Option("--quantize-method", help="Round to nearest, or AWQ or GPTQ on calibration text."),
]
LmHead = Annotated[str | None, typer.Option("--lm-head", metavar="FORMAT", help="Quantise the lm_head too: int8.")]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same result.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an artifact that is there.")]
MaybeMethod = Annotated[
    MethodName | None,
    typer.Option("--method", help="How sparsity is shared out; learned where it can be trained, else greedy."),
]
Method = Annotated[MethodName, typer.Option("--method", help="How sparsity is shared out over the projections.")]
Target = Annotated[
    float,
    typer.Option(
        "--sparsity", "-s", metavar="SHARE", callback=check_sparsity, show_default=False, help="Target, in [0, 1)."
    ),
]
MaybeTarget = Annotated[
    float | None,
    typer.Option("--sparsity", "-s", metavar="SHARE", callback=check_sparsity, help="Target, in [0, 1); 0 is dense."),
]
CalibrationText = Annotated[
    list[Path] | None,
    typer.Option(
        "--data", metavar="FILE", help="Calibration text, .txt or .jsonl; may be repeated. Default: Alpaca, as in TEAL."
    ),
]
ScoredText = Annotated[
    list[Path] | None, typer.Option("--data", metavar="FILE", help="Text to score, .txt or .jsonl; may be repeated.")
]
CalibrationFile = Annotated[Path | None, typer.Option("--calibration", metavar="FILE.npz", help="From teal calibrate.")]
CalibrateOn = Annotated[
    list[Path] | None, typer.Option("--calibration-data", metavar="FILE", help="Calibrate on this; may be repeated.")
]
CalibrationTokens = Annotated[int, typer.Option("--tokens", min=2, help="Calibration tokens.")]
SeqLen = Annotated[
    int | None, typer.Option("--seq-len", min=2, help="Tokens a calibration row; 2048, or what the model takes.")
]
