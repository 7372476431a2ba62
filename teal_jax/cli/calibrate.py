"""`teal calibrate`: activation statistics of a model."""

from pathlib import Path
from typing import Annotated

import typer

from teal_jax.cli.models import check_file, check_texts, open_model
from teal_jax.cli.options import (
    CalibrationText,
    CalibrationTokens,
    Debug,
    Dtype,
    Json,
    Model,
    Offline,
    Quiet,
    Revision,
    Seed,
    SeqLen,
    examples,
)
from teal_jax.cli.session import Session

EPILOG = examples(
    "teal calibrate mistral-7b -o calib.npz",
    "teal calibrate mistral-7b -o calib.npz --data mine.jsonl --data more.txt --tokens 40960",
    "then: teal allocate mistral-7b calib.npz --sparsity 0.4 -o plan.json",
)


def command(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE.npz", show_default=False, help="Where to.")],
    data: CalibrationText = None,
    tokens: CalibrationTokens = 20480,
    seq_len: SeqLen = None,
    seed: Seed = 0,
    dtype: Dtype = None,
    revision: Revision = None,
    offline: Offline = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Push text through the dense model and count its activations; every later plan starts from the file written."""
    with Session(quiet=quiet, as_json=as_json, debug=debug, offline=offline) as session:
        from teal_jax.sparsity.calibration import calibrate

        check_file(output)
        check_texts(data)
        lm = open_model(session, model, dtype=dtype, revision=revision)
        calibration = calibrate(
            lm, data or None, num_tokens=tokens, seq_len=seq_len, seed=seed, progress=session.progress
        )
        path = calibration.save(output)
        rows, length = calibration.tokens.shape
        session.result(
            {"path": str(path), "tokens": rows * length, **calibration.notes},
            f"{path}  ({rows * length:,} tokens of {calibration.notes['data']})",
        )
